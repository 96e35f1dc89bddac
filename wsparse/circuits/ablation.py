"""Ablation, defined once, in every strength: what closed nodes, cut edges and norms are while a circuit runs.

    ablation = Ablation(constants="resample", norm="frozen", edges="strict")
    background = make_background(
        ablation, params, config, means, pairs, windows_WT=windows, nodes_U=nodes_U, edges=edges
    )
    logits_BV = circuit_logits(params, config, pairs, nodes_U, edges, background)

`circuit_logits` is pure: it jits, vmaps over masks and strengths, and has gradients for both. The default,
means over pretraining text at strength 0, is the ablation of Gao et al. 2025 that pruning uses.

Shapes: U nodes of the model in one vector (see `masks`), B rows of pairs, T time, L layer, N nodes of a
location, W windows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wsparse import model, taps
from wsparse.circuits import graph, masks
from wsparse.circuits.pairs import PairArrays, inside, margins, pairs_loss
from wsparse.config import ModelConfig
from wsparse.nodes import NODES

Constants = Literal["mean", "zero", "task mean", "optimal", "resample", "partner"]
Norms = Literal["live", "frozen"]
Edges = Literal["loose", "strict"]
Contenders = Literal["all", "kept"]

CONSTANTS, NORMS, CONTENDERS = map(get_args, (Constants, Norms, Contenders))

# Steps and rate with which Adam learns the constants of "optimal".
_STEPS, _RATE = 40, 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """What stands in for what is not in a circuit.

    The strength is no part of it: a closed node of strength r has the value `(1 - r) constant + r value`, and
    `circuit_logits` takes r for every node, or for every node and row.

    Attributes:
      constants: "mean" over pretraining text; "zero"; "task mean", over the tokens of the task's prompts;
        "optimal", constants learned for the circuit's own loss; "resample", the values that the model has at
        the same place of a random window of pretraining text; "partner", those on the pair's other prompt.
      norm: Whether norms follow the ablated stream ("live") or are held at the whole model's scales.
      edges: Where "loose", weights from closed nodes carry their constants, times what attention makes of
        them; where "strict", every weight but the circuit's edges carries a constant, the mean over
        pretraining text of what arrives, so that only what is drawn varies.
      contenders: Whether AbsTopK chooses among "all" nodes or among the "kept" ones.
    """

    constants: Constants = "mean"
    norm: Norms = "live"
    edges: Edges = "loose"
    contenders: Contenders = "all"

    def __str__(self) -> str:
        differing = [
            f"{field.name} {value}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return ", ".join(differing) or "mean ablation"


class Background(NamedTuple):
    """What an ablation puts in place of things, as arrays.

    Attributes:
      means: Location -> `(L, N)`, "attn.y" included: what cut weights carry.
      constants: Location -> `(L, N)` or `(L, B, T, N)`: what closed nodes are.
      scales: Norm -> the whole model's scales, see `taps.NodeAblation`; None where norms are live.
    """

    means: dict[str, jax.Array]
    constants: dict[str, jax.Array]
    scales: dict[str, jax.Array] | None = None


def circuit_logits(
    params: model.Params,
    config: ModelConfig,
    pairs: PairArrays,
    nodes_U: Any,
    edges: graph.EdgeMask | None,
    background: Background,
    *,
    contenders: Contenders = "all",
    strengths: Any = 0.0,
) -> jax.Array:
    """Returns the logits after each prompt, `(B, V)`, of a circuit in a background.

    Args:
      params: Parameters; with biases if edges are cut, see `scoring.with_biases`.
      nodes_U: 1 for the nodes that stay, floats.
      edges: Kernel path -> floats `(L, in, out)`, 1 for the weights that stay; None cuts none.
      background: From `make_background`, for these pairs.
      contenders: See `Ablation`.
      strengths: r of closed nodes, `(U,)`, `(B, U)` or one number.
    """
    kept_U = jnp.asarray(nodes_U, jnp.float32)
    kept, strengths = jnp.broadcast_arrays(
        kept_U if jnp.ndim(strengths) < 2 else kept_U[None], jnp.asarray(strengths, jnp.float32)
    )
    shares = masks.unflatten(kept + (1 - kept) * strengths, config)
    if strengths.ndim == 2:
        shares = {name: jnp.moveaxis(share_BLN, 0, 1) for name, share_BLN in shares.items()}
    if edges is not None:
        params = graph.cut(params, edges, background.means)
    among = masks.unflatten(kept_U, config) if contenders == "kept" else None
    tap = taps.NodeAblation(shares, background.constants, among, background.scales)
    return answer_logits(params, config, pairs, tap)


def answer_logits(
    params: model.Params, config: ModelConfig, pairs: PairArrays, tap: taps.Tap | None = None
) -> jax.Array:
    """Returns the logits after each prompt, `(B, V)`."""
    logits_BPV, _ = model.forward(
        params, pairs.tokens, config, tap=tap, positions_BP=pairs.position[:, None], record=False
    )
    return logits_BPV[:, 0]


@functools.partial(jax.jit, static_argnames="config")
def answer_margins(
    params: model.Params, pairs: PairArrays, tap: taps.NodeAblation | None = None, *, config: ModelConfig
) -> jax.Array:
    """Returns `(B,)`: the logit of the answer after each prompt less that of the other candidate."""
    return margins(answer_logits(params, config, pairs, tap), pairs.answer, pairs.other)


def make_background(
    ablation: Ablation,
    params: model.Params,
    config: ModelConfig,
    means: dict[str, jax.Array],
    pairs: PairArrays,
    *,
    windows_WT: np.ndarray | None = None,
    nodes_U: Any = None,
    edges: graph.EdgeMask | None = None,
    fit: PairArrays | None = None,
    seed: int = 0,
) -> Background:
    """Returns the background of an ablation on some pairs.

    Args:
      means: See `scoring.mean_activations`.
      windows_WT: Pretraining text for "resample".
      nodes_U: Nodes of the circuit, for "optimal".
      edges: Weights that stay, for "optimal".
      fit: Pairs that "task mean" and "optimal" constants come from; other ones than `pairs`, or the constants
        have seen the answers.
      seed: Seed of the draw of windows.
    """
    constants = {name: means[name] for name in NODES}
    kind = ablation.constants
    if kind == "zero":
        constants = jax.tree.map(jnp.zeros_like, constants)
    elif kind == "task mean":
        assert fit is not None
        constants = _task_means(params, fit, config=config)
    elif kind == "partner":
        constants = _values(params, _partners(pairs).tokens, config=config)
    elif kind == "resample":
        assert windows_WT is not None
        rows = np.random.default_rng(seed).integers(0, len(windows_WT), len(pairs.position))
        text_BT = jnp.asarray(windows_WT[rows, : pairs.tokens.shape[1]], jnp.int32)
        constants = _values(params, text_BT, config=config)
    scales = _scales(params, pairs, config=config) if ablation.norm == "frozen" else None
    background = Background(means, constants, scales)
    if kind == "optimal":
        assert fit is not None and nodes_U is not None
        kept_U = jnp.asarray(nodes_U, jnp.float32)
        live = Background(means, constants)
        learned = _optimal(params, fit, kept_U, edges, live, config=config, contenders=ablation.contenders)
        background = background._replace(constants=learned)
    return background


def _partners(pairs: PairArrays) -> PairArrays:
    """Returns the rows in the order in which each stands in its partner's place."""
    return jax.tree.map(
        lambda array: jnp.flip(jnp.reshape(array, (-1, 2, *array.shape[1:])), 1).reshape(array.shape), pairs
    )


