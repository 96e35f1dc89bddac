"""Statistics of sparse training, and what its settings leave to be trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from wsparse import trees
from wsparse.config import SparsityConfig
from wsparse.sparsity.project import final_budgets

# The parameters that tell tokens apart, and the axis of the tokens.
_TOKEN_AXES = {"embed/tokens": 0, "head/unembed": 1}


def alive_neurons(params: Any, fired_LF: jax.Array | None = None) -> jax.Array:
    """Returns the number of MLP neurons per layer that can have an effect, int32 `(n_layer,)`.

    A neuron is dead when all its in-weights or all its out-weights are zero, or when bool `(n_layer, d_mlp)`
    `fired_LF` says that it was nonzero at no token.
    """
    mlp = params["blocks"]["mlp"]
    alive = jnp.any(mlp["fc"]["kernel"] != 0, axis=1) & jnp.any(mlp["proj"]["kernel"] != 0, axis=2)
    if fired_LF is not None:
        alive &= fired_LF
    return jnp.sum(alive, axis=1, dtype=jnp.int32)


def turnover(params: Any, updates: Any, nonzeros: dict[str, jax.Array]) -> jax.Array:
    """Returns the share of the projected weights after an update that were zero before it, a float32 scalar.

    Args:
      params: Parameters before the update.
      updates: What is added to them, after the projection.
      nonzeros: `ProjectTopKState.nonzeros` after the update.
    """
    before, change = trees.flatten(params), trees.flatten(updates)
    entered = [jnp.sum((before[path] == 0) & (change[path] != 0), dtype=jnp.int32) for path in nonzeros]
    total = lambda counts: sum(jnp.sum(count.astype(jnp.float32)) for count in counts)
    return total(entered) / jnp.maximum(total(nonzeros.values()), 1.0)


def budget_warnings(config: SparsityConfig, params: Any) -> list[str]:
    """Returns a line for each way in which the final densities leave nothing to choose, or too little to use.

    Args:
      config: Densities and floor.
      params: Parameters of a model, or their shapes.
    """
    full, poor = [], []
    for path, (shape, density, k, floor) in final_budgets(config, params).items():
        if density < 1 and floor and floor >= k:
            full.append(path)
        if path in _TOKEN_AXES and k < 2 * shape[_TOKEN_AXES[path]]:
            poor.append(f"{path}=1/{max(shape[1 - _TOKEN_AXES[path]] // 2, 1)}")
    lines = []
    if full:
        lines.append(
            f"sparsity.min_per_neuron={config.min_per_neuron} takes the whole budget of {', '.join(full)}: "
            "all neurons have equally many weights there; a lower one leaves a choice"
        )
    if poor:
        overrides = ",".join([*poor, *filter(None, [config.overrides])])
        lines.append(
            "fewer than 2 weights a token remain, too few to tell tokens apart: "
            f"--config.sparsity.overrides='{overrides}' leaves 2"
        )
    return lines


def kurtosis(x: jax.Array) -> jax.Array:
    """Returns the fourth standardized moment over the last axis, averaged over the others: a float32 scalar.

    It is 3 for a Gaussian; large values mean that few channels carry the residual stream.
    """
    x = x.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1)
    fourth = jnp.mean(jnp.square(jnp.square(centered)), axis=-1)
    # A constant row (a token whose stream is still all zeros) has no kurtosis; it counts as 0.
    return jnp.mean(jnp.where(variance > 0, fourth / jnp.maximum(jnp.square(variance), 1e-30), 0.0))
