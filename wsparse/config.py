"""Typed configs: frozen dataclasses, checked before anything is computed.

Recipes (`configs/*.py`) return an `ml_collections.ConfigDict`; `from_dict` turns it into the dataclasses
below, refuses unknown keys with the nearest valid name, and checks every value. `to_dict` is the inverse,
and its result is what `config.json` stores. `describe` lists the fields with their help text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import fractions
import functools
import json
import math
import re
import types
import typing
from typing import Any, Literal, TypeVar

import ml_collections

from wsparse.errors import UserError, closest, quoted

T = TypeVar("T")

# The AbsTopK locations, in the order of the forward pass.
ABS_TOP_K_SITES = (
    *("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "resid_post_attn"),
    *("mlp_in", "mlp_neuron", "mlp_out", "resid_post_mlp"),
)
NODE_SITES = tuple(site for site in ABS_TOP_K_SITES if not site.startswith("resid"))

# What a setting "must be".
_RULES: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "positive": lambda value: value > 0,
    "positive and finite": lambda value: 0 < value < math.inf,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def setting(default: Any, text: str, rule: str = "") -> Any:
    """Returns a dataclass field with a help text and what its value must be, see `describe` and `check`."""
    return dataclasses.field(default=default, metadata={"help": text, "rule": rule})


def check(config: Any, where: str = "") -> None:
    """Raises a UserError for a field that breaks its rule; `where` is a prefix of the name in the message."""
    for field in dataclasses.fields(config):
        rule, value = field.metadata.get("rule"), getattr(config, field.name)
        if rule and value is not None:
            require(_RULES[rule](value), f"{where}{field.name} must be {rule}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-2 style pre-norm decoder: the variants of Gao et al. 2025 and of the published checkpoints."""

    vocab_size: int = setting(2048, "Number of tokens V.", "at least 1")
    context: int = setting(256, "Longest sequence T the model accepts.", "at least 1")
    n_layer: int = setting(8, "Number of blocks L.", "at least 1")
    d_model: int = setting(256, "Width D of the residual stream.", "at least 1")
    n_head: int = setting(16, "Attention heads H; `n_head * d_head` may differ from `d_model`.", "at least 1")
    d_head: int = setting(16, "Width K of one head.", "at least 1")
    d_mlp: int | None = setting(None, "MLP neurons F; None means `4 * d_model`.", "at least 1")
    norm: Literal["rms", "layer"] = setting("rms", '"rms" (gain only, no mean subtraction) or "layer".')
    norm_bias: bool = setting(True, 'A bias in layer norms (ignored by "rms").')
    norm_eps: float | None = setting(
        None, 'None means float32 machine epsilon for "rms" and 1e-5 for "layer".', "in (0, 1)"
    )
    bias: bool = setting(True, "Biases in the linear layers (never on the unembedding).")
    activation: Literal["gelu", "relu"] = setting("gelu", 'MLP nonlinearity, exact (erf) "gelu" or "relu".')
    residual_activation: Literal["identity", "relu"] = setting(
        "identity", "Applied to the residual stream after each add."
    )
    tied_embeddings: bool = setting(False, "The unembedding is the token embedding transposed.")
    position: Literal["none", "added", "concat", "concat_sinusoid"] = setting(
        "none",
        '"none"; "added" (learned, absolute); "concat" (learned) or "concat_sinusoid" (fixed): a read-only '
        "table of width `d_pos` that each block norms with its own gain and concatenates to the normed "
        "residual before the q, k, v and fc projections.",
    )
    d_pos: int = setting(
        0, 'Width of the concatenated position table; 0 unless `position` is a "concat" one.'
    )
    bigram: Literal["learned", "frozen", "none"] = setting(
        "learned", '"learned" or "frozen" V x V table whose row of the current token is added to the logits.'
    )
    sink: bool = setting(True, "One learned logit per head that joins the softmax denominator only.")
    logits_bias: bool = setting(False, "A bias added to the logits, as some published checkpoints have.")
    abs_top_k_fraction: float | None = setting(
        0.25, "Fraction of each AbsTopK site's channels kept per token; None is off.", "in (0, 1]"
    )
    abs_top_k_sites: tuple[str, ...] = setting(NODE_SITES, "Where AbsTopK acts, names of `ABS_TOP_K_SITES`.")
    compute_dtype: Literal["float32", "bfloat16", "float64"] = setting(
        "float32", "Dtype of activations; parameters stay float32 and logits are at least float32."
    )
    remat: bool = setting(
        False, "Recompute each block in the backward pass instead of storing its activations."
    )

    def __post_init__(self):
        check(self, "model.")
        if self.concatenates_positions:
            fits, rule = self.d_pos >= 1, "at least 1"
        else:
            fits, rule = self.d_pos == 0, "0"
        require(fits, f"model.d_pos must be {rule} with position={self.position!r}", self.d_pos)
        fraction = self.abs_top_k_fraction
        for site in self.abs_top_k_sites:
            if site not in ABS_TOP_K_SITES:
                raise UserError(
                    f"model.abs_top_k_sites: unknown site {site!r}{closest(site, ABS_TOP_K_SITES)}; "
                    f"sites are {', '.join(ABS_TOP_K_SITES)}"
                )
            if fraction is not None and int(fraction * self.site_width(site)) < 1:
                raise UserError(
                    f"model.abs_top_k_fraction={fraction} keeps no channel of the {self.site_width(site)} at "
                    f"{site!r}: use a larger fraction or remove the site"
                )

    @property
    def concatenates_positions(self) -> bool:
        return self.position in ("concat", "concat_sinusoid")

    @property
    def mlp_width(self) -> int:
        """Number of MLP neurons F."""
        return self.d_mlp if self.d_mlp is not None else 4 * self.d_model

    @property
    def attention_width(self) -> int:
        """Channels of all heads side by side, `n_head * d_head`."""
        return self.n_head * self.d_head

    @property
    def read_width(self) -> int:
        """Channels that q, k, v and fc read: the residual's and the concatenated positions'."""
        return self.d_model + self.d_pos

    @property
    def eps(self) -> float:
        """The norms' epsilon with its default filled in."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 2.0**-23 if self.norm == "rms" else 1e-5

    def site_width(self, site: str) -> int:
        """Number of channels at an AbsTopK site."""
        if site in ("attn_in", "mlp_in"):
            return self.read_width
        if site in ("attn_q", "attn_k", "attn_v"):
            return self.attention_width
        return self.mlp_width if site == "mlp_neuron" else self.d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """How many weights survive, and when."""

    density: float = setting(
        1 / 64,
        "Final fraction of nonzeros of every projected matrix, in (0, 1]; 1 trains densely.",
        "in (0, 1]",
    )
    min_per_neuron: int = setting(
        4, "Nonzeros that every MLP neuron and attention channel keeps in each of its matrices.", "at least 0"
    )
    anneal_start: float = setting(0.0, "Fraction of training at which the density starts to fall from 1.")
    anneal_end: float = setting(0.5, "Fraction of training at which it reaches `density`.")
    anneal: Literal["linear", "exponential"] = setting(
        "linear", '"linear" in the density or "exponential" (linear in its logarithm).'
    )
    overrides: str = setting(
        "",
        "Final densities of parameters that have their own, 'embed/tokens=1/128,blocks/mlp/.*/kernel=0.01': "
        "regular expressions of whole parameter paths, of which the first that matches decides.",
    )
    explore_every: int = setting(
        1,
        "Steps from one exploration step, in which weights can enter, to the next, once the density is below "
        "1/16 or final; in between only weights that are not zero are trained. 1 explores in every step.",
        "at least 1",
    )

    def __post_init__(self):
        check(self, "sparsity.")
        require(
            0 <= self.anneal_start < self.anneal_end <= 1,
            "sparsity: 0 <= anneal_start < anneal_end <= 1 must hold",
            (self.anneal_start, self.anneal_end),
        )
        for pattern, density in self.targets:
            require(0 < density <= 1, f"sparsity.overrides: {pattern} must be in (0, 1]", density)

    @property
    def targets(self) -> tuple[tuple[str, float], ...]:
        """The overrides as pairs of a regular expression and a final density."""
        return tuple(_override(item) for item in self.overrides.split(",") if item.strip())

    @property
    def sparse(self) -> bool:
        """Whether any weight is removed."""
        return self.density < 1 or any(density < 1 for _, density in self.targets)


def _override(item: str) -> tuple[str, float]:
    pattern, _, number = (part.strip() for part in item.rpartition("="))
    try:
        return re.compile(pattern).pattern, float(fractions.Fraction(number))
    except (re.error, ValueError, ArithmeticError):
        rule = "sparsity.overrides must be PATH=DENSITY,..., such as 'embed/tokens=1/128'"
        raise UserError(f"{rule}, got {_shown(item)}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in Gao et al. 2025, appendix on training."""

    learning_rate: float = setting(2e-3, "Peak before the sharkfin factor.", "positive")
    warmup: float = setting(0.01, "Fraction of training spent in linear warmup.", "in [0, 1)")
    sharkfin: bool = setting(True, "Multiply the learning rate by `1/sqrt(density)`.")
    b1: float = setting(0.9, "Decay of Adam's first moment.", "in [0, 1)")
    b2: float = setting(0.95, "Decay of Adam's second moment.", "in [0, 1)")
    eps: float = setting(0.1, "Adam's epsilon; large, because gradients are normalized first.", "positive")
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices and embeddings.", "at least 0")
    gradient_rms: Literal["normalize", "clip", "none"] = setting(
        "normalize",
        '"normalize" scales the gradient so that its root-mean-square over all parameters is 1, "clip" only '
        'when it is above 1, "none" leaves it.',
    )

    def __post_init__(self):
        check(self, "optimizer.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from."""

    source: str = setting(
        "idioms",
        'A source or a weighted mix of them, e.g. "0.7*idioms+0.3*stdlib" (`wsparse.data.sources`).',
    )
    domain: Literal["python", "stories"] = setting(
        "python", 'What the text is, which says which tasks `--task=all` stands for: "python" or "stories".'
    )
    megabytes: float = setting(
        16.0,
        "Text taken from all sources together, in units of 10^6 bytes, before the split; a source that holds "
        "less than its part of the mix gives all it has.",
        "positive",
    )
    tokenizer: str = setting("", 'Path of a `tokenizer.json` to use; "" trains one on the training text.')
    validation_fraction: float = setting(
        0.02, "Fraction of documents held out, chosen by the hash of their content.", "in (0, 1)"
    )
    seed: int = setting(0, "Seed of generated documents and of the order of training windows.")
    threads: int = setting(2, "Threads that read batches ahead.", "at least 1")
    prefetch: int = setting(8, "Batches read ahead.", "at least 1")

    def __post_init__(self):
        check(self, "data.")
        require(bool(self.source.strip()), "data.source must name a source", self.source)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh's axes; at most one may be -1, which means all remaining devices."""

    data: int = setting(-1, "Batch parallelism, parameters replicated.")
    fsdp: int = setting(1, "Batch parallelism, parameters and optimizer state sharded.")
    tensor: int = setting(1, "Heads, neurons and vocabulary sharded.")

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(size == -1 or size >= 1 for size in sizes), "mesh: each axis must be at least 1, or -1", sizes
        )
        require(sizes.count(-1) <= 1, "mesh: at most one axis may be -1", sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. `steps * batch_size * model.context` tokens are seen."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int = setting(1000, "Optimizer steps.", "at least 1")
    batch_size: int = setting(
        64, "Sequences per optimizer step, over all devices and accumulation steps.", "at least 1"
    )
    accumulate: int = setting(1, "Micro-batches per optimizer step.", "at least 1")
    seed: int = setting(0, "Seed of the initial parameters.")
    log_every: int = setting(10, "Steps between records in `metrics.jsonl`.", "at least 1")
    eval_every: int = setting(
        0, "Steps between evaluations on held-out documents; 0 evaluates only at the end.", "at least 0"
    )
    eval_batches: int = setting(16, "Batches of held-out text per evaluation.", "at least 1")
    checkpoint_every: int = setting(
        0, "Steps between checkpoints; 0 saves only at the end (and when interrupted).", "at least 0"
    )
    keep_checkpoints: int = setting(3, "How many of the newest checkpoints stay on disk.", "at least 1")

    def __post_init__(self):
        check(self)
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size must be a multiple of accumulate={self.accumulate}",
            self.batch_size,
        )


