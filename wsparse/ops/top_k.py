"""The two selections of the method: channels of an activation, entries of a weight matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from wsparse.errors import UserError
from wsparse.ops import cpu, selection, tpu
from wsparse.ops.derivatives import differentiable


def abs_top_k(x: jax.Array, k: int) -> jax.Array:
    """AbsTopK of Gao et al. 2025: keep the `k` entries of largest magnitude of the last axis.

    Signs are kept. Equal magnitudes are broken by position, the lowest index first, so exactly `k` entries
    are kept. The gradient is that of the kept entries; the others receive none.

    Raises:
      UserError: `k` is out of range.

    >>> abs_top_k(jnp.array([1.0, -3.0, 2.0, -1.0]), 2)
    Array([ 0., -3.,  2.,  0.], dtype=float32)
    """
    width = x.shape[-1]
    if not 0 <= k <= width:
        raise UserError(f"abs_top_k keeps between 0 and {width} of {width} channels, got k={k}")
    if k == width:
        return x
    if tpu.available() and x.dtype.itemsize <= 4:
        return _abs_top_k_by_kernel(x, k)
    return jnp.where(selection.largest_per_row(x, k), x, jnp.zeros_like(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _abs_top_k_by_kernel(x: jax.Array, k: int) -> jax.Array:
    return _keep_by_kernel(k, x)


# What was kept of x is what would be kept of the result: it alone is stored for the backward pass.
_abs_top_k_by_kernel.defvjp(
    lambda x, k: (_keep_by_kernel(k, x),) * 2, lambda k, kept, gradient: (_keep_by_kernel(k, kept, gradient),)
)


def _keep_by_kernel(k: int, *arrays: jax.Array) -> jax.Array:
    keep = lambda x, *values: selection.keep_largest_per_row(x, k, *values)
    return lax.platform_dependent(*arrays, tpu=functools.partial(tpu.by_rows, keep), default=keep)


def ablate(value: jax.Array, gate: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns `gate * value + (1 - gate) * mean`: a closed gate shows the mean."""
    return gate * value + (1 - gate) * mean


def ablate_largest(x: jax.Array, gate_N: jax.Array, mean_N: jax.Array, k: int) -> jax.Array:
    """Returns the mean ablation of `abs_top_k(x, k)`, `x` of shape `(..., N)`: see `ablate`."""
    if not cpu.takes(x) or k == 0:
        return _ablate_plainly(x, gate_N, mean_N, k=k)
    plain = functools.partial(_ablate_plainly, k=k)
    return lax.platform_dependent(x, gate_N, mean_N, cpu=ablate_on_cpu(k), default=plain)


def _ablate_plainly(x: jax.Array, gate_N: jax.Array, mean_N: jax.Array, *, k: int) -> jax.Array:
    gate, mean = (jnp.reshape(v, (1,) * (x.ndim - 1) + v.shape) for v in (gate_N, mean_N))
    return ablate(abs_top_k(x, k), gate, mean)


