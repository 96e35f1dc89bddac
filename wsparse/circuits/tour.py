"""A first tour of any circuit, made from its evidence: from the answers back to the embedding.

It follows what differs most between the two prompts of a pair, and says what was measured on the way, never
what a node means: that is for people to write. The same circuit and evidence give the same tour.

Shapes: T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import json

import numpy as np

from wsparse.circuits import evidence_file
from wsparse.circuits.circuit import Circuit, Edge
from wsparse.circuits.evidence_file import Evidence
from wsparse.circuits.network import residual_links
from wsparse.circuits.notes import Edit, Step
from wsparse.nodes import NODES, Node

# Steps between the first, which is about all of the circuit, and the last, which removes a node.
_LONGEST = 12
_TOKENS_NAMED = 4
_MINUS = "\N{MINUS SIGN}"


def first_tour(circuit: Circuit, evidence: Evidence) -> tuple[Step, ...]:
    """Returns the steps of a tour of a circuit."""
    about = _Measured(circuit, evidence)
    start = about.start()
    trail = _trail(about, start)
    return (_overview(about), *itertools.islice(trail, _LONGEST), _removal(about))


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
    """A circuit and what was measured of it."""

    circuit: Circuit
    evidence: Evidence

    @functools.cached_property
    def nodes(self) -> dict[str, evidence_file.NodeEvidence]:
        return {node.name: node for node in self.evidence.nodes}

    @functools.cached_property
    def importance(self) -> dict[str, float]:
        return {node.name: node.importance for node in self.circuit.nodes}

    @functools.cached_property
    def values(self) -> dict[str, list[np.ndarray]]:
        """Place -> its values `(T,)` in the circuit, prompt by prompt."""
        ends = np.cumsum([prompt.length for prompt in self.evidence.prompts])[:-1]
        return {
            place: np.split(values_X, ends)
            for place, values_X in zip(self.evidence.places, self.evidence.circuit_values_PX, strict=True)
        }

    @functools.cached_property
    def tokens(self) -> list[list[int]]:
        ends = np.cumsum([prompt.length for prompt in self.evidence.prompts])[:-1]
        return [each.tolist() for each in np.split(self.evidence.prompt_tokens_X, ends)]

    @functools.cached_property
    def writers(self) -> dict[str, list[str]]:
        """Read -> the writes of its channel of the residual stream before it."""
        found: dict[str, list[str]] = {}
        for source, target in residual_links(list(self.nodes)):
            found.setdefault(target, []).append(source)
        return found

    @property
    def pairs(self) -> int:
        return len(self.evidence.prompts) // 2

    def change(self, name: str) -> float:
        """Returns the largest difference of a node's values between the prompts of a pair, averaged."""
        return float(np.mean([np.abs(difference_T).max() for difference_T in self._differences(name)]))

    def last_change(self, name: str) -> float:
        """Returns the difference of its values at the last token, averaged in size."""
        return float(np.mean([abs(difference_T[-1]) for difference_T in self._differences(name)]))

    def _differences(self, name: str) -> Iterator[np.ndarray]:
        rows = self.values[name]
        for first_T, second_T in zip(rows[::2], rows[1::2], strict=True):
            # Prompts of different lengths agree from their ends backwards.
            length = min(len(first_T), len(second_T))
            yield first_T[-length:] - second_T[-length:]

    def start(self) -> str:
        """Returns the node that moves the answers most; the most important one where that is not known."""
        writers = [name for name, node in self.nodes.items() if node.answer_weights is not None]
        if moving := [name for name in writers if self.push(name) > 0]:
            return max(moving, key=self.push)
        ends = [name for name in self.nodes if _writes(Node.parse(name))]
        return max(ends or self.nodes, key=lambda name: self.importance[name])

    def push(self, name: str) -> float:
        """Returns how much a write moves the answers apart: their weights' difference times its change."""
        first, second = self.nodes[name].answer_weights or (0.0, 0.0)
        return abs(first - second) * self.last_change(name)

    def strongest_edge(self, target: str) -> tuple[Edge, int] | None:
        """Returns the edge whose weight times its source's change is largest, and of how many."""
        edges = [edge for edge in self.circuit.edges if edge.target == target and edge.source in self.nodes]
        if not edges:
            return None
        return max(edges, key=lambda edge: abs(edge.weight) * self.change(edge.source)), len(edges)

    def token(self, token: int) -> str:
        """Returns a token's text in quotes, short, with escapes for what cannot be told from others."""
        text = self.evidence.token_texts.get(str(token), f"token {token}")[:40]
        quoted = json.dumps(text, ensure_ascii=False)
        return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in quoted)

    def words(self, name: str) -> str:
        """Returns what a node's name says."""
        node = Node.parse(name)
        kind = NODES[node.location]
        layer = f"layer {node.layer}"
        if kind.channels == "heads":
            head, channel = divmod(node.channel, self.circuit.config.d_head)
            return f"{layer}, head {head}, {kind.meaning} channel {channel}"
        if kind.channels == "neurons":
            return f"{layer}, neuron {node.channel}"
        position = node.channel - self.circuit.config.d_model
        channel = f"position channel {position}" if position >= 0 else f"residual channel {node.channel}"
        return f"{layer}, {channel}, {kind.meaning}"

    def removed(self, name: str) -> str:
        """Returns what its removal does, as a sentence."""
        return f"Its removal changes the loss by {_signed(self.importance[name])}."


