"""Published checkpoints of Gao et al. 2025: read, imported as a run, and written.

A published checkpoint is a folder with `beeg_config.json` and `final_model.pt`. In Python:

    config, params = openai.load(folder)

A run folder that `prune`, `sample` and the other commands accept like one that was trained here, and back:

    python -m wsparse.interop.convert --from=FOLDER --out=RUN [--tokenizer=FOLDER] [--source=stdlib]
    python -m wsparse.interop.convert --from=RUN --out=FOLDER --export
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import runpy
from typing import Any

import jax
import numpy as np

from wsparse import files, model, runs, trees
from wsparse.config import ModelConfig, from_dict, require
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError
from wsparse.interop import bpe_files, state_dict, torch_file
from wsparse.interop.fields import Fields

CONFIG_FILE = "beeg_config.json"
WEIGHTS_FILE = "final_model.pt"
# Of the text of an imported run.
SOURCE, DOMAIN = "stdlib", "python"

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

_LOGITS_BIAS = "final_logits_bias"
_KEYS = state_dict.Keys(
    root="transformer.",
    block="transformer.h.{}",
    sink="attn.attn_imp.sink_logit",
    logits_bias=_LOGITS_BIAS,
    causal_mask=r"transformer\.h\.\d+\.attn\.bias",
)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model config of a `beeg_config.json`.

    Older files say `n_mlp` for `d_mlp`, lack `sink` and have more fields. Fields that do not change inference
    are ignored, by name.

    Raises:
      UserError: A field is missing, is unknown, has the wrong type, or has a value for which the model has no
        variant.
    """
    own = Fields(fields, ignored=_IGNORED_FIELDS)
    take, take_flag = own.take, own.take_flag
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
    for name in sorted(_FIELDS_OFF):
        value = take(name, None)
        off = value is None or (isinstance(value, bool | int | float) and not value)
        require(off, f"{name} must be off: there is no variant of the model for it", value)
    own.finish()
    return from_dict(ModelConfig, values, where="model.")


def published_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the `beeg_config.json` of a model; the inverse of `model_config`.

    `compute_dtype` and `remat` are not part of the format: they concern the machine.

    Raises:
      UserError: The model has an epsilon or a width that the format cannot express.
    """
    require(
        config.d_model % config.n_head == 0,
        f"the published format needs model.d_model to be a multiple of n_head={config.n_head}",
        config.d_model,
    )
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


def params_from_state(config: ModelConfig, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parameters of a published state dict of arrays.

    Every key must be used or be a causal-mask buffer; `final_logits_bias` may be absent (then 0).

    Raises:
      UserError: A key is missing or unknown, or the shape of an array does not fit the config.
    """
    if config.logits_bias:
        state = {_LOGITS_BIAS: np.zeros(config.vocab_size, np.float32), **state}
    return state_dict.params_from_state(config, state, _KEYS)


def state_from_params(config: ModelConfig, params: model.Params) -> dict[str, np.ndarray]:
    """Returns the published state dict of a model; the inverse of `params_from_state`, bit for bit.

    The published code always adds a table of positions (or concatenates one) and a bias to the logits. A
    model without them gets zeros, which have no effect.
    """
    leaves = trees.flatten(jax.device_get(params))
    state = {}
    for entry in state_dict.entries(config, _KEYS):
        parts = [leaves[path] for path in entry.paths]
        array = np.concatenate([p if entry.layer is None else p[entry.layer] for p in parts], axis=-1)
        state[entry.key] = np.ascontiguousarray(array.T if entry.transposed else array)
    if config.tied_embeddings:
        state[state_dict.UNEMBED] = state[_KEYS.tokens]
    if config.position == "none":
        state[_KEYS.positions] = np.zeros((config.context, config.d_model), np.float32)
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
    config = state_dict.read_config(folder / CONFIG_FILE, model_config)
    params = state_dict.read_params(folder / WEIGHTS_FILE, config, _KEYS, params_from_state)
    if config.position == "added" and not params["embed"]["positions"].any():
        config = dataclasses.replace(config, position="none")
        del params["embed"]["positions"]
    if not params["head"]["logits_bias"].any():
        config = dataclasses.replace(config, logits_bias=False)
        del params["head"]["logits_bias"]
    return config, params


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


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a folder's `encoder.json` and `vocab.bpe`."""
    try:
        return bpe_files.load(folder)
    except bpe_files.NoTokenizerError as error:
        raise UserError(
            f"{error}: say where they are with --tokenizer=FOLDER. Without a tokenizer there is no run for "
            "prune and sample, but wsparse.interop.openai.load works from Python"
        ) from error


def export_run(folder: pathlib.Path, out: pathlib.Path) -> ModelConfig:
    """Writes the model and the tokenizer of a run as a published checkpoint, all of it or nothing.

    Returns:
      The config of the model.

    Raises:
      UserError: `folder` is not a run, its tokenizer is not of the published kind, `out` is not empty, or as
        `save`.
    """
    files.check_new_folder(out)
    run = runs.load(folder)
    bpe_files.check(run.tokenizer)
    with files.new_folder(out) as part:
        save(part, run.config.model, run.params)
        bpe_files.save(part, run.tokenizer)
    return run.config.model


if __name__ == "__main__":
    # The command's first name.
    runpy.run_module("wsparse.interop.convert", run_name="__main__", alter_sys=True)
