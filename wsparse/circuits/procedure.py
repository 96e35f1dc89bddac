"""One task's circuit in one model: search, cut, clean-up, completion, measurements and controls."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import logging
import pathlib
import time
from typing import Any

import numpy as np

from wsparse.circuits import graph, masks, measurements
from wsparse.circuits.circuit import Circuit, Counts, Scores, Size, TrialSize
from wsparse.circuits.clean_up import PASSES, clean_up, complete
from wsparse.circuits.discretize import Cut, Subgraph, discretize
from wsparse.circuits.search import Pruner, SharedSearch, Trial, log_size, search
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


def find_circuit(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    settings: Settings,
    *,
    trials: Sequence[Trial] | None = None,
    folder: pathlib.Path | None = None,
) -> Circuit | None:
    """Search for the task's circuit, and measure it.

    Args:
      subject: The model.
      pairs: Pairs of the task.
      pruner: Runs the trials, and the controls.
      settings: Settings of the procedure.
      trials: Trials of `search_trials`, where they were run before.
      folder: Folder of trials, see `search`.

    Returns:
      The circuit, or None where no trial reached the target.
    """
    started = time.monotonic()
    goal = _goal(subject, pairs, settings)
    if trials is None:
        trials = search_trials(subject, pairs, pruner, settings, folder=folder)
    cuts = {trial.number: trial.result() for trial in trials}
    reached = [trial for trial in trials if cuts[trial.number].subgraph]
    if not reached:
        return None
    finalists = sorted(reached, key=lambda trial: trial.value)[: settings.finalists]
    sufficient, best = _smallest(subject, pairs, finalists, cuts, goal, settings)
    scorer, necessity = subject.scorer, settings.necessity
    subgraph = complete(scorer, pairs.discretize, sufficient, best.tau, goal, necessity=necessity)
    if subgraph is not sufficient:
        log.info("  made necessary: %d nodes, %d edges", subgraph.n_nodes, subgraph.n_edges)
    found = _Found(sufficient, subgraph, best, cuts, goal, started, time.monotonic() - started)
    return _examine(subject, pairs, pruner, settings, found)


def search_trials(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    settings: Settings,
    *,
    folder: pathlib.Path | None = None,
    shared: SharedSearch | None = None,
) -> list[Trial]:
    """Run the trials of the search for a task's circuit, each cut to the target; see `search`.

    Raises:
      WorkPending: See `search`.
    """
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
        folder=folder,
        shared=shared,
    )


def _goal(subject: Subject, pairs: Pairs, settings: Settings) -> float:
    """Returns the loss that circuits are cut to: below the target, so that other templates reach it too."""
    model_loss = subject.score(pairs.discretize).loss
    # Where the model itself is too close to the target, the margin shrinks.
    nearest = model_loss + (settings.target - model_loss) / 10
    return max(settings.target - settings.margin, min(settings.target, nearest))


def _smallest(
    subject: Subject,
    pairs: Pairs,
    finalists: Sequence[Trial],
    cuts: dict[int, Cut],
    goal: float,
    settings: Settings,
) -> tuple[Subgraph, Trial]:
    """Clean up the cuts of trials; return the smallest, and its trial."""
    singles = settings.single_removals
    cleaned = []
    with progress(len(finalists) * PASSES * (singles + 1), "  clean-up") as bar:
        for trial in finalists:
            cut = cuts[trial.number].subgraph
            assert cut is not None
            subgraph = clean_up(
                subject.scorer, pairs.discretize, cut, goal, single_removals=singles, advance=bar.advance
            )
            cleaned.append((subgraph, trial))
    smallest, trial = min(cleaned, key=lambda candidate: candidate[0].n_edges)
    log.info("  cleaned up: %d nodes, %d edges", smallest.n_nodes, smallest.n_edges)
    return smallest, trial


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """A circuit and how it was found."""

    sufficient: Subgraph
    subgraph: Subgraph
    trial: Trial
    cuts: dict[int, Cut]
    goal: float
    started: float
    seconds: float


def _examine(subject: Subject, pairs: Pairs, pruner: Pruner, settings: Settings, found: _Found) -> Circuit:
    """Measure a circuit on the report split, and return it."""
    subgraph, trial = found.subgraph, found.trial
    scores, controls, curve = _measure(subject, pairs, pruner, settings, found)
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
        counts=_counts(subject, subgraph),
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


def _measure(
    subject: Subject, pairs: Pairs, pruner: Pruner, settings: Settings, found: _Found
) -> tuple[Scores, dict[str, Any], list[Any]]:
    """Returns a circuit's scores, controls and curve."""
    trial, controls = found.trial, {}
    # The targets of the curve, the controls, and the baseline.
    n_stages = sum(t != settings.target for t in settings.sweep) + 2 * settings.controls + 1
    with progress(n_stages, "  measuring") as bar:
        curve = measurements.curve(subject, pairs, trial.tau, found.sufficient, settings, bar.advance)
        baseline = measurements.attribution_baseline(subject, pairs, found.goal)
        bar.advance()
        if settings.controls:
            controls = measurements.controls(
                subject, pairs, pruner, trial.hparams, found.goal, settings, bar.advance
            )
    best_cut = found.cuts[trial.number].subgraph
    assert best_cut is not None
    scores = Scores(
        **measurements.measure(subject, pairs, found.subgraph),
        attribution_baseline=baseline,
        edges_before_clean_up=best_cut.n_edges,
        seconds_to_find=round(found.seconds, 1),
        seconds=round(time.monotonic() - found.started, 1),
        discretize_loss=found.subgraph.loss,
        sufficient=Size(found.sufficient.n_nodes, found.sufficient.n_edges),
        trials=tuple(_trial_size(number, cut.subgraph) for number, cut in found.cuts.items()),
    )
    return scores, controls, curve


def _trial_size(number: int, subgraph: Subgraph | None) -> TrialSize:
    if subgraph is None:
        return TrialSize(number, None, None)
    return TrialSize(number, subgraph.n_nodes, subgraph.n_edges)


def _counts(subject: Subject, subgraph: Subgraph) -> Counts:
    counts = graph.count_all(subgraph.nodes, subgraph.edges, subject.params, subject.config)
    between = graph.between(subgraph.nodes, subject.scorer.weights, subject.config)
    return Counts(**counts._asdict(), edges_between_nodes=graph.count(between))


def _numpy(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}
