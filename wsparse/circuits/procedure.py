"""One task's circuit in one model: search, cut, clean-up, completion, measurements and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import logging
import math
import time
from typing import NamedTuple

import numpy as np

from wsparse.circuits import graph, masks, measurements
from wsparse.circuits.audits.statistics import interval
from wsparse.circuits.circuit import Circuit, Scores, Size, TrialSize
from wsparse.circuits.clean_up import PASSES, clean_up, complete
from wsparse.circuits.criterion import Criterion
from wsparse.circuits.discretize import Cut, Subgraph, discretize, grow
from wsparse.circuits.scoring import Scorer
from wsparse.circuits.search import FAST, GENTLE, Pruner, Trial, TrialStore, log_size, search
from wsparse.circuits.settings import Settings
from wsparse.circuits.subject import Pairs, Subject, build_pairs
from wsparse.progress import progress

__all__ = ["CircuitSearch", "Pairs", "Settings", "Subject", "build_pairs"]

log = logging.getLogger(__name__)

# Nats above the model's own loss that a target is at least.
_ABOVE_MODEL = 0.05
# Circuits that are chosen, each for a lower loss, until one is within the target on other pairs; the least
# factor of the loss from one to the next.
_CHOICES, _LEAST_FACTOR = 3, 0.5
# Times that a cut which an adversary refutes may grow.
_CUT_ROUNDS = 24


class _Choice(NamedTuple):
    """A circuit that was chosen, and how."""

    trial: Trial
    cut: Subgraph
    """Before the clean-up."""
    sufficient: Subgraph
    """Before the completion."""
    subgraph: Subgraph
    criterion: Criterion
    goal: float
    """Loss that it keeps on the pairs that it was chosen on."""


@dataclasses.dataclass(frozen=True, eq=False)
class CircuitSearch:
    """The search for one task's circuit in one model; `pruner` runs its trials and those of the controls."""

    subject: Subject
    pairs: Pairs
    pruner: Pruner
    settings: Settings

    def is_hopeless(self) -> bool:
        """Returns whether the model itself is above the target, so that no circuit is looked for.

        That is decided on the pairs that circuits are chosen on: where the whole 95% interval of the model's
        loss, over pairs, is above the target.
        """
        rng = np.random.default_rng(self.settings.seed)
        return interval(self._model_losses_P, rng, 1000)[0] > self.settings.target

    def hint(self) -> str:
        """Returns which target would have a circuit looked for where the model is above the one that is set.

        It is as far above the model's loss, on the pairs that circuits are chosen on, as a target must be.
        """
        loss, settings = float(np.mean(self._model_losses_P)), self.settings
        higher = math.ceil(100 * (loss + _ABOVE_MODEL)) / 100
        if higher >= math.log(2):
            return f"no target would try it: the model's loss is {loss:.2f}, and chance is {math.log(2):.2f}"
        flags = f"--target={higher:g}"
        if settings.objective != "mean" and settings.robust_target < higher:
            flags += f" --robust_target={higher:g}"
        return f"the model cannot do it at {settings.target:g}: {flags} would try it"

    @functools.cached_property
    def _model_losses_P(self) -> np.ndarray:
        """The model's loss, against the labels, on every pair that circuits are chosen on."""
        all_U = np.ones(masks.n_nodes(self.subject.config), bool)
        margins_B = self.subject.scorer.margins(self.pairs.discretize, all_U)
        return np.logaddexp(0, -margins_B).reshape(-1, 2).mean(axis=1)

    @functools.cached_property
    def _model_loss(self) -> float:
        return self.subject.score(self.pairs.discretize).loss

    @property
    def target(self) -> float:
        """The loss that the circuit must reach: the settings' target, or just above a model near it."""
        return max(self.settings.target, self._model_loss + _ABOVE_MODEL)

    @functools.cached_property
    def _goal(self) -> float:
        """The loss that circuits are cut to: below the target, so that other templates reach it too."""
        settings = self.settings
        # Where the model itself is too close to the target, the margin shrinks.
        nearest = self._model_loss + (self.target - self._model_loss) / 10
        return max(self.target - settings.margin, min(self.target, nearest))

    def trials(self, store: TrialStore | None = None) -> list[Trial]:
        """Returns the trials of the search, whose results are cuts; see `search`."""

        def objective(tau_U: np.ndarray) -> tuple[float, Cut]:
            cut = self._cut(tau_U, self._goal)
            return log_size(cut.subgraph.n_edges if cut.subgraph else None, cut.least_loss), cut

        return search(
            self.pruner,
            self.subject.params,
            self.pairs.search,
            self.subject.node_means,
            objective,
            trials=self.settings.trials,
            sampler=self.settings.sampler,
            start=FAST if self.settings.objective == "mean" else GENTLE,
            seed=self.settings.seed,
            store=store,
        )

    def _criterion(self) -> Criterion:
        """Returns what candidates are held to, as it is before any adversary."""
        settings = self.settings
        return Criterion(
            self.subject.scorer,
            self.pairs.discretize,
            objective=settings.objective,
            weight=self._robust_weight,
            seed=settings.seed,
        )

    def _cut(self, tau_U: np.ndarray, goal: float) -> Cut:
        """Returns the cut of a trial that adversaries do not refute; one that they do refute grows."""
        pairs, cuts = self.pairs.discretize, []

        def propose(scorer: Scorer) -> Cut:
            # Once adversaries have shown what a candidate lacks, only more nodes can hold against them all.
            cut = (
                grow(scorer, pairs, cuts[-1].nodes, goal) if cuts else discretize(scorer, pairs, tau_U, goal)
            )
            cuts.append(cut.subgraph)
            return cut

        cut = self._criterion().settle(propose, lambda cut: cut.subgraph, goal, rounds=_CUT_ROUNDS)
        return cut or Cut(None, math.inf)

    def circuit(self, trials: Sequence[Trial], *, started: float) -> Circuit | None:
        """Returns the circuit with its measurements, or None where no trial reached the target.

        Args:
          trials: Trials of the search.
          started: Time at which they were begun, on the clock of `time.monotonic`.
        """
        cuts = {trial.number: trial.result().subgraph for trial in trials}
        reached = [(trial, cut) for trial in trials if (cut := cuts[trial.number])]
        if not reached:
            return None
        finalists = sorted(reached, key=lambda each: each[0].value)[: self.settings.finalists]
        choice = self._choice(finalists, self._goal)
        for _ in range(_CHOICES - 1):
            loss = self._confirm_loss(choice.subgraph)
            excess = loss - self._confirm_bound
            if excess <= 0:
                break
            log.info("  loss %.3f on other pairs: chosen again, for a lower loss", loss)
            goal = max(choice.goal - excess, _LEAST_FACTOR * choice.goal)
            lower = [(trial, cut) for trial, _ in finalists if (cut := self._cut(trial.tau, goal).subgraph)]
            if not lower:
                break
            choice = self._choice(lower, goal)
        return self._measured(choice, cuts, started)

    @property
    def _confirm_bound(self) -> float:
        """The loss on other pairs; the other half of the margin is for the templates of the third split."""
        return (self._goal + self.target) / 2

    def _confirm_loss(self, subgraph: Subgraph) -> float:
        """Returns the loss on other pairs, or what an adversary brings there where that is more."""
        if self.pairs.confirm is None:
            return -math.inf
        if subgraph not in self._confirm_losses:
            scorer, settings = self.subject.scorer, self.settings
            loss = scorer.mask(self.pairs.confirm, subgraph.nodes, subgraph.remaining(scorer)).loss
            if settings.objective == "robust":
                attacked = measurements.attacked(
                    self.subject, self.pairs.confirm, subgraph, settings.seed + 1
                )
                loss = max(loss, self._robust_weight * attacked)
            self._confirm_losses[subgraph] = loss
        return self._confirm_losses[subgraph]

    @functools.cached_property
    def _confirm_losses(self) -> dict[Subgraph, float]:
        return {}

    @property
    def _robust_weight(self) -> float:
        """What losses under attack are multiplied by, to be compared with the target under mean ablation."""
        # Where the model is near the targets, both are above it.
        return min(1.0, self.target / self.settings.robust_target)

    def _choice(self, finalists: Sequence[tuple[Trial, Subgraph]], goal: float) -> _Choice:
        """Returns the smallest of trials' cuts once they are cleaned up, completed.

        One that misses on other pairs is chosen only where all do.
        """
        settings, pairs, criterion = self.settings, self.pairs.discretize, self._criterion()
        singles = settings.single_removals
        with progress(len(finalists) * PASSES * (singles + 1), "  clean-up") as bar:
            cleaned = [
                clean_up(criterion, pairs, cut, goal, single_removals=singles, advance=bar.advance)
                for _, cut in finalists
            ]
        # What the last removals cost on other pairs is known only there.
        cleaned = [way.last_within(self._confirm_loss, self._confirm_bound) for way in cleaned]
        sufficient, (trial, cut) = min(
            zip(cleaned, finalists, strict=True),
            key=lambda each: (self._confirm_loss(each[0]) > self._confirm_bound, each[0].n_edges),
        )
        log.info("  cleaned up: %d nodes, %d edges", sufficient.n_nodes, sufficient.n_edges)
        subgraph = complete(
            self.subject.scorer,
            pairs,
            sufficient,
            trial.tau,
            goal,
            necessity=settings.necessity,
            sufficiency=criterion.scorer,
        )
        if subgraph is not sufficient:
            log.info("  made necessary: %d nodes, %d edges", subgraph.n_nodes, subgraph.n_edges)
        return _Choice(trial, cut, sufficient, subgraph, criterion, goal)

    def _measured(self, choice: _Choice, cuts: Mapping[int, Subgraph | None], started: float) -> Circuit:
        """Returns the circuit of a choice, measured on the report split."""
        subject, pairs, settings = self.subject, self.pairs, self.settings
        trial, cut, sufficient, subgraph, criterion, goal = choice
        seconds_to_find = time.monotonic() - started
        # The targets of the curve, the controls, and the baseline.
        n_stages = sum(t != self.target for t in settings.sweep) + 2 * settings.controls + 1
        with progress(n_stages, "  measuring") as bar:
            curve = measurements.curve(
                subject, pairs, criterion, trial.tau, sufficient, settings, self.target, bar.advance
            )
            baseline = measurements.attribution_baseline(subject, pairs, goal)
            bar.advance()
            controls = {}
            if settings.controls:
                controls = measurements.controls(
                    subject, pairs, self.pruner, trial.hparams, goal, settings, bar.advance
                )
        scores = Scores(
            **measurements.measure(subject, pairs, subgraph),
            attacked=measurements.attacked(subject, pairs.report, subgraph, settings.seed),
            attribution_baseline=baseline,
            edges_before_clean_up=cut.n_edges,
            seconds_to_find=round(seconds_to_find, 1),
            seconds=round(time.monotonic() - started, 1),
            discretize_loss=subject.scorer.mask(
                pairs.discretize, subgraph.nodes, subgraph.remaining(subject.scorer)
            ).loss,
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
            target=self.target,
            nodes=measurements.importances(subject, pairs.report, subgraph, trial.tau),
            edges=graph.edge_list(subgraph.edges, subject.params),
            loss=scores.sufficiency.loss,
            scores=scores,
            counts=graph.count_all(
                subgraph.nodes,
                subgraph.edges,
                subject.params,
                subject.config,
                pairs=pairs.report,
                constants=measurements.constants(subject, pairs.report, subgraph),
            ),
            controls=controls,
            curve=curve,
            hyperparameters=hyperparameters | {"settings": dataclasses.asdict(settings)},
            means={name: np.asarray(mean) for name, mean in subject.means.items()},
            tau=masks.unflatten(trial.tau, subject.config),
            removed=subgraph.removed,
        )
