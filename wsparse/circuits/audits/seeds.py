"""Does the same search find the same circuit from other seeds, and another one where this one is forbidden?

Shapes: U nodes of the model in one vector.
"""

from __future__ import annotations

import itertools

import numpy as np

from wsparse.circuits.audits import mask_runs, random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Curve, Measurement, TestResult
from wsparse.circuits.discretize import Subgraph

# Mean overlap, and share of successful seeds, that pass.
_OVERLAP, _SUCCESS = 0.5, 0.9
# Rounds of exclusion, and the share of successes below which it ends.
_ROUNDS, _FEW = 4, 0.1
_SUCCEEDS = f"A seed succeeds with at most {mask_runs.LARGEST} times as many nodes as the circuit's own run."


def stability(context: Context) -> TestResult:
    """Returns how often other seeds succeed, how large their circuits are, and how much these overlap."""
    n_seeds = mask_runs.require_seeds(context, least=2)
    found = mask_runs.own_successes(context)
    rng = context.rng("stability")
    overlaps = [_jaccard(a.nodes, b.nodes) for a, b in itertools.combinations(found, 2)]
    random_overlaps = [
        _jaccard(*(random_sets.same_sizes(s.nodes, context.config, rng) for s in pair))
        for pair in itertools.combinations(found, 2)
    ]
    overlap = float(np.mean(overlaps)) if overlaps else None
    success = len(found) / n_seeds
    passed = overlap is not None and overlap >= _OVERLAP and success >= _SUCCESS
    return TestResult(
        question="Does the same search find the same circuit from other seeds?",
        procedure=f"{n_seeds} seeds of mask learning with the circuit's own hyperparameters, cut to the loss "
        "that the circuit has on the pairs it was chosen on, and not cleaned up. " + _SUCCEEDS,
        control="Random node sets of the same sizes at every location and layer.",
        criterion=f"At least {_SUCCESS:.0%} succeed, with a mean Jaccard index of at least {_OVERLAP:g}.",
        verdict="passed" if passed else "failed",
        measurements=[
            Measurement(name="seeds that succeed", value=success, unit="share"),
            *_sizes(found),
            Measurement(
                name="mean Jaccard index of two seeds' nodes",
                value=overlap,
                control=float(np.mean(random_overlaps)) if random_overlaps else None,
                unit="index",
            ),
            Measurement(
                name="nodes of the circuit that most seeds keep",
                value=_share_kept(context.nodes_U, found),
                unit="share",
            ),
            Measurement(
                name="nodes that all seeds keep",
                value=float(np.all([s.nodes for s in found], axis=0).sum()) if found else None,
                unit="nodes",
            ),
            Measurement(
                name="choices on the report split that agree with the circuit's",
                value=_agreement(context, found),
                unit="share",
            ),
        ],
    )


def exclusion(context: Context) -> TestResult:
    """Returns how often the search succeeds once what was found is forbidden, round by round."""
    n_seeds = mask_runs.require_seeds(context)
    own = len(mask_runs.own_successes(context)) / n_seeds
    forbidden_U, rates, sizes = context.nodes_U.copy(), [], []
    for number in range(_ROUNDS):
        seeds = mask_runs.seeds(context, n_seeds, stage=1 + number)
        found, _ = mask_runs.successes(context, seeds, forbidden_U=forbidden_U)
        rates.append(len(found) / n_seeds)
        sizes.append(min((s.n_nodes for s in found), default=None))
        if rates[-1] < _FEW:
            break
        forbidden_U |= min(found, key=lambda s: s.n_nodes).nodes
    return TestResult(
        question="Does the search find another circuit when the nodes of this one must stay closed?",
        procedure=f"{n_seeds} seeds a round; the smallest circuit of each round is forbidden too, until "
        f"fewer than {_FEW:.0%} of the seeds succeed, at most {_ROUNDS} rounds. {_SUCCEEDS}",
        control="The same search with no node forbidden.",
        criterion=f"Fewer than {_FEW:.0%} of the seeds succeed in the first round.",
        # Where the search fails with every node too, its failure here says nothing.
        verdict="failed" if rates[0] >= _FEW else "passed" if own >= 0.5 else "reported",
        measurements=[
            m
            for number, (rate, size) in enumerate(zip(rates, sizes, strict=True), start=1)
            for m in (
                Measurement(
                    name=f"round {number}: seeds that succeed", value=rate, control=own, unit="share"
                ),
                Measurement(name=f"round {number}: smallest circuit", value=size, unit="nodes"),
            )
        ],
        curves=[
            Curve(
                x_label="round", y_label="seeds that succeed", x=[1.0 + i for i in range(len(rates))], y=rates
            )
        ],
    )


def _jaccard(a_U: np.ndarray, b_U: np.ndarray) -> float:
    return float(np.sum(a_U & b_U) / max(np.sum(a_U | b_U), 1))


def _sizes(found: list[Subgraph]) -> list[Measurement]:
    if not found:
        return []
    sizes = {"nodes": [s.n_nodes for s in found], "edges": [s.n_edges for s in found]}
    measurements = []
    for unit, counts in sizes.items():
        middle, low, high = map(float, np.quantile(counts, [0.5, 0.1, 0.9]))
        name = f"{unit}: median, from 10% to 90% of seeds"
        measurements.append(Measurement(name=name, value=middle, low=low, high=high, unit=unit))
    return measurements


def _share_kept(nodes_U: np.ndarray, found: list[Subgraph]) -> float | None:
    if not found or not nodes_U.any():
        return None
    frequency_U = np.mean([s.nodes for s in found], axis=0)
    return float(np.mean(frequency_U[nodes_U] > 0.5))


def _agreement(context: Context, found: list[Subgraph]) -> float | None:
    if not found:
        return None
    own_B = context.margins(context.logits()) > 0
    weights = context.subject.scorer.weights
    others = [context.margins(context.logits(s.nodes, weights)) > 0 for s in found]
    return float(np.mean([other_B == own_B for other_B in others]))
