"""A circuit as a graph of networkx, for its algorithms and for programs that read its formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsparse.circuits.circuit import Circuit
from wsparse.errors import optional
from wsparse.nodes import NODES, Node

if TYPE_CHECKING:
    import networkx


def to_networkx(circuit: Circuit, *, residual: bool = False) -> networkx.DiGraph:
    """Returns the graph of a circuit, its nodes in the model's order.

    The graph has the attributes `task`, `form`, `loss`, `target` and `model`. A node has `layer`, `location`,
    `channel`, `importance` and `tau`, and `head` where it belongs to one; an edge has `weight` and the `kind`
    "weight". All are numbers and strings, so that networkx writes the graph in each of its formats.

    Args:
      circuit: The circuit.
      residual: Whether what is written to a channel of the residual stream and read from it later is joined
        by an edge too, of the kind "residual" and without a weight. Paths from the embedding to the
        unembedding go through these.

    Raises:
      UserError: networkx is not installed.
    """
    graph = optional("networkx", "networkx", "a graph of networkx").DiGraph(
        task=circuit.task,
        form=circuit.form,
        loss=circuit.loss,
        target=circuit.target,
        model=circuit.model_digest,
    )
    for node in sorted(circuit.nodes, key=lambda node: Node.parse(node.name).order()):
        place = Node.parse(node.name)
        attributes: dict[str, Any] = place._asdict()
        if NODES[place.location].channels == "heads":
            attributes["head"] = place.channel // circuit.config.d_head
        graph.add_node(node.name, **attributes, importance=node.importance, tau=node.tau)
    for edge in circuit.edges:
        graph.add_edge(edge.source, edge.target, weight=edge.weight, kind="weight")
    if residual:
        graph.add_edges_from(residual_links(list(graph)), kind="residual")
    return graph


def residual_links(names: list[str]) -> list[tuple[str, str]]:
    """Returns which nodes write a channel of the residual stream that others of the list read later."""
    nodes = [Node.parse(name) for name in names]
    written = [node for node in nodes if node.location.endswith("resid_delta")]
    read = [node for node in nodes if node.location.endswith("act_in")]
    return [
        (str(source), str(target))
        for source in written
        for target in read
        if source.channel == target.channel and source.order() < target.order()
    ]
