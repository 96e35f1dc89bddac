"""One task's circuit in one model: search, cut, clean-up, evidence and controls.

Three disjoint sets of prompt pairs are used: masks are learned on the first, circuits are chosen on the
second and a part of the first, and every number that is reported comes from the third.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, sparsity, trees
from wsparse.circuits import discretize, graph, masks, scoring, tasks
from wsparse.circuits.circuit import (
    Baseline,
    Calibration,
    Circuit,
    CircuitNode,
    Control,
    Counts,
    CurvePoint,
    Score,
    Scores,
    Size,
    TrialSize,
)
from wsparse.circuits.mask_learning import HParams
from wsparse.circuits.pairs import PairArrays, arrays
from wsparse.circuits.search import Pruner, Sampler, Shared, Trial, log_size, search
from wsparse.config import ModelConfig, require
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the procedure is run with; part of every circuit file.

    Attributes:
      target: task loss, in nats, that a circuit must reach.
      margin: nats below the target that the chosen circuit must have on the pairs it is chosen on, where the
        model itself allows it; other templates are a little harder.
      sweep: other targets of the loss-against-edges curve.
      trials: pruning runs of the search.
      parallel: of them in one call.
      sampler: "tpe" or "random".
      steps: of a pruning run.
      pairs_per_step: pairs drawn for a step.
      search_pairs: pairs that steps draw from.
      discretize_pairs: pairs of the second split that circuits are chosen on, beside as many of the first.
      report_pairs: pairs that numbers are reported on.
      finalists: trials whose circuits are cleaned up.
      necessity: loss, in nats, that the model must have without the circuit: nodes are added to the smallest
        sufficient one until it has, see `discretize.complete`. 0 adds none.
      single_removals: see `discretize.clean_up`.
      tie_qk: see `mask_learning.prune`.
      controls: whether to run the controls.
      seed: of pairs, trials and the sampler.
    """

    target: float = 0.15
    margin: float = 0.07
    sweep: tuple[float, ...] = (0.05, 0.1, 0.3, 0.5)
    trials: int = 8
    parallel: int = 2
    sampler: Sampler = "tpe"
    steps: int = 100
    pairs_per_step: int = 16
    search_pairs: int = 256
    discretize_pairs: int = 48
    report_pairs: int = 96
    finalists: int = 2
    necessity: float = 0.65
    single_removals: int = 256
    tie_qk: bool = True
    controls: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in (
            "trials",
            "parallel",
            "steps",
            "pairs_per_step",
            "search_pairs",
            "discretize_pairs",
            "report_pairs",
            "finalists",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(self.necessity >= 0, "necessity must be at least 0", self.necessity)
        for target in (self.target, *self.sweep):
            require(0 < target < np.log(2), "a target must be between 0 and ln 2", target)
        require(
            0 <= self.margin < self.target,
            f"margin must be at least 0 and below the target {self.target}",
            self.margin,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """A task's pairs, padded to one length.

    Attributes:
      task: name.
      form: the candidates.
      search: pairs that masks are learned on.
      discretize: pairs that circuits are chosen on: of the second split, and as many of the first. The
        templates of one split are too alike: a circuit that only just does them fails on others.
      report: pairs that numbers are reported on.
    """

    task: str
    form: str
    search: PairArrays
    discretize: PairArrays
    report: PairArrays


class Subject:
    """A model in which circuits are looked for.

    Attributes:
      params: its parameters.
      config: its config.
      windows: `(W, T)` tokens of pretraining text.
      means: mean activations over them.
      scorer: scores its masks.
      digest: of the parameters.
      reinitialized: `seed -> Subject`, the control with every matrix's entries at random places.
    """

    def __init__(self, params: model.Params, config: ModelConfig, windows: np.ndarray):
        # Committed to a device or not is part of what is compiled for: all subjects' are.
        self.params = jax.device_put(params, jax.devices()[0])
        self.config, self.windows = config, windows
        self.means = scoring.mean_activations(self.params, config, windows)
        self.scorer = scoring.Scorer(self.params, config, self.means)
        # A control, the same for every task.
        self.reinitialized = functools.cache(self._reinitialized)

    @functools.cached_property
    def digest(self) -> str:
        return trees.digest(self.params)

    @property
    def node_means(self) -> dict[str, jax.Array]:
        return {name: self.means[name] for name in masks.shapes(self.config)}

    def _reinitialized(self, seed: int) -> Subject:
        """Sparsity and scale of every matrix stay as they are."""

        def shuffled(path: str, leaf: jax.Array) -> jax.Array:
            rule = trees.match(sparsity.DEFAULT_RULES, path)
            if not isinstance(rule, sparsity.Sparse):
                return leaf
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            if not rule.stacked:
                return jnp.reshape(jax.random.permutation(key, leaf.ravel()), leaf.shape)
            rows = jnp.reshape(leaf, (leaf.shape[0], -1))
            return jnp.reshape(
                jax.random.permutation(key, rows, axis=1, independent=True), leaf.shape
            )

        params = trees.map_with_path(shuffled, self.params)
        return Subject(params, self.config, self.windows)


def build_pairs(
    wanted: Sequence[tasks.Task],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    max_tokens: int,
) -> tuple[list[Pairs], dict[str, str]]:
    """The pairs of every task, all of one length, and why other tasks are refused."""
    sizes: dict[tasks.Split, int] = {
        "search": settings.search_pairs,
        "discretize": settings.discretize_pairs,
        "report": settings.report_pairs,
    }
    built: list[dict[tasks.Split, tasks.TaskBatch]] = []
    refused: dict[str, str] = {}
    for task in wanted:
        try:
            built.append(
                {
                    split: tasks.build(
                        task, tokenizer, size, settings.seed, split=split, max_tokens=max_tokens
                    )
                    for split, size in sizes.items()
                }
            )
        except UserError as error:
            refused[task.name] = str(error)
    length = max((b.tokens.shape[1] for splits in built for b in splits.values()), default=0)
    pairs = []
    for splits in built:
        search, discretize, report = (
            arrays(tasks.padded(splits[split], length)) for split in tasks.SPLITS
        )
        some = jax.tree.map(lambda each: each[: 2 * settings.discretize_pairs], search)
        both = jax.tree.map(lambda *each: jnp.concatenate(each), some, discretize)
        first = splits["search"]
        pairs.append(
            Pairs(task=first.task, form=first.form, search=search, discretize=both, report=report)
        )
    return pairs, refused


def model_score(subject: Subject, pairs: PairArrays) -> scoring.Score:
    """The whole model's loss and accuracy."""
    return subject.scorer.mask(pairs, np.ones(masks.n_nodes(subject.config), bool))


def search_trials(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
    *,
    shared: Shared | None = None,
) -> list[Trial]:
    """The pruning runs of the search for a task's circuit, each cut to the target.

    Raises:
      ElsewhereError: see `search`.
    """
    goal = _goal(subject, pairs, settings)

    def objective(tau_U: np.ndarray) -> tuple[float, tuple[discretize.Parts | None, float]]:
        parts, least = discretize.discretize(subject.scorer, pairs.discretize, tau_U, goal)
        return log_size(parts.n_edges if parts else None, least), (parts, least)

    def said(trial: Trial) -> None:
        parts, least = trial.result()
        found = (
            f"{parts.n_nodes} nodes, {parts.n_edges} edges"
            if parts
            else f"target missed ({least:.3f})"
        )
        number = trial.number + 1
        which = f"{number}/{settings.trials}" if number <= settings.trials else "for a lost one"
        say(f"  trial {which}: {found}")

    return search(
        pruner,
        subject.params,
        pairs.search,
        subject.node_means,
        objective,
        trials=settings.trials,
        sampler=settings.sampler,
        seed=settings.seed,
        said=said,
        shared=shared,
    )


def find_circuit(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
    *,
    trials: Sequence[Trial] | None = None,
) -> Circuit | None:
    """Search for the task's circuit, and measure it.

    Args:
      subject: the model.
      pairs: of the task.
      pruner: runs the trials, and controls.
      settings: of the procedure.
      say: is given lines about progress.
      trials: of `search_trials`, where they were run before.

    Returns:
      The circuit, or None where no trial reached the target.
    """
    started = time.monotonic()
    scorer, goal = subject.scorer, _goal(subject, pairs, settings)
    if trials is None:
        trials = search_trials(subject, pairs, pruner, settings, say)
    cuts = {t.number: t.result()[0] for t in trials}
    reached = sorted((t for t in trials if cuts[t.number]), key=lambda t: t.value)
    if not reached:
        return None
    cleaned = [
        (
            discretize.clean_up(
                scorer,
                pairs.discretize,
                cuts[trial.number],
                goal,
                singles=settings.single_removals,
            ),
            trial,
        )
        for trial in reached[: settings.finalists]
    ]
    smallest, best = min(cleaned, key=lambda pair: pair[0].n_edges)
    say(f"  cleaned up: {smallest.n_nodes} nodes, {smallest.n_edges} edges")
    parts = discretize.complete(
        scorer, pairs.discretize, smallest, best.tau, goal, least=settings.necessity
    )
    if parts is not smallest:
        say(f"  until it is necessary: {parts.n_nodes} nodes, {parts.n_edges} edges")
    seconds_found = time.monotonic() - started
    curve = _curve(subject, pairs, best.tau, smallest, settings)
    baseline = attribution_baseline(subject, pairs, goal)
    controls = (
        _controls(subject, pairs, pruner, best.hparams, goal, settings) if settings.controls else {}
    )
    counts = graph.count_all(parts.nodes, parts.edges, subject.params, subject.config)
    between = graph.between(parts.nodes, scorer.weights, subject.config)
    scores = Scores(
        **measure(subject, pairs, parts),
        attribution_baseline=baseline,
        edges_before_clean_up=cuts[best.number].n_edges,
        seconds_to_find=round(seconds_found, 1),
        seconds=round(time.monotonic() - started, 1),
        discretize_loss=parts.loss,
        sufficient=Size(smallest.n_nodes, smallest.n_edges),
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
        nodes=_nodes(subject, pairs.report, parts, best.tau),
        edges=graph.edge_list(parts.edges, subject.params),
        loss=scores.sufficiency.loss,
        scores=scores,
        counts=Counts(**counts._asdict(), edges_between_nodes=graph.count(between)),
        controls=controls,
        curve=curve,
        hyperparameters={
            "trial": best.number,
            **best.hparams._asdict(),
            "settings": dataclasses.asdict(settings),
        },
        means={name: np.asarray(each) for name, each in subject.means.items()},
        tau={
            name: np.asarray(each)
            for name, each in masks.unflatten(best.tau, subject.config).items()
        },
        removed=parts.removed,
    )


def _goal(subject: Subject, pairs: Pairs, settings: Settings) -> float:
    """The loss that circuits are cut to: below the target, so that other templates reach it too."""
    whole = model_score(subject, pairs.discretize).loss
    # Where the model itself is too close to the target, the margin shrinks.
    nearest = whole + (settings.target - whole) / 10
    return max(settings.target - settings.margin, min(settings.target, nearest))


def measure(subject: Subject, pairs: Pairs, parts: discretize.Parts) -> dict[str, Any]:
    """Sufficiency and necessity of a circuit on the report split, and the model beside it.

    Sufficiency: everything but the circuit at its mean. Necessity: the circuit's own nodes at their means
    and all else as it is; the task should be lost.
    """
    scorer, stays = subject.scorer, parts.stays(subject.scorer)
    fit = discretize.calibrate(scorer.margins(pairs.discretize, parts.nodes, stays))
    margins = scorer.margins(pairs.report, parts.nodes, stays)
    return {
        "model": Score(*model_score(subject, pairs.report)),
        "sufficiency": Score(*scorer.mask(pairs.report, parts.nodes, stays)),
        "calibrated": Calibration(**fit, loss=float(discretize.calibrated_loss(margins, **fit))),
        "necessity": Score(*scorer.mask(pairs.report, ~parts.nodes)),
    }


def attribution_baseline(subject: Subject, pairs: Pairs, goal: float) -> Baseline:
    """Nodes ranked by gradient attribution in the whole model instead of by a learned mask."""
    scorer = subject.scorer
    everything = np.ones(masks.n_nodes(subject.config), bool)
    effect = scorer.attributions(pairs.search, everything)[0]
    parts, least = discretize.discretize(scorer, pairs.discretize, np.abs(effect), goal)
    if parts is None:
        return Baseline(reached=False, least_loss=least)
    loss = scorer.mask(pairs.report, parts.nodes).loss
    return Baseline(reached=True, nodes=parts.n_nodes, edges=parts.n_edges, loss=loss)


def _nodes(
    subject: Subject, pairs: PairArrays, parts: discretize.Parts, tau_U: np.ndarray
) -> list[CircuitNode]:
    """The circuit's nodes with the growth of the loss when each is removed."""
    scorer, chosen = subject.scorer, np.flatnonzero(parts.nodes)
    order = scorer.ranks(parts.nodes, parts.stays(scorer))
    order.nodes[chosen] = np.arange(chosen.size)
    spans = [[0, 0], *([i, i + 1] for i in range(chosen.size))]
    losses = scorer.spans(pairs, order, spans).loss
    names = masks.names(subject.config)
    return [
        CircuitNode(names[i], float(tau_U[i]), float(loss - losses[0]))
        for i, loss in zip(chosen, losses[1:], strict=True)
    ]


def _curve(
    subject: Subject,
    pairs: Pairs,
    tau_U: np.ndarray,
    found: discretize.Parts,
    settings: Settings,
) -> list[CurvePoint]:
    """Edges at every target of the sweep that can be reached.

    Looser targets go on from the circuit that was found, tighter ones from cuts of their own.
    """
    scorer = subject.scorer
    points = [(settings.target, found)]
    at = found
    for target in sorted(t for t in settings.sweep if t > settings.target):
        goal = target - settings.margin
        at = discretize.clean_up(scorer, pairs.discretize, at, goal, singles=0)
        points.append((target, at))
    for target in sorted(t for t in settings.sweep if t < settings.target):
        tight = target - settings.margin * target / settings.target
        parts, _ = discretize.discretize(scorer, pairs.discretize, tau_U, tight)
        if parts is not None:
            parts = discretize.clean_up(scorer, pairs.discretize, parts, tight, singles=0)
            points.append((target, parts))
    return [
        CurvePoint(
            target=target,
            nodes=parts.n_nodes,
            edges=parts.n_edges,
            loss=scorer.mask(pairs.report, parts.nodes, parts.stays(scorer)).loss,
        )
        for target, parts in sorted(points, key=lambda point: point[0])
    ]


def _controls(
    subject: Subject,
    pairs: Pairs,
    pruner: Pruner,
    hparams: HParams,
    goal: float,
    settings: Settings,
) -> dict[str, Control]:
    """The procedure where there is nothing to find: shuffled labels, and a random model.

    Both use the hyperparameters of the circuit's own trial. A control that reaches the target says that
    the mask, not the model, solves the task.
    """
    rng = np.random.default_rng(settings.seed)
    nonsense = dataclasses.replace(
        pairs, search=_shuffled(pairs.search, rng), discretize=_shuffled(pairs.discretize, rng)
    )
    random_model = subject.reinitialized(settings.seed + 1)
    found = {}
    for name, where, what in (
        ("shuffled_labels", subject, nonsense),
        ("random_model", random_model, pairs),
    ):
        seeds = range(settings.seed, settings.seed + pruner.parallel)
        learned = pruner(where.params, what.search, where.node_means, [hparams] * len(seeds), seeds)
        tried = [
            discretize.discretize(where.scorer, what.discretize, tau_U, goal) for tau_U in learned
        ]
        reached = [parts for parts, _ in tried if parts is not None]
        found[name] = Control(
            reached=bool(reached),
            least_loss=min(least for _, least in tried),
            edges=min((parts.n_edges for parts in reached), default=None),
        )
    return found


def _shuffled(pairs: PairArrays, rng: np.random.Generator) -> PairArrays:
    """The pairs with the two answers exchanged in a random half of them."""
    swap = jnp.asarray(np.repeat(rng.random(pairs.answer.shape[0] // 2) < 0.5, 2))
    return pairs._replace(
        answer=jnp.where(swap, pairs.other, pairs.answer),
        other=jnp.where(swap, pairs.answer, pairs.other),
    )
