"""Taps: functions that look at or change what happens at a location inside the model.

A tap is a function `(location, value) -> value` that the model calls at every location of
`wsparse.nodes.LOCATIONS`, once for all layers of a scan, with a value of shape `(B, T, N)`. What it returns
is what later computation sees. Arrays that it closes over are differentiated and vmapped like any others.

Two optional attributes make a tap cheaper and never change a result:

* `position_wise = True` promises that what happens at one token depends on the values at that token alone.
  Where only some positions are wanted, the last layer is then computed, and shown to the tap, at those.
* `fused(location, value, k)` returns `tap(location, abs_top_k(value, k))`; a tap that offers it is asked in
  place of the two, and may do them in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
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


def compose(*taps: Tap) -> Tap:
    """Returns the tap that applies `taps` from the first to the last."""
    return _Composition(taps)


@dataclasses.dataclass(frozen=True, eq=False)
class MeanAblation:
    """The tap of mean ablation, `gate * value + (1 - gate) * mean` (Gao et al. 2025, pruning).

    Attributes:
      gates: Location -> `(n_layer, N)`; locations without an entry are left alone.
      means: Location -> `(n_layer, N)`, for at least the locations of `gates`.
    """

    gates: Mapping[str, jax.Array]
    means: Mapping[str, jax.Array]
    position_wise = True

    def __call__(self, location: Location, value: jax.Array) -> jax.Array:
        if location not in self.gates:
            return value
        gate, mean = (at_layer(array[location], location, value) for array in (self.gates, self.means))
        return ablate(value, gate, mean)

    def fused(self, location: Location, value: jax.Array, k: int) -> jax.Array:
        if location not in self.gates:
            return abs_top_k(value, k)
        gate, mean = (at_layer(array[location], location) for array in (self.gates, self.means))
        vectors = gate.size == mean.size == value.shape[-1]
        if not vectors or not gate.dtype == mean.dtype == value.dtype:
            return self(location, abs_top_k(value, k))
        return ablate_largest(value, jnp.ravel(gate), jnp.ravel(mean), k)


def mask(gates: Mapping[str, jax.Array], means: Mapping[str, jax.Array]) -> MeanAblation:
    """Returns `MeanAblation(gates, means)`."""
    return MeanAblation(gates, means)


def patch(values: Mapping[str, jax.Array], where: Mapping[str, jax.Array]) -> Tap:
    """Returns the tap that replaces chosen nodes by given values, e.g. those of another prompt.

    Args:
      values: Location -> `(n_layer, B, T, N)`, as `acts` of a forward pass.
      where: Location -> bool `(n_layer, N)`, true for the nodes to replace.
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
