"""Published checkpoints of Gao et al. 2025: read, imported as a run, and written.

A published checkpoint is a folder with `beeg_config.json` and `final_model.pt`. In Python:

    config, params = openai.load(folder)

A run folder that `prune`, `sample` and the other commands accept like one that was trained here, and back:

    python -m wsparse.interop.openai --from=FOLDER --out=RUN [--tokenizer=FOLDER] [--source=stdlib]
    python -m wsparse.interop.openai --from=RUN --out=FOLDER --export
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
import pathlib
import re
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from wsparse import files, model, runs, trees
from wsparse.command import run_command
from wsparse.config import DataConfig, ModelConfig, TrainConfig, from_dict, require
from wsparse.data import sources
from wsparse.errors import UserError, closest, quoted
from wsparse.interop import bpe_files, torch_file

CONFIG_FILE = "beeg_config.json"
WEIGHTS_FILE = "final_model.pt"

# Fields of the published config that do not change inference.
_IGNORED_FIELDS = frozenset([
    "dropout", "debug_nans", "tokenizer_name", "grad_checkpointing", "dropout_cat_pos_emb",
    "enable_sparse_kernels", "flash",
    # What older files have beside the published code's fields: how the model was trained, widths that are
    # given once more, and ranks of tables that are stored whole.
    "n_embd", "expansion_factor", "expansion_factor_mlp", "pfrac", "bigram_table_rank", "unembed_rank",
    "afrac_ste", "afrac_ste_only_non_neurons", "debug_exact_topk", "sparse_matmul_impl",
])  # fmt: skip
# Fields of older files that would change inference if they were on.
_FIELDS_OFF = frozenset([
    "use_tied_aux_matrix", "afrac_approx", "rtopk", "mup", "mup_width_multiplier", "enable_fp8_linear",
    "scale_invariance",
])  # fmt: skip
# The sites of files from before there was a choice.
_DEFAULT_SITES = "attn_in,attn_out,mlp_in,mlp_out"
_TOKENIZER_NAME = "tinypython_2k"

_CAUSAL_MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")
_POSITIONS, _UNEMBED = "transformer.wpe.weight", "lm_head.weight"
_LOGITS_BIAS = "final_logits_bias"
_WEIGHT_TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model config of a `beeg_config.json`.

    Older files say `n_mlp` for `d_mlp`, lack `sink` and have more fields. Fields that do not change inference
    are ignored, by name.

    Raises:
      UserError: A field is missing, is unknown, has the wrong type, or has a value for which the model has no
        variant.
    """
    remaining, known = dict(fields), set(_IGNORED_FIELDS | _FIELDS_OFF)

    def take(name, *default):
        known.add(name)
        if name not in remaining and not default:
            raise UserError(f"the published config lacks the field {name!r}")
        return remaining.pop(name, *default)

    def take_flag(name, default):
        value = take(name, default)
        require(isinstance(value, bool), f"{name} must be true or false", value)
        return value

    d_model, n_head, d_head = take("d_model"), take("n_head"), take("d_head", None)
    if d_head is None:
        for name, value in (("d_model", d_model), ("n_head", n_head)):
            require(type(value) is int and value > 0, f"{name} must be a positive integer", value)
        d_head = d_model // n_head
    d_mlp, older_d_mlp, d_pos = take("d_mlp", None), take("n_mlp", None), take("d_pos_emb", None)
    sinusoid = take_flag("sinusoidal_cat_pos_emb", False)
    enabled = take_flag("enable_bigram_table", False)
    learnable = take_flag("learnable_bigram_table", False)
    sites = take("afrac_loctypes", _DEFAULT_SITES)
    require(isinstance(sites, str), "afrac_loctypes must be names separated by commas", sites)
    values = {
        "vocab_size": take("vocab_size"),
        "context": take("block_size"),
        "n_layer": take("n_layer"),
        "d_model": d_model,
        "n_head": n_head,
        "d_head": d_head,
        "d_mlp": older_d_mlp if d_mlp is None else d_mlp,
        "norm": "rms" if take_flag("rms_norm", False) else "layer",
        "norm_bias": take("ln_bias", True),
        "bias": take("bias", True),
        "activation": take("activation_type", "gelu"),
        "residual_activation": take("residual_activation_type", "identity"),
        "tied_embeddings": take("tied_unembed", True),
        "position": "added" if d_pos is None else "concat_sinusoid" if sinusoid else "concat",
        "d_pos": 0 if d_pos is None else d_pos,
        "bigram": ("learned" if learnable else "frozen") if enabled else "none",
        "sink": False if (sink := take("sink", None)) is None else sink,
        "logits_bias": True,
        "abs_top_k_fraction": take("afrac", None),
        "abs_top_k_sites": [site.strip() for site in sites.split(",") if site.strip()],
    }
    for name in sorted(_FIELDS_OFF & set(remaining)):
        value = remaining[name]
        off = value is None or (isinstance(value, bool | int | float) and not value)
        require(off, f"{name} must be off: there is no variant of the model for it", value)
    if unknown := sorted(set(remaining) - _IGNORED_FIELDS - _FIELDS_OFF):
        raise UserError(
            f"the published config has an unknown field {quoted(unknown[0])}{closest(unknown[0], known)}: "
            "it may change what the model computes"
        )
    return from_dict(ModelConfig, values, where="model.")


