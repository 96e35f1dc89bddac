"""Models whose circuits are known, because they were put there by hand: ground truth for what finds circuits.

    model = planted.make("canceled decoy")
    pairs = model.pairs(32, seed=0)

Every model is a path from the token that decides to the two answers, among small random weights. Some have
a second path that does the same, and some a *decoy*: nodes that do the task alone, when every other node is
at its mean, and whose effect closed nodes undo in the model. Mean ablation accepts a decoy, and an adversary
that lets closed nodes through refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, trees
from wsparse.circuits import adversary, masks
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.subject import Subject
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.config import ModelConfig

LEFT, RIGHT, ANSWER_LEFT, ANSWER_RIGHT = 1, 2, 3, 4
_VOCABULARY, _CONTEXT, _OTHERS = 12, 8, range(5, 12)

_PLAIN = ModelConfig(
    vocab_size=_VOCABULARY,
    context=_CONTEXT,
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=4,
    d_mlp=24,
    abs_top_k_fraction=None,
    sink=False,
    bigram="none",
)
# Channels of the residual stream that paths use: nothing else reads or writes them.
_MARK, _PLACE, _CARRIED, _COPIED, _OUT, _DECOY = 5, 6, 9, 10, 11, 12
_OWN = (_MARK, _PLACE, _CARRIED, _COPIED, _OUT, _DECOY)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A model with a known circuit.

    Attributes:
      nodes: Names of the circuit's nodes; each is needed.
      second: Nodes of a second path, which does the task without the first; empty for none.
      decoy: Nodes that do the task under mean ablation, and not in the model; empty for none.
      at_end: Whether the last token decides, instead of the first.
    """

    name: str
    config: ModelConfig
    params: model.Params
    nodes: frozenset[str]
    second: frozenset[str] = frozenset()
    decoy: frozenset[str] = frozenset()
    at_end: bool = False

    def pairs(self, n_pairs: int, seed: int) -> PairArrays:
        """Returns pairs of prompts that differ in the token that decides; the others are drawn."""
        rng, length = np.random.default_rng(seed), _CONTEXT - 2
        tokens = np.repeat(rng.choice(_OTHERS, (n_pairs, length)), 2, axis=0)
        tokens[:, -1 if self.at_end else 0] = np.tile([LEFT, RIGHT], n_pairs)
        answers = np.tile([[ANSWER_LEFT, ANSWER_RIGHT], [ANSWER_RIGHT, ANSWER_LEFT]], (n_pairs, 1))
        answer, other = jnp.asarray(answers.T, jnp.int32)
        position = jnp.full(2 * n_pairs, length - 1, jnp.int32)
        return PairArrays(jnp.asarray(tokens, jnp.int32), position, answer, other)

    @property
    def windows(self) -> np.ndarray:
        """Text that means are taken over, `(W, T)`."""
        return np.random.default_rng(7).integers(0, _VOCABULARY, (64, _CONTEXT))

    @functools.cached_property
    def subject(self) -> Subject:
        """The model, to look for circuits in."""
        return Subject(self.params, self.config, self.windows)

    def chosen(self, nodes: Iterable[str]) -> np.ndarray:
        """Returns a mask of nodes, bool `(U,)`."""
        return masks.from_names(sorted(nodes), self.config)

    def attacked(self, pairs: PairArrays, nodes_U: np.ndarray) -> float:
        """Returns the largest loss of nodes, with all weights between them, that an adversary finds."""
        scorer = self.subject.scorer
        return adversary.ascend(Subnetwork(scorer, nodes_U, scorer.weights), pairs).loss


