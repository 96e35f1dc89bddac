"""The files behind the published circuits of Gao et al. 2025: `viz_data.pt`, and mean activations.

`viz/MODEL/TASK/SWEEP/K/viz_data.pt` holds one circuit. What its entries mean is known from the published
viewer alone. Every loss is a sum over a pair's two prompts, twice the mean that is used here, but for those
of layers, which the viewer does not halve. Class 1 is the first half of the prompts, class 2 the second, and
prompt i of one is the partner of prompt i of the other. Prompts are padded on the right with token 0. Besides
our node locations, the channels of "final_resid" are nodes: the published number of a model's nodes is
reached with them alone.

Shapes: B rows, T time, N nodes of a location.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import os
from typing import Any

import numpy as np

from wsparse.config import ModelConfig
from wsparse.errors import UserError, located, quoted
from wsparse.interop import torch_file
from wsparse.nodes import CONNECTIONS, NODES

FILE = "viz_data.pt"
MEANS_FILE = "mean_baseline_pretrain.pt"
FINAL = "final_resid"

# Sizes of the model that a file repeats; they have our names.
_SIZES = ("n_layer", "d_model", "n_head", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights between the kept nodes of two locations of a layer, as a file has them.

    `values` is `(sources, targets)`, with a last row of biases where `has_bias`.
    """

    source: str
    target: str
    layer: int
    sources: list[int]
    targets: list[int]
    has_bias: bool
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class VizData:
    """One published circuit. Losses are means over prompts, in nats.

    Attributes:
      kept: Location with its layer, "3.attn.q", or "final_resid" -> channels of the nodes.
      tokens_BT: Prompts, of class 1 and then of class 2, padded on the right.
      length_B: Number of tokens of each prompt.
      loss: Loss of the model.
      circuit_loss: Loss of the circuit.
      node_losses: Location -> loss of the circuit without each of its nodes there.
      layer_losses: "3.attn" -> loss of the circuit without its nodes there.
      activations: Location -> channel -> `(B, T)` values in the circuit.
      weights: Weights between kept nodes.
      search_loss: The last loss of the search that found the circuit; None where there is none.
      n_nodes: Number of nodes of the model; None where it is not told.
      prune_config: Settings of the search that JSON can hold.
    """

    kept: dict[str, np.ndarray]
    tokens_BT: np.ndarray
    length_B: np.ndarray
    loss: float
    circuit_loss: float
    node_losses: dict[str, np.ndarray]
    layer_losses: dict[str, float]
    activations: dict[str, dict[int, np.ndarray]]
    weights: list[Weights]
    search_loss: float | None
    n_nodes: int | None
    prune_config: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of its nodes."""
        return sum(channels.size for channels in self.kept.values())


def location_widths(config: ModelConfig) -> dict[str, int]:
    """Returns the number of channels at every published location of a model, by name with the layer."""
    widths = {
        f"{layer}.{name}": kind.width(config)
        for layer in range(config.n_layer)
        for name, kind in NODES.items()
    }
    return widths | {FINAL: config.d_model}


def read(path: str | os.PathLike[str], config: ModelConfig) -> VizData:
    """Reads a `viz_data.pt` of a model; PyTorch is not needed.

    Raises:
      UserError: The file is damaged, has not this layout, or is of another model.
    """
    tree = torch_file.read_tree(path)
    with located(f"{path}: "):
        return _parsed(_typed(tree, dict, "the file"), config)


def read_means(path: str | os.PathLike[str], config: ModelConfig) -> dict[str, np.ndarray]:
    """Reads mean activations: location with its layer -> float32 `(N,)`, for all of `location_widths`.

    "attn.y" is among them where the file has it.

    Raises:
      UserError: The file is damaged, lacks a location but for "final_resid", or is of another model.
    """
    tree, means = torch_file.read(path), {}
    widths = location_widths(config)
    more = {f"{layer}.attn.y": config.attention_width for layer in range(config.n_layer)}
    for name, width in (widths | more).items():
        if name not in tree:
            if name in widths and name != FINAL:
                raise UserError(f"{path}: it has no mean of {name}")
            continue
        mean = np.asarray(tree[name], np.float32)
        if mean.size != width or not np.all(np.isfinite(mean)):
            raise UserError(f"{path}: the mean of {name} must be {width} numbers, it has {mean.shape}")
        means[name] = mean.reshape(width)
    return means


def _parsed(tree: dict[Any, Any], config: ModelConfig) -> VizData:
    importances = _entry(tree, "importances", dict)
    _check_model(_entry(importances, "beeg_model_config", dict), config)
    kept = _kept(_entry(tree, "circuit_data", dict), location_widths(config))
    samples = _sequence(_entry(importances, "task_samples", (tuple, list)), 2, "task_samples")
    tokens_BT, length_B = _prompts(samples[0], config)
    sums = _entry(importances, "ch_interv_losses", dict)
    curve = tree.get("all_loss")
    curve = [] if curve is None else _typed(curve, list, "all_loss")
    n_nodes, settings = tree.get("num_total_nodes"), tree.get("prune_config")
    return VizData(
        kept=kept,
        tokens_BT=tokens_BT,
        length_B=length_B,
        loss=_number(importances.get("loss"), "loss") / 2,
        circuit_loss=_number(importances.get("interv_loss"), "interv_loss") / 2,
        node_losses={
            name: _numbers(sums[name], channels.size, f"ch_interv_losses of {name}") / 2
            for name, channels in kept.items()
            if name in sums
        },
        layer_losses=_layer_losses(_entry(importances, "layer_interv_losses", dict), config),
        activations=_activations(_typed(samples[1], dict, "activations"), kept, tokens_BT.shape),
        weights=_weights(_entry(importances, "pair_data_connections", list), kept),
        search_loss=_number(_sequence(curve[-1], 2, "all_loss")[1], "all_loss") / 2 if curve else None,
        n_nodes=n_nodes if type(n_nodes) is int else None,
        prune_config=_settings(settings) if type(settings) is dict else {},
    )


def _settings(values: dict[Any, Any]) -> dict[str, Any]:
    """Returns what JSON can hold: numbers, texts, None, and lists of these."""
    settings = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
        parts = value if type(value) in (list, tuple) else [value]
        if type(name) is str and all(map(_in_json, parts)):
            settings[name] = value
    return settings


def _in_json(value: Any) -> bool:
    return value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value))


def _check_model(fields: dict[Any, Any], config: ModelConfig) -> None:
    for name in _SIZES:
        own, value = getattr(config, name), fields.get(name)
        if name in fields and not (type(value) is int and value == own):
            shown = value if type(value) is int else type(value).__name__
            raise UserError(
                f"it is of a model with {name} {shown}, the run's has {own}: give the run of the model that "
                "the circuit was found in"
            )


def _kept(circuit_data: dict[Any, Any], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    kept = {}
    for name, channels in circuit_data.items():
        if name == "prune_config":
            continue
        if name not in widths:
            shown = quoted(name) if type(name) is str else name
            raise UserError(f"circuit_data has a location that the model has not: {shown}")
        channels = _array(channels, f"circuit_data of {name}")
        if channels.ndim != 1 or (channels.size and channels.dtype.kind not in "iu"):
            raise UserError(f"circuit_data of {name} must be a list of channels")
        channels = channels.astype(np.int64)
        if len(set(channels.tolist())) < channels.size or np.any((channels < 0) | (channels >= widths[name])):
            raise UserError(f"circuit_data of {name} must be different channels of {widths[name]}")
        kept[name] = channels
    return kept


def _prompts(tokens: Any, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = _array(tokens, "task_samples")
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in "iu" or not len(tokens_BT) or len(tokens_BT) % 2:
        raise UserError("task_samples must be an even number of rows of tokens")
    if np.any((tokens_BT < 0) | (tokens_BT >= config.vocab_size)):
        raise UserError(f"task_samples has a token that is not one of the model's {config.vocab_size}")
    tokens_BT = tokens_BT.astype(np.int32)
    present_BT = tokens_BT != 0
    length_B = np.where(present_BT.any(1), tokens_BT.shape[1] - np.argmax(present_BT[:, ::-1], axis=1), 0)
    if not length_B.min() or length_B.max() > config.context:
        raise UserError(f"task_samples must have prompts of 1 to {config.context} tokens")
    return tokens_BT[:, : length_B.max()], length_B.astype(np.int32)


def _layer_losses(losses: dict[Any, Any], config: ModelConfig) -> dict[str, float]:
    names = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("attn", "mlp")]
    return {name: _number(losses[name], f"layer_interv_losses of {name}") for name in names if name in losses}


def _activations(
    tree: dict[Any, Any], kept: Mapping[str, np.ndarray], shape: tuple[int, ...]
) -> dict[str, dict[int, np.ndarray]]:
    activations: dict[str, dict[int, np.ndarray]] = {}
    for name, channels in kept.items():
        of_location = _typed(tree.get(name, {}), dict, f"activations of {name}")
        for channel in channels.tolist():
            if channel not in of_location:
                continue
            values = _array(of_location[channel], f"activations of {name}.{channel}")
            if values.ndim != 2 or len(values) != shape[0] or values.shape[1] < shape[1]:
                raise UserError(f"activations of {name}.{channel} must be of shape {shape}")
            activations.setdefault(name, {})[channel] = values[:, : shape[1]].astype(np.float32)
    return activations


def _weights(entries: list[Any], kept: Mapping[str, np.ndarray]) -> list[Weights]:
    pairs = {(c.source, c.target) for c in CONNECTIONS}
    weights = []
    if len(entries) > len(kept) * len(pairs):
        raise UserError("pair_data_connections has more entries than there are pairs of locations")
    for entry in entries:
        values, sources, targets, places = _sequence(entry, 4, "pair_data_connections")
        ends = [str(_typed(place, str, "a location")).partition(".") for place in _sequence(places, 2, "")]
        (layer, _, source), (same_layer, _, target) = ends
        if (source, target) not in pairs or layer != same_layer or not layer.isdecimal():
            continue
        names = [list(_typed(part, list, "pair_data_connections")) for part in (sources, targets)]
        has_bias = bool(names[0]) and type(names[0][-1]) is str and names[0][-1] == "bias"
        names[0] = names[0][:-1] if has_bias else names[0]
        for location, channels in zip((source, target), names, strict=True):
            known = set(kept.get(f"{layer}.{location}", np.zeros(0, int)).tolist())
            if not all(type(channel) is int and channel in known for channel in channels):
                raise UserError(f"pair_data_connections has a channel of {layer}.{location} that is not kept")
        values = _array(values, "pair_data_connections")
        if not values.size:
            continue
        if values.shape != (shape := (len(names[0]) + has_bias, len(names[1]))):
            raise UserError(
                f"pair_data_connections of {layer}.{source} must be of shape {shape}, is {values.shape}"
            )
        of_place = (source, target, int(layer), names[0], names[1])
        weights.append(Weights(*of_place, has_bias, values.astype(np.float32)))
    return weights


def _entry(tree: dict[Any, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in tree:
        raise UserError(f"it lacks {name!r}, which published circuits have")
    return _typed(tree[name], kind, name)


def _typed(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise UserError(f"{what} must be a {kinds[0].__name__}, got a {type(value).__name__}")
    return value


def _sequence(value: Any, length: int, what: str) -> Any:
    if len(_typed(value, (tuple, list), what)) != length:
        raise UserError(f"{what} must have {length} parts, it has {len(value)}")
    return value


def _array(value: Any, what: str) -> np.ndarray:
    return _typed(value, np.ndarray, what)


def _number(value: Any, what: str) -> float:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if type(value) is not float and not (type(value) is int and abs(value) < 2**53):
        raise UserError(f"{what} must be a number, got a {type(value).__name__}")
    if not math.isfinite(value):
        raise UserError(f"{what} must be a number, got {value}")
    return float(value)


def _numbers(values: Any, length: int, what: str) -> np.ndarray:
    values = values.ravel().tolist() if isinstance(values, np.ndarray) else values
    numbers = [_number(value, what) for value in _typed(values, list, what)]
    if len(numbers) != length:
        raise UserError(f"{what} must be {length} numbers, it has {len(numbers)}")
    return np.array(numbers, np.float64)