def published_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the `beeg_config.json` of a model; the inverse of `model_config`.

    `compute_dtype` and `remat` are not part of the format: they concern the machine.

    Raises:
      UserError: The model has an epsilon that the format cannot express.
    """
    default = dataclasses.replace(config, norm_eps=None).eps
    if config.eps != default:
        raise UserError(
            f"the published format cannot express model.norm_eps={config.eps}: it is always {default}"
        )
    return {
        "block_size": config.context,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "dropout": 0.0,
        "bias": config.bias,
        "ln_bias": config.norm_bias,
        "rms_norm": config.norm == "rms",
        "residual_activation_type": config.residual_activation,
        "activation_type": config.activation,
        "afrac": config.abs_top_k_fraction,
        "afrac_loctypes": ",".join(config.abs_top_k_sites),
        "debug_nans": False,
        "tied_unembed": config.tied_embeddings,
        "tokenizer_name": _TOKENIZER_NAME,
        "grad_checkpointing": False,
        "d_mlp": config.mlp_width,
        "enable_bigram_table": config.bigram != "none",
        "learnable_bigram_table": config.bigram == "learned",
        "d_pos_emb": config.d_pos or None,
        "dropout_cat_pos_emb": False,
        "sinusoidal_cat_pos_emb": config.position == "concat_sinusoid",
        "enable_sparse_kernels": False,
        "flash": True,
        "sink": config.sink,
    }


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A published array and the parameters that lie side by side in it.

    Attributes:
      paths: Paths of the parameters; several share the output axis.
      shape: Shape of the published array; weights are `(out, in)` there, and transposed here.
      layer: Index into the stacked parameters; None where there is no layer axis.
    """

    key: str
    paths: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None = None
    transposed: bool = False


def _entries(config: ModelConfig) -> Iterator[_Entry]:
    """Yields an entry for every published array that holds parameters."""
    vocab, d_model, width = config.vocab_size, config.d_model, config.attention_width

    def norm(key, path, size, layer=None):
        yield _Entry(f"{key}.weight", (f"{path}/gain",), (size,), layer)
        if config.norm == "layer" and config.norm_bias:
            yield _Entry(f"{key}.bias", (f"{path}/bias",), (size,), layer)

    def linear(key, paths, inputs, outputs, layer):
        kernels = tuple(f"{path}/kernel" for path in paths)
        yield _Entry(f"{key}.weight", kernels, (outputs, inputs), layer, transposed=True)
        if config.bias:
            biases = tuple(f"{path}/bias" for path in paths)
            yield _Entry(f"{key}.bias", biases, (outputs,), layer)

    yield _Entry("transformer.wte.weight", ("embed/tokens",), (vocab, d_model))
    if config.position != "none":
        table = "sinusoids" if config.position == "concat_sinusoid" else "positions"
        shape = (config.context, config.d_pos or d_model)
        yield _Entry(_POSITIONS, (f"embed/{table}",), shape)
    qkv = tuple(f"blocks/attn/{part}" for part in "qkv")
    for i in range(config.n_layer):
        key = f"transformer.h.{i}"
        yield from norm(f"{key}.ln_1", "blocks/attn_norm", d_model, i)
        yield from norm(f"{key}.ln_2", "blocks/mlp_norm", d_model, i)
        if config.concatenates_positions:
            yield from norm(f"{key}.ln_p1", "blocks/attn_pos_norm", config.d_pos, i)
            yield from norm(f"{key}.ln_p2", "blocks/mlp_pos_norm", config.d_pos, i)
        yield from linear(f"{key}.attn.c_attn", qkv, config.read_width, 3 * width, i)
        yield from linear(f"{key}.attn.c_proj", ("blocks/attn/out",), width, d_model, i)
        if config.sink:
            yield _Entry(f"{key}.attn.attn_imp.sink_logit", ("blocks/attn/sink",), (config.n_head,), i)
        yield from linear(f"{key}.mlp.c_fc", ("blocks/mlp/fc",), config.read_width, config.mlp_width, i)
        yield from linear(f"{key}.mlp.c_proj", ("blocks/mlp/proj",), config.mlp_width, d_model, i)
    yield from norm("transformer.ln_f", "head/norm", d_model)
    if not config.tied_embeddings:
        yield _Entry(_UNEMBED, ("head/unembed",), (vocab, d_model), transposed=True)
    if config.bigram != "none":
        yield _Entry("bigram_table", ("head/bigram",), (vocab, vocab))
    if config.logits_bias:
        yield _Entry(_LOGITS_BIAS, ("head/logits_bias",), (vocab,))


