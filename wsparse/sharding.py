"""Which device holds what: a mesh from the config, and rules from parameter paths to shardings."""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from wsparse import trees
from wsparse.config import MeshConfig
from wsparse.errors import UserError
from wsparse.taps import Tap

AXES = ("data", "fsdp", "tensor")

# A layer's matrices are divided along their neurons and channels, never along the residual stream: the
# projection protects entries of each neuron, and so finds all of a neuron on one device. The tensor axis
# comes first, so that gathering over fsdp leaves each device whole heads.
_NEURONS = ("tensor", "fsdp")

# Matched against the end of a path, so that an optimizer's moments follow their parameters. Layers are
# never sharded: a scan walks over them. Bookkeeping and scalars are replicated.
RULES: trees.Rules[P] = (
    (r".*\b(nonzeros|finite)/.*|(.*/)?(count|step)", P()),
    (r"(.*/)?blocks/attn/[qkv]/kernel|(.*/)?blocks/mlp/fc/kernel", P(None, None, _NEURONS)),
    (r"(.*/)?blocks/attn/out/kernel|(.*/)?blocks/mlp/proj/kernel", P(None, _NEURONS, None)),
    (r"(.*/)?blocks/attn/[qkv]/bias|(.*/)?blocks/mlp/fc/bias", P(None, _NEURONS)),
    (r"(.*/)?blocks/attn/out/bias|(.*/)?blocks/mlp/proj/bias", P(None, "fsdp")),
    (r"(.*/)?blocks/attn/sink", P(None, "tensor")),
    (r"(.*/)?embed/tokens", P("tensor", "fsdp")),
    (r"(.*/)?head/unembed", P("fsdp", "tensor")),
    (r"(.*/)?head/bigram", P("fsdp", "tensor")),
    (r".*", P()),
)

# Batches arrive as (accumulation step, sequence, time).
BATCH = P(None, ("data", "fsdp"), None)

# Values (batch, time, channel) inside the model, by location. Said outright, because the compiler's own
# guess follows the parameters: channels over fsdp, and an all-reduce of activations after every product.
ACTIVATIONS: trees.Rules[P] = (
    (r"attn\.[qkvy]|mlp\.post_act", P(("data", "fsdp"), None, "tensor")),
    (r".*", P(("data", "fsdp"), None, None)),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over all devices (or those given); several TPU slices share out `data`.

    Raises:
      UserError: the axes' sizes do not multiply to the number of devices, or `data` is no multiple of the
        number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh: data x fsdp x tensor must be the {len(devices)} devices, got "
            f"{config.data} x {config.fsdp} x {config.tensor}: set one axis to -1"
        )
    # Other platforms count slices too, as machines, whose order already suits; a device compiled for may
    # have no number.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if sizes[0] % slices:
        raise UserError(
            f"mesh: data must be a multiple of the {slices} slices, got {sizes[0]}: what fsdp and tensor "
            "exchange would be slow between them"
        )
    # An axis may be as long as part of an axis of the slice: 16 of 4 x 8 chips.
    if slices > 1:
        inside, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def tree_shardings(tree: Any, mesh: Mesh, rules: trees.Rules[P] = RULES) -> Any:
    """A `NamedSharding` for each leaf of a tree of arrays or shapes.

    An axis of the mesh that does not divide a leaf's dimension is dropped from that dimension.
    """

    return trees.map_with_path(
        lambda path, leaf: _divisible(leaf.shape, mesh, trees.match(rules, path)), tree
    )


def replicates(mesh: Mesh) -> bool:
    """Whether every device of the mesh holds all parameters."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] == 1


def activation_tap(mesh: Mesh) -> Tap:
    """A tap that changes no value: it keeps sequences spread over the devices throughout the model."""

    def tap(name, value):
        place = _divisible(value.shape, mesh, trees.match(ACTIVATIONS, name))
        return jax.lax.with_sharding_constraint(value, place)

    return tap


def _divisible(shape: Sequence[int], mesh: Mesh, spec: P) -> NamedSharding:
    """The sharding of `spec`, without the axes of the mesh that do not divide their dimension."""

    def dividing(size, axes):
        kept = ()
        for axis in () if axes is None else (axes,) if isinstance(axes, str) else axes:
            count = math.prod(mesh.shape[each] for each in (*kept, axis))
            kept += (axis,) if size % count == 0 else ()
        return kept[0] if len(kept) == 1 else kept or None

    return NamedSharding(
        mesh, P(*(dividing(size, axes) for size, axes in zip(shape, tuple(spec), strict=False)))
    )


def batch_sharding(mesh: Mesh, spec: P = BATCH) -> NamedSharding:
    """Sharding of a training batch: sequences over the data and fsdp axes."""
    return NamedSharding(mesh, spec)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Refuse a batch that does not divide over the devices.

    Raises:
      UserError: sequences per accumulation step are no multiple of the data-parallel devices.
    """
    parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch_size // accumulate) % parallel:
        raise UserError(
            f"batch_size / accumulate must be a multiple of the {parallel} data-parallel devices "
            f"(mesh.data x mesh.fsdp), got {batch_size} / {accumulate}"
        )


def local_rows(mesh: Mesh, batch_size: int, accumulate: int = 1) -> list[int]:
    """Which rows of a global batch this process's devices hold, ascending; one process holds all.

    Args:
      mesh: the devices of all processes, in any order.
      batch_size: rows of the global batch, `accumulate` micro-batches one after the other.
      accumulate: micro-batches; each is spread over the devices.
    """
    size = batch_size // accumulate
    spread = batch_sharding(mesh, P(BATCH[1]))
    held = np.zeros(size, bool)
    for index in spread.addressable_devices_indices_map((size,)).values():
        held[index] = True
    return np.flatnonzero(np.tile(held, accumulate)).tolist()


def put_batch(
    local: np.ndarray, mesh: Mesh, spec: P = BATCH, *, size: int | None = None
) -> jax.Array:
    """The global batch from the rows that this process holds.

    Args:
      local: the process's `local_rows`, in their order, on the axis that `spec` spreads over devices.
      mesh: the devices.
      spec: of the batch.
      size: rows on that axis over all processes; None where this process has them all.
    """
    axis = tuple(spec).index(BATCH[1])
    size = local.shape[axis] if size is None else size
    held = local_rows(mesh, size)
    shape = (*local.shape[:axis], size, *local.shape[axis + 1 :])

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[axis].indices(size)
        first = held.index(start)
        mine = slice(first, first + stop - start)
        return local[(*index[:axis], mine, *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, batch_sharding(mesh, spec), part)
