"""Random node sets of the sizes of a circuit: what its nodes are compared with.

Shapes: U nodes of the model in one vector, N nodes of a location and layer.
"""

from __future__ import annotations

import itertools

import numpy as np

from wsparse.circuits import masks
from wsparse.config import ModelConfig

# Nodes about as active as one, among which its counterpart is drawn.
_NEAREST = 8


def same_sizes(nodes_U: np.ndarray, config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns bool `(U,)`, as many nodes of every location and layer as `nodes_U` has there."""
    drawn = {name: kept_LN.copy() for name, kept_LN in masks.unflatten(np.asarray(nodes_U), config).items()}
    for kept_LN in drawn.values():
        for kept_N in kept_LN:
            rng.shuffle(kept_N)
    return np.concatenate([kept_LN.ravel() for kept_LN in drawn.values()])


def matched(
    nodes_U: np.ndarray, activity_U: np.ndarray, config: ModelConfig, rng: np.random.Generator
) -> np.ndarray:
    """Returns bool `(U,)`: for each node of a set, another of the same location and layer, about as active.

    Each is drawn among the eight nodes outside the set that are nearest in activity, without replacement;
    where a layer has too few others, nodes of the set itself fill up.

    Args:
      nodes_U: The set.
      activity_U: Mean absolute value of every node, floats.
    """
    drawn_U = np.zeros(nodes_U.size, bool)
    index = masks.unflatten(np.arange(nodes_U.size), config)
    for index_N in itertools.chain(*index.values()):
        members, others = index_N[nodes_U[index_N]], index_N[~nodes_U[index_N]]
        for member in rng.permutation(members):
            free = others[~drawn_U[others]]
            if not free.size:
                drawn_U[member] = True
                continue
            distance = np.abs(activity_U[free] - activity_U[member])
            drawn_U[rng.choice(free[np.argsort(distance, kind="stable")[:_NEAREST]])] = True
    return drawn_U
