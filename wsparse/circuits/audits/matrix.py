"""How much does the verdict depend on what stands in for closed nodes?"""

from __future__ import annotations

import dataclasses

import numpy as np

from wsparse.circuits.ablation import CONSTANTS, Ablation
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult

_VARIANTS = {
    "": Ablation(),
    "strict edges": Ablation(edges="strict"),
    "frozen norms": Ablation(norm="frozen"),
    "AbsTopK among kept nodes": Ablation(contenders="kept"),
    "all three": Ablation(edges="strict", norm="frozen", contenders="kept"),
}
_LEARNED = ("optimal", "all three")


def matrix(context: Context) -> TestResult:
    """Returns the circuit's loss under every kind of constant, and every stricter or laxer variant."""
    measurements = []
    for constants in CONSTANTS:
        for variant, ablation in _VARIANTS.items():
            # Each part by itself with means alone; constants learned for each would hide what differs.
            if (constants != "mean" and variant not in ("", "all three")) or (constants, variant) == _LEARNED:
                continue
            name = f"{constants}, {variant}" if variant else constants
            measurements.append(_loss(context, name, dataclasses.replace(ablation, constants=constants)))
    target = context.circuit.target
    means = [m for m in measurements if m.name.startswith("mean")]
    return TestResult(
        question="Does the loss depend on what closed nodes, cut edges and norms are while the circuit runs?",
        procedure=f"{context.n_pairs} pairs of the report split. Closed nodes are at their mean over "
        "pretraining text, at 0, at their mean over other prompts of the task, at constants learned for the "
        "circuit on other prompts, at values of random pretraining text at the same place, or at those of "
        "the pair's other prompt. With strict edges every weight but the circuit's carries a constant; with "
        "frozen norms the norms' scales are the whole model's.",
        control="The model with every node ablated in the same way.",
        criterion=f"With means, every variant's loss is at most the target, {target:g}.",
        verdict="passed" if all(m.value is not None and m.value <= target for m in means) else "failed",
        measurements=measurements,
    )


def norm_scale(context: Context) -> TestResult:
    """Returns the circuit's loss with norms of the ablated stream, and held at the model's scales."""
    live, frozen = (_loss(context, f"{norm} norms", Ablation(norm=norm)) for norm in ("live", "frozen"))
    target = context.circuit.target
    assert live.value is not None and frozen.value is not None
    return TestResult(
        question="Does the circuit rely on the ablated stream being smaller or larger than the model's?",
        procedure=f"{context.n_pairs} pairs of the report split; frozen norms divide by what they divide by "
        "in the whole model, token by token.",
        control="The model with every node ablated in the same way.",
        criterion=f"The loss with frozen norms is at most the target, {target:g}.",
        verdict="passed" if frozen.value <= target else "failed",
        measurements=[live, frozen],
    )


def _loss(context: Context, name: str, ablation: Ablation) -> Measurement:
    """Returns the circuit's loss under an ablation, beside that of no nodes at all."""
    losses_B = context.losses(context.logits(ablation=ablation))
    nothing_U = np.zeros_like(context.nodes_U)
    edges = context.weights(ablation)
    nothing_B = context.losses(context.logits(nothing_U, edges, ablation=ablation))
    return context.mean(name, losses_B, context.rng(name), control=float(nothing_B.mean()))
