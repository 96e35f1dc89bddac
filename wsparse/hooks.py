"""For notebooks: look at and change activations by name, ours or TransformerLens's.

    logits, cache = hooks.run_with_cache(params, tokens, config, names_filter=["3.attn.q"])
    logits, cache = hooks.run_with_taps(params, tokens, config, taps={"3.mlp.post_act": lambda x: 0 * x})

Both are `wsparse.model.forward` with a tap. A name is "3.attn.q" (layer 3), "attn.q" (all layers),
"final_resid", or what TransformerLens calls the same place, "blocks.3.attn.hook_q"; docs/hooks.md has them
all, and `python -m wsparse.hooks` prints that table. Under TransformerLens's names heads have an axis of
their own, as they have there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from wsparse import model, nodes
from wsparse.config import ModelConfig
from wsparse.errors import UserError, closest

NamesFilter = str | Sequence[str] | Callable[[str], bool]
# What a tap makes of a value; shape and dtype stay.
ValueTap = Callable[[jax.Array], jax.Array]

_FINAL = "final_resid"
_LAYERED = (*nodes.NODES, *(name for name in nodes.OTHER_LOCATIONS if name != _FINAL))


class _Equivalent(NamedTuple):
    """A place of TransformerLens's, after "blocks.{i}.", ours, and what follows (B, T) in its shape there."""

    hook: str
    location: str
    shape: str = "D"
    note: str = ""


_HEADS = "H, K"
_RESID_POST = "hook_resid_post"
_EQUIVALENTS = (
    _Equivalent("hook_resid_pre", "attn.resid_in"),
    _Equivalent("ln1.hook_normalized", "attn.act_in", "R", "what attention reads: with the gain"),
    _Equivalent("attn.hook_q", "attn.q", _HEADS),
    _Equivalent("attn.hook_k", "attn.k", _HEADS),
    _Equivalent("attn.hook_v", "attn.v", _HEADS),
    _Equivalent("attn.hook_z", "attn.y", _HEADS),
    _Equivalent("hook_attn_out", "attn.resid_delta"),
    _Equivalent("hook_resid_mid", "mlp.resid_mid"),
    _Equivalent("ln2.hook_normalized", "mlp.act_in", "R", "what the MLP reads: with the gain"),
    _Equivalent("mlp.hook_post", "mlp.post_act", "F"),
    _Equivalent("hook_mlp_out", "mlp.resid_delta"),
)
_BY_HOOK = {each.hook: each for each in _EQUIVALENTS}


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a name means: a location, one layer of it or all (None), heads apart or side by side."""

    location: str
    layer: int | None
    heads: bool = False


class Activations(Mapping[str, jax.Array]):
    """What a forward pass computed, by name; every spelling of a recorded place finds it.

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
        return _split_heads(value, self._config) if place.heads else value

    def __contains__(self, name: object) -> bool:
        try:
            return _resolve(str(name), self._config).location in self._acts
        except UserError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def names(config: ModelConfig) -> tuple[str, ...]:
    """Every name of one layer's place: ours in the order of the forward pass, then TransformerLens's."""
    layers = range(config.n_layer)
    ours = [f"{i}.{location}" for i in layers for location in _LAYERED]
    hooks = [*_BY_HOOK, _RESID_POST]
    return (*ours, _FINAL, *(f"blocks.{i}.{hook}" for i in layers for hook in hooks))


def run_with_cache(
    params: model.Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    names_filter: NamesFilter | None = None,
) -> tuple[jax.Array, Activations]:
    """Run the model and keep activations.

    Args:
      params: the model's parameters.
      tokens_BT: int tokens.
      config: the model's config.
      names_filter: a name, several, or a predicate on `names(config)`; None is all of ours. What is not
        asked for is not computed where nothing else needs it.

    Returns:
      `(logits_BTV, activations)`.

    Raises:
      UserError: a name is unknown (the nearest valid one is given), or the tokens are not `(B, T)`.
    """
    wanted = _wanted(names_filter, config)
    locations = frozenset(_resolve(name, config).location for name in wanted)
    logits_BTV, acts = _forward(params, _checked(tokens_BT), config, locations)
    return logits_BTV, Activations(acts, config, wanted)


