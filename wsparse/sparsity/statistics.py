"""Numbers that tell how sparse training goes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def alive_neurons(params: Any, fired_LF: jax.Array | None = None) -> jax.Array:
    """MLP neurons per layer that can do something, int32 `(n_layer,)`.

    A neuron is dead when it has no nonzero in-weight, no nonzero out-weight, or (when `fired_LF` says
    so) never fired on the data that was looked at.

    Args:
      params: a model's parameters.
      fired_LF: bool `(n_layer, d_mlp)`: the neuron was nonzero at some token.
    """
    mlp = params["blocks"]["mlp"]
    alive = jnp.any(mlp["fc"]["kernel"] != 0, axis=1) & jnp.any(mlp["proj"]["kernel"] != 0, axis=2)
    if fired_LF is not None:
        alive &= fired_LF
    return jnp.sum(alive, axis=1, dtype=jnp.int32)


def kurtosis(x: jax.Array) -> jax.Array:
    """Fourth standardised moment over the last axis, averaged over the others; 3 for a Gaussian.

    Large values say that few channels carry the residual stream. float32 scalar.
    """
    x = x.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1)
    fourth = jnp.mean(jnp.square(jnp.square(centered)), axis=-1)
    # A constant row (a token whose stream is still all zeros) has no kurtosis; it counts as 0.
    return jnp.mean(jnp.where(variance > 0, fourth / jnp.maximum(jnp.square(variance), 1e-30), 0.0))
