"""Exact selection of the entries of largest magnitude, by bisection over their bits.

The magnitude bits of an IEEE number, read as an integer, order like the magnitudes themselves. So the
k-th largest magnitude is found by compare-and-count passes over an integer view: no sort, no gather, and
on a sharded array only the counts cross devices. Every search stops as soon as its count is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import functools
import itertools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from wsparse.ops import cpu, tpu

# A pass over a matrix in a TPU's memory has time for this many parts: 7 comparisons while 4 bytes arrive.
_WAYS_OF_TPU = 8

_INTEGER = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def magnitude_keys(x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Returns non-negative integers that order like `abs(x)`, equal for equal magnitudes, 0 for 0.

    They are as wide as `x`, or of a wider `dtype`. NaNs share one key above infinity's.

    Raises:
      TypeError: `x` is not a real floating-point array.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize not in _INTEGER:
        raise TypeError(f"magnitudes are compared for 16, 32 and 64-bit floats, got dtype {x.dtype}")
    integer = _INTEGER[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), integer).astype(dtype or integer)
    keys = bits & jnp.array(jnp.iinfo(integer).max, bits.dtype)
    return jnp.minimum(keys, jnp.array(infinity_key(x.dtype) + 1, bits.dtype))


def infinity_key(dtype: jnp.dtype) -> int:
    """Returns the key of infinity; finite magnitudes have smaller keys."""
    integer = np.dtype(_INTEGER[jnp.dtype(dtype).itemsize])
    return int(np.array(np.inf, dtype).view(integer))


def bisect_counts(
    count: Callable[[jax.Array], jax.Array],
    k: jax.Array,
    *,
    lo: jax.Array,
    hi: jax.Array,
    n_lo: jax.Array,
    n_hi: jax.Array,
    span: int,
    ways: int = 2,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bisects many thresholds at once until every count is exact.

    Args:
      count: Thresholds -> the number of items at or above each, int32, non-increasing.
      k: Items to find, `n_hi < k <= n_lo` (or anything where `hi - lo <= 1`).
      lo: Thresholds with `count(lo) == n_lo`.
      hi: Thresholds with `count(hi) == n_hi`.
      span: The most that `hi - lo` can be.
      ways: Parts that a pass divides the interval into, by `ways - 1` counts.

    Returns:
      `(lo, n_lo, n_hi)` where either `n_lo == k`, or `lo` is the k-th largest value itself and `n_hi`
      items are strictly above it. All arguments and results have one shape.
    """

    def unfinished(lo, hi, n_lo):
        return (n_lo != k) & (hi - lo > 1)

    def body(state):
        lo, hi, n_lo, n_hi = state
        active = unfinished(lo, hi, n_lo)
        step = (hi - lo) // ways + 1
        middles = [jnp.minimum(lo + part * step, hi - 1) for part in range(1, ways)]
        for middle, n in zip(middles, [count(middle) for middle in middles], strict=True):
            # Thresholds rise: the last one that enough items reach, the first one that they do not.
            up, down = active & (n >= k), active & (n < k) & (middle < hi)
            lo, n_lo = jnp.where(up, middle, lo), jnp.where(up, n, n_lo)
            hi, n_hi = jnp.where(down, middle, hi), jnp.where(down, n, n_hi)
        return lo, hi, n_lo, n_hi

    # The name says in a compiled program what its data decide in a running one.
    with jax.named_scope(f"at_most_{_passes(span, ways)}_passes"):
        lo, _, n_lo, n_hi = lax.while_loop(
            lambda state: jnp.any(unfinished(*state[:3])), body, (lo, hi, n_lo, n_hi)
        )
    return lo, n_lo, n_hi


