"""What a step spends its time on, for CPUs: compiled by numba and called by XLA as foreign functions.

XLA:CPU makes one program of each of the twenty or so compare-and-count passes of a search, and a block of
rows is done only when its slowest row is; it writes attention's scores out and reads them back several
times; it multiplies by zeros. Here each row is searched by itself in the first-level cache, scores stay
there too, and a matrix with few nonzeros is multiplied by those alone. The threads of XLA's own pool share
the work. numba is the extra `cpu`; without it, or with `WSPARSE_CPU_KERNELS=0` in the environment, plain
JAX is used, and so it is for other types than float32. The kernels have gradients, but no forward-mode
derivatives (`jax.jvp`).
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PREFIX = "wsparse_"

# Share of nonzeros below which a product over them is faster than a dense one; benchmarks/products.py.
DENSITY_LIMIT = 1 / 16

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@functools.cache
def available() -> bool:
    """Whether the kernels can be used in this process.

    XLA does not partition a foreign call: over several devices it would gather the rows first, so the
    kernels are for processes with one device.
    """
    if os.environ.get("WSPARSE_CPU_KERNELS", "1") == "0" or jax.device_count() > 1:
        return False
    try:
        _register("top_k")
    except ImportError:
        return False
    _keep_freed_memory()
    return True


def takes(x: jax.Array) -> bool:
    """Returns whether the kernels are on and take values like `x`."""
    return x.dtype == jnp.float32 and available()


def _keep_freed_memory() -> None:
    """Let the process keep what it frees.

    glibc returns large arrays to the system at once, and the next one comes back page by page, which can
    take longer than to compute it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def largest_per_row(x: jax.Array, k: int) -> jax.Array:
    """Mask of the `k` entries of largest magnitude of every row, ties to the lowest index.

    Args:
      x: float32, bfloat16 or float16 `(..., width)`; NaN counts as larger than infinity.
      k: `0 < k <= width`.

    Returns:
      Booleans shaped like `x`, `k` of them true in each row.
    """
    # Half precision widens without changing the order.
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return _call("top_k", jax.ShapeDtypeStruct(x.shape, jnp.bool), x, k=k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ablate_largest(x: jax.Array, gate_N: jax.Array, mean_N: jax.Array, k: int) -> jax.Array:
    """Mean ablation of the `k` largest entries of every row, `gate * kept + (1 - gate) * mean`.

    Args:
      x: float32 `(..., N)`; what `largest_per_row` does not choose counts as 0.
      gate_N: float32, as is `mean_N`.
      mean_N: what closed gates show instead.
      k: `0 < k <= N`.
    """
    return _ablate_forward(x, gate_N, mean_N, k)[0]


def _ablate_forward(x, gate_N, mean_N, k):
    # What was kept of each row follows from two numbers: the least key, and the last place of those equal.
    limits = jax.ShapeDtypeStruct((*x.shape[:-1], 2), jnp.int32)
    y, limits = _call("ablate", (_like(x), limits), x, gate_N, mean_N, k=k)
    return y, (x, gate_N, mean_N, limits)


def _ablate_backward(k, residuals, dy):
    del k
    x, gate_N, mean_N, limits = residuals
    # The gates' gradient is summed over so many rows at a time, whichever thread does them.
    piece = 64
    sums_P2N = jax.ShapeDtypeStruct(
        (-(-math.prod(x.shape[:-1]) // piece), 2, x.shape[-1]), jnp.float32
    )
    operands = (x, gate_N, limits, dy)
    dx, sums_P2N = _call("ablate_gradient", (_like(x), sums_P2N), *operands, piece=piece)
    by_value_N, plain_N = jnp.sum(sums_P2N, axis=0)
    return dx, by_value_N - mean_N * plain_N, (1 - gate_N) * plain_N


ablate_largest.defvjp(_ablate_forward, _ablate_backward)


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    sink_H: jax.Array | None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """`wsparse.ops.attention.attend` for float32: scores and weights never leave a core's cache.

    Query t attends to the keys up to t, or up to `positions_BT[:, t]`. Returns `(B, T, H, K)` float32.
    """
    batch, time, heads, width = q_BTHK.shape
    if width % 16:
        # The kernel takes channels in sixteens. It scales by the padded width, which the queries make good.
        pad = [(0, 0)] * 3 + [(0, -width % 16)]
        q_BTHK, k_BSHK, v_BSHK = (jnp.pad(each, pad) for each in (q_BTHK, k_BSHK, v_BSHK))
        q_BTHK = q_BTHK * math.sqrt(q_BTHK.shape[-1] / width)
        return attend(q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT)[..., :width]
    if sink_H is None:
        sink_H = jnp.full(heads, -jnp.inf, jnp.float32)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (batch, time))
    return _attend(q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT.astype(jnp.int32))


@jax.custom_vjp
def _attend(q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT):
    return _attend_forward(q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT)[0]


def _attend_forward(q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT):
    operands = (q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT)
    logs_BTH = jax.ShapeDtypeStruct(q_BTHK.shape[:-1], jnp.float32)
    y_BTHK, logs_BTH = _call("attend", (_like(q_BTHK), logs_BTH), *operands)
    return y_BTHK, (*operands, y_BTHK, logs_BTH)


def _attend_backward(residuals, dy_BTHK):
    q_BTHK, k_BSHK, v_BSHK, *_ = residuals
    sinks_BH = jax.ShapeDtypeStruct((q_BTHK.shape[0], q_BTHK.shape[2]), jnp.float32)
    results = (_like(q_BTHK), _like(k_BSHK), _like(v_BSHK), sinks_BH)
    *gradients, sinks_BH = _call("attend_gradient", results, *residuals, dy_BTHK)
    return *gradients, jnp.sum(sinks_BH, axis=0), None


_attend.defvjp(_attend_forward, _attend_backward)


def largest_of_each(keys: list[jax.Array], k: list[jax.Array]) -> list[jax.Array]:
    """`selection.largest_of_each` for keys of float32: each matrix is searched by itself."""
    return [
        _call("largest", jax.ShapeDtypeStruct(each.shape, jnp.bool), each, budget)
        for each, budget in zip(keys, k, strict=True)
    ]


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """`x` times the standard normal distribution function, exact to float32 rounding; float32."""
    return _call("gelu", _like(x), x)


gelu.defvjp(
    lambda x: (gelu(x), x),
    lambda x, dy: (_call("gelu_gradient", _like(x), x, dy),),
)


@jax.custom_vjp
def product(x_RI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """`x @ w`, float32: over the nonzeros of `w` where they are few, else a dense product.

    The choice is made when the program runs, by counting; see `DENSITY_LIMIT`. The gradient of `x` is found
    likewise, that of `w` is dense. A NaN or infinity in `x` spoils only what a nonzero weight brings it to.
    """
    return _product(x_RI, w_IO, by_row=False)


def _product(x_RI: jax.Array, w_IO: jax.Array, *, by_row: bool) -> jax.Array:
    """`x @ w`, or `x @ w.T`."""

    def dense(x_RI, w_IO):
        return jnp.matmul(x_RI, w_IO.T if by_row else w_IO)

    sparse = sparse_product_transposed if by_row else sparse_product
    few = jnp.sum(w_IO != 0, dtype=jnp.int32) < DENSITY_LIMIT * w_IO.size
    return jax.lax.cond(few, sparse, dense, x_RI, w_IO)


def _make_sparse_product(by_row: bool) -> Any:
    @jax.custom_batching.custom_vmap
    def multiply(x_RI, w_IO):
        shape = (x_RI.shape[0], w_IO.shape[0 if by_row else 1])
        return _call("product", jax.ShapeDtypeStruct(shape, jnp.float32), x_RI, w_IO, by_row=by_row)

    @multiply.def_vmap
    def rule(axis_size, in_batched, x, w_IO):
        if in_batched[1]:
            x = x if in_batched[0] else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return jax.lax.map(lambda each: multiply(*each), (x, w_IO)), True
        # One matrix for all: more rows of the same product.
        y = multiply(jnp.reshape(x, (-1, x.shape[-1])), w_IO)
        return jnp.reshape(y, (*x.shape[:-1], y.shape[-1])), True

    return multiply


sparse_product, sparse_product_transposed = map(_make_sparse_product, (False, True))

product.defvjp(
    lambda x_RI, w_IO: (product(x_RI, w_IO), (x_RI, w_IO)),
    lambda saved, dy_RO: (
        _product(dy_RO, saved[1], by_row=True),
        jnp.matmul(saved[0].T, dy_RO),
    ),
)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(
    kernel: str,
    results: Any,
    *operands: jax.Array,
    **attributes: int,
) -> Any:
    """Call a kernel; vmapped axes become leading axes of all its operands."""
    _register(kernel)
    call: Any = jax.ffi.ffi_call(_PREFIX + kernel, results, vmap_method="broadcast_all")
    return call(*operands, **{name: np.int64(value) for name, value in attributes.items()})


@functools.cache
def _register(kernel: str) -> None:
    from wsparse.ops import cpu_compiled

    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    address = cpu_compiled.handler(kernel)
    jax.ffi.register_ffi_target(_PREFIX + kernel, capsule(address, None, None), platform="cpu")