class _Builder:
    """Weights that are put into a model of small random ones; the nodes they join are noted."""

    def __init__(self, config: ModelConfig, seed: int):
        self._rng = np.random.default_rng(seed)
        fresh = trees.flatten(model.init(config, jax.random.key(seed)))
        self.flat = {path: np.array(leaf) for path, leaf in fresh.items()}
        for path, leaf in self.flat.items():
            if path.endswith("kernel"):
                few = self._rng.random(leaf.shape) < 0.2
                leaf[:] = self._rng.normal(0, 0.05, leaf.shape) * few
        for name in ("attn/out", "mlp/proj"):
            self.flat[f"blocks/{name}/kernel"][..., _OWN] = 0
        for name in ("attn/q", "attn/k", "attn/v", "mlp/fc"):
            self.flat[f"blocks/{name}/kernel"][..., _OWN, :] = 0
        for name in ("attn/q", "attn/k"):
            self.flat[f"blocks/{name}/kernel"][:] = 0
        self.flat["embed/tokens"][:] = self._rng.normal(0, 0.3, self.flat["embed/tokens"].shape)
        self.flat["embed/tokens"][:, _OWN] = 0
        # Large and constant, so that norms do not blow small values up to decisions.
        self.flat["embed/tokens"][:, 0] = 12
        self.flat["head/unembed"][:] = 0
        self.nodes: set[str] = set()

    def mark(self, distraction: float = 0.0) -> None:
        """Writes which side it is into the embedding; other tokens look a little like either."""
        self.flat["embed/tokens"][[LEFT, RIGHT], _MARK] = 4, -4
        drawn = self._rng.choice([-1.0, 1.0], len(_OTHERS)) * distraction
        self.flat["embed/tokens"][list(_OTHERS), _MARK] = drawn

    def carry(self, layer: int, source: int, value: int, target: int, weight: float = 3.0) -> None:
        """Carries a channel of earlier tokens to another of later ones, through a value channel."""
        self._only("attn/v", layer, source, value, 3.0)
        self._add("attn/out", layer, value, target, weight)
        self.nodes |= {f"{layer}.attn.act_in.{source}", f"{layer}.attn.v.{value}"}
        self.nodes.add(f"{layer}.attn.resid_delta.{target}")

    def look(self, layer: int, channel: int, source: int, strength: float) -> None:
        """Lets a head look at tokens with a large value of a channel; its query is a constant."""
        self._only("attn/k", layer, source, channel, 3.0)
        self.flat["blocks/attn/q/bias"][layer, channel] = strength
        self.nodes |= {f"{layer}.attn.act_in.{source}", f"{layer}.attn.k.{channel}"}

    def neurons(self, layer: int, source: int, first: int, target: int, weight: float = 3.0) -> None:
        """Passes a channel on through two neurons, one for each sign."""
        for neuron, sign in ((first, 1), (first + 1, -1)):
            self._only("mlp/fc", layer, source, neuron, 3.0 * sign)
            self._add("mlp/proj", layer, neuron, target, weight * sign)
            self.nodes.add(f"{layer}.mlp.post_act.{neuron}")
        self.nodes |= {f"{layer}.mlp.act_in.{source}", f"{layer}.mlp.resid_delta.{target}"}

    def answer(self, channel: int, weight: float) -> None:
        """Lets a channel decide between the answers."""
        self.flat["head/unembed"][channel, [ANSWER_LEFT, ANSWER_RIGHT]] = weight, -weight

    def taken(self) -> frozenset[str]:
        """Returns the nodes noted since the last call."""
        nodes, self.nodes = frozenset(self.nodes), set()
        return nodes

    def _only(self, name: str, layer: int, source: int, target: int, weight: float) -> None:
        kernel = self.flat[f"blocks/{name}/kernel"]
        kernel[layer, :, target] = 0
        kernel[layer, source, target] = weight

    def _add(self, name: str, layer: int, source: int, target: int, weight: float) -> None:
        kernel = self.flat[f"blocks/{name}/kernel"]
        kernel[layer, source] = 0
        kernel[layer, source, target] = weight


def _neurons(b: _Builder) -> dict[str, frozenset[str]]:
    b.mark()
    b.neurons(0, _MARK, 7, _OUT)
    b.answer(_OUT, 0.8)
    return {"nodes": b.taken()}


