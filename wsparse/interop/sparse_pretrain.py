"""Checkpoints of `sparse_pretrain`, a PyTorch replication of Gao et al. 2025: read, and imported as a run.

A checkpoint is a folder with `config.json` and `pytorch_model.bin`; one that was trained with bridges to a
dense model has `sparse_model.bin` instead, and the bridges beside it are not read. In Python:

    config, params = sparse_pretrain.load(folder)

A run folder that `prune`, `sample` and the other commands accept like one that was trained here:

    python -m wsparse.interop.convert --from=FOLDER --out=RUN [--tokenizer=FILE] [--source=...]
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import logging
import os
import pathlib
import re
from typing import Any

from wsparse import model
from wsparse.config import ModelConfig, from_dict, require
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError, closest, quoted
from wsparse.interop import state_dict
from wsparse.interop.fields import Fields

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILES = ("pytorch_model.bin", "sparse_model.bin")
# Of the text of an imported run.
SOURCE, DOMAIN = "hf:SimpleStories/SimpleStories:train:story", "stories"
_TRAINING_FILE, _TOKENIZER_FILE = "training_config.yaml", "tokenizer.json"

_KEYS = state_dict.Keys(
    root="",
    block="blocks.{}",
    sink="attn.attn_fn.sink_logit",
    causal_mask=r"blocks\.\d+\.attn\.causal_mask",
)
params_from_state = functools.partial(state_dict.params_from_state, keys=_KEYS)

# The AbsTopK sites of a config that does not list them, and ours by their names.
_DEFAULT_SITES = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"
_SITES = {site: site for site in _DEFAULT_SITES.split(",")} | {"resid_mid": "resid_post_attn"}

# Sections and fields that do not change inference.
_SECTIONS = frozenset(["model_config", "sparsity_config", "training_config", "bridges_config"])
_IGNORED_FIELDS = {
    "model_config": frozenset(["dropout"]),
    "sparsity_config": frozenset([
        "enable_weight_sparsity", "target_l0_fraction", "sparsity_anneal_start_fraction",
        "sparsity_anneal_end_fraction", "anneal_type", "min_weights_per_neuron",
    ]),
}  # fmt: skip


def _section(config: Mapping[str, Any], name: str) -> Fields:
    """Returns the fields of a section of a `config.json`."""
    if not isinstance(config.get(name), dict):
        raise UserError(f"the published config must have the section {name}")
    return Fields(config[name], ignored=_IGNORED_FIELDS[name], section=name)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model config of a `config.json`.

    Fields that it lacks have the defaults of the published code; the model's sizes must be there.

    Raises:
      UserError: A field is missing, is unknown, has the wrong type, or has a value for which the model has no
        variant.
    """
    if unknown := sorted(set(fields) - _SECTIONS):
        near = closest(unknown[0], _SECTIONS)
        raise UserError(f"the published config has an unknown section {quoted(unknown[0])}{near}")
    of_model, of_sparsity = (_section(fields, name) for name in ("model_config", "sparsity_config"))
    d_model, d_head = of_model.take("d_model"), of_model.take("d_head")
    for name, value in (("d_model", d_model), ("d_head", d_head)):
        require(type(value) is int and value > 0, f"model_config.{name} must be a positive integer", value)
    require(d_model % d_head == 0, f"model_config.d_model must be a multiple of d_head={d_head}", d_model)
    rms, sink = of_model.take_flag("use_rms_norm", True), of_model.take_flag("use_attention_sinks", True)
    require(
        of_model.take_flag("use_flash_attention", True) or not sink,
        "model_config.use_flash_attention must be true with attention sinks (their code drops the sinks)",
        False,
    )
    values = {
        "vocab_size": of_model.take("vocab_size"),
        "context": of_model.take("n_ctx"),
        "n_layer": of_model.take("n_layer"),
        "d_model": d_model,
        "n_head": d_model // d_head,
        "d_head": d_head,
        "d_mlp": of_model.take("d_mlp", None),
        "norm": "rms" if rms else "layer",
        "bias": of_model.take_flag("use_bias", True),
        "activation": of_model.take("activation", "gelu"),
        "tied_embeddings": of_model.take_flag("tie_embeddings", False),
        "position": "added" if of_model.take_flag("use_positional_embeddings", False) else "none",
        "bigram": "learned" if of_model.take_flag("use_bigram_table", True) else "none",
        "sink": sink,
        **_abs_top_k(of_sparsity),
    }
    of_model.finish()
    of_sparsity.finish()
    return from_dict(ModelConfig, values, where="model.")


