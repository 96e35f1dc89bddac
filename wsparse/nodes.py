"""The one table of node locations, and the taps that look at or change what happens there.

A tap is a function `(name, value) -> value` that the model calls at every location, once for all layers
of a scan: `name` is a `Location`, a string like "attn.q" that also carries the (traced) index of the
layer, and `value` is `(B, T, N)`. What it returns is what later computation sees. Taps are plain
functions: arrays they close over are differentiated and vmapped like any others.

Reading the table does not import jax; applying a tap does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import TYPE_CHECKING, Any

from wsparse.config import ModelConfig

if TYPE_CHECKING:
    import jax

Tap = Callable[["Location", "jax.Array"], "jax.Array"]


class Location(str):
    """The name of a location, without the layer: "attn.q". `layer` is an int32 scalar, or None.

    It equals and hashes like the plain string, so that it indexes dicts of arrays per location.
    """

    layer: jax.Array | int | None

    def __new__(cls, name: str, layer: jax.Array | int | None = None):
        location = super().__new__(cls, name)
        location.layer = layer
        return location


@dataclasses.dataclass(frozen=True)
class NodeKind:
    """One row of the table of node locations.

    Attributes:
      site: name of the AbsTopK site that acts here.
      incoming: paths of the kernels whose output side is this location.
      outgoing: paths of the kernels whose input side is this location.
    """

    site: str
    incoming: tuple[str, ...] = ()
    outgoing: tuple[str, ...] = ()

    def width(self, config: ModelConfig) -> int:
        """Number of nodes per layer."""
        return config.site_width(self.site)


_QKV = tuple(f"blocks/attn/{name}/kernel" for name in "qkv")
_OUT = ("blocks/attn/out/kernel",)
_FC, _PROJ = ("blocks/mlp/fc/kernel",), ("blocks/mlp/proj/kernel",)

NODES: dict[str, NodeKind] = {
    "attn.act_in": NodeKind("attn_in", outgoing=_QKV),
    "attn.q": NodeKind("attn_q", incoming=_QKV[:1]),
    "attn.k": NodeKind("attn_k", incoming=_QKV[1:2]),
    "attn.v": NodeKind("attn_v", incoming=_QKV[2:], outgoing=_OUT),
    "attn.resid_delta": NodeKind("attn_out", incoming=_OUT),
    "mlp.act_in": NodeKind("mlp_in", outgoing=_FC),
    "mlp.post_act": NodeKind("mlp_neuron", incoming=_FC, outgoing=_PROJ),
    "mlp.resid_delta": NodeKind("mlp_out", incoming=_PROJ),
}

# Places that are recorded and can be tapped but are no nodes; "final_resid" has no layer.
OTHER_LOCATIONS = ("attn.resid_in", "attn.y", "mlp.resid_mid", "final_resid")


def identity(name: Location, value: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    del name
    return value


def compose(*taps: Tap) -> Tap:
    """The tap that applies `taps` from the first to the last."""

    def tap(name, value):
        for each in taps:
            value = each(name, value)
        return value

    return tap


def ablate(value: jax.Array, gate: jax.Array, mean: jax.Array) -> jax.Array:
    """`gate * value + (1 - gate) * mean`: a closed gate shows the mean."""
    return gate * value + (1 - gate) * mean


@dataclasses.dataclass(frozen=True)
class MeanAblation:
    """The tap that `ablate`s (Gao et al. 2025, pruning); see `mask`."""

    gates: Mapping[str, jax.Array]
    means: Mapping[str, jax.Array]

    def __call__(self, name: Location, value: jax.Array) -> jax.Array:
        if name not in self.gates:
            return value
        gate, mean = (at_layer(each[name], name, value) for each in (self.gates, self.means))
        return ablate(value, gate, mean)

    def vectors(self, name: Location) -> tuple[jax.Array, jax.Array] | None:
        """The gate and the mean `(N,)` at a location, if it has them and they are float32."""
        import jax.numpy as jnp

        if name not in self.gates:
            return None
        gate, mean = (at_layer(each[name], name) for each in (self.gates, self.means))
        both = gate.dtype == mean.dtype == jnp.float32 and gate.size == mean.size == gate.shape[-1]
        return (jnp.ravel(gate), jnp.ravel(mean)) if both else None


def mask(gates: Mapping[str, jax.Array], means: Mapping[str, jax.Array]) -> MeanAblation:
    """Mean ablation: `gate * value + (1 - gate) * mean` (Gao et al. 2025, pruning).

    Args:
      gates: location -> `(n_layer, N)`; locations without an entry are left alone.
      means: location -> `(n_layer, N)`, for at least the locations of `gates`.
    """
    return MeanAblation(gates, means)


def patch(values: Mapping[str, jax.Array], where: Mapping[str, jax.Array]) -> Tap:
    """Replace chosen nodes by given values, e.g. those of another prompt.

    Args:
      values: location -> `(n_layer, B, T, N)`, as `acts` of a forward pass.
      where: location -> bool `(n_layer, N)`: which nodes are replaced.
    """

    import jax.numpy as jnp

    def tap(name, value):
        per_layer = where.get(name)
        if per_layer is None:
            return value
        return jnp.where(at_layer(per_layer, name), at_layer(values[name], name), value)

    return tap


def at_layer(per_layer: jax.Array, name: Location, like: jax.Array | None = None) -> jax.Array:
    """The slice of `(n_layer, ...)` for this location's layer; `(N,)` becomes `(1, 1, N)`.

    A location without a layer uses the array as it is. `like` gives the dtype.
    """
    import jax.numpy as jnp

    # A traced index needs a jax array, and arrays read from files are NumPy's.
    value: Any = per_layer if name.layer is None else jnp.asarray(per_layer)[name.layer]
    if value.ndim == 1:
        value = value[None, None]
    return value if like is None else value.astype(like.dtype)
