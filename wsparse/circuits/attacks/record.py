"""The attack file, `attack.json` beside `circuit.json`. Reading it needs no jax."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, Literal

from wsparse import files
from wsparse.config import to_dict

JSON, PICTURE = "attack.json", "attack.png"
SCHEMA = 1

Kind = Literal["neutral", "own", "other"]
KINDS: tuple[Kind, ...] = ("neutral", "own", "other")
MEANING = {
    "neutral": "numbers assigned to names",
    "own": "finished statements of the prompt's own side",
    "other": "finished statements of the other side",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Mean losses with texts of one kind and length before the prompts, in nats.

    Attributes:
      statements: Statements of a text.
      tokens: Mean number of its tokens.
      predicted: Loss that the circuit predicts.
      circuit, model: Loss that circuit and model have.
      moved: Loss of the circuit if the prompts stood as far back and no head read the text.
      worst: The three losses with the text of which the prediction is worst.
    """

    kind: Kind
    statements: int
    tokens: float
    predicted: float
    circuit: float
    model: float
    moved: float
    worst: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well predictions hold, over all prompts and texts, for the circuit or for the model.

    Attributes:
      of: "circuit" or "model".
      correlation: Of predicted and measured changes of the margin, with a 95% bootstrap interval over pairs.
      explained: 1 less the squared error of predicted changes over that of "nothing changes".
      wrong_where_predicted: Share of wrong answers where the circuit predicts one; None where it never does.
      wrong_elsewhere: Share of wrong answers where it predicts none: the control.
      n_predicted_wrong: Prompts with texts of which a wrong answer is predicted.
    """

    of: str
    correlation: float
    low: float
    high: float
    explained: float
    wrong_where_predicted: float | None
    wrong_elsewhere: float | None
    n_predicted_wrong: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What a head of the circuit brings about with the longest texts of one kind.

    Attributes:
      share: Mean share of its attention that goes to the text.
      change: What the circuit's predicted loss grows by if this head alone reads the text.
    """

    kind: Kind
    layer: int
    head: int
    share: float
    change: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """Predictions of a circuit beside what circuit and model do.

    Attributes:
      circuit, model: Digests.
      n_texts: Texts of all kinds and lengths.
      alone: Losses of circuit and model on the prompts alone.
      texts: A text of each kind, for the reader.
    """

    task: str
    circuit: str
    model: str
    n_texts: int
    pairs: int
    alone: tuple[float, ...]
    points: list[Point]
    agreements: list[Agreement]
    heads: list[Head]
    texts: dict[str, str]
    options: dict[str, Any]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes it into a circuit's folder."""
        files.write_json(pathlib.Path(folder) / JSON, {"schema": SCHEMA, **to_dict(self)})


def text_of(done: Attack) -> str:
    """Returns the attack as a table with a summary."""
    lines = [
        f"{done.task}: {done.n_texts} texts before {done.pairs} pairs of prompts; loss alone: circuit "
        f"{done.alone[0]:.3f}, model {done.alone[1]:.3f}",
        "",
        f"{'':28}{'mean of texts':>39}   {'the text predicted worst':>30}",
        f"{'text':<9}{'statements':>11}{'tokens':>8}{'moved':>9}"
        + 2 * f"{'predicted':>12}{'circuit':>9}{'model':>9}",
    ]
    for point in done.points:
        means = (point.predicted, point.circuit, point.model)
        numbers = "".join("{:12.3f}{:9.3f}{:9.3f}".format(*losses) for losses in (means, point.worst))
        lines.append(f"{point.kind:<9}{point.statements:>11}{point.tokens:>8.0f}{point.moved:>9.3f}{numbers}")
    lines += ["", "moved: the circuit where prompts stand as far back, and no head reads the text.", ""]
    for a in done.agreements:
        lines.append(
            f"{a.of}: predicted and measured changes correlate by {a.correlation:.2f} "
            f"({a.low:.2f} to {a.high:.2f}); {max(a.explained, 0):.0%} of the change is explained; "
            f"wrong where a wrong answer is predicted: {_percent(a.wrong_where_predicted)} of "
            f"{a.n_predicted_wrong}, elsewhere {_percent(a.wrong_elsewhere)}"
        )
    moving = sorted(done.heads, key=lambda head: -abs(head.change))[:6]
    lines += [
        f"layer {head.layer}, head {head.head} gives {head.share:.0%} of its attention to {head.kind} text, "
        f"which changes the circuit's loss by {head.change:+.3f}"
        for head in moving
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"