def _overview(about: _Measured) -> Step:
    circuit, scores = about.circuit, about.circuit.scores
    return Step(
        pair=0,
        caption=f"{circuit.full_name}: {about.evidence.summary.rstrip('.')}. "
        f"The circuit has {len(circuit.nodes)} nodes and {len(circuit.edges)} edges. Alone, with everything "
        f"else at its mean, its loss is {circuit.loss:.3f} nats on the report split; that of the whole model "
        f"is {scores.model.loss:.3f}, and chance is 0.693. This tour is made from measurements in the "
        "circuit and does not say what a node means: from the answers back to the embedding it follows what "
        "changes most. A change is the largest difference of a node's values between the two prompts of a "
        f"pair, at any token, averaged over {about.pairs} pairs; a removal puts one node at its mean.",
    )


def _trail(about: _Measured, start: str) -> Iterator[Step]:
    """Yields steps from a write back to the embedding."""
    yield _first_write(about, start)
    target = start
    while found := about.strongest_edge(target):
        edge, many = found
        yield _edge(about, edge, many)
        target = edge.source
        node = Node.parse(target)
        if node.location == "attn.v" and (step := _head(about, node)):
            yield step
        if NODES[node.location].channels != "read":
            continue
        writers = _writers(about, target)
        if not writers or about.change(writers[0]) == 0:
            yield _embedding(about, target)
            return
        yield _write(about, writers, target)
        target = writers[0]


def _first_write(about: _Measured, name: str) -> Step:
    weights, last = about.nodes[name].answer_weights, len(about.tokens[0]) - 1
    first, second = (about.values[name][row][-1] for row in (0, 1))
    caption = (
        f"{name} ({about.words(name)}) is {_signed(first)} at the last token of the first prompt of this "
        f"pair and {_signed(second)} at that of the second."
    )
    if weights is not None and about.evidence.answers is not None:
        answers = [about.token(token) for token in about.evidence.answers]
        caption += (
            f" The unembedding, times the final gain, gives its channel {_signed(weights[0])} for the answer "
            f"{answers[0]} and {_signed(weights[1])} for {answers[1]}. Of all that is written, the "
            "difference of these two times the difference at the last token is largest here, averaged over "
            "all pairs."
        )
    return Step(caption=f"{caption} {about.removed(name)}", node=name, pair=0, token=last)


def _edge(about: _Measured, edge: Edge, many: int) -> Step:
    which = (
        f"Of the {many} edges into its target, weight times change of the source is largest here."
        if many > 1
        else "Its target has no other."
    )
    return Step(
        edge=f"{edge.source}>{edge.target}",
        pair=0,
        caption=f"The edge {edge.source} ({about.words(edge.source)}) to {edge.target} has the weight "
        f"{_signed(edge.weight)}. {which} The source changes by {_plain(about.change(edge.source))}. "
        f"{about.removed(edge.source)}",
    )


