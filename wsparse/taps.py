"""Taps: functions that look at or change what happens at a location inside the model.

A tap is a function `(location, value) -> value` that the model calls at every location of
`wsparse.nodes.LOCATIONS`, once for all layers of a scan, with a value of shape `(B, T, N)`. What it returns
is what later computation sees. Arrays that it closes over are differentiated and vmapped like any others.

A tap with a method `rescaled(location, scale)` also says what the norms of `wsparse.nodes.NORMS` multiply the
stream by, in place of `scale`, `(B, T, 1)`.

Two optional attributes make a tap cheaper and never change a result:

* `position_wise = True` promises that what happens at one token depends on the values at that token alone.
  Where only some positions are wanted, the last layer is then computed, and shown to the tap, at those.
* `fused(location, value, k)` returns `tap(location, abs_top_k(value, k))`; a tap that offers it is asked in
  place of the two, and may do them in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from wsparse.ops.top_k import ablate, ablate_largest, abs_top_k

Tap = Callable[["Location", jax.Array], jax.Array]


class Location(str):
    """The name of a location, without the layer: "attn.q"; what a tap gets beside the value.

    It equals and hashes like the plain string, so that a tap can look it up in dicts of arrays. `layer` is
    an int32 scalar, traced where layers are scanned, or None.
    """

    layer: jax.Array | int | None

    def __new__(cls, name: str, layer: jax.Array | int | None = None):
        location = super().__new__(cls, name)
        location.layer = layer
        return location


def identity(location: Location, value: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    del location
    return value


def after_top_k(tap: Tap | None, location: Location, value: jax.Array, k: int) -> jax.Array:
    """Returns `tap(location, abs_top_k(value, k))`, in the tap's fused form where it has one."""
    fused = getattr(tap, "fused", None)
    if fused is not None:
        return fused(location, value, k)
    value = abs_top_k(value, k)
    return value if tap is None else tap(location, value)


def rescaled(tap: Tap | None, location: Location, scale: jax.Array) -> jax.Array:
    """Returns the scale of a norm that the tap wants, by default the stream's own."""
    method = getattr(tap, "rescaled", None)
    return scale if method is None else method(location, scale)


def is_position_wise(tap: Tap | None) -> bool:
    """Returns whether the tap promises that tokens do not depend on each other."""
    return tap is None or getattr(tap, "position_wise", False)


@dataclasses.dataclass(frozen=True, eq=False)
class _Composition:
    taps: tuple[Tap, ...]

    @property
    def position_wise(self) -> bool:
        return all(is_position_wise(tap) for tap in self.taps)

    def __call__(self, location: Location, value: jax.Array) -> jax.Array:
        for tap in self.taps:
            value = tap(location, value)
        return value

    def fused(self, location: Location, value: jax.Array, k: int) -> jax.Array:
        first = self.taps[0] if self.taps else None
        return _Composition(self.taps[1:])(location, after_top_k(first, location, value, k))

    def rescaled(self, location: Location, scale: jax.Array) -> jax.Array:
        for tap in self.taps:
            scale = rescaled(tap, location, scale)
        return scale


def compose(*taps: Tap) -> Tap:
    """Returns the tap that applies `taps` from the first to the last."""
    return _Composition(taps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NodeAblation:
    """The tap of ablation, `gate * value + (1 - gate) * constant` (Gao et al. 2025, pruning); a pytree.

    Attributes:
      gates: Location -> `(n_layer, N)`, or `(n_layer, B, N)` with a set of gates for every row; locations
        without an entry are left alone. A gate between 0 and 1 ablates in part.
      constants: Location -> `(n_layer, N)` or `(n_layer, B, T, N)`, for at least the locations of `gates`.
      contenders: Location -> `(n_layer, N)`: nodes above 0 compete in AbsTopK among themselves alone; None
        lets all compete.
      scales: Norm -> `(n_layer, B, T, 1)`, `(B, P, 1)` for "final_norm": scales that norms are held at; None
        leaves them to the ablated stream.
    """

    gates: Mapping[str, jax.Array]
    constants: Mapping[str, jax.Array]
    contenders: Mapping[str, jax.Array] | None = None
    scales: Mapping[str, jax.Array] | None = None

    @property
    def position_wise(self) -> bool:
        return self.scales is None and all(array.ndim == 2 for array in self.constants.values())

    def __call__(self, location: Location, value: jax.Array) -> jax.Array:
        if location not in self.gates:
            return value
        gate = at_layer(self.gates[location], location, value)
        gate = gate[:, None] if gate.ndim == 2 else gate
        return ablate(value, gate, at_layer(self.constants[location], location, value))

    def fused(self, location: Location, value: jax.Array, k: int) -> jax.Array:
        if location not in self.gates:
            return abs_top_k(value, k)
        if self.contenders is not None:
            contends = at_layer(self.contenders[location], location) > 0
            among_all, among_some = abs_top_k(value, k), abs_top_k(jnp.where(contends, value, 0), k)
            return self(location, jnp.where(contends, among_some, among_all))
        gate, constant = (at_layer(array[location], location) for array in (self.gates, self.constants))
        if not (constant.size == value.shape[-1] and gate.dtype == constant.dtype == value.dtype):
            return self(location, abs_top_k(value, k))
        if gate.size == constant.size:
            return ablate_largest(value, jnp.ravel(gate), jnp.ravel(constant), k)
        ablate_row = functools.partial(ablate_largest, mean_N=jnp.ravel(constant), k=k)
        return jax.vmap(ablate_row)(value, gate)

    def rescaled(self, location: Location, scale: jax.Array) -> jax.Array:
        return scale if self.scales is None else at_layer(self.scales[location], location, scale)


def mask(gates: Mapping[str, jax.Array], means: Mapping[str, jax.Array]) -> NodeAblation:
    """Returns the tap of mean ablation, `NodeAblation(gates, means)`."""
    return NodeAblation(gates, means)


def patch(values: Mapping[str, jax.Array], where: Mapping[str, jax.Array]) -> Tap:
    """Returns the tap that replaces chosen nodes by given values, e.g. those of another prompt.

    Args:
      values: Location -> `(n_layer, B, T, N)`, as `acts` of a forward pass.
      where: Location -> bool `(n_layer, N)` or `(n_layer, B, T, N)`, true for the values to replace.
    """

    def tap(location, value):
        chosen = where.get(location)
        if chosen is None:
            return value
        replacement = at_layer(values[location], location)
        return jnp.where(at_layer(chosen, location), replacement, value)

    return tap


def at_layer(per_layer: jax.Array, location: Location, like: jax.Array | None = None) -> jax.Array:
    """Returns the slice of `(n_layer, ...)` for the location's layer; `(N,)` becomes `(1, 1, N)`.

    A location without a layer takes the array as it is. `like` gives the dtype.
    """
    # A traced index needs a jax array, and arrays read from files are NumPy's.
    value: Any = per_layer if location.layer is None else jnp.asarray(per_layer)[location.layer]
    if value.ndim == 1:
        value = value[None, None]
    return value if like is None else value.astype(like.dtype)
