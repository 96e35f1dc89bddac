"""A circuit in its model, ready to run: the one way from a circuit file to masks and parameters.

Shapes: U nodes of the model in one vector (see `masks`), L layer, N nodes of a location.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, taps
from wsparse.circuits import graph, masks
from wsparse.circuits.circuit import Circuit
from wsparse.circuits.scoring import Scorer
from wsparse.config import ModelConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Subnetwork:
    """A circuit and the model that it is in.

    Attributes:
      scorer: Scorer of the model's masks, under the means that the circuit was found with.
      nodes_U: Bool, the circuit's nodes.
      remaining: Every weight of the model that the circuit does not cut.
    """

    scorer: Scorer
    nodes_U: np.ndarray
    remaining: graph.EdgeMask

    @classmethod
    def of(cls, params: model.Params, config: ModelConfig, circuit: Circuit) -> Subnetwork:
        """Returns a circuit in a model; `Circuit.check` says whether it is its own."""
        scorer = Scorer(params, config, jax.tree.map(jnp.asarray, circuit.means))
        nodes_U = masks.from_names([node.name for node in circuit.nodes], config)
        return cls(scorer, nodes_U, graph.uncut(scorer.weights, circuit.removed))

    @functools.cached_property
    def params(self) -> model.Params:
        """Parameters without the weights that are cut, and with biases that carry their means."""
        return graph.cut(self.scorer.params, jax.tree.map(jnp.asarray, self.remaining), self.scorer.means)

    def ablation(self, nodes_U: np.ndarray | None = None) -> taps.NodeAblation:
        """Returns the tap under which only some nodes vary, by default the circuit's."""
        nodes_U = self.nodes_U if nodes_U is None else nodes_U
        gates = masks.unflatten(jnp.asarray(nodes_U, jnp.float32), self.scorer.config)
        return taps.NodeAblation(gates, self.scorer.means)
