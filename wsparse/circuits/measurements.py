"""What is measured of a circuit: sufficiency, necessity, calibration, baseline, controls and curve."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import optimize

from wsparse.circuits import adversary, excerpts, masks
from wsparse.circuits.circuit import Baseline, Calibration, CircuitNode, Control, CurvePoint
from wsparse.circuits.clean_up import Advance, clean_up
from wsparse.circuits.criterion import Criterion
from wsparse.circuits.discretize import Subgraph, discretize, shortest
from wsparse.circuits.mask_learning import HParams
from wsparse.circuits.pairs import PairArrays, inside
from wsparse.circuits.search import Pruner
from wsparse.circuits.settings import Settings
from wsparse.circuits.subject import Pairs, Subject
from wsparse.circuits.subnetwork import Subnetwork

# Weight of the squared log scale and the squared shift in the fit of `calibrate`.
_PENALTY = 0.01


def measure(subject: Subject, pairs: Pairs, subgraph: Subgraph) -> dict[str, Any]:
    """Returns the fields model, sufficiency, calibrated, necessity and strict of a circuit's `Scores`."""
    scorer, remaining = subject.scorer, subgraph.remaining(subject.scorer)
    sufficiency = scorer.mask(pairs.report, subgraph.nodes, remaining)
    fit = calibrate(scorer.margins(pairs.discretize, subgraph.nodes, remaining))
    margins = scorer.margins(pairs.report, subgraph.nodes, remaining)
    return {
        "model": subject.score(pairs.report),
        "sufficiency": sufficiency,
        "calibrated": Calibration(**fit, loss=calibrated_loss(margins, **fit)),
        "necessity": scorer.mask(pairs.report, ~subgraph.nodes),
        "strict": scorer.mask(pairs.report, subgraph.nodes, subgraph.edges),
    }


def attacked(subject: Subject, pairs: PairArrays, subgraph: Subgraph, seed: int) -> float:
    """Returns the largest loss of a circuit that an adversary finds, see `adversary.ascend`."""
    found = Subnetwork(subject.scorer, subgraph.nodes, subgraph.remaining(subject.scorer))
    return adversary.ascend(found, pairs, seed=seed).loss


def constants(subject: Subject, pairs: PairArrays, subgraph: Subgraph) -> int:
    """Returns the number of a circuit's nodes whose value is the same at every token of the prompts."""
    scorer, config = subject.scorer, subject.scorer.config
    found = Subnetwork(scorer, subgraph.nodes, subgraph.remaining(scorer))
    _, acts = excerpts.recorded(found.params, pairs.tokens, pairs.position, found.ablation(), config=config)
    inside_BT = np.asarray(inside(pairs))
    mask = masks.unflatten(subgraph.nodes, config)
    varies = [
        np.ptp(np.asarray(acts[name][layer])[inside_BT][:, kept_N], axis=0) > 1e-6
        for name, kept_LN in mask.items()
        for layer, kept_N in enumerate(kept_LN)
    ]
    return int(subgraph.nodes.sum() - np.concatenate(varies).sum())


def calibrated_loss(margins_B: np.ndarray, *, scale: float, shift: float) -> float:
    """Returns the task loss after a scale and a shift of the logits; see `calibrate`."""
    margins_B = np.asarray(margins_B, np.float64)
    sides_B = np.where(np.arange(margins_B.size) % 2 == 0, 1.0, -1.0)
    return float(np.mean(np.logaddexp(0.0, -(scale * margins_B + shift * sides_B))))


def calibrate(margins_B: np.ndarray) -> dict[str, float]:
    """Returns the scale and the shift of the logits that L-BFGS fits to margins (Gao et al. 2025).

    With two candidates only their difference matters: the margin of the first side's answer is scaled and
    shifted, and the margin of the second side's is shifted the other way. A small penalty on the logarithm
    of the scale and on the shift keeps them finite where all pairs are on their right side: without it the
    loss falls for ever as the scale grows, and other pairs pay for it.
    """

    def penalized(fit: np.ndarray) -> float:
        return calibrated_loss(margins_B, scale=np.exp(fit[0]), shift=fit[1]) + _PENALTY * float(fit @ fit)

    log_scale, shift = optimize.minimize(penalized, np.zeros(2), method="L-BFGS-B").x
    return {"scale": float(np.exp(log_scale)), "shift": float(shift)}


