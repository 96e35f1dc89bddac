"""Checks a machine, or all machines of a job, before money is spent: `python -m wsparse.doctor`.

    python -m wsparse.doctor --config=configs/small.py --workdir=runs/small

Prints one line per check, OK or FAIL and what to do; the exit status is 1 if a check failed. In a job of
several processes all of them run the checks together, and process 0 prints the results of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.metadata
import logging
import math
import os
import platform
import shutil
import socket
import time
from typing import Any
import uuid

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from packaging.requirements import Requirement

from wsparse import errors, processes, recipes, sharding
from wsparse.command import run_command
from wsparse.config import MeshConfig, TrainConfig
from wsparse.errors import UserError
from wsparse.ops import cpu
from wsparse.step import init_state, make_program

log = logging.getLogger(__name__)

# Checkpoints are written beside the old ones, and data and metrics need a little.
_SPARE_BYTES = 1e9


# Returns a description of the healthy state; raises `UserError` otherwise.
Check = Callable[[], str]


def examine(checks: Mapping[str, Check]) -> bool:
    """Runs checks in all processes together, logs the outcomes, and returns whether all passed in all."""
    healthy = True
    for name, check in checks.items():
        outcomes = processes.gather(_outcome(check))
        failed = [(p, line) for p, line in enumerate(outcomes) if not line.startswith("OK")]
        healthy &= not failed
        process, line = failed[0] if failed else (0, outcomes[0])
        where = f" (process {process} of {len(outcomes)})" if failed and len(outcomes) > 1 else ""
        status, text = line.split(" ", 1)
        log.info(f"{status:<4}  {name}: {text}{where}")
    return healthy


def _outcome(check: Check) -> str:
    try:
        return f"OK {check()}"
    except UserError as problem:
        return f"FAIL {problem}"
    # A check that raises has found a problem too; the others still run.
    except Exception as error:
        return f"FAIL {_brief(error)}"


def _brief(error: Exception) -> str:
    return ": ".join(dict.fromkeys((type(error).__name__, errors.reason(error))))


def versions() -> str:
    """Checks that Python and the required packages have suitable versions, the same in all processes."""
    installed, wrong = [f"python {platform.python_version()}"], []
    try:
        requirements = map(Requirement, importlib.metadata.requires("wsparse") or [])
    except importlib.metadata.PackageNotFoundError:
        requirements = []
        wrong.append("to be installed itself, so that its requirements are known")
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "nothing"
        if version == "nothing" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier}, found {version}")
        installed.append(f"{requirement.name} {version}")
    # Before an error is raised here, since all processes must take part.
    processes.require_same(str(sorted(installed)), "python and its packages")
    if wrong:
        raise UserError(f"wsparse needs {'; '.join(wrong)}: pip install -U -e '.[cpu]' (or tpu, cuda)")
    shown = ("python", "jax", "orbax-checkpoint")
    return ", ".join(package for package in installed if package.split()[0] in shown)


def job() -> str:
    """Checks that every process of the job answers."""
    hosts = processes.gather(socket.gethostname())
    return f"{len(hosts)} on {len(set(hosts))} machines, coordinated by {hosts[0]}"


def devices() -> str:
    """Checks that JAX uses the accelerators of the machine, and that all devices are alike."""
    backend, local, total = jax.default_backend(), jax.local_device_count(), jax.device_count()
    missed = [kind for kind in processes.accelerators() if backend == "cpu"]
    if missed and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
        raise UserError(
            f"this machine has {missed[0]} devices, and jax uses the CPU: pip install 'wsparse[{missed[0]}]'"
        )
    if total != local * jax.process_count():
        raise UserError(
            f"{local} of {total} devices are on this one of {jax.process_count()} processes: give every "
            "process equally many"
        )
    kinds = {device.device_kind for device in jax.devices()}
    if len(kinds) > 1:
        raise UserError(f"the devices differ: {', '.join(sorted(kinds))}")
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    size = f", {memory / 2**30:.0f} GiB each" if memory else ""
    return f"{total} x {kinds.pop()} ({backend}), {local} a process{size}"


def collectives() -> str:
    """Checks a sum over all devices."""
    mesh = sharding.make_mesh(MeshConfig())
    count = mesh.size
    rows = np.asarray(sharding.local_rows(mesh, count), np.int32)
    sharded = sharding.put_batch(rows, mesh, P(sharding.BATCH[1]), size=count)
    start = time.monotonic()
    total = int(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(sharded))
    if total != count * (count - 1) // 2:
        raise UserError(f"the devices' numbers 0 to {count - 1} sum to {total}: do not train here")
    return f"a sum over {count} devices is right ({time.monotonic() - start:.1f} s with compiling)"


def storage(workdir: epath.Path) -> str:
    """Checks that the folder can be written, read and cleaned up, and is the same for all processes."""
    # Folders made here are removed again, so that a run still finds an empty place.
    try:
        made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    except ImportError as error:
        raise UserError(
            f"cannot use {workdir}: {errors.reason(error)} (for gs://, pip install 'wsparse[gcs]')"
        ) from error
    probe = workdir / processes.gather(f".doctor-{uuid.uuid4().hex}")[0]

    def write():
        # Not `files.make_folder`, which knows no buckets.
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("wsparse")
        if probe.read_text() != "wsparse":
            raise OSError("a file does not hold what was written to it")

    def clean_up():
        probe.unlink(missing_ok=True)
        for path in made:
            # Another process, or a person, may have put something there meanwhile.
            if path.exists() and not any(path.iterdir()):
                path.rmdir()

    start = time.monotonic()
    reason = processes.gather(_failure(write))[0]
    blind = [] if reason else processes.blind_processes(probe)
    seconds = time.monotonic() - start
    left = _failure(clean_up)
    if reason := reason or left:
        raise UserError(f"cannot use {workdir}: {reason}: check its permissions and the path")
    if blind:
        raise UserError(
            f"{workdir} is not the same folder for all processes: process {blind[0]} does not see what "
            "process 0 wrote; use a network file system, or mount a bucket"
        )
    mount = "; training needs it mounted as a folder" if "://" in str(workdir) else ""
    return f"{workdir} can be written, read and deleted, by all processes ({seconds:.1f} s){mount}"


def _failure(action: Callable[[], None]) -> str:
    """Returns why process 0, which alone tries, cannot do something; empty if it can."""
    if jax.process_index() == 0:
        try:
            action()
        # Drivers of buckets raise errors of their own kinds.
        except Exception as error:
            return _brief(error)
    return ""


def disk(workdir: epath.Path, config: TrainConfig | None) -> str:
    """Checks that there is room for the checkpoints of the run."""
    if "://" in str(workdir):
        return "the size of a bucket is not limited"
    existing = next(path for path in (workdir, *workdir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if config is None:
        return f"{free / 1e9:.1f} GB free"
    state = jax.eval_shape(functools.partial(init_state, config))
    one = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # The oldest is deleted only after the newest is complete.
    need = (config.keep_checkpoints + 1) * one + _SPARE_BYTES
    if free < need:
        raise UserError(
            f"{free / 1e9:.1f} GB free under {existing}, {config.keep_checkpoints + 1} checkpoints need "
            f"{need / 1e9:.1f} GB: free some, or lower keep_checkpoints"
        )
    return f"{free / 1e9:.1f} GB free, checkpoints need {need / 1e9:.1f} GB"


def step(config: TrainConfig) -> str:
    """Checks that a training step of the config compiles, fits, runs, and gives a finite loss."""
    # As in training; here, since devices that do not answer are a failure of this check.
    cpu.enable()
    mesh = sharding.make_mesh(config.mesh)
    program = make_program(config, mesh)
    size = config.batch_size // config.accumulate
    shape = (config.accumulate, size, config.model.context + 1)
    windows = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    batch = sharding.put_batch(windows[:, sharding.local_rows(mesh, size)], mesh, size=size)
    start = time.monotonic()
    compiled = program.step.lower(program.abstract_state, batch).compile()
    compiling = time.monotonic() - start
    state, _ = compiled(program.init(), batch)
    jax.block_until_ready(state)
    start = time.monotonic()
    state, report = compiled(state, batch)
    loss = float(report["loss"])
    seconds = time.monotonic() - start
    if not math.isfinite(loss):
        raise UserError(f"the loss of random tokens is {loss}: lower optimizer.learning_rate")
    axes = " x ".join(f"{axis} {length}" for axis, length in mesh.shape.items())
    memory = ""
    if analysis := compiled.memory_analysis():
        used = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        used += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        memory = f"{used / 2**30:.2f} GiB a device; "
    return (
        f"compiled in {compiling:.1f} s, then {seconds:.3f} s a step over {axes}; "
        f"{memory}loss of random tokens {loss:.2f}"
    )


def _checks(config: TrainConfig | None, workdir: epath.Path | None) -> dict[str, Check]:
    checks = {"versions": versions, "processes": job, "devices": devices, "collectives": collectives}
    if workdir is not None:
        checks["storage"] = functools.partial(storage, workdir)
        checks["disk"] = functools.partial(disk, workdir, config)
    if config is not None:
        checks["step"] = functools.partial(step, config)
    return checks


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    config = None if options.config is None else recipes.from_flag()[1]
    workdir = None if options.workdir is None else epath.Path(options.workdir)
    processes.initialize_processes()
    healthy = examine(_checks(config, workdir))
    log.info("ready" if healthy else "not ready: fix the checks marked FAIL")
    return 0 if healthy else 1


def _define_flags() -> None:
    recipes.define_flag(text="Recipe to compile, and to run one step of")
    flags.DEFINE_string("workdir", None, "Folder of the run, or the URL of a bucket.")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
