"""A circuit under test: its model, its pairs, and the functions that every test of an audit shares.

Shapes: U nodes of the model in one vector, B rows of pairs (`2 i` and `2 i + 1` are a pair), T time, X tokens
of all prompts, L layer, N nodes of a location, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import runs
from wsparse.circuits import ablation as ablations
from wsparse.circuits import excerpts, graph, masks, tasks
from wsparse.circuits.ablation import Ablation, Background
from wsparse.circuits.audits import statistics
from wsparse.circuits.audits.record import Measurement
from wsparse.circuits.circuit import Circuit
from wsparse.circuits.pairs import PairArrays, Task, TaskBatch, TooFewPairs, arrays, inside, margins
from wsparse.circuits.settings import Settings
from wsparse.circuits.subject import N_WINDOWS, Pairs, Subject, build_pairs
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.config import ModelConfig, check, setting
from wsparse.nodes import NODES

# Pairs that constants are fitted on: of the split that circuits are chosen on.
_FITTED_PAIRS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an audit; each field's help is in its metadata."""

    pairs: int = setting(48, "Pairs of the report split that a test uses.", "at least 1")
    draws: int = setting(64, "Random draws of ablation strengths and of node sets.", "at least 1")
    resamples: int = setting(1000, "Bootstrap resamples of pairs behind every interval.", "at least 1")
    seeds: int = setting(
        0,
        "Seeds of pruning for stability, exclusion and controls that learn masks; 0 leaves these tests out.",
        "at least 0",
    )
    seed: int = setting(0, "Seed of every draw.", "at least 0")

    def __post_init__(self):
        check(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What tests are given.

    Attributes:
      run: The model's run.
      circuit: The circuit under test.
      task: Its task.
      subject: The model, with its mean activations and its scorer; `subject.scorer.params` have biases.
      pairs: The task's pairs; numbers are of `report`, fits and choices of `discretize` or `search`.
      nodes_U: Bool, the circuit's nodes.
      edges: Its edges, kernel path -> bool `(L, in, out)`.
      remaining: Every weight of the model that the circuit does not cut.
      settings: Settings of the procedure that found it.
      options: Options of the audit.
    """

    run: runs.Run
    circuit: Circuit
    task: Task
    subject: Subject
    pairs: Pairs
    nodes_U: np.ndarray
    edges: graph.EdgeMask
    remaining: graph.EdgeMask
    settings: Settings
    options: Options

    @property
    def config(self) -> ModelConfig:
        """Config of the model, with biases."""
        return self.subject.scorer.config

    @property
    def n_pairs(self) -> int:
        """Pairs of the report split."""
        return len(self.pairs.report.position) // 2

    def rng(self, name: str) -> np.random.Generator:
        """Returns the generator of a test."""
        return np.random.default_rng([self.options.seed, *name.encode()])

    def on(self, batch: TaskBatch) -> Context:
        """Returns the context with other pairs, no longer than its own, in place of the report split's."""
        padded = tasks.padded(batch, self.pairs.report.tokens.shape[1])
        return dataclasses.replace(self, pairs=dataclasses.replace(self.pairs, report=arrays(padded)))

    def weights(self, ablation: Ablation) -> graph.EdgeMask:
        """Returns the weights that vary under an ablation."""
        return self.edges if ablation.edges == "strict" else self.remaining

    @functools.cached_property
    def _backgrounds(self) -> dict[Ablation, Background]:
        return {}

    def background(self, ablation: Ablation) -> Background:
        """Returns the background of an ablation on the report split."""
        if ablation not in self._backgrounds:
            self._backgrounds[ablation] = self._background(ablation)
        return self._backgrounds[ablation]

    def _background(self, ablation: Ablation) -> Background:
        scorer = self.subject.scorer
        return ablations.make_background(
            ablation,
            scorer.params,
            self.config,
            self.subject.means,
            self.pairs.report,
            windows_WT=self.subject.windows,
            nodes_U=self.nodes_U,
            edges=self.weights(ablation),
            # Those of the second split are the last.
            fit=jax.tree.map(
                lambda array: array[-2 * min(_FITTED_PAIRS, self.settings.discretize_pairs) :],
                self.pairs.discretize,
            ),
            seed=self.options.seed,
        )

    def logits(
        self,
        nodes_U: Any = None,
        edges: graph.EdgeMask | None = None,
        *,
        ablation: Ablation = Ablation(),  # noqa: B008 (frozen)
    ) -> np.ndarray:
        """Returns logits `(B, V)` on the report split: of the circuit, or of other nodes and weights.

        Args:
          nodes_U: Nodes that stay; the circuit's by default.
          edges: Weights that stay; those of the circuit under the ablation, or all if `nodes_U` are given.
        """
        scorer = self.subject.scorer
        if edges is None:
            edges = self.weights(ablation) if nodes_U is None else scorer.weights
        nodes_U = self.nodes_U if nodes_U is None else nodes_U
        return np.asarray(
            _logits(
                scorer.params,
                self.pairs.report,
                jnp.asarray(nodes_U, jnp.float32),
                jax.tree.map(jnp.asarray, edges),
                self.background(ablation),
                config=self.config,
                contenders=ablation.contenders,
            )
        )

    @functools.cached_property
    def model_logits(self) -> np.ndarray:
        """Logits of the whole model on the report split, `(B, V)`."""
        return self.logits(np.ones_like(self.nodes_U))

    def record(self, nodes_U: np.ndarray, edges: graph.EdgeMask) -> dict[str, jax.Array]:
        """Returns every node's value in a set of nodes alone, location -> `(L, B, T, N)`."""
        found, report = Subnetwork(self.subject.scorer, nodes_U, edges), self.pairs.report
        return excerpts.recorded(
            found.params, report.tokens, report.position, found.ablation(), config=self.config
        )[1]

    @functools.cached_property
    def acts(self) -> dict[str, jax.Array]:
        """What `record` returns of the circuit."""
        return self.record(self.nodes_U, self.remaining)

    @functools.cached_property
    def model_acts(self) -> dict[str, jax.Array]:
        """What `record` returns of the whole model."""
        return self.record(np.ones_like(self.nodes_U), self.subject.scorer.weights)

    def of_tokens(self, acts: dict[str, jax.Array]) -> np.ndarray:
        """Returns what `record` returns as `(X, U)`, the padding left out."""
        inside_BT = np.asarray(inside(self.pairs.report))
        columns = [np.moveaxis(np.asarray(acts[name]), 0, 2)[inside_BT] for name in NODES]
        return np.concatenate([values_XLN.reshape(len(values_XLN), -1) for values_XLN in columns], axis=1)

    @functools.cached_property
    def activity(self) -> np.ndarray:
        """Mean absolute value of every node in the whole model on the report split's prompts, `(U,)`."""
        return np.abs(self.of_tokens(self.model_acts)).mean(axis=0)

    def losses(self, logits_BV: np.ndarray) -> np.ndarray:
        """Returns the task loss of every row, `(B,)`."""
        return np.logaddexp(0, -self.margins(logits_BV))

    def margins(self, logits_BV: np.ndarray) -> np.ndarray:
        """Returns `(B,)`: the logit of the answer less that of the other candidate."""
        report = self.pairs.report
        return np.asarray(margins(jnp.asarray(logits_BV), report.answer, report.other))

    def mean(
        self,
        name: str,
        values_B: np.ndarray,
        rng: np.random.Generator,
        *,
        control: float | None = None,
        unit: str = "nats",
    ) -> Measurement:
        """Returns the mean over rows with its interval; the two rows of a pair are resampled together."""
        by_pair_P = np.asarray(values_B, np.float64).reshape(-1, 2).mean(1)
        low, high = statistics.interval(by_pair_P, rng, self.options.resamples)
        return Measurement(
            name=name, value=float(by_pair_P.mean()), low=low, high=high, control=control, unit=unit
        )


def make(run: runs.Run, circuit: Circuit, task: Task, options: Options) -> Context:
    """Returns the context of a circuit, with pairs as its procedure made them.

    Raises:
      UserError: The circuit is of other parameters, or the task makes too few pairs.
    """
    circuit.check(run.params)
    config = run.config.model
    settings, subject = circuit.settings, _subject(run)
    # The pairs that a circuit was tried on say nothing of others.
    wanted = dataclasses.replace(settings, report_pairs=options.pairs, confirm_pairs=0)
    built, refused = build_pairs([task], run.tokenizer, wanted, context=config.context)
    if error := refused.get(task.name):
        if isinstance(error, TooFewPairs) and error.split == "report":
            error = error.with_hint("--pairs")
        raise error
    nodes_U = masks.from_names([node.name for node in circuit.nodes], config)
    remaining = graph.uncut(subject.scorer.weights, circuit.removed)
    edges = graph.between(nodes_U, remaining, config)
    pairs = subject.held(built[0], settings.held_to)
    return Context(run, circuit, task, subject, pairs, nodes_U, edges, remaining, settings, options)


# All circuits of a run share it.
@functools.lru_cache(maxsize=1)
def _subject(run: runs.Run) -> Subject:
    return Subject(run.params, run.config.model, run.windows("train", n=N_WINDOWS))


@functools.partial(jax.jit, static_argnames=("config", "contenders"))
def _logits(params, pairs: PairArrays, nodes_U, edges, background, *, config, contenders) -> jax.Array:
    return ablations.circuit_logits(params, config, pairs, nodes_U, edges, background, contenders=contenders)
