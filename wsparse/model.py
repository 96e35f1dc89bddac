"""The transformer: a pure function of `(config, params)`, and the one forward pass of the codebase.

Modules of `flax.linen` are leaves: they declare parameters by name, draw their initial values, and compute;
none holds state or a random key while it runs. There is no module of the whole model, no `nn.scan` and no
`nn.remat`: `forward` applies one `Block` under `jax.lax.scan` to parameters stacked on a leading layer axis.
So parameters are plain nested dicts whose paths are the model's public names (rule tables for sparsity,
sharding and weight decay match them), a program has the same size at every depth, and whatever looks at or
changes the inside of the model is an argument, the tap (`wsparse.taps`). Flax is imported here only.

Shapes are named by suffixes: B batch, T time, D d_model, R read width (d_model and concatenated
positions), H head, K d_head, E all heads' channels, F d_mlp, V vocab, P positions of logits. A leading L is
stacked layers.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from wsparse import taps, trees
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import LOCATIONS, NORMS
from wsparse.ops.attention import attend, attention_pattern
from wsparse.ops.linear import gelu, matmul
from wsparse.ops.top_k import abs_top_k

__all__ = ["ModelConfig", "Params", "attention_pattern", "count_parameters", "forward", "init"]

Params = dict[str, Any]
Acts = dict[str, jax.Array]
# (location, value) -> value: AbsTopK and the tap, what a layer calls wherever it has a location.
_Node = Callable[[str, jax.Array], jax.Array]

_STD = 0.02


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Returns fresh parameters: float32 nested dicts, with blocks stacked on a leading layer axis.

    Weights are N(0, 0.02), output projections scaled by `1/sqrt(2 n_layer)`, biases, sinks and the
    bigram table 0, gains 1 (Gao et al. 2025). The numbers of an array depend on its own name and layer only,
    so switching a part of the model on or off leaves the others as they were.
    """
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    x_BTD = jnp.zeros((1, 1, config.d_model))
    positions_TP = jnp.zeros((1, config.d_pos)) if config.concatenates_positions else None
    embed_key, block_key, head_key = (jax.random.fold_in(key, i) for i in range(3))
    embed = Embed(config).init(embed_key, tokens_BT)["params"]
    layer_keys = jax.vmap(lambda i: jax.random.fold_in(block_key, i))(jnp.arange(config.n_layer))
    block = Block(config)
    blocks = jax.vmap(lambda k: block.init(k, x_BTD, positions_TP, taps.identity)["params"])(layer_keys)
    head = Head(config).init(head_key, x_BTD, tokens_BT, embed["tokens"])["params"]
    return {"embed": embed, "blocks": blocks, "head": head}


def forward(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    tap: taps.Tap | None = None,
    positions_BP: jax.Array | None = None,
    record: bool = True,
) -> tuple[jax.Array, Acts]:
    """Run the model.

    Args:
      params: From `init` or a checkpoint.
      tokens_BT: Int tokens, T at most `config.context`.
      config: Static under jit.
      tap: Function `(location, value) -> value`, called at every location of `wsparse.nodes` with the
        value of all tokens; what it returns is what later computation and the returned activations see.
      positions_BP: Int positions, none negative, at which logits are computed; None is all of them. The
        unembedding of a small model is a large part of its cost.
      record: Whether to return activations. Without them, and with `positions_BP`, the last layer is
        computed at those positions alone, if the tap is `position_wise` (see `wsparse.taps`) or None.
        Logits are the same.

    Returns:
      `(logits_BTV, acts)`: logits in float32 (`(B, P, V)` with `positions_BP`; float64 for a float64
      model), and the values by location, `(L, B, T, N)`; "final_resid" is `(B, T, D)`. The compiler removes
      what the caller does not use. `acts` is empty when not recorded.

    Raises:
      UserError: The sequence is longer than the context.
    """
    time = tokens_BT.shape[1]
    if time > config.context:
        raise UserError(f"the model's context is {config.context} tokens, got a sequence of {time}")
    x_BTD, positions_TP = _apply(Embed(config), params["embed"], tokens_BT)
    block = Block(config)

    def layer(x_BTD, block_params_and_index, positions_BP=None):
        block_params, index = block_params_and_index
        node = functools.partial(_node, config, tap, index)
        return _apply(block, block_params, x_BTD, positions_TP, node, positions_BP)

    step = jax.checkpoint(layer, prevent_cse=False) if config.remat else layer
    blocks, n_scanned = params["blocks"], config.n_layer
    shortened = positions_BP is not None and not record and taps.is_position_wise(tap)
    if shortened:
        n_scanned -= 1
        blocks = jax.tree.map(lambda p: p[:-1], blocks)
    # Two layers are unrolled: stacking their activations for the backward pass costs more than a loop saves.
    x_BTD, acts = lax.scan(step, x_BTD, (blocks, jnp.arange(n_scanned)), unroll=config.n_layer <= 2)
    if shortened:
        last_block = jax.tree.map(lambda p: p[-1], params["blocks"])
        x_BTD, _ = layer(x_BTD, (last_block, jnp.int32(n_scanned)), positions_BP)
    x_BTD = _node(config, tap, None, "final_resid", x_BTD)
    acts = {**acts, "final_resid": x_BTD} if record else {}
    if positions_BP is not None:
        x_BTD = x_BTD if shortened else _take_positions(x_BTD, positions_BP)
        tokens_BT = jnp.take_along_axis(tokens_BT, positions_BP, axis=1)
    node = functools.partial(_node, config, tap, None)
    logits_BTV = _apply(Head(config), params["head"], x_BTD, tokens_BT, params["embed"]["tokens"], node)
    return logits_BTV, acts