def require(condition: bool, rule: str, value: Any) -> None:
    """Raises a UserError that says what must hold and what arrived, unless the condition holds."""
    if not condition:
        raise UserError(f"{rule}, got {_shown(value)}")


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Builds a config dataclass from nested mappings (a ConfigDict or parsed JSON).

    Integers pass for floats and lists for tuples; British spellings of keys and values, which older files
    have, are read as their American ones.

    Args:
      cls: Dataclass to build: one of the configs above, or any other of the same kinds of fields.
      values: Values by field name; other fields keep their defaults.
      where: Dotted prefix of the keys, for messages.

    Raises:
      UserError: A key is unknown (the nearest valid name is given) or missing, or a value has the wrong
        type, is NaN or infinite, or breaks a rule of the dataclass.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    _check_type(values, Mapping, "a group of keys", where.rstrip("."))
    hints, required = _fields(cls)
    arguments = {}
    for key, value in values.items():
        name = key if key in hints else _american(key)
        if name not in hints:
            raise UserError(f"unknown config key {quoted(f'{where}{key}')}{closest(key, hints)}")
        arguments[name] = _convert(value, hints[name], f"{where}{name}")
    for name in required:
        if name not in arguments:
            raise UserError(f"config key '{where}{name}' is missing")
    return cls(**arguments)


