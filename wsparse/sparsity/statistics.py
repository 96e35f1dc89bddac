"""Statistics of sparse training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


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
