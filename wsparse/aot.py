"""Compiles a recipe for a TPU slice, without the slice: `python -m wsparse.aot --config=... --topology=...`.

The real jitted functions (`wsparse.step.make_program`, `wsparse.circuits.search.Pruner`) are compiled by
libtpu (the extra `aot`) for devices that need not exist. Their memory and work on each chip is printed, and
written as JSON; the exit status is 1 if they do not fit into a chip's memory.

Numbers are read from the compiled program (`wsparse.hlo`), per chip and per call. The loop of a search for a
threshold is counted as often as it can run at most, so bytes and collectives of searches are upper bounds.
FLOPs are those of matrix products; the model's own count (`model.forward_flops`) is tripled for a training
step (forward, and backward twice).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
import importlib.util
import logging
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp

from wsparse import files, hlo, model, recipes, sharding
from wsparse.circuits import PairArrays, masks, search
from wsparse.circuits.settings import Settings
from wsparse.command import run_command
from wsparse.config import ModelConfig, TrainConfig
from wsparse.errors import UserError, closest, missing_extra, reason
from wsparse.step import Program, make_program

log = logging.getLogger(__name__)

# What memory is counted as -> the compiler's name for it.
_MEMORY = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp",
           "generated_code": "generated_code"}  # fmt: skip


class Chip(NamedTuple):
    """A chip of a generation, from Google's published system architecture pages.

    Bandwidths are in 10^9 bytes a second: of the device memory, of all links to other chips together (`ici`),
    and of the network between slices (`dcn`; 0 if not published). `tflops` are of bfloat16 products. `cores`
    is 2 where names of slices count cores. `platform` are settings of libtpu that make a chip one device.
    """

    hbm_gib: float
    tflops: float
    hbm_gbps: float
    ici_gbps: float
    dcn_gbps: float
    cores: int
    platform: dict[str, Any]


CHIPS = {
    "v4": Chip(32, 275, 1228, 300, 0, 2, {"chip_config_name": "megacore"}),
    "v5e": Chip(16, 197, 819, 200, 3.125, 1, {}),
    "v5p": Chip(95, 459, 2765, 600, 6.25, 2, {}),
    "v6e": Chip(32, 918, 1640, 448, 12.5, 1, {}),
}
# Number of chips of a slice -> their arrangement.
_PLANES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
          512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}  # fmt: skip
# Names in common use -> names in libtpu: "v5e-256" -> "v5e:16x16".
TOPOLOGIES = {
    f"{kind}-{chips * chip.cores}": f"{kind}:{shape}"
    for kind, chip in CHIPS.items()
    for chips, shape in (_CUBES if chip.cores == 2 else _PLANES).items()
}


class Target(NamedTuple):
    """Devices to compile for: those of one slice, or of several equal slices joined by a network."""

    name: str
    chip: Chip
    devices: list[Any]
    slices: int

    def __str__(self) -> str:
        return f"{self.slices} x {self.name}" if self.slices > 1 else self.name


def find_target(name: str, slices: int = 1) -> Target:
    """Returns the devices of a slice, or of several: "v5e-16" (as Cloud TPU names it), or "v5e:4x4".

    Raises:
      UserError: There is no such topology, or libtpu is not installed.
    """
    full = TOPOLOGIES.get(name.replace("v5litepod", "v5e"), name)
    kind, colon, shape = full.partition(":")
    if kind not in CHIPS or not colon or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"unknown topology {name!r}{closest(name, TOPOLOGIES)}; known ones are "
            f"{', '.join(TOPOLOGIES)}, or e.g. v5e:4x4 for chips in a grid"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise missing_extra("libtpu", "aot", "compiling for a TPU")
    # Before libtpu is loaded, so that it neither looks for a TPU nor excludes other processes.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # A host has four chips unless libtpu is told otherwise.
    one_chip = {"chips_per_host_bounds": (1, 1, 1)} if full.endswith(":1x1") else {}
    several = {"num_slices": slices} if slices > 1 else {}
    settings = CHIPS[kind].platform | one_chip | several
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=full, **settings)
    except Exception as error:  # libtpu's errors have no common type of their own
        raise UserError(f"libtpu knows no topology {full!r}: {reason(error)}") from error
    return Target(full, CHIPS[kind], list(topology.devices), slices)


def train_step(config: TrainConfig, program: Program) -> tuple[Any, float]:
    """Returns the lowered training step, and the model's own FLOPs of it on all chips."""
    size = config.batch_size // config.accumulate
    batch = jax.ShapeDtypeStruct((config.accumulate, size, config.model.context + 1), jnp.int32)
    lowered = program.step.lower(program.abstract_state, batch)
    return lowered, 3 * model.forward_flops(config.model, config.batch_size * config.model.context)


