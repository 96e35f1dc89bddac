"""What a circuit says that text before a prompt does to it, from runs in which the two never meet.

A head reads an average, weighted by attention. Text before the prompt joins it with a weight and an average
of its own, which are known from the text alone, as is the last token's query from the prompt alone:

    share = Z_text / (Z_text + Z_prompt),    y = share y_text + (1 - share) y_prompt

with Z the sums of exponentiated scores, the sink's among the prompt's. So much context *dilutes* a count that
a head keeps as an average, and a few tokens that a head looks for *distract* it (Gao et al. 2025, on the
bracket and the quote circuit). Applied to every head at the prompt's last token, layer by layer, it predicts
the answer of circuit and model. It is exact for what heads of the first layer bring to the answer directly,
and leaves out that earlier tokens of the prompt read the text as well.

Shapes: B rows of pairs, T time of prompts, C time of the text, L layer, H head, K channel of a head, E
channels of all heads, V vocabulary.
"""

from __future__ import annotations

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from wsparse import model, taps
from wsparse.circuits.pairs import PairArrays, margins
from wsparse.config import ModelConfig


@functools.partial(jax.jit, static_argnames="config")
def predicted_margins(
    params: model.Params,
    prompts: PairArrays,
    text_C: jax.Array,
    n_text: jax.Array,
    reading_LH: jax.Array,
    tap: taps.NodeAblation | None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Returns the margins that are predicted where a text stands before every prompt.

    Args:
      params: Parameters, with the circuit's cut edges.
      prompts: The prompts alone.
      text_C: Tokens of the text, padded.
      n_text: How many tokens it has.
      reading_LH: 1 for heads whose reading the text joins, 0 for others.
      tap: That of the circuit; None for the whole model.

    Returns:
      `(margins_B, shares_LBH)`: the share of its attention that each head gives to the text.
    """
    rows = jnp.arange(len(prompts.position))
    _, of_text = model.forward(params, text_C[None], config, tap=tap)
    inside_C = jnp.arange(text_C.size) < n_text
    params = _moved(params, n_text)

    def run(y_LBTE: jax.Array, n_layers: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        replaced_LE = jnp.broadcast_to(
            (jnp.arange(config.n_layer) < n_layers)[:, None], (config.n_layer, y_LBTE.shape[-1])
        )
        patched = taps.compose(tap or taps.identity, taps.patch({"attn.y": y_LBTE}, {"attn.y": replaced_LE}))
        logits_B1V, acts = model.forward(
            params, prompts.tokens, config, tap=patched, positions_BP=prompts.position[:, None]
        )
        return margins(logits_B1V[:, 0], prompts.answer, prompts.other), acts

    def read(layer: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y_LBTE, shares_LBH = carry
        _, acts = run(y_LBTE, layer)
        heads = {
            name: model.split_heads(acts[name][layer], config) for name in ("attn.q", "attn.k", "attn.y")
        }
        text = {name: model.split_heads(of_text[name][layer], config)[0] for name in ("attn.k", "attn.v")}
        q_BHK, y_BHK = (heads[name][rows, prompts.position] for name in ("attn.q", "attn.y"))
        sink_H = params["blocks"]["attn"]["sink"][layer] if config.sink else None
        share_BH, y_text_BHK = _joined(
            q_BHK, heads["attn.k"], prompts.position, text["attn.k"], text["attn.v"], inside_C, sink_H
        )
        share_BH = share_BH * reading_LH[layer][None]
        y_BHK = y_BHK + share_BH[..., None] * (y_text_BHK - y_BHK)
        y_BE = jnp.reshape(y_BHK, (len(rows), -1))
        y_BTE = acts["attn.y"][layer].at[rows, prompts.position].set(y_BE)
        return y_LBTE.at[layer].set(y_BTE), shares_LBH.at[layer].set(share_BH)

    dtype = jnp.dtype(config.compute_dtype)
    shape_BT = prompts.tokens.shape
    start = (
        jnp.zeros((config.n_layer, *shape_BT, config.attention_width), dtype),
        jnp.zeros((config.n_layer, shape_BT[0], config.n_head), jnp.float32),
    )
    y_LBTE, shares_LBH = lax.fori_loop(0, config.n_layer, read, start)
    return run(y_LBTE, jnp.int32(config.n_layer))[0], shares_LBH


def _moved(params: model.Params, n_tokens: jax.Array) -> model.Params:
    """Returns the parameters for tokens that stand so many places later than their index."""
    embed = {
        name: table if name == "tokens" else jnp.roll(table, -n_tokens, axis=0)
        for name, table in params["embed"].items()
    }
    return {**params, "embed": embed}


def _joined(q_BHK, k_BTHK, position_B, k_text_CHK, v_text_CHK, inside_C, sink_H):
    """Returns the text's share of each head's attention, `(B, H)`, and its own average, `(B, H, K)`."""
    scale = 1.0 / math.sqrt(q_BHK.shape[-1])
    scores_BHT = jnp.einsum("bhk,bthk->bht", q_BHK, k_BTHK) * scale
    seen_BT = jnp.arange(k_BTHK.shape[1])[None] <= position_B[:, None]
    scores_BHT = jnp.where(seen_BT[:, None], scores_BHT, -jnp.inf)
    text_BHC = jnp.einsum("bhk,chk->bhc", q_BHK, k_text_CHK) * scale
    text_BHC = jnp.where(inside_C[None, None], text_BHC, -jnp.inf)
    own_BH = jax.nn.logsumexp(scores_BHT, axis=-1)
    if sink_H is not None:
        own_BH = jnp.logaddexp(own_BH, sink_H[None])
    y_text_BHK = jnp.einsum("bhc,chk->bhk", jax.nn.softmax(text_BHC, axis=-1), v_text_CHK)
    return jax.nn.sigmoid(jax.nn.logsumexp(text_BHC, axis=-1) - own_BH), y_text_BHK
