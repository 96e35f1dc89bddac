"""One task's circuit in one model: search, cut, clean-up, completion, measurements and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import time
from typing import Any

import numpy as np

from wsparse.circuits import graph, masks, measurements
from wsparse.circuits.circuit import Circuit, Scores, Size, TrialSize
from wsparse.circuits.clean_up import PASSES, clean_up, complete
from wsparse.circuits.discretize import Cut, Subgraph, discretize
from wsparse.circuits.search import Pruner, Trial, TrialStore, log_size, search
from wsparse.circuits.settings import Settings
from wsparse.circuits.subject import Pairs, Subject, build_pairs
from wsparse.progress import progress

__all__ = ["Pairs", "Settings", "Subject", "build_pairs", "find_circuit", "is_hopeless"]

log = logging.getLogger(__name__)


def is_hopeless(subject: Subject, pairs: Pairs, settings: Settings) -> bool:
    """Returns whether the model itself is so far above the target that no circuit is looked for.

    That is decided on the pairs that circuits are chosen on, and with a margin: near the bar a draw of
    pairs must not decide whether a task is tried.
    """
    return subject.score(pairs.discretize).loss >= settings.target + settings.margin


def search_trials(
    subject: Subject, pairs: Pairs, pruner: Pruner, settings: Settings, store: TrialStore | None = None
) -> list[Trial]:
    """Returns the trials of the search for a task's circuit, whose results are cuts; see `search`."""
    goal = _goal(subject, pairs, settings)

    def objective(tau_U: np.ndarray) -> tuple[float, Cut]:
        cut = discretize(subject.scorer, pairs.discretize, tau_U, goal)
        return log_size(cut.subgraph.n_edges if cut.subgraph else None, cut.least_loss), cut

    return search(
        pruner,
        subject.params,
        pairs.search,
        subject.node_means,
        objective,
        trials=settings.trials,
        sampler=settings.sampler,
        seed=settings.seed,
        store=store,
    )


def find_circuit(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    settings: Settings,
    *,
    trials: Sequence[Trial] | None = None,
    started: float | None = None,
) -> Circuit | None:
    """Returns the task's circuit with its measurements, or None where no trial reached the target.

    Args:
      subject: The model.
      pairs: Pairs of the task.
      pruner: Runs the trials, and those of the controls.
      settings: Settings of the procedure.
      trials: Trials of `search_trials`, where they were run before.
      started: Time at which they were begun, on `time.monotonic`'s clock.
    """
    started = time.monotonic() if started is None else started
    goal = _goal(subject, pairs, settings)
    if trials is None:
        trials = search_trials(subject, pairs, pruner, settings)
    cuts = {trial.number: trial.result().subgraph for trial in trials}
    reached = [trial for trial in trials if cuts[trial.number]]
    if not reached:
        return None
    finalists = sorted(reached, key=lambda trial: trial.value)[: settings.finalists]
    scorer, singles = subject.scorer, settings.single_removals
    with progress(len(finalists) * PASSES * (singles + 1), "  clean-up") as bar:
        cleaned = [
            clean_up(scorer, pairs.discretize, cut, goal, single_removals=singles, advance=bar.advance)
            for trial in finalists
            if (cut := cuts[trial.number])
        ]
    sufficient = min(cleaned, key=lambda subgraph: subgraph.n_edges)
    best = finalists[cleaned.index(sufficient)]
    log.info("  cleaned up: %d nodes, %d edges", sufficient.n_nodes, sufficient.n_edges)
    subgraph = complete(scorer, pairs.discretize, sufficient, best.tau, goal, necessity=settings.necessity)
    if subgraph is not sufficient:
        log.info("  made necessary: %d nodes, %d edges", subgraph.n_nodes, subgraph.n_edges)
    return _measured(
        subject, pairs, pruner, settings, trial=best, sufficient=sufficient, subgraph=subgraph, cuts=cuts,
        goal=goal, started=started,
    )  # fmt: skip


def _goal(subject: Subject, pairs: Pairs, settings: Settings) -> float:
    """Returns the loss that circuits are cut to: below the target, so that other templates reach it too."""
    model_loss = subject.score(pairs.discretize).loss
    # Where the model itself is too close to the target, the margin shrinks.
    nearest = model_loss + (settings.target - model_loss) / 10
    return max(settings.target - settings.margin, min(settings.target, nearest))


def _measured(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    settings: Settings,
    *,
    trial: Trial,
    sufficient: Subgraph,
    subgraph: Subgraph,
    cuts: Mapping[int, Subgraph | None],
    goal: float,
    started: float,
) -> Circuit:
    """Returns the circuit of a subgraph, measured on the report split."""
    seconds_to_find = time.monotonic() - started
    # The targets of the curve, the controls, and the baseline.
    n_stages = sum(t != settings.target for t in settings.sweep) + 2 * settings.controls + 1
    with progress(n_stages, "  measuring") as bar:
        curve = measurements.curve(subject, pairs, trial.tau, sufficient, settings, bar.advance)
        baseline = measurements.attribution_baseline(subject, pairs, goal)
        bar.advance()
        controls = {}
        if settings.controls:
            controls = measurements.controls(
                subject, pairs, pruner, trial.hparams, goal, settings, bar.advance
            )
    best_cut = cuts[trial.number]
    assert best_cut is not None
    scores = Scores(
        **measurements.measure(subject, pairs, subgraph),
        attribution_baseline=baseline,
        edges_before_clean_up=best_cut.n_edges,
        seconds_to_find=round(seconds_to_find, 1),
        seconds=round(time.monotonic() - started, 1),
        discretize_loss=subgraph.loss,
        sufficient=Size(sufficient.n_nodes, sufficient.n_edges),
        trials=tuple(
            TrialSize(number, *((cut.n_nodes, cut.n_edges) if cut else (None, None)))
            for number, cut in cuts.items()
        ),
    )
    return Circuit(
        task=pairs.task,
        form=pairs.form,
        model_digest=subject.digest,
        config=subject.config,
        target=settings.target,
        nodes=measurements.importances(subject, pairs.report, subgraph, trial.tau),
        edges=graph.edge_list(subgraph.edges, subject.params),
        loss=scores.sufficiency.loss,
        scores=scores,
        counts=graph.count_all(subgraph.nodes, subgraph.edges, subject.params, subject.config),
        controls=controls,
        curve=curve,
        hyperparameters={
            "trial": trial.number,
            **trial.hparams._asdict(),
            "settings": dataclasses.asdict(settings),
        },
        means=_numpy(subject.means),
        tau=_numpy(masks.unflatten(trial.tau, subject.config)),
        removed=subgraph.removed,
    )


def _numpy(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}