def _passes(span: int, ways: int) -> int:
    """Returns the passes after which an interval of `span` has become one of 1."""
    passes = 0
    while span > 1:
        span = min(span // ways + 1, span - 1)
        passes += 1
    return passes


def largest_along(
    keys: jax.Array, k: jax.Array | int, axes: int | Iterable[int], *, count_dtype: jnp.dtype = jnp.int32
) -> jax.Array:
    """Returns a mask of the `k` largest positive keys of every slice along `axes`, ties to the lowest index.

    Args:
      keys: Integers from `magnitude_keys`, any shape; keys of zero or less are never selected.
      k: int32, a scalar or of the reduced shape with `axes` kept as size 1; may be traced.
      axes: The axes that make up one slice.
      count_dtype: Integer that entries of a slice are counted in.
    """
    axes = tuple(axis % keys.ndim for axis in ([axes] if isinstance(axes, int) else axes))
    from_end = _positions_from_end(keys.shape, axes)

    def count(mask):
        return jnp.sum(mask, axes, dtype=count_dtype, keepdims=True).astype(jnp.int32)

    length = math.prod(keys.shape[axis] for axis in axes)
    top = jnp.max(keys, axes, keepdims=True).astype(jnp.result_type(jnp.int32, keys))
    found = _search(
        lambda t: count(keys >= t.astype(keys.dtype)),
        lambda t, p: count((keys == t.astype(keys.dtype)) & (from_end >= p)),
        jnp.broadcast_to(jnp.asarray(k, jnp.int32), top.shape),
        top=top,
        top_span=int(jnp.iinfo(keys.dtype).max),
        size=length,
        longest=length,
    )
    return _winners(keys, from_end, *found)


def largest_per_row(x: jax.Array, k: int) -> jax.Array:
    """Returns a mask of the `k` entries of largest magnitude of each row of activations `(..., width)`.

    Zeros count (exactly `k` are kept), so that gradient may wake a channel that is at zero. The platform
    chooses the way; the result is the same to the bit.
    """
    if k == 0:
        return jnp.zeros(x.shape, bool)
    by_kernel = cpu.enabled() and jnp.dtype(x.dtype).itemsize <= 4
    return _largest_per_row(lax.stop_gradient(x), k, by_kernel)


# Traced once for a shape: a model selects at many places, and its programs are many.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _largest_per_row(x: jax.Array, k: int, by_kernel: bool) -> jax.Array:
    return lax.platform_dependent(
        x,
        cpu=functools.partial(cpu.largest_per_row if by_kernel else _largest_per_row_blocked, k=k),
        cuda=functools.partial(largest_per_row_sorted, k=k),
        default=lambda x: largest_along(magnitude_keys(x) + 1, k, -1),
    )


def largest_per_row_sorted(x: jax.Array, k: int) -> jax.Array:
    """Selects by the library's `top_k`: a GPU waits for the host after every pass of a bisection."""
    keys = magnitude_keys(x)
    threshold = lax.top_k(keys, k)[0][..., -1:]
    above, tied = keys > threshold, keys == threshold
    n_tied = k - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= n_tied))


def keep_largest_per_row(x: jax.Array, k: int, *values: jax.Array) -> jax.Array:
    """Returns `x`, or the value in its place, where `largest_per_row(x, k)`, and 0 elsewhere: plain JAX.

    It is the body of a kernel of `wsparse.ops.tpu`, which runs it on blocks of rows.
    """
    kept = largest_along(magnitude_keys(x, jnp.int32) + 1, k, -1)
    value = values[0] if values else x
    return jnp.where(kept, value, jnp.zeros_like(value))


# Keys of one block: small enough for a core's cache, through which a search passes about 20 times.
_BLOCK_BYTES = 1 << 18


