"""The audit file, `audit.json` beside `circuit.json`: what was tested of a circuit. Reading needs no jax."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, Literal

from wsparse import files
from wsparse.config import from_dict, to_dict
from wsparse.errors import located

SCHEMA = 1

Verdict = Literal["passed", "failed", "reported", "not run"]
"""Whether a test's criterion is met. "reported" has none: its numbers are for the reader to judge."""

_JSON = "audit.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number of a test.

    Attributes:
      name: What it is: "mean of 64 draws, r = 0.5".
      value: The number for the circuit; None where there is none, such as a size that was not reached.
      low: Lower end of its 95% bootstrap interval over pairs (or seeds); None where nothing is resampled.
      high: Upper end.
      control: The same number for the test's control.
      unit: "nats", "share", "nodes", ...
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    control: float | None = None
    unit: str = "nats"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A plot of a test: `y` over `x`, and the same for the control."""

    x_label: str
    y_label: str
    x: list[float]
    y: list[float]
    control: list[float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestResult:
    """One test of a circuit.

    Attributes:
      name: Key of the test, "partial_ablation"; `tests.run` writes it, and the title.
      title: Its heading.
      question: What is asked, one sentence.
      procedure: How it was measured: how many pairs, draws, steps, on which split.
      control: What the control is; "" for none.
      criterion: The rule behind the verdict; "" for none.
      verdict: Whether the criterion is met.
      reason: Why a test was not run; "" where it was.
    """

    # pytest collects classes of this name.
    __test__ = False

    name: str = ""
    title: str = ""
    question: str
    procedure: str
    verdict: Verdict
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    control: str = ""
    criterion: str = ""
    reason: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """All tests of one circuit.

    Attributes:
      run: Name of the run's folder.
      step: Optimizer steps behind the model.
      model: Digest of the model's parameters.
      data: Digest of the tokens it was trained on.
      circuit: Digest of the circuit.
      wsparse: Version of this package.
      status: `Circuit.status`.
      objective: Objective that its masks were learned with.
      loss: Its task loss on the report split under mean ablation, in nats.
      target: Loss that it was to reach.
      pairs: Pairs of the report split that numbers are from where a test does not say otherwise.
      options: Options of the audit.
      tests: In the order of the report.
      seconds: Time of the whole audit.
      command: Command line that makes it again.
      held_to: What the circuit was to answer, see `settings.Settings`.
    """

    task: str
    form: str
    run: str
    step: int
    model: str
    data: str
    circuit: str
    wsparse: str
    status: str
    objective: str
    loss: float
    target: float
    nodes: int
    edges: int
    pairs: int
    options: dict[str, Any]
    tests: list[TestResult]
    seconds: float
    command: str = ""
    held_to: str = "labels"

    def test(self, name: str) -> TestResult | None:
        """Returns the test of a name, or None."""
        return next((test for test in self.tests if test.name == name), None)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes it into a circuit's folder."""
        files.write_json(pathlib.Path(folder) / _JSON, {"schema": SCHEMA, **to_dict(self)})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, circuit: str = "") -> Audit | None:
        """Returns the audit in a circuit's folder; None where there is none, or it is another circuit's.

        Raises:
          UserError: The file is damaged.
        """
        path = pathlib.Path(folder) / _JSON
        if not path.exists():
            return None
        with located(f"{path} is damaged: ", "; run python -m wsparse.audit again"):
            values = files.read_json(path)
            if values.pop("schema", None) != SCHEMA or circuit not in ("", values.get("circuit")):
                return None
            return from_dict(cls, values)
