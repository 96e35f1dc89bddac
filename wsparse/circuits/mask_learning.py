"""Learning a task's mask: one pure function, one scan, made to be jitted and vmapped.

Three objectives differ in the strength r of closed nodes, whose value is `(1 - r) mean + r value`:

* "mean": r is 0, the mean ablation of Gao et al. 2025.
* "stochastic": half of the rows have r = 0, half draw r from U(0, 1) for every node and row.
* "robust": half of the rows draw r, and half share the r of adversaries that ascend the same loss. With
  `m = g + (1 - g) r` the gradients for the gate g and for r both follow from that for m, so that one
  backward pass serves both players.

Shapes: U nodes of the model in one vector, B rows of pairs, T time, L layer, N nodes of a location, A
adversaries, S steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from wsparse import model, taps
from wsparse.circuits import masks
from wsparse.circuits.ablation import answer_logits
from wsparse.circuits.pairs import PairArrays, TaskBatch, arrays, pairs_loss
from wsparse.circuits.settings import Objective
from wsparse.config import ModelConfig
from wsparse.nodes import NODES

# The adversaries of "robust": how many, the step along the sign of the gradient, and the steps after which
# one begins anew from random strengths. One that never did would stay where gates expect it.
_ADVERSARIES, _ASCENT, _RESTART = 2, 0.1, 20


class HParams(NamedTuple):
    """Hyperparameters of a trial: floats, or vectors under vmap. Defaults are the paper's centers."""

    k_coef: Any = 1e-4
    """Penalty per open gate, in nats."""
    noise: Any = 1e-2
    """Standard deviation of the initial tau."""
    bias: Any = 1e-1
    """Mean of the initial tau."""
    weight_decay: Any = 1e-3
    learning_rate: Any = 3e-3
    one_minus_b2: Any = 5e-2
    """1 - b2 of Adam."""
    warmup: Any = 5e-2
    """Share of the steps in which the learning rate rises from 0."""
    temperature: Any = 1.0
    """Width of the Heaviside's surrogate derivative."""


class Masks(NamedTuple):
    """The result of `prune`."""

    tau: dict[str, jax.Array]
    """Location -> `(L, N)` in [-1, 1]; a gate is open where it is positive."""
    losses: jax.Array
    """`(S,)` task loss of each step's batch."""
    open: jax.Array
    """`(S,)` int32, gates open at each step."""


