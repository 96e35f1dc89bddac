"""Show a run's circuits in a browser: `python -m wsparse.view --run=runs/tiny [--out=report.html]`.

Writes one HTML file that needs no server and no network: a table of all tasks, each circuit as a graph, and
what every node does. The circuits come from `python -m wsparse.prune`.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import os
import pathlib
from typing import Any

from absl import flags

from wsparse import files, runs
from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.viewer import collect, page


def write(folder: pathlib.Path, out: pathlib.Path, options: collect.Options) -> pathlib.Path:
    """Write the page of the run in `folder` to the file `out`.

    Raises:
      UserError: see `collect.collect`; or the folder is no run, or `out` cannot be written.
    """
    runs.read_config(folder)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(
            f"cannot write {out}: --out must be a file in a folder that can be written to"
        )
    say = functools.partial(print, flush=True)
    data = collect.collect(folder, options, say)
    text = page.render(data, title=f"{data['run']['name']}: circuits")
    with files.replacing(out) as part:
        part.write_text(text, encoding="utf-8")
    say(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return out


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    del argv
    given: Any = flags.FLAGS
    folder = pathlib.Path(given.run)
    options = collect.Options(
        task=tuple(given.task),
        source=given.source,
        pairs=given.pairs,
        max_nodes=given.max_nodes,
    )
    try:
        write(folder, pathlib.Path(given.out or folder / "report.html"), options)
    except KeyboardInterrupt:
        print("interrupted: nothing was written")
        return 130
    return 0


def _define_flags() -> None:
    defaults = collect.Options()
    flags.DEFINE_string("run", None, "The folder of a training run.", required=True)
    flags.DEFINE_string("out", None, "The HTML file; report.html in the run's folder by default.")
    flags.DEFINE_list(
        "task",
        list(defaults.task),
        "Names, or all: every task that has a circuit. A task of your own needs its .jsonl or .py file "
        "beside it: all,mine.jsonl.",
    )
    flags.DEFINE_string(
        "source", defaults.source, "Text to take examples from; the run's held-out text by default."
    )
    flags.DEFINE_integer("pairs", defaults.pairs, "Pairs of each task to show token by token.")
    flags.DEFINE_integer(
        "max_nodes", defaults.max_nodes, "Nodes of a circuit to show, the most important ones."
    )


if __name__ == "__main__":
    _define_flags()
    run_command(main)