@functools.cache
def ablate_on_cpu(k: int) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns `ablate_largest` of `k` channels, float32, by the CPU kernel."""
    return differentiable(
        functools.partial(_ablate_plainly, k=k), functools.partial(cpu.ablate, k=k), cpu.ablate_gradient
    )


def keep_top_k(
    w: jax.Array, k: jax.Array | int, *, min_per_neuron: int = 0, neuron_axis: int | None = None
) -> jax.Array:
    """Keep the `k` entries of largest magnitude of one matrix or vector, set the others to zero.

    First every neuron (a slice along `neuron_axis`) keeps its `min_per_neuron` largest nonzero entries;
    what is left of the budget `k` goes to the largest others. Exactly `min(k, nonzeros of w)` entries stay
    when the protected ones fit into `k`; when they do not, exactly the protected ones stay. Equal
    magnitudes are broken by position, lowest row-major index first.

    Args:
      w: Floats. A matrix that holds NaN or infinity comes back as all NaN: there is no meaningful selection,
        and it must not pass unnoticed.
      k: Int scalar, may be traced; clipped to `[0, w.size]`.
      min_per_neuron: The floor j of Gao et al. 2025.
      neuron_axis: Axis of `w` that indexes neurons; None for no floor.

    >>> keep_top_k(jnp.array([[3.0, -4.0], [0.5, 2.0]]), 2)
    Array([[ 3., -4.],
           [ 0.,  0.]], dtype=float32)
    >>> keep_top_k(jnp.array([[3.0, -4.0], [0.5, 2.0]]), 2, min_per_neuron=1, neuron_axis=0)
    Array([[ 0., -4.],
           [ 0.,  2.]], dtype=float32)
    """
    if neuron_axis is not None and not -w.ndim <= neuron_axis < w.ndim:
        raise UserError(f"neuron_axis must name an axis of an array of shape {w.shape}, got {neuron_axis}")
    axis = None if neuron_axis is None else neuron_axis % w.ndim
    (found,) = select([(w[None], jnp.asarray(k, jnp.int32)[None], axis)], min_per_neuron=min_per_neuron)
    finite = jnp.reshape(found.finite, (1,) * w.ndim)
    kept = jnp.where(found.kept[0], w, jnp.zeros_like(w))
    return jnp.where(finite, kept, jnp.full_like(w, jnp.nan))


# A stack of matrices, their budgets, and the axis of their neurons: see `select`.
Job = tuple[jax.Array, jax.Array, int | None]


class Selection(NamedTuple):
    """What stays of a stack of G matrices: a mask like the stack, and the int32 `(G,)` number of nonzeros.

    `finite`, bool `(G,)`, is false for a matrix that holds NaN or infinity, for which `kept` means nothing.
    """

    kept: jax.Array
    nonzeros: jax.Array
    finite: jax.Array


def select(jobs: Sequence[Job], *, min_per_neuron: int, replicated: bool = False) -> list[Selection]:
    """Returns what `keep_top_k` keeps of every matrix of many stacks, all found in one search.

    On TPUs, replicated matrices that fit into a core's memory are each searched there instead.

    Args:
      jobs: `(stack, k, neuron_axis)`: floats `(G, ...)`, int32 budgets `(G,)`, and the axis of a matrix that
        indexes neurons, or None.
      min_per_neuron: Nonzeros protected per neuron.
      replicated: Whether every device holds all matrices.
    """

    def in_core(stack):
        single = stack.dtype.itemsize <= 4
        return replicated and single and tpu.available() and tpu.fits_core(stack.shape)

    searched = [job for job in jobs if not in_core(job[0])]
    found = iter(_select_in_one_search(searched, min_per_neuron, replicated))
    return [_select_by_kernel(*job, min_per_neuron) if in_core(job[0]) else next(found) for job in jobs]


def _select_in_one_search(
    jobs: Sequence[Job], min_per_neuron: int, replicated: bool, key_dtype: jnp.dtype | None = None
) -> list[Selection]:
    """`select` without the kernel; for `key_dtype` see `selection.magnitude_keys`."""
    keys, floors, free, budgets = [], [], [], []
    for stack, budget, axis in jobs:
        key = selection.magnitude_keys(stack, key_dtype)
        floor = _protected(key, axis, min_per_neuron)
        keys.append(key)
        floors.append(floor)
        free.append(key if floor is None else jnp.where(floor, jnp.array(-1, key.dtype), key))
        budgets.append(budget if floor is None else budget - _count(floor))
    selections = []
    masks = _largest_per_matrix(free, budgets, replicated)
    for (stack, *_), key, floor, kept in zip(jobs, keys, floors, masks, strict=True):
        kept = kept if floor is None else kept | floor
        finite = jnp.max(key, range(1, key.ndim)) < selection.infinity_key(stack.dtype)
        selections.append(Selection(kept, _count(kept), finite))
    return selections


def _largest_per_matrix(keys: list[jax.Array], k: list[jax.Array], replicated: bool) -> list[jax.Array]:
    """`selection.largest_per_matrix` in the way that suits the platform; the result is the same."""
    plain = functools.partial(selection.largest_per_matrix, replicated=replicated)
    # On TPU this may be traced inside a Pallas kernel, where a foreign call of a CPU is not allowed.
    if cpu.enabled() and not tpu.available() and all(key.dtype == jnp.int32 for key in keys):
        return lax.platform_dependent(keys, k, cpu=cpu.largest_per_matrix, default=plain)
    return plain(keys, k)


def _select_by_kernel(stack: jax.Array, k: jax.Array, neuron_axis: int | None, min_per_neuron: int):
    """`select` of one stack, each matrix read into a TPU core once and its mask written once."""

    def keep(k, matrices):
        jobs = [(matrices, jnp.reshape(k, matrices.shape[:1]), neuron_axis)]
        # A core cannot sum 16-bit integers.
        (found,) = _select_in_one_search(jobs, min_per_neuron, True, jnp.dtype(jnp.int32))
        # A row of a tile's lanes is the least that a core writes.
        lane = lax.broadcasted_iota(jnp.int32, (1, 1, 128), 2)
        nonzeros, finite = (jnp.reshape(n.astype(jnp.int32), (-1, 1, 1)) for n in found[1:])
        return found.kept.astype(jnp.int8), jnp.where(lane == 0, nonzeros, finite)

    kept, numbers = lax.platform_dependent(k, stack, tpu=functools.partial(tpu.by_matrix, keep), default=keep)
    return Selection(kept != 0, numbers[:, 0, 0], numbers[:, 0, 1] != 0)


def _protected(keys: jax.Array, neuron_axis: int | None, min_per_neuron: int) -> jax.Array | None:
    """Returns a mask of each neuron's largest nonzero entries in `keys (G, ...)`, or None without a floor."""
    if neuron_axis is None or min_per_neuron == 0:
        return None
    along_neuron = [axis for axis in range(1, keys.ndim) if axis != neuron_axis + 1]
    return selection.largest_along(keys, min_per_neuron, along_neuron)


def _count(masks: jax.Array) -> jax.Array:
    """Returns int32 `(G,)`: how many entries of each matrix are true."""
    return jnp.sum(masks, range(1, masks.ndim), dtype=jnp.int32)
