"""Show a run's circuits in a browser: `python -m wsparse.view --run=runs/tiny [--out=report.html]`.

Writes one HTML file that needs no server and no network: a table of all tasks, what their circuits share,
each circuit as a graph, and what every node does. `--with=RUN2,RUN3` puts the circuits of further runs beside
them. The circuits and what is shown of them come from `python -m wsparse.prune`.
"""

from __future__ import annotations

from collections.abc import Sequence
import logging
import pathlib
from typing import Any

from absl import flags

from wsparse import files
from wsparse.command import define_fields, given_fields, run_command
from wsparse.errors import UserError
from wsparse.viewer import contents, page, several

log = logging.getLogger(__name__)


def write(
    folder: pathlib.Path,
    out: pathlib.Path,
    options: contents.Options,
    others: Sequence[pathlib.Path] = (),
) -> pathlib.Path:
    """Write the page of the run in `folder`, and of others beside it, to the file `out`, and return `out`."""
    for each in (folder, *others):
        if not each.is_dir():
            raise UserError(f"{each} is not a run folder: name one that train has written")
    files.check_output(out)
    data = several.read([folder, *others], options)
    names = [each["run"]["name"] for each in (data, *data["others"])]
    text = page.render(data, title=f"{', '.join(names)}: circuits")
    files.write_text(out, text)
    log.info("written to %s (%.1f MB): open it in a browser", out, out.stat().st_size / 1e6)
    return out


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    folder = pathlib.Path(options.run)
    if options.source is not None:
        raise UserError(
            "the text for examples is read when evidence is measured: "
            f"python -m wsparse.prune --run={folder} --evidence --source={options.source}"
        )
    write(
        folder,
        pathlib.Path(options.out or folder / "report.html"),
        contents.Options(**given_fields(contents.Options)),
        # Its name is a word of the language.
        list(map(pathlib.Path, getattr(options, "with"))),
    )


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The folder of a training run.", required=True)
    flags.DEFINE_list("with", [], "Folders of further runs, whose circuits are shown beside the run's.")
    flags.DEFINE_string("out", None, "The HTML file; report.html in the run's folder by default.")
    flags.DEFINE_string("source", None, "Is an option of the evidence: wsparse.prune --evidence --source=...")
    define_fields(contents.Options)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
