"""What recipes need on the slices they are meant for, as Markdown: `python benchmarks/scale.py`.

Every row is `python -m wsparse.aot` of a recipe, a slice and overrides. Its JSON is kept in `runs/aot/`, and
rows whose file is there are not compiled again. No TPU is needed, only the extra `aot`; a row takes minutes.
`--rows=depth` and others say how cost grows.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags

from wsparse import files
from wsparse.command import run_command

ROWS: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "recipes": [
        ("gao:7m", "v5e-8", ()),
        ("gao:30m", "v5e-8", ()),
        ("gao:119m", "v5e-16", ()),
        ("gao:475m", "v5e-32", ()),
        ("gao:1900m", "v5e-64", ()),
    ],
    "depth": [("gao:475m", "v5e-32", (f"model.n_layer={layers}",)) for layers in (16, 32)],
    "chips": [("gao:475m", slice_, ()) for slice_ in ("v5e-16", "v5e-32", "v5e-64", "v5e-256")],
    "slices": [("gao:475m", slices, ()) for slices in ("v5e-64", "2 x v5e-32", "4 x v5e-16")],
    "generations": [("gao:475m", slice_, ()) for slice_ in ("v5e-32", "v5p-64", "v6e-32")],
    "after": [
        ("gao:1900m", "v5e-256", ()),
        ("gao:1900m", "v5e-256", ("model.n_layer=32",)),
        ("gao:1900m", "v5e-256", ("model.d_model=8192", "model.n_head=512", "mesh.fsdp=64")),
    ],
}

HEADER = (
    "| recipe | slice | mesh | memory per chip, GiB (of) | FLOPs, x model's | HBM, GiB | collectives, MiB "
    "| compute, memory, collectives (, network), ms | projection: HBM, GiB; collectives, KiB |"
)


def row(name: str, topology: str, overrides: Sequence[str]) -> str:
    """One line of the table, compiled now or read."""
    label = "_".join(
        [name.replace(":", "_"), topology.replace(" ", ""), *(each.replace("=", "") for each in overrides)]
    )
    path = pathlib.Path("runs/aot") / f"{label}.json"
    if not path.exists():
        command = [sys.executable, "-m", "wsparse.aot", f"--config={name}"]
        slices, _, one = topology.rpartition(" x ")
        command += [f"--topology={one}", f"--slices={slices or 1}", f"--out={path}"]
        # Status 1 is an answer: it does not fit.
        done = subprocess.run(
            [*command, *(f"--config.{each}" for each in overrides)], check=False, stdout=sys.stderr
        )
        if done.returncode > 1:
            raise SystemExit(done.returncode)
    report = files.read_json(path)
    title = " ".join([f"`{name}`", *overrides])
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    step = report["programs"]["train"]
    if "reason" in step:
        return f"| {title} | {topology} | {mesh} | does not fit | | | | | |"
    milliseconds = ", ".join(f"{1e3 * s:.1f}" for s in step["roofline_seconds"].values())
    cells = [
        title,
        topology,
        mesh,
        f"{step['memory']['total'] / 2**30:.2f} ({step['hbm_bytes'] / 2**30:.0f})",
        f"{step['flops_ratio']:.3f}",
        f"{step['bytes_accessed'] / 2**30:.2f}",
        f"{_moved(step['collectives']) / 2**20:.1f}",
        milliseconds,
    ]
    projection = report["programs"].get("projection")
    cells.append(
        f"{projection['bytes_accessed'] / 2**30:.2f}; {_moved(projection['collectives']) / 2**10:.1f}"
        if projection
        else ""
    )
    return f"| {' | '.join(cells)} |"


def _moved(collectives: dict[str, dict[str, int]]) -> int:
    return sum(kind["bytes"] for kind in collectives.values())


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    for kind in options.rows:
        print(f"\n{kind}\n\n{HEADER}\n|{'---|' * HEADER.count(' | ')}---|", flush=True)
        for each in ROWS[kind]:
            print(row(*each), flush=True)


if __name__ == "__main__":
    flags.DEFINE_multi_enum("rows", ["recipes"], list(ROWS), "Which tables.")
    run_command(main)
