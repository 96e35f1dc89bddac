"""For notebooks: look at and change activations by name, ours or TransformerLens's.

    logits, cache = hooks.run_with_cache(params, tokens, config, names_filter=["3.attn.q"])
    logits, cache = hooks.run_with_taps(params, tokens, config, taps={"3.mlp.post_act": lambda x: 0 * x})

Both are `wsparse.model.forward` with a tap. A name is "3.attn.q" (layer 3), "attn.q" (all layers),
"final_resid", or TransformerLens's name of the same place, "blocks.3.attn.hook_q"; docs/hooks.md lists them
all. Under TransformerLens's names heads have an axis of their own, as they have there.

A tap is called with the value itself, outside of any compiled function, and may be new in every call. What is
compiled takes the values that taps returned as arguments, so that it depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from wsparse import model
from wsparse.config import ModelConfig
from wsparse.errors import MissingKeyError, UserError, closest
from wsparse.nodes import LOCATIONS, Node
from wsparse.taps import patch

NamesFilter = str | Sequence[str] | Callable[[str], bool]
# From a value to its replacement, of the same shape and dtype.
ValueTap = Callable[[jax.Array], jax.Array]

# Attention patterns are no location of the model, which may never hold one: they are computed from queries
# and keys, and a changed one makes what the heads give.
_PATTERN = "attn.pattern"
_ORDER: dict[str, float] = {name: i for i, name in enumerate(LOCATIONS)}
_ORDER[_PATTERN] = (_ORDER["attn.v"] + _ORDER["attn.y"]) / 2


class _Place(NamedTuple):
    """Where a name is: in all layers if `layer` is None; with an axis for heads if `split_heads`."""

    location: str
    layer: int | None
    split_heads: bool = False

    @property
    def recorded(self) -> tuple[str, ...]:
        """Locations of the model that it is read from."""
        return ("attn.q", "attn.k") if self.location == _PATTERN else (self.location,)


class Activations(Mapping[str, jax.Array]):
    """Activations of a forward pass by name; any spelling of a recorded place finds it.

    "3.attn.q" is `(B, T, H * K)`, "attn.q" `(L, B, T, H * K)`, "blocks.3.attn.hook_q" `(B, T, H, K)`, and
    "blocks.3.attn.hook_pattern" `(B, H, T, T)`. Iterating gives the names that were asked for.
    """

    def __init__(
        self,
        acts: Mapping[str, jax.Array],
        config: ModelConfig,
        names: Sequence[str],
        *,
        sink_LH: jax.Array | None = None,
        patterns: Mapping[int | None, jax.Array] | None = None,
        time: int | None = None,
    ):
        """Holds activations.

        Args:
          acts: By location, as `model.forward` gives them.
          names: What was asked for.
          sink_LH: Sinks of the model, for attention patterns.
          patterns: Patterns of layers where they were changed.
          time: Tokens to show of those in `acts`; None is all.
        """
        self._acts, self._config, self._names = dict(acts), config, tuple(names)
        self._sink_LH, self._patterns, self._time = sink_LH, patterns or {}, time

    def __getitem__(self, name: str) -> jax.Array:
        try:
            place = _resolve(name, self._config)
        except UserError as error:
            raise MissingKeyError(str(error)) from error
        if not self._holds(place):
            raise MissingKeyError(f"{name!r} was not recorded: add it to names_filter")
        if place.location == _PATTERN:
            pattern_BHTS = self._patterns.get(place.layer)
            if pattern_BHTS is None:
                pattern_BHTS = _attention(self._acts, self._sink_LH, place.layer, self._config)
            return pattern_BHTS[..., : self._time, : self._time]
        value = _at(self._acts, place.location, place.layer)[..., : self._time, :]
        return model.split_heads(value, self._config) if place.split_heads else value

    def first(self, time: int) -> Activations:
        """Returns the activations at the first tokens."""
        return Activations(
            self._acts, self._config, self._names, sink_LH=self._sink_LH, patterns=self._patterns, time=time
        )

    def _holds(self, place: _Place) -> bool:
        return all(location in self._acts for location in place.recorded)

    def __contains__(self, name: object) -> bool:
        try:
            return self._holds(_resolve(str(name), self._config))
        except UserError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        shown = self._names if len(self) <= 4 else (*self._names[:3], "...", self._names[-1])
        return f"Activations({len(self)} of {self._config.n_layer} layers: {', '.join(shown)})"


@functools.cache
def _places(config: ModelConfig) -> dict[str, _Place]:
    """Returns the place of every name of a layer: ours in the order of the forward pass, then the others."""
    ours, theirs = {}, {}
    for i in range(config.n_layer):
        for location, kind in LOCATIONS.items():
            if location != "final_resid":
                ours[f"{i}.{location}"] = _Place(location, i)
            if kind.hook:
                theirs[f"blocks.{i}.{kind.hook}"] = _Place(location, i, kind.channels == "heads")
        theirs[f"blocks.{i}.attn.hook_pattern"] = _Place(_PATTERN, i)
        # The stream after a block is what the next one finds there.
        last = i + 1 == config.n_layer
        post = _Place("final_resid", None) if last else _Place("attn.resid_in", i + 1)
        theirs[f"blocks.{i}.hook_resid_post"] = post
    return ours | {"final_resid": _Place("final_resid", None)} | theirs


def names(config: ModelConfig) -> tuple[str, ...]:
    """Returns all names of single layers: ours in the order of the forward pass, then TransformerLens's."""
    return tuple(_places(config))


