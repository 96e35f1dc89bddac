"""Frozen steps over the nonzeros: weights, gradients and moments of a matrix as vectors of what is not zero.

Between exploration steps (`support_phases`) the weights that are zero stay zero. With the CPU kernels such a
step is computed on *packed* trees: in the place of a projected matrix stands the vector of its nonzeros, in
the order of their *places*, which are found once after each exploration step. The optimizer is the same.

Shapes: G matrices of a stack, N places of each.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wsparse import trees
from wsparse.config import SparsityConfig
from wsparse.ops import cpu
from wsparse.ops.linear import SupportedMatrix
from wsparse.sparsity.project import final_budgets

# Path of a packed parameter -> int32 `(G, N)` flat indices, as `cpu.places` returns them.
Places = dict[str, jax.Array]
_MOMENTS = ("mu", "nu")
# Matrices that are only multiplied by; the others become dense for the model.
_MULTIPLIED = r"blocks/.*/kernel|head/unembed"


def capacities(config: SparsityConfig, params: Any) -> dict[str, int]:
    """Returns the most nonzeros that a matrix of each packed parameter has at its final density.

    Args:
      config: Densities and floor.
      params: Parameters of a model, or their shapes.
    """
    budgets = final_budgets(config, params)
    return {
        path: max(budget.k, budget.floor, 1) for path, budget in budgets.items() if len(budget.shape) == 2
    }


def find_places(params: Any, capacities: dict[str, int]) -> tuple[Places, jax.Array]:
    """Returns the places of the nonzeros, and whether there is room for all of them."""
    places, fits = {}, []
    for path, leaf in trees.flatten(params).items():
        if path in capacities:
            stack = leaf if leaf.ndim == 3 else leaf[None]
            places[path], counts = cpu.places(stack, capacities[path])
            fits.append(jnp.all(counts <= capacities[path]))
    return places, jnp.all(jnp.stack(fits))


def pack(tree: Any, places: Places) -> Any:
    """Returns a tree like the parameters with vectors of nonzeros, `(G, N)`, or `(N,)` without layers."""

    def packed(path, leaf):
        if path not in places:
            return leaf
        at_GN = places[path]
        flat_GS = jnp.reshape(leaf, (at_GN.shape[0], -1))
        values_GN = jnp.take_along_axis(flat_GS, at_GN, axis=1, mode="fill", fill_value=0)
        return values_GN if leaf.ndim == 3 else values_GN[0]

    return trees.map_with_path(packed, tree)


def unpack(packed: Any, tree: Any, places: Places) -> Any:
    """Returns a tree with other values at the places; undoes `pack`."""

    def unpacked(path, values, leaf):
        if path not in places:
            return values
        at_GN = places[path]
        rows_G1 = jnp.arange(at_GN.shape[0])[:, None]
        flat_GS = jnp.reshape(jnp.asarray(leaf), (at_GN.shape[0], -1))
        values_GN = jnp.reshape(values, at_GN.shape)
        # Indices beyond the end, which are equal, are dropped.
        flat_GS = flat_GS.at[rows_G1, at_GN].set(values_GN, mode="drop", indices_are_sorted=True)
        return jnp.reshape(flat_GS, leaf.shape)

    return trees.map_with_path(unpacked, packed, tree)


def for_model(packed: Any, params: Any, places: Places) -> Any:
    """Returns parameters for the model, whose gradients by `packed` are those at the places."""
    rest = {path: at for path, at in places.items() if not re.fullmatch(_MULTIPLIED, path)}

    def leaf(path, values, param):
        if path not in places or path in rest:
            return values
        at_GN = places[path]
        return SupportedMatrix(param, values, at_GN if param.ndim == 3 else at_GN[0])

    return trees.map_with_path(leaf, unpack(packed, params, rest), params)


def pack_moments(state: Any, places: Places) -> Any:
    """Returns an optimizer's state with packed moments of Adam."""
    for name in _MOMENTS:
        moments = pack(optax.tree_utils.tree_get(state, name), places)
        state = optax.tree_utils.tree_set(state, **{name: moments})
    return state


def unpack_moments(packed: Any, state: Any, places: Places) -> Any:
    """Undoes `pack_moments`."""
    for name in _MOMENTS:
        new, old = (optax.tree_utils.tree_get(each, name) for each in (packed, state))
        packed = optax.tree_utils.tree_set(packed, **{name: unpack(new, old, places)})
    return packed
