"""Masks learned anew for an audit: the circuit's own procedure, from many seeds, in one compiled function.

Shapes: U nodes of the model in one vector, M runs.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import numpy as np

from wsparse.circuits.audits.context import Context
from wsparse.circuits.discretize import Subgraph, discretize
from wsparse.circuits.mask_learning import HParams
from wsparse.circuits.search import Pruner
from wsparse.circuits.subject import Pairs, Subject
from wsparse.errors import UserError

# Runs in one vmapped call.
_PARALLEL = 4
# How many times as many nodes as the circuit's own trial a seed may have that succeeds: with enough nodes
# added, any mask reaches a loss that the model reaches.
LARGEST = 2


def require_seeds(context: Context, *, least: int = 1) -> int:
    """Returns the number of seeds.

    Raises:
      UserError: There are fewer than `least`.
    """
    if context.options.seeds < least:
        raise UserError("it learns masks anew: --seeds=8 runs it")
    return context.options.seeds


def goal(context: Context) -> float:
    """Returns the loss that runs must reach, on the pairs that circuits are chosen on: the circuit's own."""
    found = context.circuit.scores.discretize_loss
    return context.circuit.target if found is None else max(found, context.circuit.target / 2)


def seeds(context: Context, count: int, *, stage: int = 0) -> range:
    """Returns seeds that no trial of a search has, and no other stage of an audit."""
    first = 1000 * (1 + context.options.seed) + 100 * stage
    return range(first, first + count)


def successes(
    context: Context,
    seeds: Sequence[int],
    *,
    subject: Subject | None = None,
    forbidden_U: np.ndarray | None = None,
) -> tuple[list[Subgraph], float]:
    """Returns the cuts of the seeds that succeed, and the least loss that was seen.

    A seed succeeds where it reaches the goal with at most `LARGEST` times as many nodes as the circuit's own
    trial had before the clean-up.

    Args:
      seeds: Seeds of the runs.
      subject: Another model.
      forbidden_U: Nodes that stay closed.
    """
    found, least_loss = subgraphs(context, seeds, subject=subject, forbidden_U=forbidden_U)
    most = LARGEST * _own_nodes(context)
    return [s for s in found if s is not None and s.n_nodes <= most], least_loss


# Several tests compare with it.
@functools.lru_cache(maxsize=1)
def own_successes(context: Context) -> list[Subgraph]:
    """Returns the cuts of the seeds that succeed when the circuit's own search is made again."""
    return successes(context, seeds(context, context.options.seeds))[0]


def _own_nodes(context: Context) -> int:
    """Returns the nodes of the circuit's own trial; those of the circuit where that is not known."""
    own = context.circuit.hyperparameters.get("trial")
    cuts = [trial.nodes or 0 for trial in context.circuit.scores.trials if trial.number == own]
    return max([*cuts, len(context.circuit.nodes)])


def subgraphs(
    context: Context,
    seeds: Sequence[int],
    *,
    subject: Subject | None = None,
    pairs: Pairs | None = None,
    forbidden_U: np.ndarray | None = None,
) -> tuple[list[Subgraph | None], float]:
    """Returns the cut of every seed, None where the goal is missed, and the least loss that was seen.

    Args:
      seeds: Seeds of the runs; hyperparameters are those of the circuit's own trial.
      subject: Another model.
      pairs: Other pairs, in the shape of the task's.
      forbidden_U: Nodes that stay closed.
    """
    subject, pairs = subject or context.subject, pairs or context.pairs
    known = context.circuit.hyperparameters
    hparams = HParams(**{name: known[name] for name in HParams._fields if name in known})
    run = _pruner(context)
    taus = []
    for start in range(0, len(seeds), _PARALLEL):
        part = list(seeds[start : start + _PARALLEL])
        means = subject.node_means
        taus += list(run(subject.params, pairs.search, means, [hparams] * len(part), part, forbidden_U))
    cuts = [
        discretize(subject.scorer, pairs.discretize, tau_U, goal(context), forbidden_U=forbidden_U)
        for tau_U in taus
    ]
    return [cut.subgraph for cut in cuts], min(cut.least_loss for cut in cuts)


@functools.lru_cache(maxsize=1)
def _pruner(context: Context) -> Pruner:
    parallel = min(_PARALLEL, context.options.seeds)
    return Pruner(context.subject.config, context.settings, parallel=parallel)
