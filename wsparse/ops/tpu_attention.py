"""Causal attention with a sink for TPUs: scores never leave a core's memory.

A TPU works on 128 channels at a time, a tile that holds several narrow heads. A head's scores are those of
the whole tile with the queries' other channels set to zero, which costs no more than padding the head alone
would, and nothing is transposed or padded in device memory: queries, keys, values and gradients are each
read once and results written once. A block of queries sees all its keys, so the backward pass can find the
softmax again, and nothing but the operands is stored for it.
"""

from __future__ import annotations

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from wsparse.ops import tpu

_LANES = 128
# Scores of one head that a core holds at a time; the kernels need about eight arrays of them.
_SCORES = 1 << 18
_LONGEST = 8192
_VMEM_BYTES = 64 << 20


def takes(q_BTHK: jax.Array) -> bool:
    """Returns whether `attend` can do attention of these queries, and of keys and values of their shape."""
    _, time, heads, width = q_BTHK.shape
    tiles = (heads * width) % _LANES == 0 and _LANES % width == 0
    return q_BTHK.dtype in (jnp.bfloat16, jnp.float32) and tiles and time % _LANES == 0 and time <= _LONGEST


def attend(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    sink_H: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`wsparse.ops.attention.attend` of as many queries as keys, where `takes` says so.

    A NaN or infinity in a key or a value spoils the other heads of its tile too. Over the devices of the mesh
    in context batches are sharded, then tiles of channels; over its axis "tensor" the tiles first, as their
    heads are. `interpret` runs the kernels' bodies as plain JAX, on any platform.
    """
    batch, time, heads, width = q_BTHK.shape
    channels = heads * width
    # A row of a tile's lanes, every head's logit at all its channels.
    sink_H = jnp.full(heads, -jnp.inf) if sink_H is None else sink_H
    sink_1E = jnp.repeat(sink_H.astype(jnp.float32), width)[None]
    rows, tiles = tpu.partition(batch, channels // _LANES, last=("tensor",))
    spec, row = P(rows, None, tiles), P(None, tiles)
    call = tpu.over_mesh(functools.partial(_attend, width, interpret), (spec, spec, spec, row), spec)
    q, k, v = (jnp.reshape(x, (batch, time, channels)) for x in (q_BTHK, k_BTHK, v_BTHK))
    return jnp.reshape(call(q, k, v, sink_1E), q_BTHK.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(width, interpret, q_BTE, k_BTE, v_BTE, sink_1E):
    return _forward(width, interpret, q_BTE, k_BTE, v_BTE, sink_1E)[0]


def _forward(width, interpret, *operands):
    q_BTE = operands[0]
    keys, queries, grid, row = _specs(q_BTE.shape)
    y_BTE = pl.pallas_call(
        functools.partial(_forward_body, width),
        grid=grid,
        in_specs=[queries, keys, keys, row],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q_BTE.shape, q_BTE.dtype),
        name="wsparse_attend",
        **_options(q_BTE, width, products=2, arrays=4, interpret=interpret),
    )(*operands)
    return y_BTE, operands


def _backward(width, interpret, operands, dy_BTE):
    *qkv, _ = operands
    keys, queries, grid, row = _specs(dy_BTE.shape)
    batch, time, channels = dy_BTE.shape
    *gradients, sinks_B1E = pl.pallas_call(
        functools.partial(_backward_body, width),
        grid=grid,
        in_specs=[queries, keys, keys, row, queries],
        out_specs=[queries, keys, keys, pl.BlockSpec((None, 1, _LANES), lambda b, e, t: (b, 0, e))],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv),
            jax.ShapeDtypeStruct((batch, 1, channels), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((time, _LANES), jnp.float32)] * 2,
        name="wsparse_attend_gradient",
        **_options(dy_BTE, width, products=5, arrays=7, interpret=interpret),
    )(*operands, dy_BTE)
    # Every channel of a head has the head's gradient: the transpose of what repeated the logit sums them.
    return *gradients, jnp.sum(sinks_B1E, axis=0) / width


_attend.defvjp(_forward, _backward)


def _specs(shape):
    """Returns blocks of all keys and of some queries, the grid over both, and the sinks' row."""
    batch, time, channels = shape
    sizes = [size for size in range(_LANES, time + 1, _LANES) if time % size == 0]
    queries = max(size for size in sizes if size == _LANES or size * time <= _SCORES)
    return (
        pl.BlockSpec((None, time, _LANES), lambda b, e, t: (b, 0, e)),
        pl.BlockSpec((None, queries, _LANES), lambda b, e, t: (b, t, e)),
        (batch, channels // _LANES, time // queries),
        pl.BlockSpec((1, _LANES), lambda b, e, t: (0, e)),
    )


def _options(q_BTE, width, *, products, arrays, interpret):
    """Returns what both kernels are called with; products and arrays are for estimates of cost."""
    batch, time, channels = q_BTE.shape
    scores = batch * (channels // width) * time * time
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * scores * width,
            transcendentals=scores,
            bytes_accessed=arrays * q_BTE.size * q_BTE.dtype.itemsize,
        ),
        "interpret": interpret,
    }


def _forward_body(width, q_ref, k_ref, v_ref, sink_ref, y_ref):
    q_TE, k_SE, v_SE = q_ref[...].astype(jnp.float32), k_ref[...], v_ref[...]
    y_TE = jnp.zeros(q_TE.shape, jnp.float32)
    for own_1E in _heads(width):
        own_q = _only(own_1E, q_TE, k_SE.dtype)
        weights_TS, _, total_T1 = _softmax(own_q, k_SE, sink_ref[...], own_1E, width)
        y_TE += jnp.where(own_1E, _dot(weights_TS.astype(v_SE.dtype), v_SE) / total_T1, 0.0)
    y_ref[...] = y_TE.astype(y_ref.dtype)


def _backward_body(
    width, q_ref, k_ref, v_ref, sink_ref, dy_ref, dq_ref, dk_ref, dv_ref, dsink_ref, dk_SE, dv_SE
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        for sums in (dk_SE, dv_SE, dsink_ref):
            sums[...] = jnp.zeros_like(sums)

    k, v, dtype = k_ref[...], v_ref[...], k_ref.dtype
    q_TE, dy_TE = q_ref[...].astype(jnp.float32), dy_ref[...].astype(jnp.float32)
    dq_TE = jnp.zeros(q_TE.shape, jnp.float32)
    for own_1E in _heads(width):
        own_q, own_dy = _only(own_1E, q_TE, dtype), _only(own_1E, dy_TE, dtype)
        weights_TS, sink_T1, total_T1 = _softmax(own_q, k, sink_ref[...], own_1E, width)
        p_TS = weights_TS / total_T1
        dp_TS = _dot(own_dy, v, transposed=1)
        mean_T1 = jnp.sum(p_TS * dp_TS, axis=1, keepdims=True)
        ds_TS = (p_TS * (dp_TS - mean_T1) * (1 / math.sqrt(width))).astype(dtype)
        dq_TE += jnp.where(own_1E, _dot(ds_TS, k), 0.0)
        # Other heads' channels are zero in what these two sum.
        dk_SE[...] += _dot(ds_TS, own_q, transposed=0)
        dv_SE[...] += _dot(p_TS.astype(dtype), own_dy, transposed=0)
        dsink_11 = -jnp.sum(sink_T1 / total_T1 * mean_T1, axis=0, keepdims=True)
        dsink_ref[...] += jnp.where(own_1E, dsink_11, 0.0)
    dq_ref[...] = dq_TE.astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk_ref[...] = dk_SE[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_SE[...].astype(dv_ref.dtype)


def _heads(width):
    """Yields a mask of the lanes of every head of a tile."""
    lanes = lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    for head in range(_LANES // width):
        yield (lanes >= head * width) & (lanes < (head + 1) * width)


def _only(own_1E, x_TE, dtype):
    """Returns one head's channels, zero in the others."""
    return jnp.where(own_1E, x_TE, 0.0).astype(dtype)


def _softmax(own_q_TE, k_SE, sink_1E, own_1E, width):
    """Returns the exponentials of one head's scores, of its sink, and the sum of both in each row."""
    scores_TS = _dot(own_q_TE, k_SE, transposed=1)
    shape = scores_TS.shape
    query = lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(2) * shape[0]
    causal = lax.broadcasted_iota(jnp.int32, shape, 1) <= query
    scores_TS = jnp.where(causal, scores_TS * (1 / math.sqrt(width)), -jnp.inf)
    sink_11 = jnp.max(jnp.where(own_1E, sink_1E, -jnp.inf), axis=1, keepdims=True)
    top_T1 = jnp.maximum(jnp.max(scores_TS, axis=1, keepdims=True), sink_11)
    weights_TS = jnp.exp(scores_TS - top_T1)
    sink_T1 = jnp.exp(sink_11 - top_T1)
    return weights_TS, sink_T1, jnp.sum(weights_TS, axis=1, keepdims=True) + sink_T1


def _dot(x, y, *, transposed=None):
    """Returns `x @ y`, `x.T @ y` (transposed 0) or `x @ y.T` (transposed 1), summed in float32."""
    axes = ((0 if transposed == 0 else 1,), (1 if transposed == 1 else 0,))
    return lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=jnp.float32)
