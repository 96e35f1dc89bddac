"""Does the circuit follow the model when the prompts are of another kind?"""

from __future__ import annotations

import itertools

import numpy as np

from wsparse.circuits import tasks
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult
from wsparse.circuits.pairs import TaskBatch
from wsparse.errors import UserError

# Pairs for each value of a knob; the longest list of values of one knob; pairs from which values are learned.
_PAIRS, _MOST_VALUES, _DRAWN = 16, 6, 64
# Share of equal choices that passes, and the accuracy of the model above which it is asked for.
_AGREEMENT, _ACCURATE = 0.9, 0.9


def shift(context: Context) -> TestResult:
    """Returns how often circuit and model choose alike, for every value of every knob of the generator."""
    if not context.task.has_knobs:
        raise UserError(f"task {context.task.name!r} has no knobs: its pairs come from a list")
    measurements, agreements = [], []
    for knob, value in _values(context):
        try:
            shifted = context.on(_pairs_of(context, {knob: value}))
        except UserError:
            continue
        model_B = shifted.margins(shifted.model_logits) > 0
        circuit_B = shifted.margins(shifted.logits(context.nodes_U, context.remaining)) > 0
        agreement = float(np.mean(model_B == circuit_B))
        if model_B.mean() >= _ACCURATE:
            agreements.append(agreement)
        measurements.append(
            Measurement(
                name=f"{knob} = {value}: circuit and model choose alike",
                value=agreement,
                control=float(model_B.mean()),
                unit="share",
            )
        )
    if not measurements:
        raise UserError(f"task {context.task.name!r} makes too few pairs of any one value of a knob")
    return TestResult(
        question="Does the circuit choose as the model does, whatever the distractors, distance and depth "
        "are?",
        procedure=f"{_PAIRS} new pairs of the report split for each value of each knob of the task's "
        "generator.",
        control="The model's own accuracy on these prompts.",
        criterion=f"At least {_AGREEMENT:.0%} of choices agree at every value at which the model is right on "
        f"at least {_ACCURATE:.0%}.",
        verdict=("passed" if min(agreements) >= _AGREEMENT else "failed") if agreements else "reported",
        measurements=measurements,
    )


def _values(context: Context) -> list[tuple[str, int]]:
    """Returns the knobs of the task, each with the values that are drawn most often."""
    batch = tasks.build(
        context.task, context.run.tokenizer, _DRAWN, context.options.seed + 1, split="report",
        max_tokens=context.config.context,
    )  # fmt: skip
    knobs = sorted({knob for drawn in batch.knobs for knob in drawn})
    values = []
    for knob in knobs:
        drawn = [pair[knob] for pair in batch.knobs if knob in pair]
        common = sorted(set(drawn), key=lambda value: (-drawn.count(value), value))[:_MOST_VALUES]
        values.append([(knob, value) for value in sorted(common)])
    return list(itertools.chain(*(pairs for pairs in values if len(pairs) > 1)))


def _pairs_of(context: Context, knobs: dict[str, int]) -> TaskBatch:
    """Returns new pairs of these knobs, no longer than the report split's."""
    return tasks.build(
        context.task, context.run.tokenizer, _PAIRS, context.options.seed + 1, split="report",
        max_tokens=context.pairs.report.tokens.shape[1], knobs=knobs,
    )  # fmt: skip