def _carried(b: _Builder) -> dict[str, frozenset[str]]:
    b.mark()
    b.carry(0, _MARK, 3, _OUT)
    b.answer(_OUT, 4.0)
    return {"nodes": b.taken()}


def _carried_twice(b: _Builder) -> dict[str, frozenset[str]]:
    b.mark()
    b.carry(0, _MARK, 3, _CARRIED)
    b.carry(1, _CARRIED, 2, _OUT)
    b.answer(_OUT, 0.8)
    return {"nodes": b.taken()}


def _carried_and_neurons(b: _Builder) -> dict[str, frozenset[str]]:
    b.mark()
    b.carry(0, _MARK, 3, _CARRIED)
    b.neurons(1, _CARRIED, 7, _OUT)
    b.answer(_OUT, 1.0)
    return {"nodes": b.taken()}


def _selected(b: _Builder) -> dict[str, frozenset[str]]:
    b.mark(distraction=3.0)
    b.flat["embed/tokens"][[LEFT, RIGHT], _PLACE] = 4
    b.look(0, 1, _PLACE, strength=4.0)
    b.carry(0, _MARK, 3, _OUT)
    b.answer(_OUT, 0.8)
    return {"nodes": b.taken()}


def _redundant(b: _Builder) -> dict[str, frozenset[str]]:
    first = _carried(b)["nodes"]
    b.carry(0, _MARK, 6, _DECOY)
    b.answer(_DECOY, 4.0)
    return {"nodes": first, "second": b.taken()}


def _canceled(b: _Builder) -> dict[str, frozenset[str]]:
    """The decoy's value channel is undone by another one, which reads and writes the same channels."""
    nodes = _carried(b)["nodes"]
    b.carry(0, _MARK, 5, _DECOY)
    decoy = b.taken()
    b.carry(0, _MARK, 6, _DECOY, weight=-3.0)
    b.taken()
    b.answer(_DECOY, 2.2)
    return {"nodes": nodes, "decoy": decoy}


def _canceled_neurons(b: _Builder) -> dict[str, frozenset[str]]:
    """The decoy's neurons are undone by others."""
    nodes = _carried_and_neurons(b)["nodes"]
    b.carry(0, _MARK, 5, _COPIED)
    b.neurons(1, _COPIED, 10, _DECOY)
    decoy = b.taken()
    b.neurons(1, _COPIED, 14, _DECOY, weight=-3.0)
    b.taken()
    b.answer(_DECOY, 0.62)
    return {"nodes": nodes, "decoy": decoy}


_SINK = dataclasses.replace(_PLAIN, sink=True)
_MODELS: dict[str, tuple[ModelConfig, Callable[[_Builder], dict[str, frozenset[str]]]]] = {
    "neurons": (_PLAIN, _neurons),
    "carried": (_PLAIN, _carried),
    "carried twice": (_PLAIN, _carried_twice),
    "carried and neurons": (_PLAIN, _carried_and_neurons),
    "selected": (_PLAIN, _selected),
    "selected, sink": (_SINK, _selected),
    "redundant": (_PLAIN, _redundant),
    "canceled decoy": (_PLAIN, _canceled),
    "canceled decoy, sink": (_SINK, _canceled),
    "canceled neurons": (_PLAIN, _canceled_neurons),
    "AbsTopK": (dataclasses.replace(_PLAIN, abs_top_k_fraction=0.5), _carried_and_neurons),
    "bigram": (dataclasses.replace(_PLAIN, bigram="learned"), _canceled),
}
NAMES = tuple(_MODELS)


@functools.cache
def make(name: str, seed: int = 0) -> Planted:
    """Returns the planted model of a name in `NAMES`; the seed is that of the weights around it."""
    config, build = _MODELS[name]
    builder = _Builder(config, seed)
    known = build(builder)
    params = jax.tree.map(jnp.asarray, trees.unflatten(builder.flat))
    return Planted(name=name, config=config, params=params, at_end=name == "neurons", **known)