def prune(
    params: model.Params,
    config: ModelConfig,
    task_batch: PairArrays | TaskBatch,
    means: dict[str, jax.Array],
    hparams: HParams,
    key: jax.Array,
    *,
    steps: int = 300,
    pairs_per_step: int = 64,
    tie_qk: bool = True,
    objective: Objective = "mean",
    forbidden_U: jax.Array | None = None,
) -> Masks:
    """Learn which nodes a task needs (Gao et al. 2025, circuit pruning).

    Every node has a parameter tau; its gate is 1 where tau is positive. The value of a closed node is its
    mean over the pretraining distribution, or between that and its own, see `Objective`. The task's loss plus
    `k_coef` for every open gate is minimized by AdamW with gradients clipped at norm 1 and a rate that falls
    to 0; tau is clamped to [-1, 1].

    Args:
      params: Parameters of the model, which do not change.
      config: Config of the model, static.
      task_batch: Pairs that steps draw from, with replacement.
      means: Location -> `(L, N)`, see `scoring.mean_activations`.
      hparams: Traced, so that trials can be vmapped.
      key: Key of the initial noise and of the draws.
      steps: Number of steps, static.
      pairs_per_step: Pairs drawn for a step, static.
      tie_qk: Whether a channel's query and key share a gate.
      objective: Strengths of closed nodes, static.
      forbidden_U: 1 for nodes whose gates stay closed; None forbids none.
    """
    pairs = arrays(task_batch)
    n_pairs = pairs.position.shape[0] // 2
    noise_key, draw_key = jax.random.split(key)
    shapes = masks.shapes(config)
    allowed = None if forbidden_U is None else masks.unflatten(1.0 - forbidden_U, config)
    tau = {
        name: hparams.bias + hparams.noise * jax.random.normal(jax.random.fold_in(noise_key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    tau = _clamped(masks.tie(tau) if tie_qk else tau)
    optimizer = _optimizer(hparams, steps)

    def penalized(tau, adversaries, rows: PairArrays, key):
        gates = masks.gates(tau, hparams.temperature)
        if allowed is not None:
            gates = jax.tree.map(jnp.multiply, gates, allowed)
        shares = _shares(gates, adversaries, rows.position.size, key, objective)
        logits_BV = answer_logits(params, config, rows, taps.mask(shares, means))
        loss = pairs_loss(logits_BV, rows)
        n_open = sum(jnp.sum(gate) for gate in gates.values())
        return loss + hparams.k_coef * n_open, (loss, n_open)

    def step(carry, index):
        tau, state, adversaries = carry
        step_key = jax.random.fold_in(draw_key, index)
        chosen = jax.random.randint(step_key, (pairs_per_step, 1), 0, n_pairs)
        rows = jnp.reshape(2 * chosen + jnp.arange(2)[None], -1)
        batch = jax.tree.map(lambda array: jnp.take(array, rows, axis=0), pairs)
        slopes = jax.grad(penalized, argnums=(0, 1), has_aux=True)
        row_key, restart_key = (jax.random.fold_in(step_key, i) for i in (1, 2))
        (gradient, ascent), (loss, n_open) = slopes(tau, adversaries, batch, row_key)
        updates, state = optimizer.update(gradient, state, tau)
        tau: Any = _clamped(optax.apply_updates(tau, updates))
        adversaries = _ascended(adversaries, ascent, index, restart_key)
        return (tau, state, adversaries), (loss, n_open.astype(jnp.int32))

    carry = (tau, optimizer.init(tau), _random_strengths(noise_key, config))
    (tau, *_), (losses, n_open) = lax.scan(step, carry, jnp.arange(steps))
    tau = masks.untie(tau)
    if allowed is not None:
        tau = {name: jnp.where(allowed[name] > 0, tau_LN, -1.0) for name, tau_LN in tau.items()}
    return Masks(tau, losses, n_open)


def _random_strengths(key: jax.Array, config: ModelConfig) -> masks.Mask:
    """Returns strengths of every adversary, location -> `(L, A, N)`."""
    return {
        name: jax.random.uniform(jax.random.fold_in(key, len(NODES) + i), (layers, _ADVERSARIES, width))
        for i, (name, (layers, width)) in enumerate(masks.shapes(config).items())
    }


def _ascended(adversaries: masks.Mask, slopes: masks.Mask, step: Any, key: jax.Array) -> masks.Mask:
    """Returns the adversaries after a step of ascent; one at a time begins anew."""
    due_A = (step - jnp.arange(_ADVERSARIES) * (_RESTART // _ADVERSARIES)) % _RESTART == 0

    def moved(name: str, i: int) -> jax.Array:
        r_LAN = jnp.clip(adversaries[name] + _ASCENT * jnp.sign(slopes[name]), 0.0, 1.0)
        drawn_LAN = jax.random.uniform(jax.random.fold_in(key, i), r_LAN.shape)
        return jnp.where(due_A[None, :, None], drawn_LAN, r_LAN)

    return {name: moved(name, i) for i, name in enumerate(adversaries)}


def _shares(
    gates: masks.Mask, adversaries: masks.Mask, n_rows: int, key: jax.Array, objective: Objective
) -> masks.Mask:
    """Returns the share of its own value that every node has: location -> `(L, N)` or `(L, B, N)`."""
    if objective == "mean":
        return gates
    shares = {}
    adversary_B = jnp.arange(n_rows - n_rows // 2) * _ADVERSARIES // (n_rows - n_rows // 2)
    for i, (name, gate_LN) in enumerate(gates.items()):
        layers, width = gate_LN.shape
        drawn_LBN = jax.random.uniform(jax.random.fold_in(key, i), (layers, n_rows // 2, width))
        fixed_LBN = adversaries[name][:, adversary_B]
        if objective == "stochastic":
            fixed_LBN = jnp.zeros_like(fixed_LBN)
        gate_L1N = gate_LN[:, None]
        shares[name] = gate_L1N + (1 - gate_L1N) * jnp.concatenate([drawn_LBN, fixed_LBN], axis=1)
    return shares


def _clamped(tau: Any) -> Any:
    return jax.tree.map(lambda tau_LN: jnp.clip(tau_LN, -1.0, 1.0), tau)


def _optimizer(hparams: HParams, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=1 - hparams.one_minus_b2),
        optax.add_decayed_weights(hparams.weight_decay),
        optax.scale_by_learning_rate(lambda step: _learning_rate(hparams, step, steps)),
    )


def _learning_rate(hparams: HParams, step: Any, steps: int) -> jax.Array:
    warmup = hparams.warmup * steps
    rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup, 1.0))
    return hparams.learning_rate * rise * jnp.minimum(1.0, (steps - step) / (steps - warmup))