def params_from_state(config: ModelConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parameters of a published state dict of arrays.

    Every key must be used or be a causal-mask buffer; `final_logits_bias` may be absent (then 0).

    Raises:
      UserError: A key is missing or unknown, or the shape of an array does not fit the config.
    """
    remaining = {key: value for key, value in state.items() if not _CAUSAL_MASK.fullmatch(key)}

    def take(key, shape):
        if key not in remaining:
            raise UserError(f"the checkpoint lacks {key!r}{closest(key, remaining)}")
        array = np.asarray(remaining.pop(key))
        if array.shape != shape:
            raise UserError(f"{key!r} must have shape {shape} for this config, got {array.shape}")
        return array

    leaves: dict[str, Any] = {}
    for entry in _entries(config):
        if entry.key == _LOGITS_BIAS:
            remaining.setdefault(_LOGITS_BIAS, np.zeros(entry.shape, np.float32))
        array = take(entry.key, entry.shape)
        array = array.T if entry.transposed else array
        for path, part in zip(entry.paths, np.split(array, len(entry.paths), axis=-1), strict=True):
            if entry.layer is None:
                leaves[path] = part
            else:
                leaves.setdefault(path, []).append(part)
    if config.tied_embeddings:
        unembed = take(_UNEMBED, (config.vocab_size, config.d_model))
        if not np.array_equal(unembed, leaves["embed/tokens"]):
            raise UserError("the config ties the embeddings, but lm_head.weight and wte.weight differ")
    if remaining:
        raise UserError(
            f"the checkpoint has {len(remaining)} keys that do not belong to the config, such as "
            f"{quoted(min(remaining))}"
        )
    stacked = {p: np.stack(leaf) if isinstance(leaf, list) else leaf for p, leaf in leaves.items()}
    return trees.unflatten(stacked)


def state_from_params(config: ModelConfig, params: model.Params) -> dict[str, np.ndarray]:
    """Returns the published state dict of a model; the inverse of `params_from_state`, bit for bit.

    The published code always adds a table of positions (or concatenates one) and a bias to the logits. A
    model without them gets zeros, which have no effect.
    """
    leaves = trees.flatten(jax.device_get(params))
    state = {}
    for entry in _entries(config):
        parts = [leaves[path] for path in entry.paths]
        array = np.concatenate([p if entry.layer is None else p[entry.layer] for p in parts], axis=-1)
        state[entry.key] = np.ascontiguousarray(array.T if entry.transposed else array)
    if config.tied_embeddings:
        state[_UNEMBED] = state["transformer.wte.weight"]
    if config.position == "none":
        state[_POSITIONS] = np.zeros((config.context, config.d_model), np.float32)
    state.setdefault(_LOGITS_BIAS, np.zeros(config.vocab_size, np.float32))
    return state


def load(folder: str | os.PathLike[str]) -> tuple[ModelConfig, model.Params]:
    """Reads a published checkpoint; PyTorch is not needed.

    Weights in 16 bits are widened to float32, which is exact. An added table of positions or a bias of the
    logits that is all zeros is left out, since it has no effect.

    Returns:
      `(config, params)`, the parameters as float32 jax arrays.

    Raises:
      UserError: A file is missing or damaged, a field or key is missing or unknown, a shape does not fit,
        or an array has another dtype (`torch_file.TorchFileError` for errors of the file itself).
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} is not a published checkpoint: it has no {CONFIG_FILE}")
    fields = files.read_json(folder / CONFIG_FILE)
    try:
        config = model_config(fields)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error
    state = torch_file.read(folder / WEIGHTS_FILE)
    try:
        for key, array in state.items():
            if array.dtype not in _WEIGHT_TYPES and not _CAUSAL_MASK.fullmatch(key):
                raise UserError(
                    f"{quoted(key)} is of type {array.dtype}; weights must be float32, float16 or bfloat16"
                )
        params = params_from_state(config, state)
    except UserError as error:
        raise UserError(f"{folder / WEIGHTS_FILE}: {error}") from error
    if config.position == "added" and not params["embed"]["positions"].any():
        config = dataclasses.replace(config, position="none")
        del params["embed"]["positions"]
    if not params["head"]["logits_bias"].any():
        config = dataclasses.replace(config, logits_bias=False)
        del params["head"]["logits_bias"]
    # Copies, since the arrays of the state are views of the file.
    return config, jax.tree.map(lambda leaf: jnp.array(np.array(leaf, np.float32)), params)


