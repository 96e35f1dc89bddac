"""What does the same search find where there is nothing to find?"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from wsparse.circuits.audits import mask_runs
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult
from wsparse.circuits.discretize import Subgraph
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.subject import Pairs

# Arbitrary pairs of tokens; how many times as many nodes nonsense must need.
_TOKEN_PAIRS, _RATIO = 8, 2.0
# Seeds of each search: there are ten of them.
_SEEDS = 4


def nonsense(context: Context) -> TestResult:
    """Returns sizes of circuits for inverted labels and for arbitrary pairs of tokens."""
    # As many for the task itself as for each of its stand-ins.
    n_seeds = min(mask_runs.require_seeds(context), _SEEDS)
    rng = context.rng("nonsense")
    own, _ = _size(context, context.pairs, n_seeds)
    stand_ins = {"inverted labels": _inverted(context.pairs)}
    for number, (first, second) in enumerate(_token_pairs(context, rng), start=1):
        texts = " or ".join(repr(context.run.tokenizer.decode([token])) for token in (first, second))
        stand_ins[f"{number}: {texts}"] = _relabeled(context.pairs, first, second)
    measurements, ratios = [], []
    for name, pairs in stand_ins.items():
        size, least = _size(context, pairs, n_seeds)
        ratios.append(np.inf if size is None else size / max(own or np.inf, 1))
        measurements += [
            Measurement(name=f"{name}: nodes at the circuit's loss", value=size, control=own, unit="nodes"),
            Measurement(name=f"{name}: least loss", value=least),
        ]
    return TestResult(
        question="Does the same search find circuits for rules that the model was never taught?",
        procedure="The labels of all pairs are exchanged, or the answers are replaced by two arbitrary "
        f"tokens, one for each side, {len(stand_ins) - 1} times; same prompts, steps and hyperparameters, "
        "cut to the same loss, and not cleaned up.",
        control="The task itself, searched for in the same way.",
        criterion=f"Wherever nonsense reaches the loss it needs at least {_RATIO:g} times as many nodes.",
        verdict="passed" if own is not None and min(ratios) >= _RATIO else "failed",
        measurements=measurements,
    )


def random_weights(context: Context) -> TestResult:
    """Returns what the same search finds in the model with every matrix's entries at random places."""
    n_seeds = mask_runs.require_seeds(context)
    stand_in = context.subject.reinitialized(context.options.seed + 1)
    found, least = mask_runs.successes(context, mask_runs.seeds(context, n_seeds), subject=stand_in)
    sizes = [s.n_nodes for s in found]
    own = len(mask_runs.own_successes(context)) / n_seeds
    return TestResult(
        question="Does the same search find a circuit in a model whose matrices know nothing?",
        procedure=f"Every sparse matrix's entries are shuffled; biases, gains and the bigram table stay. "
        f"{n_seeds} seeds; one succeeds with at most {mask_runs.LARGEST} times as many nodes as the "
        "circuit's own run.",
        control="The trained model, searched in the same way.",
        criterion="No seed succeeds.",
        # Where the search fails in the trained model too, its failure here says nothing.
        verdict="failed" if sizes else "passed" if own >= 0.5 else "reported",
        measurements=[
            Measurement(name="seeds that succeed", value=len(sizes) / n_seeds, control=own, unit="share"),
            Measurement(name="smallest circuit", value=min(sizes, default=None), unit="nodes"),
            Measurement(name="least loss", value=least),
        ],
    )


def _size(context: Context, pairs: Pairs, n_seeds: int) -> tuple[int | None, float]:
    """Returns the nodes of the smallest circuit, None where none reaches the loss, and the least loss."""
    found, least = mask_runs.subgraphs(context, mask_runs.seeds(context, n_seeds), pairs=pairs)
    reached: list[Subgraph] = [s for s in found if s is not None]
    return min((s.n_nodes for s in reached), default=None), least


def _token_pairs(context: Context, rng: np.random.Generator) -> np.ndarray:
    """Returns pairs of frequent tokens that are no answers of the task."""
    counts_V = np.bincount(context.subject.windows.ravel(), minlength=context.config.vocab_size)
    counts_V[np.asarray(context.pairs.search.answer)] = 0
    frequent = np.argsort(-counts_V)[: 8 * _TOKEN_PAIRS]
    frequent = frequent[counts_V[frequent] > 0]
    # A vocabulary may have fewer tokens than the pairs ask for.
    n_pairs = min(_TOKEN_PAIRS, len(frequent) // 2)
    return rng.choice(frequent, (n_pairs, 2), replace=False)


def _inverted(pairs: Pairs) -> Pairs:
    return _each(pairs, lambda rows: rows._replace(answer=rows.other, other=rows.answer))


def _relabeled(pairs: Pairs, first: int, second: int) -> Pairs:
    def relabel(rows: PairArrays) -> PairArrays:
        answer = jnp.tile(jnp.array([first, second], jnp.int32), len(rows.answer) // 2)
        # A model has no opinion on what it was never asked.
        return rows._replace(
            answer=answer, other=jnp.flip(answer.reshape(-1, 2), 1).ravel(), certainty=None, reference=None
        )

    return _each(pairs, relabel)


def _each(pairs: Pairs, change) -> Pairs:
    splits = {name: change(getattr(pairs, name)) for name in ("search", "discretize", "report")}
    return dataclasses.replace(pairs, **splits)
