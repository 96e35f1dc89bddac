"""The transformer: a pure function of `(config, params)`, and the one forward pass of the codebase.

Shapes are named by suffixes: B batch, T time, D d_model, R read width (d_model and concatenated
positions), H head, K d_head, F d_mlp, V vocab, P positions of logits, S key time. A leading L is stacked
layers. Flax's modules appear here only, as leaves with explicit names.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from wsparse import trees
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import Location, MeanAblation, Tap
from wsparse.ops import cpu
from wsparse.ops.attention import attend, attention_pattern
from wsparse.ops.linear import gelu, matmul
from wsparse.ops.top_k import ablate_largest, abs_top_k

__all__ = ["ModelConfig", "Params", "attention_pattern", "count_parameters", "forward", "init"]

Params = dict[str, Any]
# (location, AbsTopK site or None, value) -> value: what a layer calls wherever it has a location.
_Node = Callable[[str, str | None, jax.Array], jax.Array]

_STD = 0.02


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters: float32 nested dicts, each block's parameters stacked on a leading layer axis.

    Weights are N(0, 0.02), output projections scaled by `1/sqrt(2 n_layer)`, biases, sinks and the
    bigram table 0, gains 1 (Gao et al. 2025). Each array's numbers depend on its own name and layer only,
    so switching a part of the model on or off leaves the rest as it was.
    """
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, config.d_model))
    positions_TP = jnp.zeros((1, config.d_pos)) if config.concatenates_positions else None
    embed_key, block_key, head_key = (jax.random.fold_in(key, i) for i in range(3))

    embed = Embed(config).init(embed_key, tokens_BT)["params"]
    layer_keys = jax.vmap(lambda i: jax.random.fold_in(block_key, i))(jnp.arange(config.n_layer))
    block = Block(config)
    blocks = jax.vmap(lambda k: block.init(k, x_BTD, positions_TP, _plain)["params"])(layer_keys)
    head = Head(config).init(head_key, x_BTD, tokens_BT, embed["tokens"])["params"]
    return {"embed": embed, "blocks": blocks, "head": head}


