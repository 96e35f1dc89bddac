"""Selections on TPU cores: blocks are read once into VMEM, searched there, and written once.

A search passes over its data some tens of times. XLA runs each pass over device memory; here a Pallas kernel
holds a block of rows (or a whole matrix) in a core's own memory meanwhile. The kernel's body is the plain-JAX
selection that its caller passes, so that the two agree to the bit.

Kernels are used where the default platform is a TPU; `WSPARSE_TPU_KERNELS=0` or `=1` in the environment
decides otherwise (1 is for compiling ahead of time; other platforms then still run the plain JAX).
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
import os
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# float32 values of one block; with keys, masks and double buffering a kernel needs about eight times that.
_BLOCK = 1 << 18
# The same for a whole matrix, whose kernel asks for more of the core's memory than the default.
_MATRIX = 1 << 21
_MATRIX_VMEM_BYTES = 96 << 20


def available() -> bool:
    """Returns whether kernels are to be used in programs traced now."""
    setting = os.environ.get("WSPARSE_TPU_KERNELS", "")
    return setting != "0" and (setting == "1" or jax.default_backend() == "tpu")


def by_rows(select: Callable[..., jax.Array], *arrays: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns `select(*blocks)` of blocks of rows: a function of each row by itself, like its last argument.

    Over the devices of the mesh in context (`jax.sharding.use_abstract_mesh`) rows are sharded by their
    leading axes; rows that were divided along their width come together first.

    Args:
      select: `(rows, width)` blocks -> a block like the last.
      *arrays: `(..., width)` of one shape, 16 or 32-bit.
      interpret: Whether to run the kernel's body as plain JAX, on any platform.
    """
    spec = P(*partition(*arrays[0].shape[:-1]))
    call = functools.partial(_rows, select, interpret)
    return over_mesh(call, (spec,) * len(arrays), spec)(*arrays)


def _rows(select, interpret, *arrays):
    last = arrays[-1]
    width = last.shape[-1]
    flat = [jnp.reshape(array, (-1, width)) for array in arrays]
    rows = flat[0].shape[0]
    # Whole tiles of 32 rows suit every dtype.
    block = min(max(_BLOCK // width // 32 * 32, 32), rows)
    spec = pl.BlockSpec((block, width), lambda i: (i, 0))

    def body(*refs):
        *sources, target = refs
        target[...] = select(*(source[...] for source in sources))

    result = pl.pallas_call(
        body,
        grid=(pl.cdiv(rows, block),),
        in_specs=[spec] * len(flat),
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((rows, width), last.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="wsparse_by_rows",
    )(*flat)
    return jnp.reshape(result, last.shape)


def fits_core(shape: tuple[int, ...]) -> bool:
    """Returns whether `by_matrix` can hold one matrix of a stack `(G, ...)`."""
    return len(shape) == 3 and math.prod(shape[1:]) <= _MATRIX


def by_matrix(
    select: Callable[..., tuple[jax.Array, ...]], k: jax.Array, stack: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, ...]:
    """Returns `select(k[g], stack[g])` of every matrix, each held as a whole in a core's memory.

    Args:
      select: `(int32 scalar, (1, m, n))` -> arrays `(1, ..., ...)` of three axes.
      k: int32 `(G,)`.
      stack: `(G, m, n)` where `fits_core`; every device of the mesh in context has all of it.
      interpret: As in `by_rows`.
    """
    call = functools.partial(_matrices, select, interpret)
    return over_mesh(call, (P(), P()), P())(k, stack)


def _matrices(select, interpret, k, stack):
    def body(k_ref, source, *targets):
        results = select(k_ref[pl.program_id(0)], source[...])
        for target, result in zip(targets, results, strict=True):
            target[...] = result

    def spec(shape):
        return pl.BlockSpec((1, *shape[1:]), lambda i, k_ref: (i, 0, 0))

    results = jax.eval_shape(select, k[0], stack[:1])
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=stack.shape[:1],
            in_specs=[spec(stack.shape)],
            out_specs=tuple(spec(result.shape) for result in results),
        ),
        out_shape=tuple(
            jax.ShapeDtypeStruct((*stack.shape[:1], *result.shape[1:]), result.dtype) for result in results
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_MATRIX_VMEM_BYTES),
        interpret=interpret,
        name="wsparse_by_matrix",
    )(k, stack)


def over_mesh(call: Callable[..., Any], in_specs: tuple[P, ...], out_specs: P) -> Callable[..., Any]:
    """Returns a kernel's call on every device of the mesh in context: XLA cannot partition kernels itself."""
    if math.prod(_mesh_axes().values()) == 1:
        return call
    return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def partition(*sizes: int, last: tuple[str, ...] = ()) -> list[tuple[str, ...] | None]:
    """Returns for each of an array's axes the axes of the mesh in context over which it is sharded.

    An axis of the mesh goes to the first of `sizes` that it divides evenly, beside those that went there;
    one that `last` names to the last such.
    """
    axes = _mesh_axes()
    parts: list[tuple[str, ...]] = [()] * len(sizes)
    for name, devices in axes.items():
        places = range(len(sizes))
        for place in reversed(places) if name in last else places:
            if sizes[place] % (devices * math.prod(axes[axis] for axis in parts[place])) == 0:
                parts[place] += (name,)
                break
    return [part or None for part in parts]


def _mesh_axes() -> dict[str, int]:
    """Returns the sizes of the axes of the mesh in context that are not the caller's own."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}