@functools.partial(jax.jit, static_argnames="config")
def _values(params, tokens_BT, *, config: ModelConfig) -> dict[str, jax.Array]:
    _, acts = model.forward(params, tokens_BT, config)
    return {name: acts[name] for name in NODES}


@functools.partial(jax.jit, static_argnames="config")
def _task_means(params, pairs: PairArrays, *, config: ModelConfig) -> dict[str, jax.Array]:
    """Returns means over the tokens of prompts, the padding left out: location -> `(L, N)`."""
    _, acts = model.forward(params, pairs.tokens, config)
    inside_BT = inside(pairs)
    share_BT = inside_BT / jnp.sum(inside_BT)
    return {name: jnp.einsum("lbtn,bt->ln", acts[name], share_BT) for name in NODES}


@functools.partial(jax.jit, static_argnames="config")
def _scales(params, pairs: PairArrays, *, config: ModelConfig) -> dict[str, jax.Array]:
    """Returns the scales of the whole model's norms."""
    _, acts = model.forward(params, pairs.tokens, config)
    final_BPD = jnp.take_along_axis(acts["final_resid"], pairs.position[:, None, None], axis=1)
    return {
        "attn_norm": model.norm_scale(acts["attn.resid_in"], config),
        "mlp_norm": model.norm_scale(acts["mlp.resid_mid"], config),
        "final_norm": model.norm_scale(final_BPD, config),
    }


@functools.partial(jax.jit, static_argnames=("config", "contenders"))
def _optimal(params, pairs, kept_U, edges, background: Background, *, config, contenders):
    """Returns the constants of closed nodes that Adam finds for the circuit's loss, from `background`'s."""
    optimizer = optax.adam(_RATE)

    def loss(constants):
        logits_BV = circuit_logits(
            params,
            config,
            pairs,
            kept_U,
            edges,
            background._replace(constants=constants),
            contenders=contenders,
        )
        return pairs_loss(logits_BV, pairs)

    def step(carry, _):
        constants, state, best = carry
        value, gradient = jax.value_and_grad(loss)(constants)
        best = jax.tree.map(lambda new, old: jnp.where(value < best[0], new, old), (value, constants), best)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(constants, updates), state, best), None

    start = background.constants
    first = (start, optimizer.init(start), (jnp.float32(jnp.inf), start))
    (_, _, (_, best)), _ = jax.lax.scan(step, first, length=_STEPS)
    return best
