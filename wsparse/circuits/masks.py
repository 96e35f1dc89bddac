"""Binary node masks: learned through a Heaviside gate with a smooth derivative.

A mask is a dict location -> `(L, N)`. Shapes: L layer, N nodes of a location, U all nodes of the model in
one vector (locations in the order of `wsparse.nodes.NODES`, layers within, channels within).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse.config import ModelConfig
from wsparse.nodes import NODES, Node, shapes

Mask = dict[str, Any]


def n_nodes(config: ModelConfig) -> int:
    """Returns the number of nodes of the model."""
    return sum(layers * width for layers, width in shapes(config).values())


def flatten(mask: Mapping[str, Any]) -> Any:
    """Returns a mask as one vector `(..., U)`; axes before `(L, N)` stay."""
    return jnp.concatenate([jnp.reshape(mask[name], (*mask[name].shape[:-2], -1)) for name in NODES], axis=-1)


def unflatten(vector_U: Any, config: ModelConfig) -> Mask:
    """Returns the mask of a vector `(..., U)`."""
    mask, start = {}, 0
    for name, shape in shapes(config).items():
        stop = start + shape[0] * shape[1]
        mask[name] = vector_U[..., start:stop].reshape(*vector_U.shape[:-1], *shape)
        start = stop
    return mask


def names(config: ModelConfig) -> list[str]:
    """Returns every node's name, "layer.location.channel", in the order of `flatten`."""
    return [
        str(Node(layer, location, channel))
        for location, (layers, width) in shapes(config).items()
        for layer in range(layers)
        for channel in range(width)
    ]


def from_names(node_names: Sequence[str], config: ModelConfig) -> np.ndarray:
    """Returns bool `(U,)`: which nodes are in the list."""
    return np.isin(names(config), node_names)


def heads(kept_LE: Any, config: ModelConfig) -> list[tuple[int, int]]:
    """Returns the heads of which a channel is kept, in order, as layer and head."""
    kept_LHK = np.asarray(kept_LE).reshape(config.n_layer, config.n_head, config.d_head)
    return [(int(layer), int(head)) for layer, head in np.argwhere(kept_LHK.any(axis=2))]


@jax.custom_jvp
def heaviside(tau: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Returns 1 where `tau > 0`, else 0; its derivative is that of `sigmoid(tau / temperature)`."""
    del temperature
    return (tau > 0).astype(tau.dtype)


@heaviside.defjvp
def _heaviside_jvp(primals, tangents):
    tau, temperature = primals
    sigmoid = jax.nn.sigmoid(tau / temperature)
    return heaviside(tau, temperature), sigmoid * (1 - sigmoid) / temperature * tangents[0]


def gates(tau: Mapping[str, jax.Array], temperature: jax.Array | float) -> Mask:
    """Returns the gates of parameters that `tie` may have reduced."""
    return untie({name: heaviside(tau_LN, temperature) for name, tau_LN in tau.items()})


def tie(mask: Mapping[str, Any]) -> Mask:
    """Returns the mask without `attn.k`, whose channels then share the entries of `attn.q`.

    A score is a sum over channels of query times key: either without the other is a constant.
    """
    return {name: values for name, values in mask.items() if name != "attn.k"}


def untie(mask: Mapping[str, Any]) -> Mask:
    """Returns the whole mask: `attn.k` is `attn.q` where `tie` took it away."""
    return {name: mask.get(name, mask["attn.q"]) for name in NODES}