def forward(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    tap: Tap | None = None,
    positions_BP: jax.Array | None = None,
    record: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run the model.

    Args:
      params: from `init` or a checkpoint.
      tokens_BT: int tokens, T at most `config.context`.
      config: the model's config, static under jit.
      tap: `(location, value) -> value`, called at every location of `wsparse.nodes`; what it returns
        is what later computation and the returned activations see.
      positions_BP: int positions at which logits are wanted; None is all of them. The unembedding of
        a small model is a large part of its cost.
      record: whether activations are returned. Without them, and with `positions_BP`, the last layer's
        queries, neurons and writes are computed at those positions alone, `(B, P, N)` in the tap: nothing
        else would be read. Logits are the same.

    Returns:
      `(logits_BTV, acts)`: logits in float32 (`(B, P, V)` where positions were given; float64 for a
      float64 model), and the value at each location: `acts["attn.q"]` is `(L, B, T, H * K)`, and so on
      for "attn.act_in", "attn.k", "attn.v", "attn.y", "attn.resid_delta", "attn.resid_in",
      "mlp.act_in", "mlp.post_act", "mlp.resid_delta", "mlp.resid_mid"; "final_resid" is `(B, T, D)`. What
      the caller does not use is removed by the compiler. Empty when not recorded.

    Raises:
      UserError: the sequence is longer than the context.
    """
    if tokens_BT.shape[1] > config.context:
        raise UserError(
            f"the model's context is {config.context} tokens, got a sequence of {tokens_BT.shape[1]}"
        )
    # Flax types `apply` by what it may return with mutable collections; here it is the outputs.
    embedded: Any = Embed(config).apply({"params": params["embed"]}, tokens_BT)
    x_BTD, positions_TP = embedded
    block = Block(config)

    def layer(x_BTD: Any, xs):
        block_params, index = xs
        acts: dict[str, jax.Array] = {}
        node = _recorder(config, tap, index, acts)
        x_BTD: Any = block.apply({"params": block_params}, x_BTD, positions_TP, node)
        return x_BTD, acts

    if config.remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    blocks, n_scanned = params["blocks"], config.n_layer
    short = positions_BP is not None and not record
    if short:
        n_scanned -= 1
        blocks = jax.tree.map(lambda p: p[:-1], blocks)
    # Two layers are unrolled: stacking their activations for the backward pass costs more than a loop saves.
    x_BTD, acts = lax.scan(
        layer, x_BTD, (blocks, jnp.arange(n_scanned)), unroll=config.n_layer <= 2
    )
    if short:
        last_block = jax.tree.map(lambda p: p[-1], params["blocks"])
        node = _recorder(config, tap, jnp.int32(n_scanned), {})
        x_BTD: Any = block.apply({"params": last_block}, x_BTD, positions_TP, node, positions_BP)
    x_BTD = _recorder(config, tap, None, acts)("final_resid", None, x_BTD)
    if positions_BP is not None:
        x_BTD = x_BTD if short else _take_positions(x_BTD, positions_BP)
        tokens_BT = jnp.take_along_axis(tokens_BT, positions_BP, axis=1)
    head = Head(config)
    logits_BTV: Any = head.apply(
        {"params": params["head"]}, x_BTD, tokens_BT, params["embed"]["tokens"]
    )
    return logits_BTV, acts if record else {}


def count_parameters(params: Params) -> int:
    """Number of parameters, all of them."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the matrix products of a forward pass over `tokens` tokens in windows of the whole context.

    Two for each weight and token, and for each score and weighted value of the full, unmasked attention. A
    forward and backward pass needs three times as many.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    kernels = [leaf for path, leaf in trees.flatten(shapes["blocks"]).items() if "kernel" in path]
    weights = sum(leaf.size for leaf in kernels) + config.d_model * config.vocab_size
    return 2 * tokens * (weights + 2 * config.n_layer * config.context * config.attention_width)


def _plain(name: str, site: str | None, value: jax.Array) -> jax.Array:
    del name, site
    return value


def _recorder(config: ModelConfig, tap: Tap | None, layer: jax.Array | None, acts: dict) -> _Node:
    """The node function of one layer: AbsTopK, then the tap, then the record."""

    def node(name, site, value):
        location = Location(name, layer)
        # Mean ablation and AbsTopK have a kernel together.
        ablation = tap.vectors(location) if isinstance(tap, MeanAblation) else None
        if ablation is not None and cpu.takes(value):
            value = ablate_largest(value, *ablation, _n_kept(config, site, value))
        else:
            value = _activation_sparsity(config, site, value)
            value = value if tap is None else tap(location, value)
        acts[name] = value
        return value

    return node


def _activation_sparsity(config: ModelConfig, site: str | None, value: jax.Array) -> jax.Array:
    return abs_top_k(value, _n_kept(config, site, value))


def _n_kept(config: ModelConfig, site: str | None, value: jax.Array) -> int:
    """How many channels AbsTopK keeps of a value: all where it does not act."""
    width = value.shape[-1]
    if config.abs_top_k_fraction is None or site not in config.abs_top_k_sites:
        return width
    return int(config.abs_top_k_fraction * width)


def _along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.reshape(vector, (1,) * (like.ndim - 1) + vector.shape).astype(like.dtype)


def _take_positions(x_BTD: jax.Array, positions_BP: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTD, positions_BP[..., None], axis=1)


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel `(in, out)`."""

    features: int
    config: ModelConfig
    std: float = _STD
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
        y = matmul(x, kernel.astype(x.dtype))
        if self.use_bias:
            y = y + _along_last(self.param("bias", nn.initializers.zeros, shape[1:]), y)
        return y


class Norm(nn.Module):
    """RMS or layer norm over the last axis, computed in at least float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        config = self.config
        gain = self.param("gain", nn.initializers.ones, x.shape[-1:])
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if config.norm == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.eps)
        y = y * _along_last(gain, y)
        if config.norm == "layer" and config.norm_bias:
            y = y + _along_last(self.param("bias", nn.initializers.zeros, x.shape[-1:]), y)
        return y.astype(x.dtype)


class Embed(nn.Module):
    """Tokens to the residual stream; returns it and the table of positions to concatenate, if any."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT):
        config, time = self.config, tokens_BT.shape[1]
        dtype = jnp.dtype(config.compute_dtype)
        normal = nn.initializers.normal(_STD)
        table_VD = self.param("tokens", normal, (config.vocab_size, config.d_model))
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
        if config.position == "added":
            table = self.param("positions", normal, (config.context, config.d_model))
            return x_BTD + table[None, :time].astype(dtype), None
        if config.position == "concat":
            table = self.param("positions", normal, (config.context, config.d_pos))
            return x_BTD, table[:time].astype(dtype)
        if config.position == "concat_sinusoid":
            table = self.param("sinusoids", _sinusoids, (config.context, config.d_pos))
            return x_BTD, lax.stop_gradient(table[:time]).astype(dtype)
        return x_BTD, None


class Attention(nn.Module):
    """Causal self-attention of `n_head` heads of `d_head` channels."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTR, node: _Node, positions_BP=None):
        config = self.config
        x_BTR = node("attn.act_in", "attn_in", x_BTR)
        x_BPR = x_BTR if positions_BP is None else _take_positions(x_BTR, positions_BP)
        heads = []
        for name, read in (("q", x_BPR), ("k", x_BTR), ("v", x_BTR)):
            linear = Linear(config.attention_width, config, use_bias=config.bias, name=name)
            y_BTE = node(f"attn.{name}", f"attn_{name}", linear(read))
            heads.append(jnp.reshape(y_BTE, (*y_BTE.shape[:2], config.n_head, config.d_head)))
        sink_H = (
            self.param("sink", nn.initializers.zeros, (config.n_head,)) if config.sink else None
        )
        q_BTHK, k_BTHK, v_BTHK = heads
        y_BTHK = attend(q_BTHK, k_BTHK, v_BTHK, sink_H, positions_BP)
        y_BTE = node(
            "attn.y", None, jnp.reshape(y_BTHK, (*y_BTHK.shape[:2], config.attention_width))
        )
        out = Linear(config.d_model, config, _output_std(config), config.bias, name="out")
        return node("attn.resid_delta", "attn_out", out(y_BTE))