def _abs_top_k(of_sparsity: Fields) -> dict[str, Any]:
    """Returns our fields of AbsTopK."""
    enabled = of_sparsity.take_flag("enable_activation_sparsity", True)
    fraction = of_sparsity.take("activation_topk_fraction", 0.25)
    listed = of_sparsity.take("activation_sparsity_locations", _DEFAULT_SITES)
    name = "sparsity_config.activation_sparsity_locations"
    require(isinstance(listed, str), f"{name} must be names separated by commas", listed)
    theirs = [site.strip() for site in listed.split(",") if site.strip()]
    if enabled and "resid_pre" in theirs:
        raise UserError(
            f"{name} has resid_pre, AbsTopK of the residual stream before each block, the embeddings "
            "included: there is no variant of the model for it"
        )
    for site in theirs if enabled else ():
        if site not in _SITES:
            raise UserError(f"{name} has an unknown site {quoted(site)}{closest(site, _SITES)}")
    if not enabled:
        return {"abs_top_k_fraction": None}
    return {"abs_top_k_fraction": fraction, "abs_top_k_sites": [_SITES[site] for site in theirs]}


def load(folder: str | os.PathLike[str]) -> tuple[ModelConfig, model.Params]:
    """Reads a published checkpoint; PyTorch is not needed.

    Weights in 16 bits are widened to float32, which is exact. A warning says so where the model was trained
    with other AbsTopK sites than those that the published code runs it with.

    Returns:
      `(config, params)`, the parameters as float32 jax arrays.

    Raises:
      UserError: A file is missing or damaged, a field or key is missing or unknown, a shape does not fit,
        or an array has another dtype (`torch_file.TorchFileError` for errors of the file itself).
    """
    folder = pathlib.Path(folder)
    config = state_dict.read_config(folder / CONFIG_FILE, model_config)
    weights = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} has neither {' nor '.join(WEIGHTS_FILES)}")
    params = state_dict.read_params(weights, config, _KEYS, params_from_state)
    if (trained := _trained_sites(folder)) is not None and config.abs_top_k_fraction is not None:
        ours = {_SITES.get(site, site) for site in trained}
        if other := sorted(ours ^ set(config.abs_top_k_sites)):
            log.warning(
                "%s differs from %s in the AbsTopK sites: %s. It is read by the latter, as the published "
                "code does",
                folder / _TRAINING_FILE, CONFIG_FILE, ", ".join(map(quoted, other)),
            )  # fmt: skip
    return config, params


def _trained_sites(folder: pathlib.Path) -> list[str] | None:
    """Returns the AbsTopK sites that the file of training settings lists, None where there is none.

    `config.json` does not repeat them, and the published code does not read them from here.
    """
    try:
        text = (folder / _TRAINING_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    listed = re.search(r"^\s*activation_sparsity_locations:\s*['\"]?([\w, ]+)", text, flags=re.MULTILINE)
    return listed and [site.strip() for site in listed[1].split(",")]


def load_tokenizer(path: pathlib.Path) -> tokenizer_lib.Tokenizer:
    """Returns the tokenizer of a `tokenizer.json`, or of a folder that has one."""
    path = path / _TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"no tokenizer at {path}: give the tokenizer.json of the tokenizer that config.json names with "
            "--tokenizer=FILE. Without one there is no run, but the module's load works from Python"
        )
    return tokenizer_lib.load(path)