def attribution_baseline(subject: Subject, pairs: Pairs, goal: float) -> Baseline:
    """Returns the cut through nodes ranked by gradient attribution in place of a learned mask."""
    scorer = subject.scorer
    all_nodes = np.ones(masks.n_nodes(subject.config), bool)
    effects = scorer.attributions(pairs.search, all_nodes)[0]
    order = np.argsort(-np.abs(effects), kind="stable")
    subgraph, least_loss = shortest(scorer, pairs.discretize, order, goal)
    if subgraph is None:
        return Baseline(reached=False, least_loss=least_loss)
    loss = scorer.mask(pairs.report, subgraph.nodes).loss
    return Baseline(reached=True, nodes=subgraph.n_nodes, edges=subgraph.n_edges, loss=loss)


def importances(
    subject: Subject, pairs: PairArrays, subgraph: Subgraph, tau_U: np.ndarray
) -> list[CircuitNode]:
    """Returns the circuit's nodes with the growth of the loss when each alone is removed."""
    scorer, order = subject.scorer, np.flatnonzero(subgraph.nodes)
    spans = [[0, 0], *([i, i + 1] for i in range(order.size))]
    remaining = subgraph.remaining(scorer)
    losses = scorer.without(pairs, subgraph.nodes, remaining, order, spans).loss
    names = masks.names(subject.config)
    return [
        CircuitNode(names[i], float(tau_U[i]), float(loss - losses[0]))
        for i, loss in zip(order, losses[1:], strict=True)
    ]


def curve(
    subject: Subject,
    pairs: Pairs,
    criterion: Criterion,
    tau_U: np.ndarray,
    subgraph: Subgraph,
    settings: Settings,
    target: float,
    advance: Advance = lambda count: None,
) -> list[CurvePoint]:
    """Returns the circuit's size at every target of the sweep that can be reached, sorted by target.

    Cuts and clean-ups hold to the criterion. Looser targets go on from the circuit of the main `target`,
    `subgraph`, tighter ones from cuts of their own through `tau_U`.
    `advance` is called with 1 for every target.
    """
    scorer = subject.scorer
    subgraphs = {target: subgraph}
    for looser in sorted(t for t in settings.sweep if t > target):
        goal = looser - settings.margin
        subgraph = clean_up(criterion, pairs.discretize, subgraph, goal, single_removals=0).result
        subgraphs[looser] = subgraph
        advance(1)
    for tighter in sorted(t for t in settings.sweep if t < target):
        goal = tighter - settings.margin * tighter / target
        cut, _ = discretize(criterion.scorer, pairs.discretize, tau_U, goal)
        if cut is not None:
            subgraphs[tighter] = clean_up(criterion, pairs.discretize, cut, goal, single_removals=0).result
        advance(1)
    return [
        CurvePoint(
            target=reached,
            nodes=point.n_nodes,
            edges=point.n_edges,
            loss=scorer.mask(pairs.report, point.nodes, point.remaining(scorer)).loss,
        )
        for reached, point in sorted(subgraphs.items())
    ]


def controls(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    hparams: HParams,
    goal: float,
    settings: Settings,
    advance: Advance = lambda count: None,
) -> dict[str, Control]:
    """Returns the results of the procedure where there is nothing to find, by name.

    Labels are shuffled, or the model is random; both use the hyperparameters of the circuit's own trial.
    A control that reaches the circuit's goal says that the mask, not the model, solves the task. `advance`
    is called with 1 for every control.
    """
    rng = np.random.default_rng(settings.seed)
    shuffled = dataclasses.replace(
        pairs, search=_shuffled(pairs.search, rng), discretize=_shuffled(pairs.discretize, rng)
    )
    stand_ins = {
        "shuffled_labels": (subject, shuffled),
        "random_model": (subject.reinitialized(settings.seed + 1), pairs),
    }
    seeds = range(settings.seed, settings.seed + pruner.parallel)
    results = {}
    for name, (control, of_task) in stand_ins.items():
        taus_MU = pruner(control.params, of_task.search, control.node_means, [hparams] * len(seeds), seeds)
        cuts = [discretize(control.scorer, of_task.discretize, tau_U, goal) for tau_U in taus_MU]
        reached = [cut for cut, _ in cuts if cut is not None]
        results[name] = Control(
            reached=bool(reached),
            least_loss=min(least_loss for _, least_loss in cuts),
            edges=min((cut.n_edges for cut in reached), default=None),
        )
        advance(1)
    return results


def _shuffled(pairs: PairArrays, rng: np.random.Generator) -> PairArrays:
    """Returns the pairs with the two answers exchanged in a random half of them."""
    swap = jnp.asarray(np.repeat(rng.random(pairs.answer.shape[0] // 2) < 0.5, 2))
    return pairs._replace(
        answer=jnp.where(swap, pairs.other, pairs.answer), other=jnp.where(swap, pairs.answer, pairs.other)
    )