class MLP(nn.Module):
    """Two linear layers with the nonlinearity between."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTR, node: _Node):
        config = self.config
        x_BTR = node("mlp.act_in", "mlp_in", x_BTR)
        h_BTF = Linear(config.mlp_width, config, use_bias=config.bias, name="fc")(x_BTR)
        h_BTF = gelu(h_BTF) if config.activation == "gelu" else nn.relu(h_BTF)
        h_BTF = node("mlp.post_act", "mlp_neuron", h_BTF)
        proj = Linear(config.d_model, config, _output_std(config), config.bias, name="proj")
        return node("mlp.resid_delta", "mlp_out", proj(h_BTF))


class Block(nn.Module):
    """One layer: attention, then the MLP, each read from the normed residual and added back to it.

    With `positions_BP` all of it but the keys and values is computed at those positions only.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, positions_TP, node: _Node, positions_BP=None):
        config = self.config

        def read(name, x_BTD, at_BP=None):
            read_BTR = Norm(config, name=f"{name}_norm")(x_BTD)
            if positions_TP is None:
                return read_BTR
            position = Norm(config, name=f"{name}_pos_norm")(positions_TP)
            if at_BP is None:
                position = jnp.broadcast_to(position[None], (*x_BTD.shape[:2], config.d_pos))
            else:
                position = jnp.take(position, at_BP, axis=0)
            return jnp.concatenate([read_BTR, position], axis=-1)

        def written(x_BTD, site):
            if config.residual_activation == "relu":
                x_BTD = nn.relu(x_BTD)
            return _activation_sparsity(config, site, x_BTD)

        x_BTD = node("attn.resid_in", None, x_BTD)
        delta = Attention(config, name="attn")(read("attn", x_BTD), node, positions_BP)
        if positions_BP is not None:
            x_BTD = _take_positions(x_BTD, positions_BP)
        x_BTD = node("mlp.resid_mid", None, written(x_BTD + delta, "resid_post_attn"))
        delta = MLP(config, name="mlp")(read("mlp", x_BTD, positions_BP), node)
        return written(x_BTD + delta, "resid_post_mlp")


class Head(nn.Module):
    """Final norm, unembedding, bigram table: the residual stream to logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, tokens_BT, embedding_VD):
        config = self.config
        x_BTD = Norm(config, name="norm")(x_BTD)
        dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
        if config.tied_embeddings:
            kernel_DV = embedding_VD.T
        else:
            shape = (config.d_model, config.vocab_size)
            kernel_DV = self.param("unembed", nn.initializers.normal(_STD), shape)
        logits_BTV = matmul(x_BTD, kernel_DV.astype(x_BTD.dtype), dtype)
        if config.bigram != "none":
            table_VV = self.param("bigram", nn.initializers.zeros, (config.vocab_size,) * 2)
            if config.bigram == "frozen":
                table_VV = lax.stop_gradient(table_VV)
            logits_BTV = logits_BTV + jnp.take(table_VV, tokens_BT, axis=0).astype(dtype)
        if config.logits_bias:
            bias_V = self.param("logits_bias", nn.initializers.zeros, (config.vocab_size,))
            logits_BTV = logits_BTV + _along_last(bias_V, logits_BTV)
        return logits_BTV


def _output_std(config: ModelConfig) -> float:
    return _STD / math.sqrt(2 * config.n_layer)


def _sinusoids(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Sines then cosines with periods log-spaced from 4 tokens to the context, padded with zeros."""
    del key
    context, width = shape
    half = max(1, width // 2)
    periods = jnp.logspace(math.log10(4.0), math.log10(max(4.0, context)), half, dtype=dtype)
    angles = jnp.arange(context, dtype=dtype)[:, None] * (2 * math.pi / periods)[None]
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[:, :width]
    return jnp.pad(table, ((0, 0), (0, width - table.shape[1])))