def sinks(params: Params) -> jax.Array | None:
    """Returns the attention sinks of all layers, `(L, H)`; None for a model without."""
    return params["blocks"]["attn"].get("sink")


@functools.partial(jax.jit, static_argnames="config")
def layer_attention(
    q_LBTE: jax.Array,
    k_LBTE: jax.Array,
    sink_LH: jax.Array | None,
    layer: jax.Array | int,
    *,
    config: ModelConfig,
) -> jax.Array:
    """Returns the attention of a layer, `(B, H, T, T)`, from recorded queries and keys.

    The layer is traced: one program serves all.
    """
    q_BTHK, k_BTHK = (split_heads(y_LBTE[layer], config) for y_LBTE in (q_LBTE, k_LBTE))
    return attention_pattern(q_BTHK, k_BTHK, None if sink_LH is None else sink_LH[layer])


def split_heads(y: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns what heads have side by side, `(..., E)`, with an axis for each: `(..., H, K)`."""
    return jnp.reshape(y, (*y.shape[:-1], config.n_head, config.d_head))


def norm_scale(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns what a norm multiplies a (for layer norm, centered) stream by, `(..., 1)`."""
    return _scale(_centered(x, config), config)


def count_parameters(params: Params) -> int:
    """Returns the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """Returns the FLOPs of the matrix products of a forward pass over `tokens` tokens in full windows.

    Two for each weight and token, and for each score and weighted value of the full, unmasked attention.
    """
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    kernels = [leaf for path, leaf in trees.flatten(shapes["blocks"]).items() if "kernel" in path]
    weights = sum(leaf.size for leaf in kernels) + config.d_model * config.vocab_size
    return 2 * tokens * (weights + 2 * config.n_layer * config.context * config.attention_width)


def _apply(module: nn.Module, params: Params, *args: Any) -> Any:
    # Flax's type of the result allows for mutable collections.
    return module.apply({"params": params}, *args)


def _node(config: ModelConfig, tap: taps.Tap | None, layer: Any, name: str, value: jax.Array) -> jax.Array:
    """Returns what later computation sees of a location's value (AbsTopK, then the tap) or a norm's scale."""
    if name in NORMS:
        return taps.rescaled(tap, taps.Location(name, layer), value)
    k = _n_kept(config, LOCATIONS[name].site, value)
    return taps.after_top_k(tap, taps.Location(name, layer), value, k)


def _n_kept(config: ModelConfig, site: str | None, value: jax.Array) -> int:
    """Returns how many channels AbsTopK keeps of a value: all where it does not act."""
    if config.abs_top_k_fraction is None or site not in config.abs_top_k_sites:
        return value.shape[-1]
    return int(config.abs_top_k_fraction * value.shape[-1])


def _along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.reshape(vector, (1,) * (like.ndim - 1) + vector.shape).astype(like.dtype)


def _take_positions(x_BTD: jax.Array, positions_BP: jax.Array | None) -> jax.Array:
    return x_BTD if positions_BP is None else jnp.take_along_axis(x_BTD, positions_BP[..., None], axis=1)


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel `(in, out)`."""

    features: int
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


def _centered(x: jax.Array, config: ModelConfig) -> jax.Array:
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return y - jnp.mean(y, axis=-1, keepdims=True) if config.norm == "layer" else y


def _scale(y: jax.Array, config: ModelConfig) -> jax.Array:
    return lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.eps)


