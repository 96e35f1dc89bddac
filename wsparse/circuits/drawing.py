"""A circuit as a figure of matplotlib, layer by layer, for notebooks and papers.

Columns are steps of the model from left to right, as in the viewer: what a block reads, queries, keys and
values, what attention writes, what the MLP reads, its neurons, what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io
from typing import Any

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
import numpy as np

from wsparse.circuits.circuit import Circuit
from wsparse.circuits.network import residual_links
from wsparse.nodes import NODES, Node

# The columns of a layer, and where each location is.
_TITLES = ("attention\nreads", "q, k, v", "attention\nwrites", "MLP\nreads", "neurons", "MLP\nwrites")
_HEADS = 1
_COLUMN = {
    "attn.act_in": 0,
    "attn.q": _HEADS,
    "attn.k": _HEADS,
    "attn.v": _HEADS,
    "attn.resid_delta": 2,
    "mlp.act_in": 3,
    "mlp.post_act": 4,
    "mlp.resid_delta": 5,
}
_POSITIVE, _NEGATIVE, _RESIDUAL = "#2166ac", "#e08214", "#b0b0b0"
# Columns with more nodes than this have no names beside them.
_MOST_NAMES = 40

Places = dict[str, tuple[float, float]]


class Drawing(Figure):
    """A figure that a notebook shows inline whether or not `pyplot` is in use."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


def draw(circuit: Circuit) -> Drawing:
    """Returns the figure of a circuit.

    An edge is a weight: blue is positive, orange negative, wide is large. A dotted line joins what is
    written to a channel of the residual stream with what reads it later. A node is the darker, the more the
    loss grows without it; beside it is its channel.
    """
    names = [node.name for node in circuit.nodes]
    links = residual_links(names)
    columns = _columns(names)
    places = _places(columns, [*((edge.source, edge.target) for edge in circuit.edges), *links])
    most = max(map(len, columns.values()), default=1)
    figure = Drawing(figsize=(2.0 + 1.25 * len(columns), min(2.0 + 0.2 * most, 14.0)), layout="constrained")
    axes = figure.add_subplot()
    loss = f"{len(names)} nodes, {len(circuit.edges)} edges, loss {circuit.loss:.3f}"
    axes.set_title(f"{circuit.full_name}: {loss}")
    if links:
        segments = [[places[end] for end in link] for link in links]
        axes.add_collection(LineCollection(segments, colors=_RESIDUAL, linewidths=0.6, linestyles="dotted"))
    if circuit.edges:
        weights = np.array([edge.weight for edge in circuit.edges])
        axes.add_collection(
            LineCollection(
                [[places[edge.source], places[edge.target]] for edge in circuit.edges],
                colors=np.where(weights > 0, _POSITIVE, _NEGATIVE).tolist(),
                linewidths=0.3 + 2.2 * np.abs(weights) / np.abs(weights).max(),
                alpha=0.6,
            )
        )
    _draw_nodes(axes, circuit, places, named=most <= _MOST_NAMES)
    for (layer, column), of_column in columns.items():
        title = f"{_TITLES[column]}\nlayer {layer}"
        axes.annotate(title, (places[of_column[0]][0], 1.02), ha="center", va="bottom", fontsize=7)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(-1.06, 1.2)
    axes.set_axis_off()
    return figure


def _draw_nodes(axes: Any, circuit: Circuit, places: Places, *, named: bool) -> None:
    if not circuit.nodes:
        return
    importance = np.array([max(node.importance, 0.0) for node in circuit.nodes])
    x, y = np.array([places[node.name] for node in circuit.nodes]).T
    axes.scatter(
        x, y, c=importance, cmap="Greys", vmin=-0.2 * importance.max() - 1e-9, vmax=importance.max() + 1e-9,
        edgecolors="black", linewidths=0.5, s=36, zorder=3,
    )  # fmt: skip
    if not named:
        return
    for node in circuit.nodes:
        place = Node.parse(node.name)
        letter = place.location.split(".")[1] if _COLUMN[place.location] == _HEADS else ""
        axes.annotate(
            f"{letter}{place.channel}", places[node.name], xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=6, zorder=4,
        )  # fmt: skip


def _columns(names: Sequence[str]) -> dict[tuple[int, int], list[str]]:
    """Returns the nodes of every column that has some, from left to right: (layer, column) -> names."""
    columns: dict[tuple[int, int], list[str]] = {}
    for node in sorted(map(Node.parse, names), key=lambda node: (node.layer, _COLUMN[node.location])):
        columns.setdefault((node.layer, _COLUMN[node.location]), []).append(str(node))
    return columns


def _places(columns: Mapping[Any, list[str]], links: Sequence[tuple[str, str]]) -> Places:
    """Returns where nodes are: x is the number of the column, y from -1 to 1.

    In a column they are in the order of the mean height of what leads to them, so that fewer edges cross.
    """
    sources: dict[str, list[str]] = {}
    for source, target in links:
        sources.setdefault(target, []).append(source)
    places: Places = {}

    def height(name: str) -> tuple[int, float, int]:
        node = Node.parse(name)
        heights = [places[source][1] for source in sources.get(name, ()) if source in places]
        # Queries, keys and values stay together.
        kind = list(NODES).index(node.location)
        return kind, -float(np.mean(heights)) if heights else 0.0, node.channel

    for x, names in enumerate(columns.values()):
        ordered = sorted(names, key=height)
        spread = np.linspace(1, -1, len(ordered) + 2)[1:-1]
        places |= {name: (float(x), float(y)) for name, y in zip(ordered, spread, strict=True)}
    return places
