"""Adversaries of a circuit: strengths of closed nodes that make its loss as large as they can.

A closed node of strength r has the value `(1 - r) mean + r value`; an adversary chooses r in [0, 1] for every
closed node, the same for all prompts. It is a search: that it fails does not say that every adversary does.

Shapes: U nodes of the model in one vector, D draws, S steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from wsparse.circuits.ablation import Background, circuit_logits
from wsparse.circuits.pairs import PairArrays, pairs_loss
from wsparse.circuits.subnetwork import Subnetwork

STEPS, STEP_SIZE, STARTS = 20, 0.1, 8
# Steps between two looks at the loss on all pairs.
INTERVAL = 5
# Pairs that one step sees, at least. Steps that see a part find large losses as often as those that see all,
# in less time; of small ones they can find less.
_PAIRS_PER_STEP = 32


class Attack(NamedTuple):
    """The result of an adversary."""

    strengths: np.ndarray
    """float32 `(U,)`, those of the largest loss that was seen; 0 for the circuit's own nodes."""
    losses: np.ndarray
    """`(S + 1,)` task loss at the start and after every step, or every `INTERVAL` steps; the largest of all
    starts."""

    @property
    def worst(self) -> np.ndarray:
        """`(S + 1,)` the largest loss up to every step."""
        return np.maximum.accumulate(self.losses)

    @property
    def loss(self) -> float:
        """The largest loss."""
        return float(np.max(self.losses))


def ascend(
    found: Subnetwork,
    pairs: PairArrays,
    *,
    seed: int = 0,
    steps: int = STEPS,
    starts: int = STARTS,
    until: float = np.inf,
) -> Attack:
    """Returns the result of sign-gradient ascent in steps of 0.1, the best of several starts.

    Where an ascent ends depends on where it starts: for one circuit, one ends at 0.1 nats and the next at 2.
    The first start is the whole model, every strength at 1; the others are random, by turns of zeros and ones
    and of numbers between them. Every step sees the next of some parts of the pairs; losses are those on all.

    Args:
      seed: Seed of the starts.
      steps: Number of steps, a multiple of `INTERVAL`.
      starts: Number of starts.
      until: Loss above which no further start is tried.
    """
    rng, config = np.random.default_rng(seed), found.scorer.config
    parts = max(1, len(pairs.position) // (2 * _PAIRS_PER_STEP))
    arrays, attacks = _arrays(found, pairs), []
    for i in range(starts):
        drawn_U = rng.random(found.nodes_U.size, np.float32)
        start_U = np.ones_like(drawn_U) if i == 0 else np.round(drawn_U) if i % 2 else drawn_U
        ascent = _ascend(*arrays, start_U, config=config, parts=parts, steps=steps)
        attacks.append(Attack(*map(np.asarray, ascent)))
        if attacks[-1].loss > until:
            break
    best = max(attacks, key=lambda attack: attack.loss)
    return best._replace(losses=np.max([attack.losses for attack in attacks], axis=0))


@functools.partial(jax.jit, static_argnames=("config", "parts", "steps"))
def _ascend(params, pairs, kept_U, edges, background, start_U, *, config, parts, steps):
    def loss(strengths_U, pairs):
        return _loss(params, pairs, kept_U, edges, background, strengths_U, config=config)

    def split(array):
        """Returns the rows of each part, `(parts, B / parts, ...)`; neighbors are in different ones."""
        n_rows, rest = 2 * parts * (len(array) // (2 * parts)), array.shape[1:]
        rows = jnp.reshape(array[:n_rows], (-1, parts, 2, *rest))
        return jnp.reshape(jnp.swapaxes(rows, 0, 1), (parts, -1, *rest))

    pairs_of_part = jax.tree.map(split, pairs)

    def step(strengths_U, index):
        part = jax.tree.map(lambda rows: rows[index % parts], pairs_of_part)
        slope_U = jax.grad(loss)(strengths_U, part)
        return jnp.clip(strengths_U + STEP_SIZE * jnp.sign(slope_U), 0.0, 1.0), None

    def interval(carry, steps_I):
        strengths_U, best, best_U = carry
        strengths_U, _ = lax.scan(step, strengths_U, steps_I)
        value = loss(strengths_U, pairs)
        best_U = jnp.where(value > best, strengths_U, best_U)
        return (strengths_U, jnp.maximum(value, best), best_U), value

    start_U = jnp.asarray(start_U)
    first = loss(start_U, pairs)
    intervals = jnp.reshape(jnp.arange(steps), (-1, INTERVAL))
    (_, _, best_U), losses_S = lax.scan(interval, (start_U, first, start_U), intervals)
    return best_U * (1 - kept_U), jnp.concatenate([first[None], losses_S])


def ablate_few(found: Subnetwork, pairs: PairArrays, *, budget: int, steps: int = STEPS) -> Attack:
    """Returns the attack that leaves everything but `budget` closed nodes as it is, and ablates those.

    A step estimates, to first order at the ablation of the last, how much each closed node's ablation adds to
    the loss; estimates are summed over steps, and the nodes with the largest sums are ablated next.

    Args:
      budget: Number of nodes outside the circuit that may be ablated.
      steps: Number of sets that are tried.
    """
    config = found.scorer.config
    ablated_U, losses_S = _ablate_few(*_arrays(found, pairs), jnp.int32(budget), config=config, steps=steps)
    return Attack(np.asarray((1 - ablated_U) * ~found.nodes_U), np.asarray(losses_S))


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def _ablate_few(params, pairs, kept_U, edges, background, budget, *, config, steps):
    def loss(ablated_U):
        return _loss(params, pairs, kept_U, edges, background, 1 - ablated_U, config=config)

    def step(carry, _):
        ablated_U, summed_U, best, best_U = carry
        value, slope_U = jax.value_and_grad(loss)(ablated_U)
        best_U = jnp.where(value > best, ablated_U, best_U)
        summed_U = summed_U + slope_U
        worth_U = jnp.where(kept_U > 0, -jnp.inf, summed_U)
        rank_U = jnp.argsort(jnp.argsort(-worth_U))
        chosen_U = ((rank_U < budget) & (kept_U == 0)).astype(ablated_U.dtype)
        return (chosen_U, summed_U, jnp.maximum(value, best), best_U), value

    none_U: Any = jnp.zeros_like(kept_U)
    first = (none_U, none_U, -jnp.inf, none_U)
    (_, _, _, best_U), losses_S = lax.scan(step, first, length=steps + 1)
    return best_U, losses_S


def losses(found: Subnetwork, pairs: PairArrays, strengths_DU: np.ndarray) -> np.ndarray:
    """Returns the task loss under given strengths, `(D,)`."""
    arrays = _arrays(found, pairs)
    losses_D = [_loss(*arrays, strengths_U, config=found.scorer.config) for strengths_U in strengths_DU]
    return np.asarray(losses_D)


def _arrays(found: Subnetwork, pairs: PairArrays) -> tuple[Any, ...]:
    """Returns what the compiled functions are given of a circuit."""
    scorer, kept_U = found.scorer, jnp.asarray(found.nodes_U, jnp.float32)
    edges = jax.tree.map(jnp.asarray, found.remaining)
    return scorer.params, pairs, kept_U, edges, Background(scorer.means, scorer.means)


@functools.partial(jax.jit, static_argnames="config")
def _loss(params, pairs, kept_U, edges, background, strengths_U, *, config) -> jax.Array:
    logits_BV = circuit_logits(params, config, pairs, kept_U, edges, background, strengths=strengths_U)
    return pairs_loss(logits_BV, pairs)