def save(folder: str | os.PathLike[str], config: ModelConfig, params: model.Params) -> None:
    """Writes a model as a published checkpoint, which `load` and the published code read.

    The same model gives the same bytes.

    Raises:
      UserError: The format cannot express the config, or the folder cannot be written.
    """
    folder, fields = pathlib.Path(folder), published_fields(config)
    files.make_folder(folder)
    torch_file.write(folder / WEIGHTS_FILE, state_from_params(config, params))
    files.write_json(folder / CONFIG_FILE, fields)


# Runs ----------------------------------------------------------------------------------------------


def import_run(
    folder: pathlib.Path,
    out: pathlib.Path,
    *,
    tokenizer_folder: pathlib.Path | None = None,
    source: str = "stdlib",
) -> TrainConfig:
    """Makes a run folder of a published checkpoint.

    Args:
      folder: The checkpoint.
      out: The run folder, which must not exist or be empty.
      tokenizer_folder: Folder of `encoder.json` and `vocab.bpe`; None is `folder`.
      source: Source of the run's text, as `config.data.source` in training. It is read when it is first
        needed.

    Returns:
      The config of the run, with defaults for the training (sparsity, optimizer, steps), which is unknown.

    Raises:
      UserError: As `load`; there is no tokenizer, or it does not fit the model; `out` exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not empty: choose another folder")
    sources.parse_mix(source)
    model_config, params = load(folder)
    try:
        tokenizer = bpe_files.load(tokenizer_folder or folder)
    except bpe_files.NoTokenizerError as error:
        raise UserError(
            f"{error}: say where they are with --tokenizer=FOLDER. Without a tokenizer there is no run for "
            "prune and sample, but wsparse.interop.openai.load works from Python"
        ) from error
    if tokenizer.vocab_size != model_config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model_config.vocab_size}: "
            "give the model's own tokenizer with --tokenizer=FOLDER"
        )
    config = TrainConfig(model=model_config, data=DataConfig(source=source))
    runs.create(out, config, params, tokenizer, summary={"imported_from": str(folder)})
    return config


def export_run(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the model and the tokenizer of a run as a published checkpoint.

    Raises:
      UserError: `folder` is not a run, or as `save`.
    """
    run = runs.load(folder)
    save(out, run.config.model, run.params)
    bpe_files.save(out, run.tokenizer)


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    # `from` is a keyword, so the flag cannot be read as an attribute.
    folder, out = pathlib.Path(options["from"].value), pathlib.Path(options.out)
    if options.export:
        export_run(folder, out)
        print(f"wrote {out}: read it with --from={out}, or with the published code")
        return
    tokenizer = pathlib.Path(options.tokenizer) if options.tokenizer else None
    import_run(folder, out, tokenizer_folder=tokenizer, source=options.source)
    print(f"wrote {out}: python -m wsparse.sample --run={out} --prompt='def add(a, b):'")


def _define_flags() -> None:
    flags.DEFINE_string("from", None, "A published checkpoint's folder; a run with --export.")
    flags.DEFINE_string("out", None, "The folder to write: a run; a checkpoint with --export.")
    flags.DEFINE_bool("export", False, "Write the run --from as a published checkpoint to --out.")
    flags.DEFINE_string(
        "tokenizer", None, "The folder of encoder.json and vocab.bpe, where it is not --from."
    )
    flags.DEFINE_string("source", "stdlib", "Source of text for prune, as config.data.source in training.")
    flags.mark_flags_as_required(["from", "out"])


if __name__ == "__main__":
    _define_flags()
    run_command(main)
