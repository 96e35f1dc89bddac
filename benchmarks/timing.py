"""What the benchmarks share: timing calls in turns, training steps, and the machine's rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import statistics
import time

import jax
import jax.numpy as jnp

from wsparse import model
from wsparse.config import TrainConfig
from wsparse.step import Program


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


def forward_and_backward(
    function: Callable[..., jax.Array],
    *operands: jax.Array,
    fixed: tuple[jax.Array, ...] = (),
    layers: int = 1,
) -> Callable[[], object]:
    """A call that runs a function for so many layers, with gradients of all but the fixed operands."""

    @jax.jit
    def run(operands, fixed, tangent):
        out = []
        for layer in range(layers):
            # A product with the layer's index keeps the compiler from doing one layer for all.
            scaled = (operands[0] * (1.0 + layer), *operands[1:])
            y, pull = jax.vjp(lambda *varied: function(*varied, *fixed), *scaled)
            out.append((y, pull(tangent)))
        return out

    tangent = jnp.ones_like(jax.eval_shape(function, *operands, *fixed))
    return lambda: run(operands, fixed, tangent)


def every(calls: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes all of some calls."""
    calls = list(calls)
    return lambda: [call() for call in calls]


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOPs per second of a float32 `size x size` product, the best of `repeats`."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    seconds(lambda: product(x))
    return max(2 * size**3 / seconds(lambda: product(x)) for _ in range(repeats))


def bandwidth(size: int = 2**21, repeats: int = 20) -> float:
    """Bytes per second, read and written together, of negating a float32 array; the best of `repeats`."""
    x, negated = jnp.ones(size), jax.jit(jnp.negative)
    seconds(lambda: negated(x))
    return max(2 * 4 * size / seconds(lambda: negated(x)) for _ in range(repeats))


def stepper(program: Program, config: TrainConfig) -> tuple[Callable[[], object], model.Params]:
    """A call that runs one step of a run on a fixed batch, warmed up, and parameters of after the warm-up."""
    state = program.init()
    shape = (config.accumulate, config.batch_size // config.accumulate, config.model.context + 1)
    batch = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)

    def step():
        nonlocal state
        state, report = program.step(state, batch)
        return report

    for _ in range(3):
        jax.block_until_ready(step())
    return step, jax.tree.map(jnp.copy, state.params)
