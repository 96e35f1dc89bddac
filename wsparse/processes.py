"""The processes of a job: how they join, agree on a text, and see one file system."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import logging
import os
import pathlib
import platform
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from wsparse.errors import UserError, reason

_PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LONGEST = 1024


def initialize_processes() -> None:
    """Join the other processes of the job, where the environment says that there are any.

    Slurm, Open MPI, Cloud TPU slices and GKE are recognized by jax itself. Elsewhere, and before those,
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say so.
    One process on its own needs nothing, also where the machine has a TPU or what looks like one. Must come
    before the first use of a device.

    Raises:
      UserError: The variables contradict each other, or the others cannot be joined.
    """
    arguments = _arguments_from_environment()
    named = bool(arguments) or _names_others()
    if jax.distributed.is_initialized() or not (named or _may_be_a_slice()):
        return
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        # What jax says where neither the environment nor the cloud knows of a job.
        if not named and "coordinator_address should be defined" in str(error):
            return
        raise UserError(
            f"cannot join the other processes: {reason(error)}; every process needs the "
            f"same {_PROCESS_VARIABLES[0]} and {_PROCESS_VARIABLES[1]}, and its own {_PROCESS_VARIABLES[2]}"
        ) from error
    if jax.process_index() != 0:
        # All processes do the same, and the first one logs it.
        logging.getLogger("wsparse").setLevel(logging.WARNING)


def gather(text: str) -> list[str]:
    """Returns the `text` of every process, in the order of processes, each cut to 1 kB.

    All processes must call this together.
    """
    if jax.process_count() == 1:
        return [text]
    padded = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def require_same(text: str, what: str) -> None:
    """Raises `UserError` when processes do not agree on `text`, which the message calls `what`."""
    texts = gather(text)
    other = next((process for process, copy in enumerate(texts) if copy != texts[0]), None)
    if other is not None:
        raise UserError(
            f"{what} must be the same in all {len(texts)} processes, but that of process {other} "
            "differs from that of process 0: give all of them the same files"
        )


def blind_processes(path: epath.PathLike, *, seconds: float = 60) -> list[int]:
    """Returns the processes that do not see a file of process 0 in time: none on shared storage."""
    deadline = time.monotonic() + seconds
    path = epath.Path(path)
    # The first call waits for the writer.
    gather("")
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return [p for p, sees in enumerate(gather(str(path.exists()))) if sees != "True"]


def accelerators() -> list[str]:
    """Returns the accelerators that this machine seems to have, "tpu" or "cuda", without asking jax."""
    kinds = {"tpu": ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"), "cuda": ("/dev/nvidia[0-9]*",)}
    return [kind for kind, patterns in kinds.items() if any(map(glob.glob, patterns))]


def machine() -> str:
    """Returns what this job runs on, such as "2 cores of Intel(R) Xeon(R) Processor" or "8 x TPU v5e"."""
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    names = [platform.processor() or platform.machine()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    n_cores = len(affinity(0))
    return f"{n_cores} core{'s' * (n_cores != 1)} of {names[0]}"


def _arguments_from_environment() -> dict[str, Any]:
    """Returns the arguments of `jax.distributed.initialize`, which itself reads only the first variable."""
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


def _names_others() -> bool:
    """Returns whether the environment names other processes, in variables that jax reads."""
    environment = os.environ
    return (
        # Only a step that srun began has the list: in a batch script of Slurm itself, python is alone.
        ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def _may_be_a_slice() -> bool:
    """Returns whether this may be a host of a Cloud TPU slice, which only the metadata server tells."""
    may_use_tpu = "cpu" not in os.environ.get("JAX_PLATFORMS", "") and importlib.util.find_spec("libtpu")
    return bool(may_use_tpu) and "tpu" in accelerators()
