"""Does the circuit hold when closed nodes are let through in part, at random or by an adversary?

Shapes: U nodes of the model in one vector, D draws.
"""

from __future__ import annotations

import numpy as np

from wsparse.circuits import adversary
from wsparse.circuits.audits import random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Curve, Measurement, TestResult
from wsparse.circuits.pairs import first
from wsparse.circuits.subnetwork import Subnetwork

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_STEPS = (5, 10, 20, 40)
_BUDGETS = (1, 10, 40)
# Steps after which the criterion is judged.
_JUDGED = 20
# Pairs on which partial ablation's many draws are scored, and draws for a control.
_DRAWN_PAIRS, _CONTROL_DRAWS = 24, 16


def partial_ablation(context: Context) -> TestResult:
    """Returns losses with closed nodes let through in part, at random."""
    nodes_U, n_draws, n_pairs = context.nodes_U, context.options.draws, min(_DRAWN_PAIRS, context.n_pairs)
    rng = context.rng("partial_ablation")
    random_U = random_sets.same_sizes(nodes_U, context.config, rng)
    scorer, pairs = context.subject.scorer, first(context.pairs.report, n_pairs)
    found, control = (Subnetwork(scorer, kept_U, context.remaining) for kept_U in (nodes_U, random_U))
    measurements, means, controls = [], [], []
    for strength in _STRENGTHS:
        drawn_DU = strength * rng.random((n_draws, nodes_U.size), np.float32)
        losses_D = adversary.losses(found, pairs, drawn_DU)
        control_D = adversary.losses(control, pairs, drawn_DU[:_CONTROL_DRAWS])
        means.append(float(losses_D.mean()))
        controls.append(float(control_D.mean()))
        worst, worst_control = (_worst(losses) for losses in (losses_D, control_D))
        at = f"{n_draws} draws up to r = {strength:g}"
        measurements += [
            Measurement(name=f"mean of {at}", value=means[-1], control=controls[-1]),
            Measurement(name=f"worst 5% of {at}", value=worst, control=worst_control),
        ]
    bound = context.settings.robust_target
    largest = max(m.value for m in measurements[1::2] if m.value is not None)
    return TestResult(
        question="Does the circuit hold when every other node is let through a little, at random?",
        procedure=f"{n_pairs} pairs of the report split. A draw gives every closed node a strength "
        "between 0 (its mean) and r, the same for all prompts; worst 5% is the mean of the largest losses.",
        control="A random node set of the same size at every location and layer, in 16 draws.",
        criterion=f"The worst 5% stay at or below {bound:g} at every r.",
        verdict="passed" if largest <= bound else "failed",
        measurements=measurements,
        curves=[
            Curve(x_label="r", y_label="mean loss (nats)", x=list(_STRENGTHS), y=means, control=controls)
        ],
    )


def adversarial_steps(context: Context) -> TestResult:
    """Returns the largest loss that sign-gradient ascent finds in so many steps."""
    rng, report = context.rng("adversarial_steps"), context.pairs.report
    found = Subnetwork(context.subject.scorer, context.nodes_U, context.remaining)
    attack = adversary.ascend(found, report, seed=context.options.seed, steps=max(_STEPS))
    # As many random guesses as the adversary has steps: what following the gradient adds.
    drawn_DU = rng.random((adversary.STARTS * max(_STEPS), context.nodes_U.size), np.float32)
    guessed = np.maximum.accumulate(adversary.losses(found, report, drawn_DU))
    values = [float(attack.worst[n // adversary.INTERVAL]) for n in _STEPS]
    controls = [float(guessed[adversary.STARTS * n - 1]) for n in _STEPS]
    measurements = [
        Measurement(name=f"largest loss in {n} steps", value=value, control=control)
        for n, value, control in zip(_STEPS, values, controls, strict=True)
    ]
    bound = context.settings.robust_target
    return TestResult(
        question="Can strengths of closed nodes be chosen with which the circuit fails?",
        procedure=f"{context.n_pairs} pairs of the report split. The adversary chooses a strength in [0, 1] "
        f"for every closed node, the same for all prompts, by steps of {adversary.STEP_SIZE:g} along the "
        f"sign of the gradient of the loss, from {adversary.STARTS} starts: the whole model, and random "
        "strengths, by turns of zeros and ones and of numbers between them.",
        control="The largest loss of as many random draws of strengths as all starts have steps.",
        criterion=f"At most {bound:g} nats after {_JUDGED} steps.",
        verdict="passed" if values[_STEPS.index(_JUDGED)] <= bound else "failed",
        measurements=measurements,
        curves=[
            Curve(
                x_label="steps",
                y_label="largest loss (nats)",
                x=[float(n) for n in _STEPS],
                y=values,
                control=controls,
            )
        ],
    )


def adversarial_budgets(context: Context) -> TestResult:
    """Returns the largest loss of the model when an adversary ablates a few nodes outside the circuit."""
    rng, scorer = context.rng("adversarial_budgets"), context.subject.scorer
    nodes_U, report = context.nodes_U, context.pairs.report
    found, outside = Subnetwork(scorer, nodes_U, scorer.weights), np.flatnonzero(~nodes_U)
    values, controls = [], []
    for budget in _BUDGETS:
        values.append(adversary.ablate_few(found, report, budget=budget).loss)
        strengths_DU = np.ones((_JUDGED, nodes_U.size), np.float32)
        for strengths_U in strengths_DU:
            strengths_U[rng.choice(outside, min(budget, outside.size), replace=False)] = 0
        controls.append(float(adversary.losses(found, report, strengths_DU).max()))
    bound = context.settings.robust_target
    return TestResult(
        question="Does the model keep the task when a few chosen nodes outside the circuit are ablated?",
        procedure=f"{context.n_pairs} pairs of the report split. The model runs whole, but for at most so "
        f"many nodes outside the circuit, which are at their means; {adversary.STEPS} sets are tried, chosen "
        "by first-order estimates summed over the sets before.",
        control=f"The largest loss of {_JUDGED} random sets of as many nodes outside the circuit.",
        criterion=f"At most {bound:g} nats at every budget.",
        verdict="passed" if max(values) <= bound else "failed",
        measurements=[
            Measurement(name=f"largest loss without {budget} nodes", value=value, control=control)
            for budget, value, control in zip(_BUDGETS, values, controls, strict=True)
        ],
        curves=[
            Curve(
                x_label="nodes ablated",
                y_label="largest loss (nats)",
                x=[float(budget) for budget in _BUDGETS],
                y=values,
                control=controls,
            )
        ],
    )


def _worst(losses_D: np.ndarray) -> float:
    """Returns the mean of the largest 5% of losses, at least one."""
    n = max(1, round(len(losses_D) / 20))
    return float(np.sort(losses_D)[-n:].mean())
