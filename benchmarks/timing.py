"""What the benchmarks share: timing calls in turns, and the machine's matmul rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import statistics
import time

import jax
import jax.numpy as jnp


def seconds(call: Callable[[], object]) -> float:
    """Seconds that one call takes, its arrays included."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def medians_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each call, warmed up once.

    The calls take turns, so that a machine whose speed drifts slows all of them.
    """
    for call in calls.values():
        seconds(call)
    times = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in times) for name in calls}


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOPs per second of a float32 `size x size` product, the best of `repeats`."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    seconds(lambda: product(x))
    return max(2 * size**3 / seconds(lambda: product(x)) for _ in range(repeats))
