"""Bootstrap intervals of means."""

from __future__ import annotations

import numpy as np


def interval(values_P: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of the mean of independent values."""
    values_P = np.asarray(values_P, np.float64)
    chosen = rng.integers(0, values_P.size, (resamples, values_P.size))
    low, high = np.quantile(values_P[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)
