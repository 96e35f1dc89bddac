"""A model in which circuits are looked for, and a task's pairs of prompts for it.

Three disjoint sets of pairs are used: masks are learned on the first, circuits are chosen on the second and a
part of the first, and every number that is reported comes from the third.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, sparsity, trees
from wsparse.circuits import masks, scoring, tasks
from wsparse.circuits.ablation import answer_logits
from wsparse.circuits.circuit import Score
from wsparse.circuits.pairs import PairArrays, arrays, first, inside, margins
from wsparse.circuits.settings import HeldTo, Settings
from wsparse.config import ModelConfig
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError

# Windows of training text that mean activations are taken over.
N_WINDOWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """A task's pairs, padded to one length.

    Attributes:
      search: Pairs that masks are learned on.
      discretize: Pairs that circuits are chosen on: of the second split, and as many of the first. The
        templates of one split are too alike: a circuit that only just does them fails on others.
      confirm: Pairs of the second split that circuits are not chosen on; None where there are none.
      report: Pairs that numbers are reported on.
    """

    task: str
    form: str
    search: PairArrays
    discretize: PairArrays
    report: PairArrays
    confirm: PairArrays | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the pairs, whatever they are padded to and their losses are against."""
        splits = {
            name: (np.asarray(rows.tokens)[np.asarray(inside(rows))], *rows[1:4])
            for name in ("search", "discretize", "confirm", "report")
            if (rows := getattr(self, name))
        }
        return trees.digest(splits)


class Subject:
    """A model in which circuits are looked for.

    Attributes:
      windows: `(W, T)` tokens of pretraining text.
      means: Mean activations over them.
      scorer: Scorer of its masks.
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
        """The means that masks need."""
        return {name: self.means[name] for name in masks.shapes(self.config)}

    def held(self, pairs: Pairs, held_to: HeldTo) -> Pairs:
        """Returns pairs whose losses are against the labels, or, but for the report's, against this model."""
        if held_to == "labels":
            return pairs

        def held(rows: PairArrays) -> PairArrays:
            log_p_BV = jax.nn.log_softmax(_answer_logits(self.params, rows, config=self.config))
            if held_to == "vocabulary":
                return rows._replace(reference=log_p_BV)
            return rows._replace(certainty=jax.nn.sigmoid(margins(log_p_BV, rows.answer, rows.other)))

        return dataclasses.replace(
            pairs,
            search=held(pairs.search),
            discretize=held(pairs.discretize),
            confirm=held(pairs.confirm) if pairs.confirm else None,
        )

    def score(self, pairs: PairArrays) -> Score:
        """Returns the loss and accuracy of the model without any mask."""
        return self.scorer.mask(pairs, np.ones(masks.n_nodes(self.config), bool))

    def _reinitialized(self, seed: int) -> Subject:
        """Returns the model with every sparse matrix shuffled; sparsity and scale stay as they are."""

        def shuffled(path: str, leaf: jax.Array) -> jax.Array:
            rule = trees.match(sparsity.DEFAULT_RULES, path)
            if not isinstance(rule, sparsity.Sparse):
                return leaf
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
            if not rule.stacked:
                return jnp.reshape(jax.random.permutation(key, leaf.ravel()), leaf.shape)
            rows = jnp.reshape(leaf, (leaf.shape[0], -1))
            return jnp.reshape(jax.random.permutation(key, rows, axis=1, independent=True), leaf.shape)

        params = trees.map_with_path(shuffled, self.params)
        return Subject(params, self.config, self.windows)


@functools.partial(jax.jit, static_argnames="config")
def _answer_logits(params: model.Params, rows: PairArrays, *, config: ModelConfig) -> jax.Array:
    return answer_logits(params, config, rows).astype(jnp.float32)


def build_pairs(
    chosen: Sequence[tasks.Task], tokenizer: Tokenizer, settings: Settings, *, context: int
) -> tuple[list[Pairs], dict[str, UserError]]:
    """Returns the pairs of every task, all of one length, and why other tasks are refused."""
    n_pairs: dict[tasks.Split, int] = {
        "search": settings.search_pairs,
        "discretize": settings.discretize_pairs + settings.confirm_pairs,
        "report": settings.report_pairs,
    }
    max_tokens = min(settings.max_tokens, context)
    built, refused = tasks.build_all(chosen, tokenizer, n_pairs, settings.seed, max_tokens=max_tokens)
    n_chosen = settings.discretize_pairs
    pairs = []
    for batches in built:
        search, discretize, report = (arrays(batches[split]) for split in tasks.SPLITS)
        chosen_on = first(search, n_chosen), first(discretize, n_chosen)
        confirm = jax.tree.map(lambda array: array[2 * n_chosen :], discretize)
        pairs.append(
            Pairs(
                task=batches["search"].task,
                form=batches["search"].form,
                search=search,
                discretize=jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *chosen_on),
                confirm=confirm if settings.confirm_pairs else None,
                report=report,
            )
        )
    return pairs, refused
