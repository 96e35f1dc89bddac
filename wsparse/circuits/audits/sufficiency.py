"""Does the circuit alone do what the model does? And does the model lose the task without it?"""

from __future__ import annotations

import numpy as np
import scipy.special

from wsparse.circuits.audits import statistics
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult


def sufficiency(context: Context) -> TestResult:
    """Returns losses, accuracy, divergences and agreement of the circuit under mean ablation."""
    rng = context.rng("sufficiency")
    circuit_BV, model_BV = context.logits(), context.model_logits
    nothing_BV = context.logits(np.zeros_like(context.nodes_U))
    report = context.pairs.report
    both_B2 = np.stack([report.answer, report.other], axis=1)
    two = lambda logits_BV: np.take_along_axis(logits_BV, both_B2, axis=1)
    right_B = context.margins(model_BV) > 0
    same_B = (context.margins(circuit_BV) > 0) == right_B
    constant_B = (context.margins(nothing_BV) > 0) == right_B

    def row(name, of_circuit_B, of_control_B=None, unit="nats"):
        control = None if of_control_B is None else float(np.mean(of_control_B))
        return context.mean(name, of_circuit_B, rng, control=control, unit=unit)

    measurements = [
        row("task loss", context.losses(circuit_BV), context.losses(nothing_BV)),
        row("task loss of the model", context.losses(model_BV)),
        row("accuracy", context.margins(circuit_BV) > 0, context.margins(nothing_BV) > 0, "share"),
        row("KL from model to circuit over the two candidates", *_kl(two, model_BV, circuit_BV, nothing_BV)),
        row("KL from model to circuit over the vocabulary", *_kl(_all, model_BV, circuit_BV, nothing_BV)),
        row("same choice as the model", same_B, constant_B, "share"),
    ]
    if not right_B.all():
        wrong_P = same_B[~right_B].astype(float)
        low, high = statistics.interval(wrong_P, rng, context.options.resamples)
        name = f"same choice where the model is wrong ({wrong_P.size} prompts)"
        measurements.append(
            Measurement(
                name=name, value=float(wrong_P.mean()), low=low, high=high, unit="share",
                control=float(constant_B[~right_B].mean()),
            )
        )  # fmt: skip
    bound = measurements[0].high
    assert bound is not None
    return TestResult(
        question="Does the circuit do the task with every other node at its mean?",
        procedure=f"{len(right_B) // 2} pairs of the report split, every closed node at its mean over "
        "pretraining text.",
        control="The model with every node at its mean.",
        criterion=f"The upper end of the loss's interval is at most the target, {context.circuit.target:g}.",
        verdict="passed" if bound <= context.circuit.target else "failed",
        measurements=measurements,
    )


def _all(logits_BV: np.ndarray) -> np.ndarray:
    return logits_BV


def _kl(of, reference_BV: np.ndarray, *others_BV: np.ndarray) -> list[np.ndarray]:
    """Returns the divergence of every row from the reference's distribution to others'."""
    reference = scipy.special.log_softmax(of(reference_BV), axis=1)
    return [
        np.sum(np.exp(reference) * (reference - scipy.special.log_softmax(of(other_BV), axis=1)), axis=1)
        for other_BV in others_BV
    ]
