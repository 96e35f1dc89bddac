"""Does the circuit hold when closed nodes are let through in part, at random or by an adversary?

Shapes: U nodes of the model in one vector, D draws, B rows of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse.circuits import ablation, adversary
from wsparse.circuits.ablation import Ablation, Background
from wsparse.circuits.audits import random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Curve, Measurement, TestResult
from wsparse.circuits.pairs import first, pairs_loss

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
    measurements, means, controls = [], [], []
    for strength in _STRENGTHS:
        drawn_DU = strength * rng.random((n_draws, nodes_U.size), np.float32)
        losses_D = _drawn_losses(context, nodes_U, drawn_DU, n_pairs)
        control_D = _drawn_losses(context, random_U, drawn_DU[:_CONTROL_DRAWS], n_pairs)
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
    rng = context.rng("adversarial_steps")
    attack = _ascend(context, context.nodes_U, max(_STEPS))
    # As many random guesses as the adversary has steps: what following the gradient adds.
    drawn_DU = rng.random((max(_STEPS), context.nodes_U.size), np.float32)
    guessed = np.maximum.accumulate(_drawn_losses(context, context.nodes_U, drawn_DU, context.n_pairs))
    worst = attack.worst
    measurements = [
        Measurement(name=f"largest loss in {n} steps", value=float(worst[n]), control=float(guessed[n - 1]))
        for n in _STEPS
    ]
    bound = context.settings.robust_target
    return TestResult(
        question="Can strengths of closed nodes be chosen with which the circuit fails?",
        procedure=f"{context.n_pairs} pairs of the report split. The adversary chooses a strength in [0, 1] "
        f"for every closed node, the same for all prompts, by steps of {adversary.STEP_SIZE:g} along the "
        "sign of the gradient of the loss, from random ones.",
        control="The largest loss of as many random draws of strengths.",
        criterion=f"At most {bound:g} nats after {_JUDGED} steps.",
        verdict="passed" if worst[_JUDGED] <= bound else "failed",
        measurements=measurements,
        curves=[
            Curve(
                x_label="steps",
                y_label="largest loss (nats)",
                x=[float(n) for n in _STEPS],
                y=[float(worst[n]) for n in _STEPS],
                control=[float(guessed[n - 1]) for n in _STEPS],
            )
        ],
    )


def adversarial_budgets(context: Context) -> TestResult:
    """Returns the largest loss of the model when an adversary ablates a few nodes outside the circuit."""
    rng, scorer = context.rng("adversarial_budgets"), context.subject.scorer
    nodes_U, background = context.nodes_U, context.background(Ablation())
    outside = np.flatnonzero(~nodes_U)
    values, controls = [], []
    for budget in _BUDGETS:
        attack = adversary.ablate_few(
            scorer.params,
            context.config,
            context.pairs.report,
            nodes_U,
            scorer.weights,
            background,
            budget=budget,
        )
        values.append(attack.loss)
        strengths_DU = np.ones((_JUDGED, nodes_U.size), np.float32)
        for strengths_U in strengths_DU:
            strengths_U[rng.choice(outside, min(budget, outside.size), replace=False)] = 0
        losses_D = _drawn_losses(context, nodes_U, strengths_DU, context.n_pairs, scorer.weights)
        controls.append(float(losses_D.max()))
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


def _ascend(context: Context, nodes_U: np.ndarray, steps: int) -> adversary.Attack:
    return adversary.ascend(
        context.subject.scorer.params,
        context.config,
        context.pairs.report,
        nodes_U,
        context.remaining,
        context.background(Ablation()),
        seed=context.options.seed,
        steps=steps,
    )


def _drawn_losses(
    context: Context, nodes_U: np.ndarray, strengths_DU: np.ndarray, n_pairs: int, edges: Any = None
) -> np.ndarray:
    """Returns the loss of a node set on the first pairs under every draw of strengths, `(D,)`."""
    edges = context.remaining if edges is None else edges
    run = functools.partial(
        _losses,
        context.subject.scorer.params,
        first(context.pairs.report, n_pairs),
        jnp.asarray(nodes_U, jnp.float32),
        jax.tree.map(jnp.asarray, edges),
        context.background(Ablation()),
        config=context.config,
    )
    # Of one size, so that one function is compiled.
    chunks = _chunks(strengths_DU)
    return np.concatenate([np.asarray(run(jnp.asarray(chunk)))[:size] for chunk, size in chunks])


_CHUNK = 8


def _chunks(strengths_DU: np.ndarray) -> Iterable[tuple[np.ndarray, int]]:
    for start in range(0, len(strengths_DU), _CHUNK):
        chunk = strengths_DU[start : start + _CHUNK]
        yield np.resize(chunk, (_CHUNK, strengths_DU.shape[1])), len(chunk)


@functools.partial(jax.jit, static_argnames="config")
def _losses(params, pairs, kept_U, edges, background: Background, strengths_DU, *, config) -> jax.Array:
    def loss(strengths_U):
        logits_BV = ablation.circuit_logits(
            params, config, pairs, kept_U, edges, background, strengths=strengths_U
        )
        return pairs_loss(logits_BV, pairs)

    return jax.lax.map(loss, strengths_DU)


def _worst(losses_D: np.ndarray) -> float:
    """Returns the mean of the largest 5% of losses, at least one."""
    n = max(1, round(len(losses_D) / 20))
    return float(np.sort(losses_D)[-n:].mean())
