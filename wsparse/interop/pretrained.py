"""Models as folders in the layout of the Hugging Face Hub.

The folder has `config.json` (ours, under "model"; under "data" what the text is, where that is known),
`model.safetensors` (parameters by path, in their own dtype), `tokenizer.json` and `README.md`, a model card
made from them.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from wsparse import files, markdown, model, runs, trees
from wsparse.config import DataConfig, ModelConfig, from_dict, to_dict
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError, optional, quoted, reason

_CONFIG, _WEIGHTS, _TOKENIZER, _README = "config.json", "model.safetensors", "tokenizer.json", "README.md"
MODEL_FILES = (_CONFIG, _WEIGHTS, _TOKENIZER)
MODEL_TYPE = "wsparse"
# What decides a run's text. The others concern the machine, or are paths on it.
_OF_TEXT = ("source", "domain", "megabytes", "validation_fraction", "seed")
_DTYPES = "float32, float16 or bfloat16"


class Pretrained(NamedTuple):
    """A model with its tokenizer."""

    config: ModelConfig
    params: model.Params
    tokenizer: tokenizer_lib.Tokenizer


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: model.Params,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    data: DataConfig | None = None,
    name: str | None = None,
    val_loss: float | None = None,
    repository: str = "",
    about: str = "",
) -> None:
    """Writes a model with its tokenizer and a model card.

    Args:
      folder: Made if missing; the files of an earlier model are replaced.
      config: Model config.
      params: Parameters, written bit for bit in their own dtype.
      tokenizer: Tokenizer of the model.
      data: Where its text comes from, for runs made of the folder; None if that is not known.
      name: Title of the card; None is the name of the folder.
      val_loss: Held-out loss in nats per token, for the card.
      repository: Repository id, "owner/name", that the folder is made for; the card says how to load that.
      about: Sections of the card between its table and how the model is loaded, in Markdown.

    Raises:
      UserError: The parameters or the tokenizer do not fit the config, the folder cannot be made, or it holds
        files of the same names that are not such a model's, as a run's folder does.
    """
    folder = pathlib.Path(folder)
    _refuse_foreign(folder)
    leaves = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    _check_fit(config, leaves, tokenizer, "the given model")
    files.make_folder(folder)
    with files.replacing(folder / _WEIGHTS) as part:
        # The library writes arrays as they lie in memory, transposed ones included. `save_file` would make
        # a file that only its owner can read.
        contiguous = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
        part.write_bytes(safetensors.numpy.save(contiguous, metadata={"format": MODEL_TYPE}))
    tokenizer.save(folder / _TOKENIZER)
    of_text = {} if data is None else {"data": {key: getattr(data, key) for key in _OF_TEXT}}
    files.write_json(folder / _CONFIG, {"model_type": MODEL_TYPE, "model": to_dict(config)} | of_text)
    title = name or folder.absolute().name
    files.write_text(folder / _README, _card(title, config, params, val_loss, repository, about))


def from_pretrained(source: str | os.PathLike[str], *, revision: str | None = None) -> Pretrained:
    """Reads a model from a folder of `save_pretrained`, or from a repository of the Hugging Face Hub.

    Args:
      source: A folder; where there is none, a repository id, "owner/name" (needs the extra `hub`).
      revision: Branch, tag or commit of the repository.

    Returns:
      The model; parameters are jax arrays of the stored dtypes.

    Raises:
      UserError: Neither folder nor repository exists (or there is no network), or the files are not such a
        model.
    """
    folder = pathlib.Path(source)
    if not folder.is_dir():
        folder = download(str(source), revision)
    values = _read_config(folder)
    config = from_dict(ModelConfig, values["model"], where="model.")
    tokenizer = tokenizer_lib.load(folder / _TOKENIZER)
    path = folder / _WEIGHTS
    try:
        leaves = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except AttributeError as error:  # The library looks every dtype up in NumPy.
        raise UserError(f"{path} has a dtype that is not {_DTYPES}: {error}") from error
    _check_fit(config, leaves, tokenizer, str(path))
    return Pretrained(config, trees.unflatten(jax.tree.map(jnp.array, leaves)), tokenizer)


def read_data(folder: pathlib.Path) -> DataConfig | None:
    """Returns where the text of a folder's model comes from; None where the folder does not say."""
    values = _read_config(folder)
    return from_dict(DataConfig, values["data"], where="data.") if "data" in values else None


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    values = files.read_json(folder / _CONFIG)
    if values.get("model_type") != MODEL_TYPE or not isinstance(values.get("model"), dict):
        raise UserError(
            f"{folder / _CONFIG} is not of a wsparse model (model_type={values.get('model_type')!r}): "
            "published checkpoints are read by wsparse.interop.openai and wsparse.interop.sparse_pretrain"
        )
    return values


