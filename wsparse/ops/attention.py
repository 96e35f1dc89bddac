"""Causal attention with per-head sinks: its plain-JAX form, and the choice of a kernel.

Shapes: B batch, T query time, S key time, H head, K d_head.
"""

from __future__ import annotations

from collections.abc import Callable
import math

import jax
from jax import lax
import jax.numpy as jnp

from wsparse.ops import cpu, tpu, tpu_attention
from wsparse.ops.derivatives import differentiable


def attend(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    sink_H: jax.Array | None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention; `sink_H` are logits that join each head's softmax denominator only.

    Scores are scaled by `1/sqrt(d_head)`. Query t is at position t, or at `positions_BT[:, t]`. Returns
    `(B, T, H, K)`. The platform chooses the way; the results are equal up to rounding.
    """
    kernels: dict[str, Callable[..., jax.Array]] = {}
    if cpu.takes(q_BTHK):
        kernels["cpu"] = attend_on_cpu
    if tpu.available() and positions_BT is None and tpu_attention.takes(q_BTHK):
        kernels["tpu"] = lambda q, k, v, sink, _: tpu_attention.attend(q, k, v, sink)
    return lax.platform_dependent(
        q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT, default=attend_plainly, **kernels
    )


def attend_plainly(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    sink_H: jax.Array | None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """`attend` in plain JAX."""
    weights_BHTS, total_BHT1 = _attention_weights(q_BTHK, k_BSHK, sink_H, positions_BT)
    v_BHSK = jnp.swapaxes(v_BSHK, 1, 2)
    y_BHTK = jnp.matmul(weights_BHTS.astype(v_BSHK.dtype), v_BHSK)
    # Normalized after the product, which is smaller than the weights by T / d_head.
    y_BHTK = (y_BHTK / total_BHT1.astype(y_BHTK.dtype)).astype(v_BSHK.dtype)
    return jnp.swapaxes(y_BHTK, 1, 2)


_attend_on_cpu = differentiable(attend_plainly, cpu.attend, cpu.attend_gradient)


def attend_on_cpu(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    sink_H: jax.Array | None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """`attend` of float32 by the CPU kernel."""
    batch, time, heads, _ = q_BTHK.shape
    if sink_H is None:
        sink_H = jnp.full(heads, -jnp.inf, jnp.float32)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (batch, time))
    return _attend_on_cpu(q_BTHK, k_BSHK, v_BSHK, sink_H, positions_BT.astype(jnp.int32))


def attention_pattern(q_BTHK: jax.Array, k_BSHK: jax.Array, sink_H: jax.Array | None) -> jax.Array:
    """`(B, H, T, S)` attention weights in at least float32; rows sum to 1 less the sink's share."""
    weights_BHTS, total_BHT1 = _attention_weights(q_BTHK, k_BSHK, sink_H)
    return weights_BHTS / total_BHT1


def _attention_weights(
    q_BTHK: jax.Array, k_BSHK: jax.Array, sink_H: jax.Array | None, positions_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Exponentials of the scores, zero for future keys, and what each row is to be divided by."""
    dtype = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    # Heads beside the batch: many small products of contiguous matrices, which every platform likes.
    q_BHTK, k_BHSK = jnp.swapaxes(q_BTHK, 1, 2), jnp.swapaxes(k_BSHK, 1, 2)
    scores_BHTS = jnp.matmul(q_BHTK, jnp.swapaxes(k_BHSK, 2, 3), preferred_element_type=dtype)
    scores_BHTS = scores_BHTS * (1.0 / math.sqrt(q_BTHK.shape[-1]))
    time, keys = scores_BHTS.shape[2:]
    if positions_BT is None:
        causal = jnp.tri(time, keys, dtype=bool)[None, None]
    else:
        causal = jnp.arange(keys)[None, None, None] <= positions_BT[:, None, :, None]
    scores_BHTS = jnp.where(causal, scores_BHTS, -jnp.inf)
    top_BHT1 = jnp.max(scores_BHTS, axis=-1, keepdims=True)
    sink_1H11 = None if sink_H is None else jnp.reshape(sink_H, (1, -1, 1, 1)).astype(dtype)
    if sink_1H11 is not None:
        top_BHT1 = jnp.maximum(top_BHT1, sink_1H11)
    # Any shift gives the same weights; this one keeps the exponentials in range.
    top_BHT1 = lax.stop_gradient(top_BHT1)
    weights_BHTS = jnp.exp(scores_BHTS - top_BHT1)
    total_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
    if sink_1H11 is not None:
        total_BHT1 = total_BHT1 + jnp.exp(sink_1H11 - top_BHT1)
    return weights_BHTS, total_BHT1
