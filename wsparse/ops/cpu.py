"""Kernels for CPUs, in C++ (`csrc/`), which XLA calls through its foreign function interface.

XLA:CPU makes one program of each of the twenty or so compare-and-count passes of a search, and a block of
rows is done only when its slowest row is; it writes attention's scores out and reads them back several
times; it multiplies by zeros. Here each row is searched by itself in the first-level cache, scores stay
there too, and a matrix with few nonzeros is multiplied by those alone. The threads of XLA's own pool share
the work, and results do not depend on their number.

The kernels are off until a command calls `enable`. They need a C++ compiler on first use (`build.py`) and one
device; they take float32. Everything else is plain JAX. `WSPARSE_CPU_KERNELS=0` in the environment keeps them
off.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse.ops import build

log = logging.getLogger(__name__)

_PREFIX = "wsparse_"
_KERNELS = (
    *("top_k", "largest", "ablate", "ablate_gradient", "gelu", "gelu_gradient"),
    *("attend", "attend_gradient", "product", "places", "sampled_product"),
)

# Fraction of nonzeros below which a product over them is faster than a dense one; benchmarks/products.py.
DENSITY_LIMIT = 1 / 8

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_enabled = False


def enable() -> bool:
    """Switches the kernels on for what is traced from now on, and lets the process keep what it frees.

    XLA does not partition a foreign call: over several devices it would gather the rows first, so the
    kernels are for processes with one CPU device. Called again, it does nothing.

    Returns:
      Whether the kernels are on. Why not is logged in one line.
    """
    global _enabled
    wanted = os.environ.get("WSPARSE_CPU_KERNELS", "1") != "0"
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    if not _enabled and wanted and alone and load():
        _keep_freed_memory()
        _enabled = True
    return _enabled


def enabled() -> bool:
    """Returns whether the kernels are on."""
    return _enabled


def takes(x: jax.Array) -> bool:
    """Returns whether the kernels are on and take values like `x`."""
    return _enabled and x.dtype == jnp.float32


@functools.cache
def load() -> bool:
    """Compiles the kernels if need be and registers them with XLA.

    Returns:
      Whether that worked. Why not is logged in one line.
    """
    path = build.library()
    if path is None:
        return False
    try:
        library = ctypes.CDLL(str(path))
        for kernel in _KERNELS:
            capsule = jax.ffi.pycapsule(getattr(library, _PREFIX + kernel))
            jax.ffi.register_ffi_target(_PREFIX + kernel, capsule, platform="cpu")
    except Exception as error:  # Kernels are a matter of speed: nothing that goes wrong here is fatal.
        log.warning("CPU kernels are off: %s", " ".join(str(error).split())[:300])
        return False
    return True


def _keep_freed_memory() -> None:
    """Lets the process keep what it frees.

    glibc returns large arrays to the system at once, and the next one comes back page by page, which can
    take longer than to compute it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def largest_per_row(x: jax.Array, k: int) -> jax.Array:
    """Finds the `k` entries of largest magnitude of every row, ties to the lowest index.

    Args:
      x: float32, bfloat16 or float16 `(..., width)`; NaN counts as larger than infinity.
      k: Number of entries, `0 < k <= width`.

    Returns:
      Booleans shaped like `x`, `k` of them true in each row.
    """
    # Half precision widens without changing the order.
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return _call("top_k", jax.ShapeDtypeStruct(x.shape, jnp.bool), x, k=k)


def largest_per_matrix(keys: list[jax.Array], k: list[jax.Array]) -> list[jax.Array]:
    """`selection.largest_per_matrix` for keys of float32: each matrix is searched by itself."""
    return [
        _call("largest", jax.ShapeDtypeStruct(stack.shape, jnp.bool), stack, budget)
        for stack, budget in zip(keys, k, strict=True)
    ]


def ablate(
    x: jax.Array, gate_N: jax.Array, mean_N: jax.Array, *, k: int
) -> tuple[jax.Array, tuple[jax.Array]]:
    """Mean ablation of the `k` largest entries of every row, `gate * kept + (1 - gate) * mean`.

    Args:
      x: float32 `(..., N)`; entries that `largest_per_row` does not choose count as 0.
      gate_N: float32, as is `mean_N`.
      mean_N: Values shown where gates are closed.
      k: Number of entries, `0 < k <= N`.

    Returns:
      The result, and two integers for each row that say what was kept.
    """
    cuts = jax.ShapeDtypeStruct((*x.shape[:-1], 2), jnp.int32)
    y, cuts = _call("ablate", (_like(x), cuts), x, gate_N, mean_N, k=k)
    return y, (cuts,)


# Rows over which the kernel sums the gates' gradient at a time: `kRowsOfGates` of csrc/ablate.cc.
_ROWS_OF_GATES = 64