def _refuse_foreign(folder: pathlib.Path) -> None:
    """Refuse a folder with files that would be replaced, and that are not of a model written here."""
    present = [name for name in (*MODEL_FILES, _README) if (folder / name).exists()]
    if not present:
        return
    config = files.read_json(folder / _CONFIG) if _CONFIG in present else {}
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{folder} holds {present[0]}, which is not of a model in this layout: choose another folder"
        )


def _check_fit(config: ModelConfig, leaves, tokenizer: tokenizer_lib.Tokenizer, what: str) -> None:
    """Rejects arrays that do not fit the config, by name."""
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    expected = {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}
    given = {path: leaf.shape for path, leaf in leaves.items()}
    for path in sorted(expected | given):
        if expected.get(path) != given.get(path):
            raise UserError(
                f"{what} does not fit its config: {quoted(path)} has shape {given.get(path, 'none')}, "
                f"the config says {expected.get(path, 'none')}"
            )
    for path, leaf in leaves.items():
        if leaf.dtype not in (np.float32, np.float16, jnp.bfloat16):
            raise UserError(f"{what} has {quoted(path)} of {leaf.dtype}, it must be {_DTYPES}")
        if not np.isfinite(leaf).all():
            raise UserError(f"{what} has NaN or infinite numbers in {quoted(path)}")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{what} has a tokenizer of {tokenizer.vocab_size} tokens, its config says "
            f"model.vocab_size={config.vocab_size}"
        )


def is_repository(text: str) -> bool:
    """Returns whether a text has the form of a repository id of the Hub, "owner/name"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def download(repository: str, revision: str | None, *, more: Sequence[str] = ()) -> pathlib.Path:
    """Returns the folder of a repository's model files, from the Hub or its client's cache.

    Args:
      repository: Repository id, "owner/name".
      revision: Branch, tag or commit.
      more: Patterns of other files that are wanted.

    Raises:
      UserError: It is no repository id, the extra is missing, or the repository cannot be loaded.
    """
    if not is_repository(repository):
        raise UserError(
            f"{repository} is neither a folder nor a repository id of the Hugging Face Hub (owner/name)"
        )
    purpose = f"{repository} is not a folder here, and loading it from the Hub"
    huggingface_hub = optional("huggingface_hub", "hub", purpose)
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[*MODEL_FILES, *more]
            )
        )
    except Exception as error:  # HTTP, name resolution and cache errors of several libraries.
        why = reason(error)
        failure = f"and could not be loaded from the Hugging Face Hub: {why}"
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            failure = (
                "was not downloaded before, and the Hugging Face Hub does not answer: is there a network? "
                f"({why.removeprefix('Got: ')})"
            )
        raise UserError(f"{repository} is not a folder here, {failure}") from error


def _card(
    title: str, config: ModelConfig, params: model.Params, val_loss: float | None, repository: str, about: str
) -> str:
    sizes = runs.sizes(params)
    sparse = sizes["l0"] < 0.5
    rows = {
        "layers": config.n_layer,
        "d_model": config.d_model,
        "heads": f"{config.n_head} of {config.d_head}",
        "MLP neurons a layer": config.mlp_width,
        "vocabulary": config.vocab_size,
        "context": config.context,
        "parameters": f"{sizes['parameters']:,}",
        "nonzero weights": f"{sizes['nonzeros']:,}, {sizes['l0']:.2%} of the sparse matrices",
    }
    if val_loss is not None:
        rows["held-out loss"] = f"{val_loss:.4f} nats per token"
    return f"""---
library_name: wsparse
pipeline_tag: text-generation
tags:{f"{chr(10)}- weight-sparse" if sparse else ""}
- interpretability
---

# {title}

{_SPARSE if sparse else _DENSE}

{markdown.table(("", ""), rows.items())}{f"{chr(10)}{about}{chr(10)}" if about else ""}
## Load it

```python
{_LOAD_RUN.format(repository) if repository else _LOAD_FOLDER}
```

`config.json` has the architecture, `model.safetensors` the parameters by path, `tokenizer.json` the
tokenizer, which the `tokenizers` library reads too.
"""


_SPARSE = """A weight-sparse transformer: most of its weights are exactly zero, so that what it does can be
read off small circuits ([Gao et al. 2025](https://arxiv.org/abs/2511.13653))."""
_DENSE = """A transformer of the architecture of [Gao et al. 2025](https://arxiv.org/abs/2511.13653). Most of
its weights are not zero."""

_LOAD_FOLDER = """import jax.numpy as jnp
from wsparse import hooks
from wsparse.interop.pretrained import from_pretrained

config, params, tokenizer = from_pretrained("path/of/this/folder")  # or its id on the Hub
tokens = jnp.array([tokenizer.encode("def add(a, b):")])
logits, cache = hooks.run_with_cache(params, tokens, config)
cache["0.mlp.post_act"]  # (batch, time, neurons)"""

_LOAD_RUN = """import wsparse

run = wsparse.load("{}")
logits, cache = run.run_with_cache("def add(a, b):")
cache["0.mlp.post_act"]  # (batch, time, neurons)
run.circuits  # by task"""