class Norm(nn.Module):
    """RMS or layer norm over the last axis, computed in at least float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, rescaled: Callable[[jax.Array], jax.Array] = lambda scale: scale):
        config = self.config
        gain = self.param("gain", nn.initializers.ones, x.shape[-1:])
        y = _centered(x, config)
        y = y * rescaled(_scale(y, config))
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
    """Causal self-attention of `n_head` heads of `d_head` channels; returns what it writes, and acts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTR, node: _Node, positions_BP=None):
        config, acts = self.config, {}
        x_BTR = acts["attn.act_in"] = node("attn.act_in", x_BTR)
        heads = []
        for name, read_BTR in (("q", _take_positions(x_BTR, positions_BP)), ("k", x_BTR), ("v", x_BTR)):
            linear = Linear(config.attention_width, use_bias=config.bias, name=name)
            y_BTE = acts[f"attn.{name}"] = node(f"attn.{name}", linear(read_BTR))
            heads.append(split_heads(y_BTE, config))
        sink_H = self.param("sink", nn.initializers.zeros, (config.n_head,)) if config.sink else None
        q_BTHK, k_BTHK, v_BTHK = heads
        y_BTHK = attend(q_BTHK, k_BTHK, v_BTHK, sink_H, positions_BP)
        y_BTE = jnp.reshape(y_BTHK, (*y_BTHK.shape[:2], config.attention_width))
        y_BTE = acts["attn.y"] = node("attn.y", y_BTE)
        out = Linear(config.d_model, _output_std(config), config.bias, name="out")
        delta_BTD = acts["attn.resid_delta"] = node("attn.resid_delta", out(y_BTE))
        return delta_BTD, acts


class MLP(nn.Module):
    """Two linear layers with the nonlinearity between; returns what it writes, and acts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTR, node: _Node):
        config, acts = self.config, {}
        x_BTR = acts["mlp.act_in"] = node("mlp.act_in", x_BTR)
        h_BTF = Linear(config.mlp_width, use_bias=config.bias, name="fc")(x_BTR)
        h_BTF = gelu(h_BTF) if config.activation == "gelu" else jax.nn.relu(h_BTF)
        h_BTF = acts["mlp.post_act"] = node("mlp.post_act", h_BTF)
        proj = Linear(config.d_model, _output_std(config), config.bias, name="proj")
        delta_BTD = acts["mlp.resid_delta"] = node("mlp.resid_delta", proj(h_BTF))
        return delta_BTD, acts


class Block(nn.Module):
    """One layer: attention, then the MLP, each read from the normed residual and added back to it.

    Returns the residual stream and the layer's activations by location. With `positions_BP`, everything but
    keys and values is computed at those positions only.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, positions_TP, node: _Node, positions_BP=None):
        config = self.config

        def read(name, x_BTD, at_BP=None):
            norm = f"{name}_norm"
            read_BTR = Norm(config, name=norm)(x_BTD, functools.partial(node, norm))
            if positions_TP is None:
                return read_BTR
            position = Norm(config, name=f"{name}_pos_norm")(positions_TP)
            position = position[None] if at_BP is None else jnp.take(position, at_BP, axis=0)
            position = jnp.broadcast_to(position, (*x_BTD.shape[:2], config.d_pos))
            return jnp.concatenate([read_BTR, position], axis=-1)

        def add(x_BTD, delta_BTD, site):
            x_BTD = x_BTD + delta_BTD
            if config.residual_activation == "relu":
                x_BTD = jax.nn.relu(x_BTD)
            return abs_top_k(x_BTD, _n_kept(config, site, x_BTD))

        acts = {}
        x_BTD = acts["attn.resid_in"] = node("attn.resid_in", x_BTD)
        delta_BTD, attention_acts = Attention(config, name="attn")(read("attn", x_BTD), node, positions_BP)
        x_BTD = add(_take_positions(x_BTD, positions_BP), delta_BTD, "resid_post_attn")
        x_BTD = acts["mlp.resid_mid"] = node("mlp.resid_mid", x_BTD)
        delta_BTD, mlp_acts = MLP(config, name="mlp")(read("mlp", x_BTD, positions_BP), node)
        return add(x_BTD, delta_BTD, "resid_post_mlp"), acts | attention_acts | mlp_acts


class Head(nn.Module):
    """Final norm, unembedding, bigram table: the residual stream to logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, tokens_BT, embedding_VD, node: _Node = lambda _, value: value):
        config = self.config
        x_BTD = Norm(config, name="norm")(x_BTD, functools.partial(node, "final_norm"))
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


def _sinusoids(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Sines then cosines with periods log-spaced from 4 tokens to the context, padded with zeros."""
    del key
    context, width = shape
    half = max(1, width // 2)
    periods = jnp.logspace(math.log10(4.0), math.log10(max(4.0, context)), half, dtype=jnp.float32)
    angles = jnp.arange(context, dtype=jnp.float32)[:, None] * (2 * math.pi / periods)[None]
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[:, :width]
    return jnp.pad(table, ((0, 0), (0, width - table.shape[1])))
