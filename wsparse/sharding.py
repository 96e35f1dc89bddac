"""Which device holds what: a mesh from the config, and rules from parameter paths to shardings."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import logging
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from wsparse import trees
from wsparse.config import MeshConfig
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS, LOCATIONS
from wsparse.taps import Tap

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

# A layer's matrices are divided along their neurons and channels, never along the residual stream: the
# projection protects entries of each neuron, and so finds all of a neuron on one device. The tensor axis
# comes first, so that gathering over fsdp leaves each device whole heads.
_NEURONS = ("tensor", "fsdp")

# Matched against the end of a path, so that an optimizer's moments follow their parameters. Layers are
# never sharded: a scan walks over them. Strict: a parameter of the model that is not mentioned is an error.
RULES: trees.Rules[P] = (
    (r".*\b(nonzeros|finite)/.*|(.*/)?(count|step|rms)", P()),
    *(
        (f"(.*/)?{c.kernel}", P(None, None, _NEURONS) if c.neuron_axis else P(None, _NEURONS, None))
        for c in CONNECTIONS
    ),
    *((f"(.*/)?{c.bias}", P(None, _NEURONS if c.neuron_axis else "fsdp")) for c in CONNECTIONS),
    (r"(.*/)?blocks/attn/sink", P(None, "tensor")),
    (r"(.*/)?embed/tokens", P("tensor", "fsdp")),
    (r"(.*/)?head/(unembed|bigram)", P("fsdp", "tensor")),
    (r"(.*/)?(blocks/\w+_norm|head/norm)/(gain|bias)", P()),
    (r"(.*/)?(embed/(positions|sinusoids)|head/logits_bias)", P()),
)

# Batches arrive as (accumulation step, sequence, time).
BATCH = P(None, ("data", "fsdp"), None)

# Values (batch, time, channel) inside the model, by location. Stated explicitly, because the compiler's own
# guess follows the parameters: channels over fsdp, and an all-reduce of activations after every product.
ACTIVATIONS = {
    location: P(("data", "fsdp"), None, "tensor" if kind.channels in ("heads", "neurons") else None)
    for location, kind in LOCATIONS.items()
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `config` over all devices, or over those given; TPU slices divide `data`.

    Raises:
      UserError: The axes' sizes do not multiply to the number of devices, or `data` is not a multiple of
        the number of slices.
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
        make = mesh_utils.create_hybrid_device_mesh
        placed = make(inside, between, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for each leaf of a tree of arrays or shapes; strict like `trees.match`.

    A mesh axis that does not divide a leaf's dimension is dropped from that dimension, which is logged once.
    """

    def place(path, leaf):
        return NamedSharding(mesh, _divisible(path, leaf.shape, mesh, trees.match(RULES, path)))

    return trees.map_with_path(place, tree)


def activation_tap(mesh: Mesh) -> Tap:
    """Returns a tap that changes no value: it keeps sequences sharded over the devices inside the model."""

    def tap(location, value):
        spec = _divisible(str(location), value.shape, mesh, ACTIVATIONS[location])
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))

    return tap


def _divisible(path: str, shape: Sequence[int], mesh: Mesh, spec: P) -> P:
    """Returns `spec` without the mesh axes that do not divide their dimension."""
    entries: list[str | tuple[str, ...] | None] = []
    for dimension, (size, entry) in enumerate(zip(shape, tuple(spec), strict=False)):
        kept: tuple[str, ...] = ()
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            count = math.prod(mesh.shape[name] for name in (*kept, axis))
            if size % count == 0:
                kept += (axis,)
            else:
                # A parameter's moments are not worth a line of their own.
                name = re.sub(r".*/(?=(embed|blocks|head)/)", "", path)
                _log_dropped(name, dimension, size, axis, mesh.shape[axis])
        entries.append(kept[0] if len(kept) == 1 else kept or None)
    return P(*entries)


@functools.cache
def _log_dropped(name: str, dimension: int, size: int, axis: str, devices: int) -> None:
    log.info(
        f"{name} is not sharded over {axis}: its dimension {dimension}, of size {size}, "
        f"does not divide over {devices} devices"
    )


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raises `UserError` for a batch that does not divide over the devices."""
    parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch_size // accumulate) % parallel:
        raise UserError(
            f"batch_size / accumulate must be a multiple of the {parallel} data-parallel devices "
            f"(mesh.data x mesh.fsdp), got {batch_size} / {accumulate}"
        )


def local_rows(mesh: Mesh, batch_size: int, accumulate: int = 1) -> list[int]:
    """Returns the rows of a global batch that this process's devices hold, ascending.

    The batch is `accumulate` micro-batches one after the other, each sharded over the devices of the mesh.
    """
    size = batch_size // accumulate
    rows = NamedSharding(mesh, P(BATCH[1]))
    held = np.zeros(size, bool)
    for index in rows.addressable_devices_indices_map((size,)).values():
        held[index] = True
    return np.flatnonzero(np.tile(held, accumulate)).tolist()


def put_batch(local: np.ndarray, mesh: Mesh, spec: P = BATCH, *, size: int | None = None) -> jax.Array:
    """Returns the global batch, given this process's `local_rows` on the axis that `spec` shards.

    `size` is the number of rows on that axis over all processes; None where this process has them all.
    """
    axis = tuple(spec).index(BATCH[1])
    shape = (*local.shape[:axis], size or local.shape[axis], *local.shape[axis + 1 :])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), local, shape)
