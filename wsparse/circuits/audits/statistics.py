"""Bootstrap intervals of means over pairs."""

from __future__ import annotations

import numpy as np

from wsparse.circuits.audits.record import Measurement


def interval(values_P: np.ndarray, rng: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of the mean of independent values."""
    values_P = np.asarray(values_P, np.float64)
    chosen = rng.integers(0, values_P.size, (resamples, values_P.size))
    low, high = np.quantile(values_P[chosen].mean(1), [0.025, 0.975])
    return float(low), float(high)


def of_rows(
    name: str,
    values_B: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
    *,
    control: float | None = None,
    unit: str = "nats",
) -> Measurement:
    """Returns the mean over rows with its interval; the two rows of a pair are resampled together."""
    by_pair_P = np.asarray(values_B, np.float64).reshape(-1, 2).mean(1)
    low, high = interval(by_pair_P, rng, resamples)
    return Measurement(
        name=name, value=float(by_pair_P.mean()), low=low, high=high, control=control, unit=unit
    )
