"""Adversaries of a circuit: strengths of closed nodes that make its loss as large as they can.

A closed node of strength r has the value `(1 - r) mean + r value`; an adversary chooses r in [0, 1] for every
closed node, the same for all prompts. It is a search: that it fails does not say that every adversary does.

Shapes: U nodes of the model in one vector, B rows of pairs, S steps.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from wsparse import model
from wsparse.circuits import graph
from wsparse.circuits.ablation import Background, circuit_logits
from wsparse.circuits.pairs import PairArrays, pairs_loss
from wsparse.config import ModelConfig

STEPS, STEP_SIZE = 20, 0.1


class Attack(NamedTuple):
    """The result of an adversary."""

    strengths: np.ndarray
    """float32 `(U,)`, those of the largest loss that was seen; 0 for the circuit's own nodes."""
    losses: np.ndarray
    """`(S + 1,)` task loss at the start and after every step."""

    @property
    def worst(self) -> np.ndarray:
        """`(S + 1,)` the largest loss up to every step."""
        return np.maximum.accumulate(self.losses)

    @property
    def loss(self) -> float:
        """The largest loss."""
        return float(np.max(self.losses))


def ascend(
    params: model.Params,
    config: ModelConfig,
    pairs: PairArrays,
    nodes_U: np.ndarray,
    edges: graph.EdgeMask,
    background: Background,
    *,
    seed: int = 0,
    steps: int = STEPS,
) -> Attack:
    """Returns the result of sign-gradient ascent from random strengths, in steps of 0.1.

    Args:
      params: Parameters; with biases if edges are cut, see `scoring.with_biases`.
      nodes_U: Nodes of the circuit.
      edges: Weights that stay, see `ablation.circuit_logits`.
      background: From `ablation.make_background`.
      seed: Seed of the first strengths.
      steps: Number of steps.
    """
    kept_U = jnp.asarray(nodes_U, jnp.float32)
    start_U = np.random.default_rng(seed).random(kept_U.size, np.float32)
    edges = jax.tree.map(jnp.asarray, edges)
    strengths_U, losses_S = _ascend(
        params, pairs, kept_U, edges, background, start_U, config=config, steps=steps
    )
    return Attack(np.asarray(strengths_U), np.asarray(losses_S))


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def _ascend(params, pairs, kept_U, edges, background, start_U, *, config, steps):
    def loss(strengths_U):
        logits_BV = circuit_logits(params, config, pairs, kept_U, edges, background, strengths=strengths_U)
        return pairs_loss(logits_BV, pairs)

    def step(carry, _):
        strengths_U, best, best_U = carry
        value, slope_U = jax.value_and_grad(loss)(strengths_U)
        best_U = jnp.where(value > best, strengths_U, best_U)
        moved_U = jnp.clip(strengths_U + STEP_SIZE * jnp.sign(slope_U), 0.0, 1.0)
        return (moved_U, jnp.maximum(value, best), best_U), value

    start_U = jnp.asarray(start_U)
    (_, _, best_U), losses_S = lax.scan(step, (start_U, -jnp.inf, start_U), length=steps + 1)
    return best_U * (1 - kept_U), losses_S


def ablate_few(
    params: model.Params,
    config: ModelConfig,
    pairs: PairArrays,
    nodes_U: np.ndarray,
    edges: graph.EdgeMask,
    background: Background,
    *,
    budget: int,
    steps: int = STEPS,
) -> Attack:
    """Returns the attack that leaves everything but `budget` closed nodes as it is, and ablates those.

    A step estimates, to first order at the ablation of the last, how much each closed node's ablation adds to
    the loss; estimates are summed over steps, and the nodes with the largest sums are ablated next.

    Args:
      budget: Number of nodes outside the circuit that may be ablated.
      steps: Number of sets that are tried.
    """
    kept_U = jnp.asarray(nodes_U, jnp.float32)
    edges = jax.tree.map(jnp.asarray, edges)
    ablated_U, losses_S = _ablate_few(
        params, pairs, kept_U, edges, background, jnp.int32(budget), config=config, steps=steps
    )
    return Attack(np.asarray((1 - ablated_U) * (1 - kept_U)), np.asarray(losses_S))


@functools.partial(jax.jit, static_argnames=("config", "steps"))
def _ablate_few(params, pairs, kept_U, edges, background, budget, *, config, steps):
    def loss(ablated_U):
        logits_BV = circuit_logits(params, config, pairs, kept_U, edges, background, strengths=1 - ablated_U)
        return pairs_loss(logits_BV, pairs)

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
