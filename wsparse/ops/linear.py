"""Products of activations with weight matrices, and the GELU: plain JAX, and the choice of a kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from wsparse.ops import cpu


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """`x @ kernel` with the leading axes of `x` as one: its gradient then needs no transposed copy."""
    rows = jnp.reshape(x, (-1, x.shape[-1]))
    plain = functools.partial(jnp.matmul, preferred_element_type=dtype)
    if cpu.takes(rows) and kernel.dtype == jnp.float32:
        y = lax.platform_dependent(rows, kernel, cpu=cpu.product, default=plain)
    else:
        y = plain(rows, kernel)
    return jnp.reshape(y, (*x.shape[:-1], kernel.shape[-1]))


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU."""
    plain = functools.partial(jax.nn.gelu, approximate=False)
    if cpu.takes(x):
        return lax.platform_dependent(x, cpu=cpu.gelu, default=plain)
    return plain(x)
