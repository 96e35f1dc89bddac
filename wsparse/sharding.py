"""Which device holds what: a mesh from the config, and rules from parameter paths to shardings."""

from __future__ import annotations

from collections.abc import Sequence
import glob
import importlib.util
import math
import os
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from wsparse import trees
from wsparse.config import MeshConfig
from wsparse.errors import UserError
from wsparse.nodes import Tap

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


def initialize_processes() -> None:
    """Join the other processes of the job, where the environment says that there are any.

    Slurm, Open MPI, Cloud TPU slices and GKE are recognized by jax itself. Elsewhere, and before those,
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say so.
    One process on its own needs nothing. Must come before the first use of a device.

    Raises:
      UserError: the variables contradict each other, or the others cannot be joined.
    """
    given = _given_processes()
    if jax.distributed.is_initialized() or not (given or _in_a_cluster()):
        return
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes: {str(error).splitlines()[0]}; every process needs the "
            f"same {_PROCESS_VARIABLES[0]} and {_PROCESS_VARIABLES[1]}, and its own {_PROCESS_VARIABLES[2]}"
        ) from error


def gather(text: str) -> list[str]:
    """`text` of every process, in the order of processes; what is longer than 1 kB is cut.

    All processes must call this together.
    """
    if jax.process_count() == 1:
        return [text]
    padded = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def require_same(text: str, what: str) -> None:
    """Refuse to go on when processes do not agree on `text`.

    Raises:
      UserError: naming `what` and the first process that differs.
    """
    everywhere = gather(text)
    other = next((p for p, each in enumerate(everywhere) if each != everywhere[0]), None)
    if other is not None:
        raise UserError(
            f"{what} must be the same in all {len(everywhere)} processes, but that of process {other} "
            "differs from that of process 0: give all of them the same files"
        )


def blind_processes(path: epath.PathLike, *, seconds: float = 60) -> list[int]:
    """The processes that do not see a file which process 0 has written; empty where storage is shared.

    Args:
      path: of the file.
      seconds: how long a network's file system may take to show it.
    """
    deadline = time.monotonic() + seconds
    path = epath.Path(path)
    # The first call waits for the writer.
    gather("")
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return [p for p, sees in enumerate(gather(str(path.exists()))) if sees != "True"]


def accelerators() -> list[str]:
    """The kinds of accelerator that this machine seems to have, "tpu" or "cuda", without asking jax."""
    kinds = {"tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"), "cuda": ("/dev/nvidia[0-9]*",)}
    return [kind for kind, patterns in kinds.items() if any(map(glob.glob, patterns))]


_PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LONGEST = 1024


def _given_processes() -> dict[str, Any]:
    """What the variables say, as arguments of `jax.distributed.initialize`, which reads only the first."""
    address, count, index = (os.environ.get(name) for name in _PROCESS_VARIABLES)
    if count is None and index is None:
        return {} if address is None else {"coordinator_address": address}
    try:
        number, total = int(index or ""), int(count or "")
    except ValueError:
        number, total = 0, 0
    if not 0 <= number < total or address is None or ":" not in address:
        raise UserError(
            f"{', '.join(_PROCESS_VARIABLES)} must be host:port, the number of processes and one of 0, 1, "
            f"... below it, got {address}, {count}, {index}"
        )
    return {"coordinator_address": address, "num_processes": total, "process_id": number}


def _in_a_cluster() -> bool:
    """Whether jax would find other processes, or a slice of a pod, by itself."""
    environment = os.environ
    # Only a step that srun began has this: in a batch script of Slurm itself, python is alone.
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    return (
        slurm
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        # The hosts of a Cloud TPU slice know each other from the metadata server alone.
        or ("tpu" in accelerators() and _may_use_tpu())
    )


def _may_use_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and "cpu" not in os.environ.get(
        "JAX_PLATFORMS", ""
    )
