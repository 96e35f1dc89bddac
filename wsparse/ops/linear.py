"""Products of activations with weight matrices, and the GELU: plain JAX, and the choice of a kernel.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from wsparse.ops import cpu
from wsparse.ops.derivatives import Function, differentiable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SupportedMatrix:
    """A matrix whose gradient is wanted at listed places only, where it may be nonzero; CPU kernels only.

    Attributes:
      dense: float32 `(I, O)`; it has no gradient itself.
      values: float32 `(N,)`, its entries at the places, which have.
      places: int32 `(N,)`, flat indices in increasing order; what is I * O or more is no place.
    """

    dense: jax.Array
    values: jax.Array
    places: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.dense.shape

    def astype(self, dtype: Any) -> SupportedMatrix:
        """Returns the matrix itself: there is only float32."""
        if dtype != jnp.float32:
            raise TypeError(f"a SupportedMatrix is float32, got {dtype}")
        return self


def matmul(x: jax.Array, kernel: jax.Array | SupportedMatrix, dtype: Any = None) -> jax.Array:
    """`x @ kernel` with the leading axes of `x` as one: its gradient then needs no transposed copy."""
    rows = jnp.reshape(x, (-1, x.shape[-1]))
    if isinstance(kernel, SupportedMatrix):
        y = _supported_product(rows, kernel.dense, kernel.values, kernel.places)
        return jnp.reshape(y, (*x.shape[:-1], kernel.shape[-1]))
    plain = functools.partial(jnp.matmul, preferred_element_type=dtype)
    if cpu.takes(rows) and kernel.dtype == jnp.float32:
        y = lax.platform_dependent(rows, kernel, cpu=product, default=plain)
    else:
        y = plain(rows, kernel)
    return jnp.reshape(y, (*x.shape[:-1], kernel.shape[-1]))


def product(x_RI: jax.Array, w_IO: jax.Array, transposed: bool = False) -> jax.Array:
    """`x @ w`, or `x @ w.T`, float32: over the nonzeros of `w` where they are few, else a dense product.

    The choice is made when the program runs, by counting; see `cpu.DENSITY_LIMIT`. The gradient of `x` is
    found likewise, that of `w` is dense. Where the product is over the nonzeros, a NaN or infinity in `x`
    spoils only results that a nonzero weight brings it to; a dense one spoils the whole row.
    """
    return _PRODUCTS[transposed](x_RI, w_IO)


def _make_product(transposed: bool) -> Function:
    def dense(x_RI, w_IO):
        return jnp.matmul(x_RI, w_IO.T if transposed else w_IO)

    def forward(x_RI, w_IO):
        sparse = cpu.sparse_product_transposed if transposed else cpu.sparse_product
        few = jnp.sum(w_IO != 0, dtype=jnp.int32) < cpu.DENSITY_LIMIT * w_IO.size
        return lax.cond(few, sparse, dense, x_RI, w_IO), ()

    def backward(operands, _, dy_RO):
        x_RI, w_IO = operands
        dw_IO = jnp.matmul(dy_RO.T, x_RI) if transposed else jnp.matmul(x_RI.T, dy_RO)
        return product(dy_RO, w_IO, not transposed), dw_IO

    return differentiable(dense, forward, backward)


_PRODUCTS = {transposed: _make_product(transposed) for transposed in (False, True)}


@jax.custom_vjp
def _supported_product(
    x_RI: jax.Array, w_IO: jax.Array, values_N: jax.Array, places_N: jax.Array
) -> jax.Array:
    del values_N, places_N
    return cpu.sparse_product(x_RI, w_IO)


def _supported_product_forward(x_RI, w_IO, values_N, places_N):
    return cpu.sparse_product(x_RI, w_IO), (x_RI, w_IO, places_N)


def _supported_product_backward(residuals, dy_RO):
    x_RI, w_IO, places_N = residuals
    return cpu.sparse_product_transposed(dy_RO, w_IO), None, cpu.sampled_product(x_RI, dy_RO, places_N), None


_supported_product.defvjp(_supported_product_forward, _supported_product_backward)


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU."""
    if cpu.takes(x):
        return lax.platform_dependent(x, cpu=gelu_on_cpu, default=_gelu_plainly)
    return _gelu_plainly(x)


def _gelu_plainly(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


gelu_on_cpu = differentiable(_gelu_plainly, cpu.gelu, cpu.gelu_gradient)
