"""The tests of an audit, in the order of its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time

from wsparse.circuits.audits import (
    attention_patterns,
    interchange,
    matrix,
    minimality,
    necessity,
    node_roles,
    nonsense,
    seeds,
    selectivity,
    shift,
    strengths,
    sufficiency,
)
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import TestResult
from wsparse.errors import UserError, closest, quoted

TESTS: dict[str, Callable[[Context], TestResult]] = {
    "sufficiency": sufficiency.sufficiency,
    "necessity": necessity.necessity,
    "matrix": matrix.matrix,
    "norm_scale": matrix.norm_scale,
    "partial_ablation": strengths.partial_ablation,
    "adversarial_steps": strengths.adversarial_steps,
    "adversarial_budgets": strengths.adversarial_budgets,
    "node_roles": node_roles.node_roles,
    "attention_patterns": attention_patterns.attention_patterns,
    "interchange": interchange.interchange,
    "minimality": minimality.minimality,
    "selectivity": selectivity.selectivity,
    "shift": shift.shift,
    "stability": seeds.stability,
    "exclusion": seeds.exclusion,
    "nonsense": nonsense.nonsense,
    "random_weights": nonsense.random_weights,
}


def check_names(names: Sequence[str]) -> None:
    """Checks that names are those of tests.

    Raises:
      UserError: There is none, or one is unknown.
    """
    known = f"tests are {', '.join(TESTS)}"
    if not names:
        raise UserError(f"tests must name at least one test; {known}")
    for name in names:
        if name not in TESTS:
            raise UserError(f"no test {quoted(name)}{closest(name, TESTS)}; {known}")


def run(context: Context, names: Sequence[str]) -> Iterator[TestResult]:
    """Yields the results of tests of these names, in the order of the report.

    A test that cannot be made of this circuit is "not run", with the reason.
    """
    for name, test in TESTS.items():
        if name not in names:
            continue
        started = time.monotonic()
        try:
            result = test(context)
        except UserError as error:
            result = TestResult(question="", procedure="", verdict="not run", reason=str(error))
        seconds = round(time.monotonic() - started, 1)
        yield dataclasses.replace(result, name=name, title=CLAIMS[name].title, seconds=seconds)