def ablate_gradient(operands, residuals, dy: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of `x`, `gate_N` and `mean_N`; see `ablate`."""
    (x, gate_N, mean_N), (cuts,) = operands, residuals
    blocks = -(-math.prod(x.shape[:-1]) // _ROWS_OF_GATES)
    sums_P2N = jax.ShapeDtypeStruct((blocks, 2, x.shape[-1]), jnp.float32)
    dx, sums_P2N = _call("ablate_gradient", (_like(x), sums_P2N), x, gate_N, cuts, dy)
    by_value_N, plain_N = jnp.sum(sums_P2N, axis=0)
    return dx, by_value_N - mean_N * plain_N, (1 - gate_N) * plain_N


def attend(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, sink_H: jax.Array, positions_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`attention.attend` for float32: scores and weights never leave a core's cache.

    Returns:
      The result, and with it the logarithms of the softmax's denominators.
    """
    logs_BTH = jax.ShapeDtypeStruct(q_BTHK.shape[:-1], jnp.float32)
    operands = (q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT)
    y_BTHK, logs_BTH = _call("attend", (_like(q_BTHK), logs_BTH), *operands)
    return y_BTHK, (y_BTHK, logs_BTH)


def attend_gradient(operands, residuals, dy_BTHK: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the gradients of queries, keys, values and sinks; see `attend`."""
    q_BTHK, k_BSHK, v_BSHK, *_ = operands
    sinks_BH = jax.ShapeDtypeStruct((q_BTHK.shape[0], q_BTHK.shape[2]), jnp.float32)
    results = (_like(q_BTHK), _like(k_BSHK), _like(v_BSHK), sinks_BH)
    *gradients, sinks_BH = _call("attend_gradient", results, *operands, *residuals, dy_BTHK)
    return *gradients, jnp.sum(sinks_BH, axis=0)


def gelu(x: jax.Array) -> tuple[jax.Array, tuple[()]]:
    """`x` times the standard normal distribution function, exact to float32 rounding; float32."""
    return _call("gelu", _like(x), x), ()


def gelu_gradient(operands, residuals, dy: jax.Array) -> tuple[jax.Array]:
    """Returns the gradient of `x`; see `gelu`."""
    del residuals
    return (_call("gelu_gradient", _like(dy), *operands, dy),)


def _make_sparse_product(transposed: bool) -> Any:
    @jax.custom_batching.custom_vmap
    def multiply(x_RI, w_IO):
        shape = (x_RI.shape[0], w_IO.shape[0 if transposed else 1])
        result = jax.ShapeDtypeStruct(shape, jnp.float32)
        return _call("product", result, x_RI, w_IO, transposed=transposed)

    @multiply.def_vmap
    def rule(axis_size, in_batched, x, w_IO):
        if in_batched[1]:
            x = x if in_batched[0] else jnp.broadcast_to(x[None], (axis_size, *x.shape))
            return jax.lax.map(lambda operands: multiply(*operands), (x, w_IO)), True
        # One matrix for all: more rows of the same product.
        y = multiply(jnp.reshape(x, (-1, x.shape[-1])), w_IO)
        return jnp.reshape(y, (*x.shape[:-1], y.shape[-1])), True

    return multiply


# `x @ w` and `x @ w.T` over the nonzeros of `w`, float32.
sparse_product, sparse_product_transposed = map(_make_sparse_product, (False, True))


def places(w: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Finds the nonzeros of float32 matrices `(G, I, O)`.

    Returns:
      Their flat indices in each matrix in order, int32 `(G, capacity)`, filled up with the matrix's size; and
      how many there are, int32 `(G,)`, which may be more than `capacity`.
    """
    shapes = (
        jax.ShapeDtypeStruct((w.shape[0], capacity), jnp.int32),
        jax.ShapeDtypeStruct(w.shape[:1], jnp.int32),
    )
    return _call("places", shapes, w)


# Rows whose products the kernel sums in one go: `kRowsOfSums` of csrc/product.cc.
_ROWS_OF_SUMS = 256


def sampled_product(x_RI: jax.Array, dy_RO: jax.Array, places_N: jax.Array) -> jax.Array:
    """Returns `(x.T @ dy)` at flat indices in increasing order, float32 `(N,)`; 0 for those out of range."""
    blocks = -(-x_RI.shape[0] // _ROWS_OF_SUMS)
    sums_BN = jax.ShapeDtypeStruct((blocks, places_N.shape[0]), jnp.float32)
    return jnp.sum(_call("sampled_product", sums_BN, x_RI, dy_RO, places_N), axis=0)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(kernel: str, results: Any, *operands: jax.Array, **attributes: int) -> Any:
    """Calls a kernel; vmapped axes become leading axes of all its operands."""
    if not load():
        raise RuntimeError(f"the CPU kernel {kernel} could not be compiled or loaded")
    call: Any = jax.ffi.ffi_call(_PREFIX + kernel, results, vmap_method="broadcast_all")
    return call(*operands, **{name: np.int64(value) for name, value in attributes.items()})