def prune(
    config: ModelConfig, devices: Sequence[Any], *, steps: int, pairs_per_step: int
) -> tuple[Any, float]:
    """Returns the lowered call of a `Pruner` with a trial on each chip, and the model's own FLOPs."""
    trials, rows = len(devices), 2 * pairs_per_step
    settings = Settings(steps=steps, pairs_per_step=pairs_per_step)
    pruner = search.Pruner(config, settings, parallel=trials, devices=devices)
    shape = jax.ShapeDtypeStruct
    column = shape((rows,), jnp.int32)
    lowered = pruner.lower(
        jax.eval_shape(lambda: model.init(config, jax.random.key(0))),
        PairArrays(shape((rows, config.context), jnp.int32), position=column, answer=column, other=column),
        {name: shape(mask, jnp.float32) for name, mask in masks.shapes(config).items()},
    )
    # The weights are frozen: the backward pass is the gradient of activations only.
    return lowered, 2 * trials * steps * model.forward_flops(config, rows * config.context)


def compile_report(lowered: Any, target: Target, *, flops: float) -> dict[str, Any]:
    """Compiles for a slice and returns JSON values, everything per chip and per call.

    Args:
      lowered: A `jax.stages.Lowered`.
      target: The devices.
      flops: The model's own FLOPs on all chips; 0 where they are not defined.
    """
    started = time.monotonic()
    limit = int(target.chip.hbm_gib * 2**30)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "reason": re.sub(r"\s+", " ", reason(error))[:300], "hbm_bytes": limit}
    seconds = time.monotonic() - started
    analysis = compiled.memory_analysis()
    memory = {name: getattr(analysis, f"{key}_size_in_bytes") for name, key in _MEMORY.items()}
    memory["total"] = sum(memory.values()) - 2 * memory["aliased"]
    program = hlo.parse(compiled.as_text())
    collectives = program.collectives()
    inside = [c for c in collectives if not c.between_slices]
    between = [c for c in collectives if c.between_slices]
    xla = compiled.cost_analysis() or {}
    report: dict[str, Any] = {
        "fits": memory["total"] <= limit,
        "memory": memory,
        "hbm_bytes": limit,
        "flops": program.matmul_flops(),
        "bytes_accessed": program.hbm_bytes(),
        "collectives": _by_kind(inside),
        "collectives_in_searches": _by_kind([c for c in collectives if c.in_search]),
        "collectives_between_slices": _by_kind(between),
        "compile_seconds": round(seconds, 1),
        "xla": {key: xla[key] for key in ("flops", "bytes accessed") if key in xla},
    }
    if flops:
        report["model_flops"] = flops / len(target.devices)
        report["flops_ratio"] = report["flops"] / report["model_flops"]
    report["roofline_seconds"] = {
        "compute": report["flops"] / (target.chip.tflops * 1e12),
        "memory": report["bytes_accessed"] / (target.chip.hbm_gbps * 1e9),
        # A group of a slice lies along one of its two or three axes, which has half of a chip's links.
        "collectives": _collective_seconds(inside, target.chip.ici_gbps / 2),
    }
    if target.slices > 1 and target.chip.dcn_gbps:
        report["roofline_seconds"]["network"] = _collective_seconds(between, target.chip.dcn_gbps)
    return report


