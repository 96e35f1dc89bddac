"""For notebooks: look at and change activations by name, ours or TransformerLens's.

    logits, cache = hooks.run_with_cache(params, tokens, config, names_filter=["3.attn.q"])
    logits, cache = hooks.run_with_taps(params, tokens, config, taps={"3.mlp.post_act": lambda x: 0 * x})

Both are `wsparse.model.forward` with a tap. A name is "3.attn.q" (layer 3), "attn.q" (all layers),
"final_resid", or TransformerLens's name of the same place, "blocks.3.attn.hook_q"; docs/hooks.md lists them
all. Under TransformerLens's names heads have an axis of their own, as they have there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from wsparse import model
from wsparse.config import ModelConfig
from wsparse.errors import UserError, closest
from wsparse.nodes import LOCATIONS, Node

NamesFilter = str | Sequence[str] | Callable[[str], bool]
# From a value to its replacement, of the same shape and dtype.
ValueTap = Callable[[jax.Array], jax.Array]


class _Place(NamedTuple):
    """Where a name is: in all layers if `layer` is None; with an axis for heads if `split_heads`."""

    location: str
    layer: int | None
    split_heads: bool = False


class Activations(Mapping[str, jax.Array]):
    """Activations of a forward pass by name; any spelling of a recorded place finds it.

    "3.attn.q" is `(B, T, H * K)`, "attn.q" `(L, B, T, H * K)`, "blocks.3.attn.hook_q" `(B, T, H, K)`.
    Iterating gives the names that were asked for.
    """

    def __init__(self, acts: Mapping[str, jax.Array], config: ModelConfig, names: Sequence[str]):
        self._acts, self._config, self._names = dict(acts), config, tuple(names)

    def __getitem__(self, name: str) -> jax.Array:
        place = _resolve(name, self._config)
        if place.location not in self._acts:
            raise UserError(f"{name!r} was not recorded: add it to names_filter")
        value = self._acts[place.location]
        if place.layer is not None:
            value = value[place.layer]
        return _split_heads(value, self._config) if place.split_heads else value

    def __contains__(self, name: object) -> bool:
        try:
            return _resolve(str(name), self._config).location in self._acts
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
    computed where nothing else needs them.

    Raises:
      UserError: A name is unknown (the nearest valid one is given), or the tokens are not `(B, T)`.
    """
    return _run(params, tokens_BT, config, {}, names_filter)


def run_with_taps(
    params: model.Params, tokens_BT: jax.Array, config: ModelConfig, *, taps: Mapping[str, ValueTap]
) -> tuple[jax.Array, Activations]:
    """Returns logits and activations of the model with activations changed, as they are after the taps.

    As under `jax.jit`, the same functions at the same names are compiled once. A new lambda is a new
    function; in a loop pass what varies through `set_node` or `jax.tree_util.Partial`, whose arguments
    are traced.

    Args:
      params: Model parameters.
      tokens_BT: Int tokens.
      config: Model config.
      taps: Name -> function from the value there to its replacement, of the same shape. Under a name of all
        layers it is applied in each. Several at one place are applied in the given order.

    Raises:
      UserError: As `run_with_cache`, or a function changes the shape.
    """
    return _run(params, tokens_BT, config, taps, None)


def _run(params, tokens_BT, config, taps, names_filter):
    tokens_BT = jnp.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise UserError(
            f"tokens must be integers of shape (batch, time), got {tokens_BT.dtype} of shape "
            f"{tokens_BT.shape}"
        )
    selected = _select(names_filter, config)
    locations = frozenset(_resolve(name, config).location for name in selected)
    for name in taps:
        _resolve(name, config)
    leaves, structure = jax.tree.flatten(tuple(taps.values()))
    functions = tuple(leaf if callable(leaf) else None for leaf in leaves)
    arrays = tuple(None if callable(leaf) else leaf for leaf in leaves)
    logits_BTV, acts = _forward_with_taps(
        params, tokens_BT, config, locations, tuple(taps), structure, functions, arrays
    )
    return logits_BTV, Activations(acts, config, selected)


@functools.partial(jax.jit, static_argnames=("config", "locations", "tap_names", "structure", "functions"))
def _forward_with_taps(params, tokens_BT, config, locations, tap_names, structure, functions, arrays):
    leaves = [a if f is None else f for f, a in zip(functions, arrays, strict=True)]
    value_taps = dict(zip(tap_names, jax.tree.unflatten(structure, leaves), strict=True))

    def tap(location, value):
        for name, function in value_taps.items():
            place = _resolve(name, config)
            if place.location == location:
                change = functools.partial(_apply, name, function, place, config)
                if place.layer is None:
                    value = change(value)
                else:
                    value = lax.cond(location.layer == place.layer, change, lambda x: x, value)
        return value

    logits_BTV, acts = model.forward(params, tokens_BT, config, tap=tap if tap_names else None)
    return logits_BTV, {name: value for name, value in acts.items() if name in locations}


def set_node(name: str, config: ModelConfig, value: float = 0.0) -> dict[str, ValueTap]:
    """Returns taps for `run_with_taps` that set one node, such as "1.mlp.post_act.33", at every token.

    Channel and value are traced: a loop over the nodes of a layer's location compiles once.
    """
    node = Node.parse(name, config)
    set_channel = jax.tree_util.Partial(_set_channel, node.channel, value)
    return {f"{node.layer}.{node.location}": set_channel}


def _set_channel(channel, value, x):
    return x.at[..., channel].set(value)


def _apply(name: str, function: ValueTap, place: _Place, config: ModelConfig, value: jax.Array):
    argument = _split_heads(value, config) if place.split_heads else value
    result = jnp.asarray(function(argument))
    if result.shape != argument.shape:
        raise UserError(
            f"the tap of {name!r} must return shape {argument.shape}, as it was given, got {result.shape}"
        )
    return jnp.reshape(result, value.shape).astype(value.dtype)


def _split_heads(value: jax.Array, config: ModelConfig) -> jax.Array:
    return jnp.reshape(value, (*value.shape[:-1], config.n_head, config.d_head))


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
    block, _, hook = name.rpartition(".attn.hook_pattern")
    if block and not hook:
        q, k = (f"cache['{block}.attn.hook_{letter}']" for letter in "qk")
        raise UserError(
            f"{name!r} is not recorded; it is model.attention_pattern({q}, {k}, sink), with sink the "
            "layer's params['blocks']['attn']['sink'], or None in a model without sinks"
        )
    near = closest(name, (*names(config), *LOCATIONS))
    raise UserError(
        f"there is no activation {name!r} in a model of {config.n_layer} layers{near}; "
        "docs/hooks.md lists the names"
    )
