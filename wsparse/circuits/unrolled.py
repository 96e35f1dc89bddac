"""A circuit unrolled over a prompt: its nodes at each token, and what they contribute to each other.

The graph is exact. What arrives at a node or a logit is a sum; each term is the number of one edge, or is in
the constants of the place: biases, and what removed nodes and cut weights are replaced by. The sum is the
node's value before its nonlinearity (GELU or ReLU, AbsTopK). Norms and attention are held at what they are on
this prompt, as in the attribution graphs of Ameisen et al. 2025:

* a weight from a node to another: weight times value;
* a value node at token s to what its head writes at token t: value times attention from t to s times weight;
* what was written to a channel of the residual stream, to a read of it: value times norm scale times gain;
  to a logit: that times the unembedding's entry;
* the embedding at a token, which is its token's row and its position's: the same, and the bigram entry for
  logits.

Queries and keys decide the attention, so they have edges in and none out.

Shapes: T query time, S key time, D d_model, N nodes of a location, E all heads' channels, H head, K d_head, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, trees
from wsparse.circuits.circuit import Circuit
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS, NODES, Connection, Node

Kind = Literal["node", "embedding", "constants", "logit"]

_ORDER = tuple(NODES)
_STREAMS = ("attn.resid_in", "mlp.resid_mid")
_WRITES = ("attn.resid_delta", "mlp.resid_delta")
_READS = {"attn.act_in": "attn", "mlp.act_in": "mlp"}


class Vertex(NamedTuple):
    """A node of the unrolled graph.

    Attributes:
      kind: "node" of the circuit, "embedding" of a token, "constants" that enter `row`, or "logit".
      row: Height: the embedding 0, each location of each layer one, logits the last.
      index: Channel of a node, id of a token or of a logit's token; -1 for constants.
      position: Token.
    """

    kind: Kind
    row: int
    index: int
    position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrolled:
    """A circuit on a prompt.

    Attributes:
      tokens: The prompt.
      values: Vertex -> the node's value that later computation sees, or the logit; None for others. Only
        what a logit depends on, and only nodes that are not 0.
      links: (source, target) -> what the source contributes to the target.
      probabilities: Token -> probability after the prompt in the circuit, of the logits' tokens.
    """

    tokens: tuple[int, ...]
    values: dict[Vertex, float | None]
    links: dict[tuple[Vertex, Vertex], float]
    probabilities: dict[int, float]


def row(node: Node) -> int:
    """Returns the height of a node, 1 or more."""
    return 1 + node.layer * len(_ORDER) + _ORDER.index(node.location)


def unroll(
    params: model.Params,
    config: ModelConfig,
    circuit: Circuit,
    tokens: Sequence[int],
    answers: Sequence[int] = (),
    *,
    most_likely: int = 5,
) -> Unrolled:
    """Returns a circuit on a prompt.

    Args:
      params: Parameters of the model that the circuit is in.
      config: Config of the model.
      circuit: The circuit.
      tokens: The prompt.
      answers: Tokens whose logits after the prompt are in the graph.
      most_likely: How many of the circuit's most likely tokens are, where no answers are given.

    Raises:
      UserError: The prompt does not fit the context, or is empty.
    """
    if not 1 <= len(tokens) <= config.context:
        raise UserError(f"a prompt must have 1 to {config.context} tokens, this one has {len(tokens)}")
    # Sums are checked to more digits than bfloat16 has.
    config = dataclasses.replace(config, compute_dtype="float32")
    found = Subnetwork.of(params, config, circuit)
    # Tokens after the prompt do not change what is before: one program serves prompts of all lengths.
    padded_1T = np.zeros((1, config.context), np.int32)
    padded_1T[0, : len(tokens)] = tokens
    whole = found.scorer.config
    logits_1TV, acts = _run(found.params, jnp.asarray(padded_1T), found.ablation(), config=whole)
    logits_V = np.asarray(logits_1TV[0, len(tokens) - 1], np.float64)
    chosen = list(dict.fromkeys(answers)) or np.argsort(-logits_V, kind="stable")[:most_likely].tolist()
    parts = _Parts(found.params, whole, circuit.mask(), tokens, acts)
    for layer in range(config.n_layer):
        parts.add_layer(layer)
    parts.add_logits(chosen, logits_V)
    share_V = np.exp(logits_V - logits_V.max())
    share_V /= share_V.sum()
    return parts.unrolled({token: float(share_V[token]) for token in chosen})


@functools.partial(jax.jit, static_argnames="config")
def _run(params, tokens_BT, tap, *, config: ModelConfig):
    """Returns logits, and the values of locations, attention patterns and norm scales of one row."""
    logits_BTV, acts = model.forward(params, tokens_BT, config, tap=tap)
    patterns = [
        model.layer_attention(acts["attn.q"], acts["attn.k"], model.sinks(params), i, config=config)
        for i in range(config.n_layer)
    ]
    scales = {name: model.norm_scale(acts[name], config) for name in (*_STREAMS, "final_resid")}
    return logits_BTV, {"acts": acts, "patterns": jnp.stack(patterns), "scales": scales}


class _Parts:
    """Collects the edges of the graph, location by location."""

    def __init__(
        self,
        params: model.Params,
        config: ModelConfig,
        kept: Mapping[str, np.ndarray],
        tokens: Sequence[int],
        recorded: Mapping[str, Any],
    ):
        time = len(tokens)
        self.config, self.kept, self.tokens, self.time = config, kept, tuple(map(int, tokens)), time
        self.flat = {path: np.asarray(leaf, np.float64) for path, leaf in trees.flatten(params).items()}
        acts = jax.device_get(recorded["acts"])
        # All of the model's layers: (L, T, N); the end of the stream: (T, D).
        self.acts = {name: np.asarray(a, np.float64)[..., 0, :time, :] for name, a in acts.items()}
        scales = jax.device_get(recorded["scales"])
        self.scales = {name: np.asarray(a, np.float64)[..., 0, :time, :] for name, a in scales.items()}
        self.patterns_LHTS = np.asarray(recorded["patterns"], np.float64)[:, 0, :, :time, :time]
        self.values: dict[Vertex, float | None] = {}
        self.links: dict[tuple[Vertex, Vertex], float] = {}
        self.top_row = 1 + config.n_layer * len(_ORDER)
        embedding_TD = self.flat["embed/tokens"][list(self.tokens)]
        if config.position == "added":
            embedding_TD = embedding_TD + self.flat["embed/positions"][:time]
        self.embedding_TD = embedding_TD
        # The stream after each write is 0 in channels where a nonlinearity of the stream stops it.
        between = [self.acts[name][i] for i in range(config.n_layer) for name in _STREAMS]
        self.streams = [*between, self.acts["final_resid"]]

    def add_layer(self, layer: int) -> None:
        """Adds the nodes of a layer and what arrives at them."""
        for read in ("attn.act_in", "mlp.act_in"):
            self._add_reads(layer, read)
        for connection in CONNECTIONS:
            if connection.source == "attn.v":
                self._add_heads(layer, connection)
            else:
                self._add_products(layer, connection)
        for location in _ORDER:
            for channel in np.flatnonzero(self.kept[location][layer]).tolist():
                node = Node(layer, location, channel)
                for position in range(self.time):
                    value = self.acts[location][layer, position, channel]
                    if value != 0:
                        self.values[self._vertex(node, position)] = float(value)

    def _add_products(self, layer: int, connection: Connection) -> None:
        """Adds what arrives through a matrix at the same token."""
        kernel_IO = self.flat[connection.kernel][layer]
        source_TI = self.acts[connection.source][layer]
        kept_I = self.kept[connection.source][layer]
        constants_TO = np.where(kept_I, 0, source_TI) @ kernel_IO + self.flat[connection.bias][layer]
        for o in np.flatnonzero(self.kept[connection.target][layer]).tolist():
            target = Node(layer, connection.target, o)
            for i in np.flatnonzero(kept_I & (kernel_IO[:, o] != 0)).tolist():
                source = Node(layer, connection.source, i)
                for t in range(self.time):
                    number = source_TI[t, i] * kernel_IO[i, o]
                    self._link(self._vertex(source, t), self._vertex(target, t), number)
            self._add_constants(target, constants_TO[:, o])

    def _add_heads(self, layer: int, connection: Connection) -> None:
        """Adds what heads bring from earlier tokens to what they write."""
        config = self.config
        kernel_EO, v_SE = self.flat[connection.kernel][layer], self.acts["attn.v"][layer]
        kept_E, pattern_HTS = self.kept["attn.v"][layer], self.patterns_LHTS[layer]
        removed_SE = np.where(kept_E, 0, v_SE).reshape(self.time, config.n_head, config.d_head)
        removed_TE = np.einsum("hts,shk->thk", pattern_HTS, removed_SE).reshape(self.time, -1)
        constants_TO = removed_TE @ kernel_EO + self.flat[connection.bias][layer]
        for o in np.flatnonzero(self.kept[connection.target][layer]).tolist():
            target = Node(layer, connection.target, o)
            for e in np.flatnonzero(kept_E & (kernel_EO[:, o] != 0)).tolist():
                numbers_TS = pattern_HTS[e // config.d_head] * v_SE[:, e] * kernel_EO[e, o]
                for t in range(self.time):
                    for s in range(t + 1):
                        source = self._vertex(Node(layer, "attn.v", e), s)
                        self._link(source, self._vertex(target, t), numbers_TS[t, s])
            self._add_constants(target, constants_TO[:, o])

    def _add_reads(self, layer: int, location: str) -> None:
        """Adds what is read from the stream: the embedding, and what was written before."""
        config, part = self.config, _READS[location]
        stage = 2 * layer + (part == "mlp")
        gain_D = self.flat[f"blocks/{part}_norm/gain"][layer]
        scale_T1 = self.scales[_STREAMS[stage % 2]][layer]
        bias_D = self.flat.get(f"blocks/{part}_norm/bias", np.zeros((config.n_layer, 1)))[layer]
        centers_TD = -self._center(self.streams[stage]) * scale_T1 * gain_D + bias_D
        for channel in np.flatnonzero(self.kept[location][layer]).tolist():
            target = Node(layer, location, channel)
            if channel >= config.d_model:
                self._add_position(target, part)
                continue
            factor_T = scale_T1[:, 0] * gain_D[channel]
            constants_T = centers_TD[:, channel].copy()
            entering_T = self._embedded(stage)[:, channel] * factor_T
            for t in range(self.time):
                self._link(self._embedding(t), self._vertex(target, t), entering_T[t])
            for source, written_T in self._written(stage, channel):
                for t in range(self.time):
                    self._link(self._vertex(source, t), self._vertex(target, t), written_T[t] * factor_T[t])
            constants_T += self._removed(stage)[:, channel] * factor_T
            self._add_constants(target, constants_T)

    def _add_position(self, target: Node, part: str) -> None:
        """Adds what enters a read of a concatenated position: its table's entry, normed."""
        config, norm = self.config, f"blocks/{part}_pos_norm"
        name = "positions" if config.position == "concat" else "sinusoids"
        table_TP = self.flat[f"embed/{name}"][: self.time]
        scale_T1 = np.asarray(model.norm_scale(jnp.asarray(table_TP, jnp.float32), config), np.float64)
        channel = target.channel - config.d_model
        factor_T = scale_T1[:, 0] * self.flat[f"{norm}/gain"][target.layer, channel]
        for t in range(self.time):
            self._link(self._embedding(t), self._vertex(target, t), table_TP[t, channel] * factor_T[t])
        bias = self.flat.get(f"{norm}/bias", np.zeros((config.n_layer, config.d_pos)))[target.layer, channel]
        self._add_constants(target, bias - self._center(table_TP)[:, 0] * factor_T)

    def add_logits(self, answers: Sequence[int], logits_V: np.ndarray) -> None:
        """Adds the logits of tokens after the prompt."""
        config, flat, stage, t = self.config, self.flat, 2 * self.config.n_layer, self.time - 1
        scale = self.scales["final_resid"][t, 0]
        unembed_DV = flat["embed/tokens"].T if config.tied_embeddings else flat["head/unembed"]
        factor_DV = scale * flat["head/norm/gain"][:, None] * unembed_DV
        center = self._center(self.streams[stage])[t, 0]
        bias_D = flat.get("head/norm/bias", np.zeros(config.d_model))
        for answer in answers:
            target = Vertex("logit", self.top_row, int(answer), t)
            self.values[target] = float(logits_V[answer])
            factor_D = factor_DV[:, answer]
            entering = self._embedded(stage)[t] @ factor_D
            if config.bigram != "none":
                entering += flat["head/bigram"][self.tokens[t], answer]
            self._link(self._embedding(t), target, entering)
            for channel in np.flatnonzero(factor_D).tolist():
                for source, written_T in self._written(stage, channel):
                    self._link(self._vertex(source, t), target, written_T[t] * factor_D[channel])
            constant = self._removed(stage)[t] @ factor_D - center * factor_D.sum()
            constant += bias_D @ unembed_DV[:, answer]
            if config.logits_bias:
                constant += flat["head/logits_bias"][answer]
            self._link(Vertex("constants", self.top_row, -1, t), target, constant)

    def _center(self, stream_TD: np.ndarray) -> np.ndarray:
        """Returns what layer norm subtracts, `(T, 1)`."""
        return stream_TD.mean(-1, keepdims=True) * (self.config.norm == "layer")

    def _embedded(self, stage: int) -> np.ndarray:
        """Returns what is left of the embedding at a stage, `(T, D)`."""
        return self.embedding_TD * self._passed(0, stage)

    def _passed(self, write: int, stage: int) -> np.ndarray:
        """Returns 1 where what a write adds to the stream is still in it when it is read at a stage."""
        config, passed_TD = self.config, np.ones_like(self.embedding_TD)
        for after in range(write + 1, stage + 1):
            site = ("resid_post_mlp", "resid_post_attn")[after % 2]
            selects = config.abs_top_k_fraction is not None and site in config.abs_top_k_sites
            if selects or config.residual_activation == "relu":
                passed_TD = passed_TD * (self.streams[after] != 0)
        return passed_TD

    def _written(self, stage: int, channel: int) -> list[tuple[Node, np.ndarray]]:
        """Returns the kept nodes that wrote a channel before a stage, and what is left of each, `(T,)`."""
        nodes = [Node(write // 2, _WRITES[write % 2], channel) for write in range(stage)]
        return [
            (node, self.acts[node.location][node.layer, :, channel] * self._passed(write, stage)[:, channel])
            for write, node in enumerate(nodes)
            if self.kept[node.location][node.layer, channel]
        ]

    def _removed(self, stage: int) -> np.ndarray:
        """Returns what removed nodes wrote to the stream before a stage, `(T, D)`."""
        total_TD = np.zeros_like(self.embedding_TD)
        for write in range(stage):
            layer, location = write // 2, _WRITES[write % 2]
            removed_TD = np.where(self.kept[location][layer], 0, self.acts[location][layer])
            total_TD += removed_TD * self._passed(write, stage)
        return total_TD

    def _vertex(self, node: Node, position: int) -> Vertex:
        return Vertex("node", row(node), node.channel, position)

    def _embedding(self, position: int) -> Vertex:
        return Vertex("embedding", 0, self.tokens[position], position)

    def _add_constants(self, target: Node, numbers_T: np.ndarray) -> None:
        for t in range(self.time):
            self._link(Vertex("constants", row(target), -1, t), self._vertex(target, t), numbers_T[t])

    def _link(self, source: Vertex, target: Vertex, number: float) -> None:
        if number != 0:
            self.links[source, target] = float(number)

    def unrolled(self, probabilities: dict[int, float]) -> Unrolled:
        """Returns the graph of what the logits depend on, through attention too."""
        sources: dict[Vertex, list[Vertex]] = {}
        for source, target in self.links:
            sources.setdefault(target, []).append(source)
        found: set[Vertex] = set()
        waiting = [vertex for vertex in self.values if vertex.kind == "logit"]
        while waiting:
            vertex = waiting.pop()
            if vertex not in found:
                found.add(vertex)
                inputs = sources.get(vertex, [])
                waiting += inputs
                waiting += self._attended(vertex, inputs)
        links = {
            (source, target): number
            for (source, target), number in self.links.items()
            if source in found and target in found
        }
        values = {vertex: self.values.get(vertex) for vertex in sorted(found, key=_place)}
        return Unrolled(tokens=self.tokens, values=values, links=links, probabilities=probabilities)

    def _attended(self, vertex: Vertex, inputs: Sequence[Vertex]) -> list[Vertex]:
        """Returns the queries and keys, where they are not 0, of the heads that write to a vertex."""
        layer, place = divmod(vertex.row - 1, len(_ORDER))
        if vertex.kind != "node" or _ORDER[place] != "attn.resid_delta":
            return []
        width, found = self.config.d_head, []
        heads = {source.index // width for source in inputs if source.kind == "node"}
        for name, positions in (("attn.q", [vertex.position]), ("attn.k", range(vertex.position + 1))):
            for channel in np.flatnonzero(self.kept[name][layer]).tolist():
                if channel // width in heads:
                    places = [self._vertex(Node(layer, name, channel), t) for t in positions]
                    found += [place for place in places if place in self.values]
        return found


def _place(vertex: Vertex) -> tuple[int, int, int]:
    return vertex.row, vertex.index, vertex.position
