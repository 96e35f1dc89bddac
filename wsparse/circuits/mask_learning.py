"""Learning a task's mask: one pure function, one scan, made to be jitted and vmapped.

Shapes: B rows of pairs, T time, L layer, N nodes of a location, S steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from wsparse import model, taps
from wsparse.circuits import masks
from wsparse.circuits.pairs import PairArrays, TaskBatch, arrays, task_loss
from wsparse.config import ModelConfig


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
) -> Masks:
    """Learn which nodes a task needs (Gao et al. 2025, circuit pruning).

    Every node has a parameter tau; its gate is 1 where tau is positive. The value of a closed node is its
    mean over the pretraining distribution. The objective is the task's loss plus `k_coef` for every open
    gate, minimized by AdamW with gradients clipped at norm 1 and a rate that falls to 0; tau is clamped to
    [-1, 1].

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
    """
    pairs = arrays(task_batch)
    n_pairs = pairs.position.shape[0] // 2
    noise_key, draw_key = jax.random.split(key)
    shapes = masks.shapes(config)
    tau = {
        name: hparams.bias + hparams.noise * jax.random.normal(jax.random.fold_in(noise_key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    tau = _clamped(masks.tie(tau) if tie_qk else tau)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=1 - hparams.one_minus_b2),
        optax.add_decayed_weights(hparams.weight_decay),
        optax.scale_by_learning_rate(lambda step: _learning_rate(hparams, step, steps)),
    )

    def objective(tau, rows: PairArrays):
        gates = masks.gates(tau, hparams.temperature)
        logits_BV = answer_logits(params, config, rows, taps.mask(gates, means))
        loss = task_loss(logits_BV, rows.answer, rows.other)
        n_open = sum(jnp.sum(gate) for gate in gates.values())
        return loss + hparams.k_coef * n_open, (loss, n_open)

    def step(carry, index):
        tau, state = carry
        chosen = jax.random.randint(jax.random.fold_in(draw_key, index), (pairs_per_step, 1), 0, n_pairs)
        rows = jnp.reshape(2 * chosen + jnp.arange(2)[None], -1)
        batch = jax.tree.map(lambda array: jnp.take(array, rows, axis=0), pairs)
        gradient, (loss, n_open) = jax.grad(objective, has_aux=True)(tau, batch)
        updates, state = optimizer.update(gradient, state, tau)
        tau: Any = _clamped(optax.apply_updates(tau, updates))
        return (tau, state), (loss, n_open.astype(jnp.int32))

    (tau, _), (losses, n_open) = lax.scan(step, (tau, optimizer.init(tau)), jnp.arange(steps))
    return Masks(masks.untie(tau), losses, n_open)


def answer_logits(
    params: model.Params, config: ModelConfig, pairs: PairArrays, tap: taps.Tap | None = None
) -> jax.Array:
    """Returns the logits after each prompt, `(B, V)`."""
    logits_BPV, _ = model.forward(
        params, pairs.tokens, config, tap=tap, positions_BP=pairs.position[:, None], record=False
    )
    return logits_BPV[:, 0]


def _clamped(tau: Any) -> Any:
    return jax.tree.map(lambda tau_LN: jnp.clip(tau_LN, -1.0, 1.0), tau)


def _learning_rate(hparams: HParams, step: Any, steps: int) -> jax.Array:
    warmup = hparams.warmup * steps
    rise = jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup, 1.0))
    return hparams.learning_rate * rise * jnp.minimum(1.0, (steps - step) / (steps - warmup))
