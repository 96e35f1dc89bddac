"""Typed configs: frozen dataclasses, checked before anything is computed.

`configs/*.py` return an `ml_collections.ConfigDict`; `from_dict` turns it into the dataclasses below,
refuses unknown keys with the nearest valid name, and checks every value. `to_dict` is the way back, and
what `config.json` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

import ml_collections

from wsparse.errors import UserError, closest

T = TypeVar("T")

# The AbsTopK locations, in the order of the forward pass.
ABS_TOP_K_SITES = (
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "resid_post_attn",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "resid_post_mlp",
)
NODE_SITES = tuple(site for site in ABS_TOP_K_SITES if not site.startswith("resid"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-2 style pre-norm decoder: every variant of Gao et al. 2025 and of the published checkpoints.

    Attributes:
      vocab_size: number of tokens V.
      context: longest sequence T the model accepts.
      n_layer: number of blocks L.
      d_model: width D of the residual stream.
      n_head: attention heads H; `n_head * d_head` may differ from `d_model`.
      d_head: width K of one head.
      d_mlp: MLP neurons F; None means `4 * d_model`.
      norm: "rms" (gain only, no mean subtraction) or "layer".
      norm_bias: a bias in layer norms (ignored by "rms").
      norm_eps: None means float32 machine epsilon for "rms" and 1e-5 for "layer".
      bias: biases in the linear layers (never on the unembedding).
      activation: MLP nonlinearity, exact (erf) "gelu" or "relu".
      residual_activation: applied to the residual stream after each add.
      tied_embeddings: the unembedding is the token embedding transposed.
      position: "none"; "added" (learned, absolute); "concat" (learned) or "concat_sinusoid" (fixed): a
        read-only table of width `d_pos` that each block norms with its own gain and concatenates to the
        normed residual before the q, k, v and fc projections.
      d_pos: width of the concatenated position table; 0 unless `position` is a "concat" one.
      bigram: "learned" or "frozen" V x V table whose row of the current token is added to the logits.
      sink: one learned logit per head that joins the softmax denominator only.
      logits_bias: a bias added to the logits, as some published checkpoints have.
      abs_top_k_fraction: fraction of each AbsTopK site's channels kept per token; None is off.
      abs_top_k_sites: where AbsTopK acts, names of `ABS_TOP_K_SITES`.
      compute_dtype: dtype of activations; parameters stay float32 and logits are at least float32.
      remat: recompute each block in the backward pass instead of storing its activations.
    """

    vocab_size: int = 2048
    context: int = 256
    n_layer: int = 8
    d_model: int = 256
    n_head: int = 16
    d_head: int = 16
    d_mlp: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    norm_eps: float | None = None
    bias: bool = True
    activation: Literal["gelu", "relu"] = "gelu"
    residual_activation: Literal["identity", "relu"] = "identity"
    tied_embeddings: bool = False
    position: Literal["none", "added", "concat", "concat_sinusoid"] = "none"
    d_pos: int = 0
    bigram: Literal["learned", "frozen", "none"] = "learned"
    sink: bool = True
    logits_bias: bool = False
    abs_top_k_fraction: float | None = 0.25
    abs_top_k_sites: tuple[str, ...] = NODE_SITES
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "context", "n_layer", "d_model", "n_head", "d_head"):
            require(
                getattr(self, name) >= 1, f"model.{name} must be at least 1", getattr(self, name)
            )
        require(self.d_mlp is None or self.d_mlp >= 1, "model.d_mlp must be at least 1", self.d_mlp)
        if self.concatenates_positions:
            require(
                self.d_pos >= 1,
                f"model.d_pos must be at least 1 with position={self.position!r}",
                self.d_pos,
            )
        else:
            require(
                self.d_pos == 0,
                f"model.d_pos must be 0 with position={self.position!r}",
                self.d_pos,
            )
        fraction = self.abs_top_k_fraction
        require(
            fraction is None or 0 < fraction <= 1,
            "model.abs_top_k_fraction must be in (0, 1] or None",
            fraction,
        )
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
        return 1.1920928955078125e-07 if self.norm == "rms" else 1e-5

    def site_width(self, site: str) -> int:
        """Number of channels at an AbsTopK site."""
        if site in ("attn_in", "mlp_in"):
            return self.read_width
        if site in ("attn_q", "attn_k", "attn_v"):
            return self.attention_width
        return self.mlp_width if site == "mlp_neuron" else self.d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """How many weights survive, and when.

    Attributes:
      density: final fraction of nonzeros of every projected matrix, in (0, 1]; 1 trains densely.
      min_per_neuron: nonzeros that every MLP neuron and attention channel keeps in each of its matrices.
      anneal_start: fraction of training at which the density starts to fall from 1.
      anneal_end: fraction of training at which it reaches `density`.
      anneal: "linear" in the density or "exponential" (linear in its logarithm).
    """

    density: float = 1 / 64
    min_per_neuron: int = 4
    anneal_start: float = 0.0
    anneal_end: float = 0.5
    anneal: Literal["linear", "exponential"] = "linear"

    def __post_init__(self):
        require(0 < self.density <= 1, "sparsity.density must be in (0, 1]", self.density)
        require(
            self.min_per_neuron >= 0,
            "sparsity.min_per_neuron must be at least 0",
            self.min_per_neuron,
        )
        require(
            0 <= self.anneal_start < self.anneal_end <= 1,
            "sparsity: 0 <= anneal_start < anneal_end <= 1 must hold",
            (self.anneal_start, self.anneal_end),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in Gao et al. 2025, appendix on training.

    Attributes:
      learning_rate: peak before the sharkfin factor.
      warmup: fraction of training spent in linear warmup.
      sharkfin: multiply the learning rate by `1/sqrt(density)`.
      gradient_rms: "normalize" scales the gradient so that its root-mean-square over all parameters is
        1, "clip" only when it is above 1, "none" leaves it.
    """

    learning_rate: float = 2e-3
    warmup: float = 0.01
    sharkfin: bool = True
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 0.1
    weight_decay: float = 0.1
    gradient_rms: Literal["normalize", "clip", "none"] = "normalize"

    def __post_init__(self):
        require(
            self.learning_rate > 0, "optimizer.learning_rate must be positive", self.learning_rate
        )
        require(0 <= self.warmup < 1, "optimizer.warmup must be in [0, 1)", self.warmup)
        require(
            0 <= self.b1 < 1 and 0 <= self.b2 < 1,
            "optimizer.b1 and b2 must be in [0, 1)",
            (self.b1, self.b2),
        )
        require(self.eps > 0, "optimizer.eps must be positive", self.eps)
        require(
            self.weight_decay >= 0, "optimizer.weight_decay must not be negative", self.weight_decay
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from.

    Attributes:
      source: a source or a weighted mix of them, e.g. "0.7*idioms+0.3*stdlib" (`wsparse.data.sources`).
      megabytes: text taken from the sources in all, in units of 10^6 bytes, before the split; a source
        that holds less than its share gives all it has.
      tokenizer: path of a `tokenizer.json` to use; "" trains one on the training text.
      validation_fraction: share of documents held out, chosen by the hash of their content.
      seed: seed of generated documents and of the order of training windows.
      prefetch: batches read ahead by `threads` reader threads.
    """

    source: str = "0.7*idioms+0.3*stdlib"
    megabytes: float = 16.0
    tokenizer: str = ""
    validation_fraction: float = 0.02
    seed: int = 0
    threads: int = 2
    prefetch: int = 8

    def __post_init__(self):
        require(bool(self.source.strip()), "data.source must name a source", self.source)
        require(self.megabytes > 0, "data.megabytes must be positive", self.megabytes)
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction must be in (0, 1)",
            self.validation_fraction,
        )
        require(self.threads >= 1, "data.threads must be at least 1", self.threads)
        require(self.prefetch >= 1, "data.prefetch must be at least 1", self.prefetch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh's axes; exactly one may be -1, "all devices that are left".

    Attributes:
      data: batch parallelism, parameters replicated.
      fsdp: batch parallelism, parameters and optimizer state sharded.
      tensor: heads, neurons and vocabulary sharded.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        require(
            all(size == -1 or size >= 1 for size in sizes),
            "mesh: each axis must be at least 1, or -1",
            sizes,
        )
        require(sizes.count(-1) <= 1, "mesh: at most one axis may be -1", sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. `steps * batch_size * model.context` tokens are seen.

    Attributes:
      batch_size: sequences per optimizer step, over all devices and accumulation steps.
      accumulate: micro-batches per optimizer step.
      seed: seed of the initial parameters.
      log_every: steps between records in `metrics.jsonl`.
      eval_every: steps between evaluations on held-out documents; 0 evaluates only at the end.
      eval_batches: batches of held-out text per evaluation.
      checkpoint_every: steps between checkpoints; 0 saves only at the end (and when interrupted).
      keep_checkpoints: how many of the newest checkpoints stay on disk.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 16
    checkpoint_every: int = 0
    keep_checkpoints: int = 3

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "eval_batches",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("eval_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size must be a multiple of accumulate={self.accumulate}",
            self.batch_size,
        )


def require(condition: bool, rule: str, got: Any) -> None:
    """Raise a UserError that says what must hold and what arrived."""
    if not condition:
        raise UserError(f"{rule}, got {got!r}")


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build a config dataclass from nested mappings (a ConfigDict or parsed JSON).

    Args:
      cls: one of the dataclasses above.
      values: what to set; the rest keeps its default.
      where: dotted path of `values` inside the whole config, for messages.

    Raises:
      UserError: an unknown key (the nearest valid name is given), a value of the wrong type, or one
        that breaks a rule of the dataclass.
    """
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        key = unknown[0]
        raise UserError(f"unknown config key '{where}{key}'{closest(key, hints)}")
    return cls(
        **{key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()}
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON types; `from_dict(type(config), to_dict(config)) == config`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str = "") -> list[str]:
    """Lines "key: old -> new" for the leaves in which two nested dicts differ."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, where=f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a!r} -> {b!r}")
    return lines


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; integers pass for floats, lists for tuples."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        if not isinstance(value, Mapping):
            raise UserError(f"config key '{where}' must be a group of keys, got {value!r}")
        return from_dict(hint, value, where=f"{where}.")
    if origin is Literal:
        if value not in arguments:
            near = closest(value, arguments) if isinstance(value, str) else ""
            raise UserError(
                f"config key '{where}' must be one of {', '.join(map(repr, arguments))}, got {value!r}{near}"
            )
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(value, inner, where)
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"config key '{where}' must be a list, got {value!r}")
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"config key '{where}' must be of type {hint.__name__}, got {value!r}")
    return value


def recipe(**settings: Any) -> ml_collections.ConfigDict:
    """A `TrainConfig` as the ConfigDict that a file in `configs/` returns.

    Args:
      **settings: what differs from the defaults, groups as dicts: `recipe(steps=10, model={"n_layer": 2})`.

    Raises:
      UserError: as `from_dict`.
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
            (kind,) = (each for each in typing.get_args(hint) if each is not type(None))
            value = ml_collections.config_dict.placeholder(kind)
        values[name] = value
    return ml_collections.ConfigDict(values)
