"""AbsTopK's selection for CPUs, compiled by numba and called by XLA as a foreign function.

XLA:CPU makes one program of each of the twenty or so compare-and-count passes of a search, and a block of
rows is done only when its slowest row is. Here each row is searched by itself in the first-level cache,
about five passes each: 2 to 3 ns an element instead of 16. numba is the extra `cpu`; without it, or with
`WSPARSE_CPU_KERNELS=0` in the environment, the plain JAX of `wsparse.sparsity.magnitude` is used.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TARGET = "wsparse_largest_per_row"


@functools.cache
def available() -> bool:
    """Whether the kernel can be used in this process.

    XLA does not partition a foreign call: over several devices it would gather the rows first, so the
    kernel is for processes with one device.
    """
    if os.environ.get("WSPARSE_CPU_KERNELS", "1") == "0" or jax.device_count() > 1:
        return False
    try:
        _register()
    except ImportError:
        return False
    return True


def largest_per_row(x: jax.Array, k: int) -> jax.Array:
    """Mask of the `k` entries of largest magnitude of every row, ties to the lowest index.

    Args:
      x: float32, bfloat16 or float16 `(..., width)`; NaN counts as larger than infinity.
      k: `0 < k <= width`.

    Returns:
      Booleans shaped like `x`, `k` of them true in each row.
    """
    _register()
    call: Any = jax.ffi.ffi_call(
        _TARGET, jax.ShapeDtypeStruct(x.shape, jnp.bool), vmap_method="broadcast_all"
    )
    # Half precision widens without changing the order.
    return call(jax.lax.stop_gradient(x).astype(jnp.float32), k=np.int64(k))


@functools.cache
def _register() -> None:
    address = _compile()
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    jax.ffi.register_ffi_target(_TARGET, capsule(address, None, None), platform="cpu")


# Positions, in 8-byte words, of what the handler reads in the structs of XLA's C interface for foreign
# functions (xla/ffi/api/c_api.h, stable by its own promise).
_FRAME_EXTENSION, _FRAME_STAGE, _FRAME_ARGS, _FRAME_RETS, _FRAME_ATTRS = 1, 4, 9, 14, 20
_EXTENSION_TYPE, _EXTENSION_METADATA = 1, 3
_METADATA_VERSION = 3
_BUFFER_DATA, _BUFFER_RANK, _BUFFER_DIMS = 3, 4, 5
_SCALAR_VALUE = 1
_STAGE_EXECUTE = 3


@functools.cache
def _compile() -> int:
    """The address of the handler."""
    import numba
    from numba import carray, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    i32 = np.int32
    # The key of NaN is one above infinity's; see `magnitude.magnitude_keys`.
    top_key = i32(np.array(np.inf, np.float32).view(np.int32) + 1)
    njit = numba.njit(boundscheck=False, inline="always", cache=True)

    def as_pointer(typing_context, address):
        """An integer as a `void *`."""
        del typing_context

        def codegen(context, builder, signature, arguments):
            del context, signature
            return builder.inttoptr(arguments[0], cgutils.voidptr_t)

        return types.voidptr(address), codegen

    pointer: Any = intrinsic(as_pointer)

    @njit
    def words(address, n):
        return carray(pointer(address), n, np.int64)

    # Every sum is cast back to 32 bits: numba would widen it, and half the vector lanes would idle.

    @njit
    def read_keys(bits, keys):
        top = i32(0)
        for i in range(keys.shape[0]):
            magnitude = i32(bits[i] & i32(0x7FFFFFFF))
            key = i32(i32(min(magnitude, top_key)) + i32(1))
            keys[i] = key
            top = i32(max(top, key))
        return top

    @njit
    def count(keys, threshold):
        n = i32(0)
        for i in range(keys.shape[0]):
            n = i32(n + i32(keys[i] >= threshold))
        return n

    @njit
    def lower_bound(keys, k, top):
        """A key that at least k keys reach: the least of the maxima of k groups of four."""
        if 4 * k > keys.shape[0]:
            return i32(1)
        a, b, c, d = keys[:k], keys[k : 2 * k], keys[2 * k : 3 * k], keys[3 * k : 4 * k]
        low = top
        for i in range(k):
            low = i32(min(low, i32(max(max(a[i], b[i]), max(c[i], d[i])))))
        return low

    @njit
    def write(keys, threshold, kept):
        for i in range(keys.shape[0]):
            kept[i] = np.uint8(keys[i] >= threshold)

    @njit
    def write_with_ties(keys, threshold, ties, kept):
        for i in range(keys.shape[0]):
            chosen = keys[i] > threshold
            if keys[i] == threshold and ties > 0:
                chosen, ties = True, ties - 1
            kept[i] = np.uint8(chosen)

    @njit
    def select_row(bits, k, keys, kept):
        top = read_keys(bits, keys)
        low, high, n_high = lower_bound(keys, k, top), i32(top + i32(1)), i32(0)
        n_low = count(keys, low)
        passes = 0
        while n_low != k and high - low > 1:
            span = i32(high - low)
            if passes % 3 == 2:
                # Interpolation alone can creep; every third pass halves.
                middle = i32(low + span // i32(2))
            else:
                share = np.float32(n_low - k + 0.5) / np.float32(n_low - n_high + 1)
                middle = i32(low + i32(np.float32(span) * share))
                middle = i32(max(i32(low + i32(1)), min(middle, i32(high - i32(1)))))
            n = count(keys, middle)
            passes += 1
            if n >= k:
                low, n_low = middle, n
            else:
                high, n_high = middle, n
        if n_low == k:
            write(keys, low, kept)
        else:
            write_with_ties(keys, low, k - n_high, kept)

    def handle(frame_address):
        frame = words(frame_address, _FRAME_ATTRS + 1)
        if frame[_FRAME_EXTENSION] != 0:
            extension = words(frame[_FRAME_EXTENSION], _EXTENSION_METADATA + 1)
            if extension[_EXTENSION_TYPE] & 0xFFFFFFFF == 1:
                # XLA asks which version of the interface this was written against: 0.1.
                words(extension[_EXTENSION_METADATA], 5)[_METADATA_VERSION] = 1 << 32
                return 0
        if frame[_FRAME_STAGE] & 0xFFFFFFFF != _STAGE_EXECUTE:
            return 0
        source = words(words(frame[_FRAME_ARGS], 1)[0], _BUFFER_DIMS + 1)
        target = words(words(frame[_FRAME_RETS], 1)[0], _BUFFER_DIMS + 1)
        k = i32(words(words(words(frame[_FRAME_ATTRS], 1)[0], 2)[_SCALAR_VALUE], 1)[0])
        rank = source[_BUFFER_RANK]
        dims = words(source[_BUFFER_DIMS], rank)
        rows = 1
        for axis in range(rank - 1):
            rows *= dims[axis]
        width = dims[rank - 1]
        bits = carray(pointer(source[_BUFFER_DATA]), (rows, width), np.int32)
        kept = carray(pointer(target[_BUFFER_DATA]), (rows, width), np.uint8)
        keys = np.empty(width, np.int32)
        for row in range(rows):
            select_row(bits[row], k, keys, kept[row])
        return 0

    handler: Any = numba.cfunc(types.intp(types.intp), cache=True)(handle)
    return handler.address
