"""Schedules of the density and the learning rate, and the scaling of the gradient (Gao et al. 2025)."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wsparse.config import OptimizerConfig, SparsityConfig

# A support that loses many weights at once is chosen worse (docs/training.md). While the density is above the
# first number every step explores, since steps over the nonzeros would not be cheaper; below it the density
# falls by at most the second, as a part of itself, from one exploration step to the next.
ALWAYS_ABOVE, LARGEST_DROP = 1 / 16, 0.05


def density_schedule(config: SparsityConfig, steps: int, target: float | None = None) -> optax.Schedule:
    """Returns a schedule of the density: 1 until `anneal_start`, the target from `anneal_end` on.

    Its value at step i is the density after that step, of a run of `steps`; the step that ends the anneal
    already has exactly the target, which is `config.density` or that of an override.
    """
    start, stop = config.anneal_start * steps, max(config.anneal_end * steps, 1)
    final = config.density if target is None else target

    def schedule(step):
        progress = jnp.clip((step + 1 - start) / (stop - start), 0.0, 1.0)
        if config.anneal == "linear":
            density = 1.0 + (final - 1.0) * progress
        else:
            density = jnp.exp(jnp.log(final) * progress)
        # Not by the progress: XLA may multiply by a reciprocal, and n * (1 / n) be less than 1.
        return jnp.where(step + 1 >= stop, jnp.float32(final), density.astype(jnp.float32))

    return schedule


@functools.cache
def exploration_steps(config: SparsityConfig, steps: int) -> np.ndarray:
    """Returns bool `(steps,)`: which steps of a run explore.

    They are the steps above a density of `ALWAYS_ABOVE`; each that comes `config.explore_every` after the
    last; and before that, each in which a density would have fallen by more than `LARGEST_DROP` of itself,
    or reaches its target.
    """
    if config.explore_every == 1 or not config.sparse:
        return np.ones(steps, bool)
    densities, targets = _densities(config, steps)
    explores, last, before = densities[:, 0] > max(ALWAYS_ABOVE, config.density), -config.explore_every, 1.0
    for step, now in enumerate(densities):
        fallen = (now < (1 - LARGEST_DROP) * before) | ((now == targets) & (before != targets))
        explores[step] |= step - last >= config.explore_every or fallen.any()
        if explores[step]:
            last, before = step, now
    return explores


def frozen_steps(config: SparsityConfig, steps: int) -> np.ndarray:
    """Returns which steps explore nothing and have the final density, bools `(steps,)`.

    Where the CPU kernels are on, only the nonzeros are touched in these steps.
    """
    explores = exploration_steps(config, steps)
    densities, targets = _densities(config, steps)
    settled = explores & np.all(densities == targets, axis=1)
    return ~explores & (np.cumsum(settled) > 0)


def _densities(config: SparsityConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the densities of every step, `(steps, n)`, and where they end, `(n,)`."""
    targets = np.array([config.density, *(target for _, target in config.targets)], np.float32)
    # A caller may be tracing.
    with jax.ensure_compile_time_eval():
        schedules = [density_schedule(config, steps, float(target)) for target in targets]
        return np.stack([schedule(jnp.arange(steps)) for schedule in schedules], axis=1), targets


def learning_rate_schedule(config: OptimizerConfig, steps: int, *, density: optax.Schedule) -> optax.Schedule:
    """Returns linear warmup, then linear decay to 0 at `steps`, times `1/sqrt(density)`: the "sharkfin".

    Without `config.sharkfin` the last factor is 1.
    """
    warmup = max(round(config.warmup * steps), 1)

    def schedule(step):
        rise = jnp.minimum((step + 1) / warmup, 1.0)
        fall = jnp.clip((steps - step) / max(steps - warmup, 1), 0.0, 1.0)
        factor = jax.lax.rsqrt(density(step)) if config.sharkfin else 1.0
        return config.learning_rate * rise * fall * factor

    return schedule


def gradient_rms(gradients: optax.Updates) -> jax.Array:
    """Returns the root-mean-square over all entries of all leaves, a float32 scalar."""
    leaves = jax.tree.leaves(gradients)
    total = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves)
    # As an integer, more than 2^31 parameters would overflow.
    return jnp.sqrt(total / float(sum(leaf.size for leaf in leaves)))


class ScaleByGradientRmsState(NamedTuple):
    """Root-mean-square that the last exploration step was scaled by, a float32 scalar."""

    rms: jax.Array


def scale_by_gradient_rms(
    form: Literal["normalize", "clip"], *, phases: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Scale the whole gradient so that its root-mean-square over all parameters is 1.

    Unlike `optax.clip_by_global_norm` and `normalize_by_update_norm`, the scale does not depend on the number
    of parameters, and the sum of squares is float32 whatever the gradient's dtype. "normalize" always scales
    (an all-zero gradient stays zero); "clip" only scales down. Squares have float32's range: a gradient with
    a root-mean-square below 1e-19 becomes larger but not 1, and one with a norm above 1e19 becomes zero.

    Args:
      form: "normalize" or "clip".
      phases: Whether `support_phases` is around it: between exploration steps the gradient is only known in
        part, and the scale is that of the last exploration step.
    """

    def init(params):
        del params
        return ScaleByGradientRmsState(jnp.ones((), jnp.float32)) if phases else optax.EmptyState()

    def update(updates, state: Any, params=None, *, explore=True, **extra: Any):
        del params, extra
        rms = gradient_rms(updates)
        if phases:
            rms = jnp.where(explore, rms, state.rms)
            state = ScaleByGradientRmsState(rms)
        # Squares of less than that underflow.
        least = 1.0 if form == "clip" else np.sqrt(np.finfo(np.float32).tiny)
        scale = 1.0 / jnp.maximum(rms, least)
        return jax.tree.map(lambda u: u * scale.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)