def run_with_cache(
    params: model.Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    names_filter: NamesFilter | None = None,
) -> tuple[jax.Array, Activations]:
    """Returns logits, and the activations that `names_filter` selects.

    It is a name, several, or a predicate on `names(config)`; None is all of ours. Other values are not
    computed where nothing else needs them. Compiled once for a shape of the tokens and a set of locations,
    in whichever layers.

    Raises:
      UserError: A name is unknown (the nearest valid one is given), or the tokens are not `(B, T)`.
    """
    tokens_BT = _checked(tokens_BT)
    selected = _select(names_filter, config)
    locations = {location for name in selected for location in _resolve(name, config).recorded}
    logits_BTV, acts = _forward(params, tokens_BT, config=config, locations=frozenset(locations))
    return logits_BTV, Activations(acts, config, selected, sink_LH=model.sinks(params))


def run_with_taps(
    params: model.Params, tokens_BT: jax.Array, config: ModelConfig, *, taps: Mapping[str, ValueTap]
) -> tuple[jax.Array, Activations]:
    """Returns logits and activations of the model with activations changed, as they are after the taps.

    A tap is called once for each layer that it is in, in the order of the forward pass, with what the taps
    before it have made of the value. It is an ordinary function of arrays: it may differ from call to call,
    read what changes outside of it, and look at numbers. After each place that is changed the model is run
    again; that is compiled once for a shape of the tokens, whatever the taps are.

    Args:
      params: Model parameters.
      tokens_BT: Int tokens.
      config: Model config.
      taps: Name -> function from the value there to its replacement, of the same shape. Under a name of all
        layers it is applied in each. Several at one place are applied in the given order.

    Raises:
      UserError: As `run_with_cache`, or a function changes the shape.
    """
    tokens_BT, sink_LH = _checked(tokens_BT), model.sinks(params)
    at_places: dict[tuple[int | None, str], list[tuple[str, _Place]]] = {}
    for name in taps:
        place = _resolve(name, config)
        every = place.layer is None and place.location != "final_resid"
        for layer in range(config.n_layer) if every else (place.layer,):
            at_places.setdefault((layer, place.location), []).append((name, place))
    logits_BTV, acts = _forward(params, tokens_BT, config=config, locations=frozenset(LOCATIONS))
    patterns: dict[int | None, jax.Array] = {}
    # As `taps.patch` takes them: a row for each layer, and one for the end of the stream.
    rows = {name: () if name == "final_resid" else (config.n_layer,) for name in LOCATIONS}
    changed = {name: np.zeros((*shape, 1), bool) for name, shape in rows.items()}
    for layer, location in sorted(at_places, key=lambda at: _in_order(*at, config)):
        if location == _PATTERN:
            value = _attention(acts, sink_LH, layer, config)
        else:
            value = _at(acts, location, layer)
        for name, place in at_places[layer, location]:
            value = _apply(name, taps[name], place, config, value)
        if location == _PATTERN:
            patterns[layer] = value
            location, value = "attn.y", _attended(value, _at(acts, "attn.v", layer), config)
        acts[location] = value if layer is None else acts[location].at[layer].set(value)
        # New each time: the run before may still be reading what it was given.
        mask = changed[location].copy()
        mask[... if layer is None else layer] = True
        changed = {**changed, location: mask}
        logits_BTV, acts = _forward_with_taps(params, tokens_BT, acts, changed, config=config)
    return logits_BTV, Activations(acts, config, _select(None, config), sink_LH=sink_LH, patterns=patterns)


