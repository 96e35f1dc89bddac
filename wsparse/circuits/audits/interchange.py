"""Do nodes carry the decision: what happens when they have the values of another prompt?

Shapes: U nodes of the model in one vector, B rows of pairs, T time, L layer, N nodes of a location.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, taps
from wsparse.circuits import masks
from wsparse.circuits.ablation import answer_logits
from wsparse.circuits.audits import random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import TestResult
from wsparse.circuits.pairs import PairArrays, margins
from wsparse.errors import UserError

# Share of decisions that must stay, or flip.
_STAY, _FLIP = 0.9, 0.9


def interchange(context: Context) -> TestResult:
    """Returns how often decisions stay when nodes take the values of a prompt of the same side, or flip.

    Raises:
      UserError: There is one pair alone.
    """
    if context.n_pairs < 2:
        raise UserError("it needs the prompts of a second pair: --pairs=48")
    rng = context.rng("interchange")
    same_B, other_B = _sources(context, rng)
    random_U = random_sets.matched(context.nodes_U, context.activity, context.config, rng)
    right_B = context.margins(context.model_logits) > 0

    def decisions(nodes_U: np.ndarray, source_B: np.ndarray) -> np.ndarray:
        """Returns whether the answer is preferred with the nodes' values of other prompts, `(B,)`."""
        where = {name: jnp.asarray(m) for name, m in masks.unflatten(nodes_U, context.config).items()}
        report = context.pairs.report
        source = report._replace(tokens=report.tokens[source_B], position=report.position[source_B])
        found = _patched(context.subject.params, report, source, where, config=context.subject.config)
        return np.asarray(found) > 0

    stays_B = decisions(context.nodes_U, same_B) == right_B
    flips_B = decisions(context.nodes_U, other_B) != right_B
    stays = context.mean(
        "decisions that stay with values of the same side", stays_B, rng, unit="share",
        control=float(np.mean(decisions(random_U, same_B) == right_B)),
    )  # fmt: skip
    flips = context.mean(
        "decisions that flip with values of the other side", flips_B, rng, unit="share",
        control=float(np.mean(decisions(random_U, other_B) != right_B)),
    )  # fmt: skip
    assert stays.value is not None and flips.value is not None
    return TestResult(
        question="Does the model decide by what the circuit's nodes carry?",
        procedure=f"{context.n_pairs} pairs of the report split. In the whole model, all nodes of the "
        "circuit take the values that they have on another prompt, aligned from the prompts' ends: one of "
        "the same side (the decision should stay), and the pair's other prompt (it should flip).",
        control="A random set of as many nodes of each location and layer, matched by activation.",
        criterion=f"At least {_STAY:.0%} stay, and at least {_FLIP:.0%} flip.",
        verdict="passed" if stays.value >= _STAY and flips.value >= _FLIP else "failed",
        measurements=[stays, flips],
    )


def _sources(context: Context, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every row, the same side of another pair of nearest length, and its partner's row."""
    length_P2 = np.asarray(context.pairs.report.position).reshape(-1, 2)
    same_P2 = np.empty_like(length_P2)
    for side in (0, 1):
        length_P = length_P2[:, side] + 0.5 * rng.random(len(length_P2))
        apart_PP = np.abs(length_P[:, None] - length_P[None])
        np.fill_diagonal(apart_PP, np.inf)
        same_P2[:, side] = 2 * apart_PP.argmin(axis=1) + side
    rows_P2 = np.arange(length_P2.size).reshape(-1, 2)
    return same_P2.ravel(), rows_P2[:, ::-1].ravel()


@functools.partial(jax.jit, static_argnames="config")
def _patched(params, pairs: PairArrays, source: PairArrays, where, *, config) -> jax.Array:
    """Returns the margins of `pairs`, `(B,)`, with nodes at their values on `source`, aligned at the ends."""
    _, acts = model.forward(params, source.tokens, config)
    time = pairs.tokens.shape[1]
    shift_B1 = (source.position - pairs.position)[:, None]
    place_BT = jnp.arange(time)[None] + shift_B1
    there_BT = (place_BT >= 0) & (place_BT <= source.position[:, None])

    place_1BT1 = jnp.clip(place_BT, 0, time - 1)[None, ..., None]
    given = {name: jnp.take_along_axis(acts[name], place_1BT1, axis=2) for name in where}
    chosen = {name: m_LN[:, None, None] & there_BT[None, ..., None] for name, m_LN in where.items()}
    logits_BV = answer_logits(params, config, pairs, taps.patch(given, chosen))
    return margins(logits_BV, pairs.answer, pairs.other)
