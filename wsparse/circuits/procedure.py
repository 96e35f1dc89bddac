"""One task's circuit in one model: search, cut, clean-up, completion, measurements and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import logging
import time

import numpy as np

from wsparse.circuits import graph, masks, measurements
from wsparse.circuits.circuit import Circuit, Scores, Size, TrialSize
from wsparse.circuits.clean_up import PASSES, clean_up, complete
from wsparse.circuits.discretize import Cut, Subgraph, discretize
from wsparse.circuits.search import Pruner, Trial, TrialStore, log_size, search
from wsparse.circuits.settings import Settings
from wsparse.circuits.subject import Pairs, Subject, build_pairs
from wsparse.progress import progress

__all__ = ["CircuitSearch", "Pairs", "Settings", "Subject", "build_pairs"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class CircuitSearch:
    """The search for one task's circuit in one model; `pruner` runs its trials and those of the controls."""

    subject: Subject
    pairs: Pairs
    pruner: Pruner
    settings: Settings

    def is_hopeless(self) -> bool:
        """Returns whether the model itself is so far above the target that no circuit is looked for.

        That is decided on the pairs that circuits are chosen on, and with a margin: near the bar a draw of
        pairs must not decide whether a task is tried.
        """
        return self._model_loss >= self.settings.target + self.settings.margin

    @functools.cached_property
    def _model_loss(self) -> float:
        return self.subject.score(self.pairs.discretize).loss

    @functools.cached_property
    def _goal(self) -> float:
        """The loss that circuits are cut to: below the target, so that other templates reach it too."""
        settings = self.settings
        # Where the model itself is too close to the target, the margin shrinks.
        nearest = self._model_loss + (settings.target - self._model_loss) / 10
        return max(settings.target - settings.margin, min(settings.target, nearest))

    def trials(self, store: TrialStore | None = None) -> list[Trial]:
        """Returns the trials of the search, whose results are cuts; see `search`."""

        def objective(tau_U: np.ndarray) -> tuple[float, Cut]:
            cut = discretize(self.subject.scorer, self.pairs.discretize, tau_U, self._goal)
            return log_size(cut.subgraph.n_edges if cut.subgraph else None, cut.least_loss), cut

        return search(
            self.pruner,
            self.subject.params,
            self.pairs.search,
            self.subject.node_means,
            objective,
            trials=self.settings.trials,
            sampler=self.settings.sampler,
            seed=self.settings.seed,
            store=store,
        )

    def circuit(self, trials: Sequence[Trial], *, started: float) -> Circuit | None:
        """Returns the circuit with its measurements, or None where no trial reached the target.

        Args:
          trials: Trials of the search.
          started: Time at which they were begun, on the clock of `time.monotonic`.
        """
        settings, scorer, pairs = self.settings, self.subject.scorer, self.pairs.discretize
        cuts = {trial.number: trial.result().subgraph for trial in trials}
        reached = [trial for trial in trials if cuts[trial.number]]
        if not reached:
            return None
        finalists = sorted(reached, key=lambda trial: trial.value)[: settings.finalists]
        singles = settings.single_removals
        with progress(len(finalists) * PASSES * (singles + 1), "  clean-up") as bar:
            cleaned = [
                clean_up(scorer, pairs, cut, self._goal, single_removals=singles, advance=bar.advance)
                for trial in finalists
                if (cut := cuts[trial.number])
            ]
        sufficient = min(cleaned, key=lambda subgraph: subgraph.n_edges)
        best = finalists[cleaned.index(sufficient)]
        log.info("  cleaned up: %d nodes, %d edges", sufficient.n_nodes, sufficient.n_edges)
        necessity = settings.necessity
        subgraph = complete(scorer, pairs, sufficient, best.tau, self._goal, necessity=necessity)
        if subgraph is not sufficient:
            log.info("  made necessary: %d nodes, %d edges", subgraph.n_nodes, subgraph.n_edges)
        return self._measured(best, sufficient, subgraph, cuts, started)

    def _measured(
        self,
        trial: Trial,
        sufficient: Subgraph,
        subgraph: Subgraph,
        cuts: Mapping[int, Subgraph | None],
        started: float,
    ) -> Circuit:
        """Returns the circuit of a subgraph, measured on the report split."""
        subject, pairs, settings, goal = self.subject, self.pairs, self.settings, self._goal
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
                    subject, pairs, self.pruner, trial.hparams, goal, settings, bar.advance
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
        hyperparameters = {"trial": trial.number, **trial.hparams._asdict()}
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
            hyperparameters=hyperparameters | {"settings": dataclasses.asdict(settings)},
            means={name: np.asarray(mean) for name, mean in subject.means.items()},
            tau=masks.unflatten(trial.tau, subject.config),
            removed=subgraph.removed,
        )