def _by_kind(collectives: Sequence[hlo.Collective]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for collective in collectives:
        kinds[collective.kind]["count"] += collective.count
        kinds[collective.kind]["bytes"] += collective.count * collective.bytes
    return dict(sorted(kinds.items()))


def _collective_seconds(collectives: Sequence[hlo.Collective], gbps: float) -> float:
    """Returns seconds on rings of devices (or of slices) that each send `gbps`, 10^9 bytes a second."""
    total = 0.0
    for kind, count, moved, group, *_ in collectives:
        # A permutation has no groups: every device sends all bytes to one other.
        fraction = 1 if kind == "collective-permute" else (group - 1) / group
        rounds = 2 if kind == "all-reduce" else 1
        total += count * moved * rounds * fraction / (gbps * 1e9)
    return total


def describe(what: str, report: dict[str, Any]) -> str:
    """Returns a report as lines of text."""
    if "reason" in report:
        return f"{what}: DOES NOT FIT: {report['reason']}"
    mebi = lambda n: f"{n / 2**20:,.1f} MiB"
    memory = report["memory"]
    lines = [
        f"{what}: {'fits' if report['fits'] else 'DOES NOT FIT'}: {mebi(memory['total'])} of "
        f"{mebi(report['hbm_bytes'])} per chip (compiled in {report['compile_seconds']} s)",
        "  memory       " + ", ".join(f"{k} {mebi(v)}" for k, v in memory.items() if k != "total"),
    ]
    if "flops_ratio" in report:
        lines.append(
            f"  FLOPs        {report['flops']:.4g}, {report['flops_ratio']:.3f} times the model's "
            f"{report['model_flops']:.4g}"
        )
    lines.append(f"  HBM traffic  {mebi(report['bytes_accessed'])}")
    for title, key in (
        ("collectives", "collectives"),
        ("of searches", "collectives_in_searches"),
        ("over network", "collectives_between_slices"),
    ):
        kinds = [f"{kind} {v['count']} x, {mebi(v['bytes'])}" for kind, v in report[key].items()]
        lines.append(f"  {title:<12} {'; '.join(kinds) or 'none'}")
    roofline = {k: f"{1e3 * v:.2f} ms" for k, v in report["roofline_seconds"].items()}
    lines.append("  at best      " + ", ".join(f"{k} {v}" for k, v in roofline.items()))
    return "\n".join(lines)


def run(config: TrainConfig, target: Target, what: str, *, steps: int, pairs_per_step: int) -> dict[str, Any]:
    """Compiles the functions and logs their needs; returns the report that the command saves."""
    mesh = sharding.make_mesh(config.mesh, target.devices)
    log.info(
        f"{target}: {len(target.devices)} chips of {target.chip.hbm_gib} GiB, mesh "
        + " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    )
    jobs = {}
    if what in ("train", "all"):
        program = make_program(config, mesh)
        jobs["train"] = train_step(config, program)
        if config.sparsity.sparse:
            jobs["projection"] = program.project.lower(program.abstract_state.params), 0.0
    if what in ("prune", "all"):
        options = {"steps": steps, "pairs_per_step": pairs_per_step}
        jobs["prune"] = prune(config.model, target.devices, **options)
    programs = {}
    for name, (lowered, flops) in jobs.items():
        programs[name] = compile_report(lowered, target, flops=flops)
        log.info(describe(name, programs[name]))
    return {
        "topology": target.name,
        "slices": target.slices,
        "chips": len(target.devices),
        "mesh": dict(mesh.shape),
        "fits": all(report["fits"] for report in programs.values()),
        "programs": programs,
    }


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    recipe, config = recipes.from_flag()
    jax.config.update("jax_platforms", "cpu")
    # By default the platform that JAX runs on would decide.
    os.environ.setdefault("WSPARSE_TPU_KERNELS", "1")
    target = find_target(options.topology, options.slices)
    name = f"{recipe}_{re.sub(r'[: ]+', '_', str(target))}.json"
    out = pathlib.Path(options.out or pathlib.Path("runs/aot") / name)
    # Before compiling, which takes minutes.
    files.make_folder(out.parent)
    files.check_output(out)
    sizes = {"steps": options.steps, "pairs_per_step": options.pairs_per_step}
    report = {"config": recipe} | run(config, target, options.what, **sizes)
    files.write_json(out, report)
    log.info(f"wrote {out}")
    return 0 if report["fits"] else 1


def _define_flags() -> None:
    recipes.define_flag(text="Recipe to compile")
    flags.DEFINE_string("topology", None, "A slice, e.g. v5e-256 or v5e:16x16.", required=True)
    flags.DEFINE_integer("slices", 1, "How many such slices.", lower_bound=1)
    flags.DEFINE_enum("what", "train", ["train", "prune", "all"], "Which functions to compile.")
    flags.DEFINE_integer("steps", 300, "Steps of a pruning run.", lower_bound=1)
    flags.DEFINE_integer("pairs_per_step", 64, "Pairs drawn for a pruning step.", lower_bound=1)
    flags.DEFINE_string("out", None, "The JSON file; runs/aot/CONFIG_TOPOLOGY.json by default.")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
