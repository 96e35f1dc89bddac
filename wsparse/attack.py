"""Mislead a model by what its circuit says: `python -m wsparse.attack --run=runs/tiny --task=if_equals`.

A circuit that is how the model decides says what makes the model fail: text before the prompt takes a share
of a head's attention, and dilutes or outvotes what the head reads. From runs of the circuit in which text and
prompt never meet (`wsparse.circuits.attacks.dilution`) the loss is predicted for texts of three kinds:
*neutral* statements, finished statements of the prompt's *own* side and of the *other* side. Then circuit and
model are measured on the prompts with these texts before them.

Writes `attack.json` and `attack.png` into the circuit's folder, `RUN/circuits/TASK/`.
"""

from __future__ import annotations

from collections.abc import Sequence
import logging
import pathlib
from typing import Any

from absl import flags
import numpy as np

from wsparse import plots, runs
from wsparse.circuits import evidence
from wsparse.circuits.attacks.measure import Options, attack
from wsparse.circuits.attacks.record import KINDS, MEANING, PICTURE, Attack, text_of
from wsparse.circuits.circuit import folder_of
from wsparse.command import define_fields, given_fields, run_command
from wsparse.ops import cpu

log = logging.getLogger(__name__)

# What is drawn: a field of points, its label, the loss alone that its line begins with, and its style.
_LINES = (
    ("circuit", "circuit", 0, "C0o-"),
    ("predicted", "predicted", 0, "k--"),
    ("moved", "predicted, text not read", 0, "k:"),
    ("model", "model", 1, "C1s-"),
)


def _draw(done: Attack, path: pathlib.Path) -> None:
    with plots.figure(path, 1, len(KINDS), figsize=(11, 3.6), sharey=True) as axes:
        for axis, kind in zip(axes, KINDS, strict=True):
            points = [point for point in done.points if point.kind == kind]
            tokens = [0.0, *(point.tokens for point in points)]
            for name, label, alone, style in _LINES:
                losses = [done.alone[alone], *(getattr(point, name) for point in points)]
                axis.plot(tokens, losses, style, label=label)
            axis.axhline(np.log(2), color="0.7", linewidth=0.8)
            axis.set_title(f"{kind}: {MEANING[kind]}", fontsize=9)
            axis.set_xlabel("tokens before the prompt")
        axes[0].set_ylabel("task loss, nats")
        axes[0].legend(frameon=False)


def attack_run(
    folder: pathlib.Path, names: Sequence[str], options: Options, *, run: runs.Run | None = None
) -> list[Attack]:
    """Attacks with circuits of a run, writes the results into their folders, and returns them.

    Raises:
      UserError: A task or circuit does not exist, or a circuit belongs to other parameters, or its folder
        cannot be written to; nothing is computed then.
    """
    run, chosen = evidence.opened(folder, names, "the attack", run=run)
    done = []
    for circuit, task in chosen:
        result = attack(run, circuit, task, options)
        place = folder_of(folder, circuit.full_name)
        _draw(result, place / PICTURE)
        result.save(place)
        log.info("%s\nwritten to %s\n", text_of(result), place / PICTURE)
        done.append(result)
    return done


def main(argv: Sequence[str]) -> None:
    """Runs the command; see the module's docstring."""
    del argv
    flag: Any = flags.FLAGS
    options = Options(**given_fields(Options))
    cpu.enable()
    attack_run(pathlib.Path(flag.run), flag.task, options)


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "Folder of a training run.", required=True)
    flags.DEFINE_list("task", ["all"], "Names, .jsonl or .py files, or all that have a circuit.")
    define_fields(Options)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