def _head(about: _Measured, value: Node) -> Step | None:
    """Returns the step about the head that a value belongs to: what it attends to from the last token."""
    number = value.channel // about.circuit.config.d_head
    row = next(
        (i for i, h in enumerate(about.evidence.heads) if (h.layer, h.head) == (value.layer, number)), None
    )
    if row is None:
        return None
    named = []
    for prompt in (0, 1):
        at, weight = _attended(about, row, prompt)
        token = about.token(about.tokens[prompt][at])
        named.append((at, f"{_plain(weight)} on {token} (token {at + 1} of {len(about.tokens[prompt])})"))
    inside = [
        name
        for name in about.nodes
        if (node := Node.parse(name)).layer == value.layer
        and NODES[node.location].channels == "heads"
        and node.channel // about.circuit.config.d_head == number
    ]
    scored = [name for name in inside if not name.startswith(f"{value.layer}.attn.v.")]
    return Step(
        # Queries and keys show the pattern and their share of the score.
        node=max(scored, key=lambda name: about.importance[name]) if scored else str(value),
        pair=0,
        token=named[0][0],
        caption=f"{value} is a value of head {number} of layer {value.layer}, of which {len(inside)} "
        f"queries, keys and values are in the circuit. From the last token its largest attention is "
        f"{named[0][1]} in the first prompt of this pair and {named[1][1]} in the second.",
    )


def _attended(about: _Measured, head: int, prompt: int) -> tuple[int, float]:
    """Returns the token that a head attends to most from a prompt's last one, and how much."""
    lengths = [each.length for each in about.evidence.prompts]
    end = sum(evidence_file.triangle(length) for length in lengths[: prompt + 1])
    size = min(lengths[prompt], evidence_file.PATTERN_TOKENS)
    # The last row of the prompt's triangle.
    weights_T = about.evidence.circuit_patterns_HY[head, end - size : end]
    at = int(weights_T.argmax())
    return lengths[prompt] - size + at, float(weights_T[at])


def _writers(about: _Measured, read: str) -> list[str]:
    """Returns the nodes that write what a node reads, the one that changes most first."""
    return sorted(about.writers.get(read, ()), key=about.change, reverse=True)


def _write(about: _Measured, writers: Sequence[str], read: str) -> Step:
    name, many = writers[0], len(writers)
    which = (
        f"Of the {many} nodes of the circuit that write it before, this one changes most:"
        if many > 1
        else "No other node of the circuit writes it before; it changes"
    )
    return Step(
        node=name,
        pair=0,
        caption=f"{read} reads residual channel {Node.parse(read).channel}, which {name} "
        f"({about.words(name)}) writes. {which} by {_plain(about.change(name))}. {about.removed(name)}",
    )


def _embedding(about: _Measured, read: str) -> Step:
    """Returns the last step of the trail: what a read has from the embedding."""
    index = list(about.nodes).index(read)
    count = about.nodes[read].n_tokens
    entries = [
        f"{about.token(int(token))} {_signed(float(weight))}"
        for token, weight in zip(
            about.evidence.top_tokens_NK[index], about.evidence.top_weights_NK[index], strict=True
        )
        if token >= 0
    ]
    if entries:
        said = f"The embedding of {count} tokens has an entry there; the largest: " if count > 1 else (
            "The embedding of one token has an entry there: "
        )  # fmt: skip
        said += f"{', '.join(entries[:_TOKENS_NAMED])}."
    else:
        said = "No token has an entry there in the embedding."
    first, second = about.tokens[:2]
    length = min(len(first), len(second))
    apart = [i for i in range(-length, 0) if first[i] != second[i]]
    differing = ""
    if apart:
        tokens = (about.token(first[apart[0]]), about.token(second[apart[0]]))
        differing = f" The prompts of this pair first differ in {tokens[0]} and {tokens[1]}."
    return Step(
        node=read,
        pair=0,
        token=len(first) + apart[0] if apart else None,
        caption=f"{read} ({about.words(read)}): no node of the circuit that changes writes this channel "
        f"before it. {said}{differing} {about.removed(read)}",
    )


def _removal(about: _Measured) -> Step:
    name, node = next(iter(about.nodes.items()))
    return Step(
        node=name,
        pair=0,
        edits=(Edit(name=name, mode="mean"),),
        caption=f"{name} ({about.words(name)}) is held at its mean, {_signed(node.mean)}. Of all removals "
        f"this one makes the loss grow most: by {_signed(about.importance[name])} in the circuit, on all "
        f"pairs of the report split, and by {_signed(node.from_model)} in the whole model, on "
        f"{about.evidence.ablation_pairs} of them.",
    )


def _writes(node: Node) -> bool:
    return NODES[node.location].channels == "residual"


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", _MINUS)


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", _MINUS)