# Slow, and asked for once for every edge of a circuit.
@functools.cache
def _fields(cls: Any) -> tuple[dict[str, Any], list[str]]:
    """Returns the types of a dataclass's fields by name, and the names of those without a default."""
    fields, missing = dataclasses.fields(cls), dataclasses.MISSING
    required = [field.name for field in fields if field.default is field.default_factory is missing]
    return typing.get_type_hints(cls), required


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as nested dicts of JSON types, such that `from_dict` gives the same config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe(config: Any, *, where: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields the dotted key, the value and the help text of every field of a config, groups flattened."""
    for field in dataclasses.fields(config):
        value, help_text = getattr(config, field.name), field.metadata.get("help", "")
        if dataclasses.is_dataclass(value):
            yield from describe(value, where=f"{where}{field.name}.")
        elif rule := field.metadata.get("rule"):
            yield f"{where}{field.name}", value, f"{help_text} Must be {rule}."
        else:
            yield f"{where}{field.name}", value, help_text


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str = "") -> list[str]:
    """Returns lines "key: old -> new" for the leaves in which two nested dicts differ."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, where=f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a!r} -> {b!r}")
    return lines


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Returns `value` as the annotated type `hint`."""
    if type(value) is hint and (hint is not float or math.isfinite(value)):
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=f"{where}.")  # pyrefly: ignore
    if origin is Literal:
        return _choice(value, arguments, where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, _not_none(hint), where)
    if origin in (tuple, list):
        _check_type(value, (tuple, list), "a list", where)
        return origin(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _check_type(value, Mapping, "a group of keys", where)
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    # A bool is an int for `isinstance`.
    require(type(value) is hint, f"config key '{where}' must be of type {hint.__name__}", value)
    raise UserError(f"config key '{where}' must be a finite number, got {value}")


def _check_type(value: Any, kind: Any, name: str, where: str) -> None:
    require(isinstance(value, kind), f"config key '{where}' must be {name}", value)


def _choice(value: Any, choices: tuple[Any, ...], where: str) -> Any:
    for spelling in (value, _american(value)):
        if spelling in choices:
            return spelling
    near = closest(value, choices) if isinstance(value, str) else ""
    valid = ", ".join(map(repr, choices))
    raise UserError(f"config key '{where}' must be one of {valid}, got {_shown(value)}{near}")


def _not_none(hint: Any) -> type:
    """Returns T for the type `T | None`."""
    (kind,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    return kind


def _american(name: Any) -> str:
    """Returns a British spelling as its American one: normalise, discretise_pairs."""
    return str(name).replace("ise", "ize")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def recipe(**settings: Any) -> ml_collections.ConfigDict:
    """Returns a `TrainConfig` as the ConfigDict that a file in `configs/` returns.

    It is checked here, so that a wrong key or value is reported with the recipe's own line.

    >>> config = recipe(steps=10, model={"n_layer": 2})
    >>> config.model.n_layer, config.batch_size
    (2, 64)

    Args:
      **settings: What differs from the defaults, groups as dicts.

    Raises:
      UserError: See `from_dict`.
    """
    return _config_dict(from_dict(TrainConfig, settings))


def _config_dict(config: Any) -> ml_collections.ConfigDict:
    values = {}
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif value is None:
            # A bare None would accept no override.
            value = ml_collections.config_dict.placeholder(_not_none(hint))
        values[name] = value
    return ml_collections.ConfigDict(values)