def _largest_per_row_blocked(x: jax.Array, k: int) -> jax.Array:
    """Selects in blocks whose rows lie along the minor axis: the CPU's vector lanes each count a row."""
    keys = magnitude_keys(x) + 1
    width = keys.shape[-1]
    rows = jnp.reshape(keys, (-1, width))
    block = min(max(_BLOCK_BYTES // (width * keys.dtype.itemsize), 1), max(rows.shape[0], 1))
    blocks = -(-rows.shape[0] // block)
    padded = jnp.pad(rows, ((0, blocks * block - rows.shape[0]), (0, 0)))
    count_dtype = jnp.int16 if width < 2**15 else jnp.int32

    def select(block_keys):
        return largest_along(block_keys.T, k, 0, count_dtype=count_dtype).T

    kept = lax.map(select, jnp.reshape(padded, (blocks, block, width)))
    return jnp.reshape(jnp.reshape(kept, (-1, width))[: rows.shape[0]], keys.shape)


def largest_per_matrix(
    keys: Sequence[jax.Array], k: Sequence[jax.Array], *, replicated: bool = False
) -> list[jax.Array]:
    """Returns masks of the `k` largest positive keys of every matrix, ties to the lowest flat index.

    All matrices of all arrays advance in one loop: on sharded arrays a search costs a fixed number of
    all-reduces of a few integers, whatever the number of arrays, and no array is gathered.

    Args:
      keys: Stacks of matrices or vectors, `(G, ...)`.
      k: int32 `(G,)` for each array; may be traced.
      replicated: Whether no array is sharded.
    """
    if not keys:
        return []
    ends = list(itertools.accumulate(stack.shape[0] for stack in keys))[:-1]
    from_end = [_positions_from_end(a.shape, range(1, a.ndim), replicated=replicated) for a in keys]
    sizes = [math.prod(stack.shape[1:]) for stack in keys]

    def per_stack(values):
        """Returns a value per matrix as one array per stack, which broadcasts against it."""
        parts = zip(jnp.split(values, ends), keys, strict=True)
        return [jnp.reshape(v, v.shape + (1,) * (a.ndim - 1)) for v, a in parts]

    def count(masks):
        return jnp.concatenate([jnp.sum(m, range(1, m.ndim), dtype=jnp.int32) for m in masks])

    def at_least(t):
        return count([a >= v.astype(a.dtype) for a, v in zip(keys, per_stack(t), strict=True)])

    def tied_from(t, p):
        parts = zip(keys, from_end, per_stack(t), per_stack(p), strict=True)
        return count([(a == v.astype(a.dtype)) & (end >= start) for a, end, v, start in parts])

    wide = jnp.result_type(jnp.int32, *keys)
    found = _search(
        at_least,
        tied_from,
        jnp.concatenate([jnp.asarray(budget, jnp.int32) for budget in k]),
        top=jnp.concatenate([jnp.max(a, range(1, a.ndim)).astype(wide) for a in keys]),
        top_span=max(int(jnp.iinfo(a.dtype).max) for a in keys),
        size=jnp.concatenate([jnp.full(a.shape[0], n, jnp.int32) for a, n in zip(keys, sizes, strict=True)]),
        longest=max(sizes),
        ways=_WAYS_OF_TPU if tpu.available() else 2,
    )
    return [_winners(*parts) for parts in zip(keys, from_end, *map(per_stack, found), strict=True)]


def _search(at_least, tied_from, k, *, top, top_span, size, longest, ways=2):
    """Returns every slice's threshold, the position that settles its ties, and how many entries it keeps.

    Args:
      at_least: Thresholds -> entries at or above them.
      tied_from: (thresholds, positions from the end) -> entries that equal the threshold there or before.
      k: Entries to find, int32.
      top: Largest key.
      top_span: The most that it can be, static.
      size: Entries of a slice.
      longest: The most that there are, static.
      ways: See `bisect_counts`.
    """
    one, none = jnp.ones_like(top), jnp.zeros_like(k)
    positive = at_least(one)
    n_kept = jnp.clip(k, 0, positive)
    threshold, n_lo, n_hi = bisect_counts(
        at_least,
        n_kept,
        lo=one,
        hi=jnp.where(n_kept > 0, top + 1, one),
        n_lo=positive,
        n_hi=none,
        span=top_span,
        ways=ways,
    )
    # Where several entries equal the threshold and not all of them are kept, the lowest indices win:
    # the same search over positions counted from the end. Without ties the loop runs zero times.
    exact = (n_lo == n_kept) | (n_kept == 0)
    needed = n_kept - n_hi
    position, _, _ = bisect_counts(
        lambda p: tied_from(threshold, p),
        needed,
        lo=none,
        hi=jnp.where(exact, 0, size),
        n_lo=jnp.where(exact, needed, n_lo - n_hi),
        n_hi=none,
        span=longest,
        ways=ways,
    )
    return threshold, position, n_kept


def _winners(keys, from_end, threshold, position, n_kept):
    t = threshold.astype(keys.dtype)
    return (n_kept > 0) & ((keys > t) | ((keys == t) & (from_end >= position)))


def _positions_from_end(shape: Sequence[int], axes: Iterable[int], *, replicated: bool = True) -> jax.Array:
    """Returns int32 `shape`: how many entries follow each one in its slice, in row-major order."""
    position, stride = jnp.zeros(shape, jnp.int32), 1
    for axis in sorted(axes, reverse=True):
        if replicated:
            after = shape[axis] - 1 - lax.broadcasted_iota(jnp.int32, shape, axis)
        else:
            # XLA would count once for all arrays, sharded as one of them is, and gather it for the others.
            # It recognizes a constant that counts upwards, but not one that counts downwards.
            indices = jnp.asarray(np.arange(shape[axis], dtype=np.int32)[::-1].copy())
            after = lax.broadcast_in_dim(indices, shape, (axis,))
        position = position + after * stride
        stride *= shape[axis]
    return position