@functools.partial(jax.jit, static_argnames=("config", "locations"))
def _forward(params, tokens_BT, config, locations):
    logits_BTV, acts = model.forward(params, tokens_BT, config)
    return logits_BTV, {name: value for name, value in acts.items() if name in locations}


def run_with_taps(
    params: model.Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    *,
    taps: Mapping[str, ValueTap],
) -> tuple[jax.Array, Activations]:
    """Run the model with activations changed.

    Args:
      params: the model's parameters.
      tokens_BT: int tokens.
      config: the model's config.
      taps: name -> function from the value there to what is to replace it, of the same shape. Under a
        name of all layers it is applied in each. Several at one place are applied in the given order.

    Returns:
      `(logits_BTV, activations)`, the activations as they are after the taps.

    Raises:
      UserError: as `run_with_cache`; a function changes the shape.
    """
    places = [(name, _resolve(name, config), function) for name, function in taps.items()]

    def tap(location, value):
        for name, place, function in places:
            if place.location == location:
                changed = functools.partial(_apply, name, function, place, config)
                if place.layer is None:
                    value = changed(value)
                else:
                    value = lax.cond(location.layer == place.layer, changed, lambda x: x, value)
        return value

    run = jax.jit(lambda params, tokens_BT: model.forward(params, tokens_BT, config, tap=tap))
    logits_BTV, acts = run(params, _checked(tokens_BT))
    return logits_BTV, Activations(acts, config, _wanted(None, config))


def _apply(name: str, function: ValueTap, place: _Place, config: ModelConfig, value: jax.Array):
    given = _split_heads(value, config) if place.heads else value
    result = jnp.asarray(function(given))
    if result.shape != given.shape:
        raise UserError(
            f"the tap of {name!r} must return shape {given.shape} as it is given, got {result.shape}"
        )
    return jnp.reshape(result, value.shape).astype(value.dtype)


def _split_heads(value: jax.Array, config: ModelConfig) -> jax.Array:
    return jnp.reshape(value, (*value.shape[:-1], config.n_head, config.d_head))


def _checked(tokens_BT: Any) -> jax.Array:
    tokens_BT = jnp.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise UserError(
            f"tokens must be integers of shape (batch, time), got {tokens_BT.dtype} of shape "
            f"{tokens_BT.shape}"
        )
    return tokens_BT


def _wanted(names_filter: NamesFilter | None, config: ModelConfig) -> tuple[str, ...]:
    if names_filter is None:
        return tuple(name for name in names(config) if not name.startswith("blocks."))
    if isinstance(names_filter, str):
        return (names_filter,)
    if callable(names_filter):
        return tuple(name for name in names(config) if names_filter(name))
    return tuple(names_filter)


def _resolve(name: str, config: ModelConfig) -> _Place:
    if name in _LAYERED or name == _FINAL:
        return _Place(name, None)
    known = name in names(config)
    if known and name.startswith("blocks."):
        _, number, hook = name.split(".", 2)
        layer = int(number)
        if hook == _RESID_POST:
            # What a block leaves in the stream is what the next one finds there.
            last = layer + 1 == config.n_layer
            return _Place(_FINAL, None) if last else _Place("attn.resid_in", layer + 1)
        equivalent = _BY_HOOK[hook]
        return _Place(equivalent.location, layer, equivalent.shape == _HEADS)
    if known:
        number, location = name.split(".", 1)
        return _Place(location, int(number))
    near = closest(name, (*names(config), *_LAYERED))
    raise UserError(
        f"there is no activation {name!r} in a model of {config.n_layer} layers{near}; "
        "docs/hooks.md lists the names"
    )


def table() -> str:
    """The names side by side, in Markdown."""
    rows = [(f"{{i}}.{e.location}", e.hook, e.shape, e.note) for e in _EQUIVALENTS]
    rows.append(("{i+1}.attn.resid_in", _RESID_POST, "D", "`final_resid` for the last layer"))
    lines = ["| wsparse | TransformerLens | shape there | |", "|---|---|---|---|"]
    lines += [f"| `{o}` | `blocks.{{i}}.{h}` | (B, T, {s}) | {n} |" for o, h, s, n in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