def _checked(tokens_BT) -> jax.Array:
    tokens_BT = jnp.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise UserError(
            f"tokens must be integers of shape (batch, time), got {tokens_BT.dtype} of shape "
            f"{tokens_BT.shape}"
        )
    return tokens_BT


def _in_order(layer: int | None, location: str, config: ModelConfig) -> tuple[int, float]:
    """Returns a key that sorts places in the order of the forward pass."""
    return config.n_layer if layer is None else layer, _ORDER[location]


@functools.partial(jax.jit, static_argnames=("config", "locations"))
def _forward(params, tokens_BT, *, config: ModelConfig, locations: frozenset[str]):
    logits_BTV, acts = model.forward(params, tokens_BT, config)
    return logits_BTV, {name: value for name, value in acts.items() if name in locations}


@functools.partial(jax.jit, static_argnames="config")
def _forward_with_taps(params, tokens_BT, acts, changed, *, config: ModelConfig):
    """Returns logits and activations where those of some layers and locations are given, see `taps.patch`."""
    return model.forward(params, tokens_BT, config, tap=patch(acts, changed))


def _at(acts: Mapping[str, jax.Array], location: str, layer: int | None) -> jax.Array:
    value = acts[location]
    # The layer is traced here too: an index that is not would be compiled for each.
    return value if layer is None else lax.dynamic_index_in_dim(value, layer, keepdims=False)


def _attention(acts, sink_LH, layer: int | None, config: ModelConfig) -> jax.Array:
    """Returns the attention pattern of a layer, `(B, H, T, T)`."""
    assert layer is not None
    return model.layer_attention(acts["attn.q"], acts["attn.k"], sink_LH, layer, config=config)


def _attended(pattern_BHTS: jax.Array, v_BSE: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns what heads give under a pattern, side by side: `(B, T, H * K)`."""
    v_BSHK = model.split_heads(v_BSE, config)
    y_BTHK = jnp.einsum("bhts,bshk->bthk", pattern_BHTS.astype(v_BSHK.dtype), v_BSHK)
    return jnp.reshape(y_BTHK, v_BSE.shape)


def set_node(name: str, config: ModelConfig, value: float = 0.0) -> dict[str, ValueTap]:
    """Returns taps for `run_with_taps` that set one node, such as "1.mlp.post_act.33", at every token.

    Nothing is compiled for a node: a loop over all nodes compiles as often as the first of them.
    """
    node = Node.parse(name, config)
    return {f"{node.layer}.{node.location}": functools.partial(_set_channel, node.channel, value)}


def _set_channel(channel, value, x):
    return x.at[..., channel].set(value)


def _apply(name: str, function: ValueTap, place: _Place, config: ModelConfig, value: jax.Array):
    argument = model.split_heads(value, config) if place.split_heads else value
    result = jnp.asarray(function(argument))
    if result.shape != argument.shape:
        raise UserError(
            f"the tap of {name!r} must return shape {argument.shape}, as it was given, got {result.shape}"
        )
    return jnp.reshape(result, value.shape).astype(value.dtype)


def _select(names_filter: NamesFilter | None, config: ModelConfig) -> tuple[str, ...]:
    if names_filter is None:
        return tuple(name for name in names(config) if not name.startswith("blocks."))
    if isinstance(names_filter, str):
        return (names_filter,)
    if callable(names_filter):
        return tuple(name for name in names(config) if names_filter(name))
    return tuple(names_filter)


def _resolve(name: str, config: ModelConfig) -> _Place:
    if name in LOCATIONS:
        return _Place(name, None)
    if place := _places(config).get(name):
        return place
    near = closest(name, (*names(config), *LOCATIONS))
    raise UserError(
        f"there is no activation {name!r} in a model of {config.n_layer} layers{near}; "
        "docs/hooks.md lists the names"
    )
