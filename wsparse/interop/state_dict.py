"""State dicts of PyTorch models with GPT-2's modules, which published formats share but for some names.

Weights are stored `(out, in)`, a key a layer, and q, k and v side by side; ours are `(in, out)` and stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from wsparse import files, model, trees
from wsparse.config import ModelConfig
from wsparse.errors import UserError, closest, located, quoted
from wsparse.interop import torch_file

UNEMBED = "lm_head.weight"
_WEIGHT_TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """The names in which formats differ.

    Attributes:
      root: What the embeddings' and the last norm's keys begin with.
      block: What a layer's keys begin with, its number in braces.
      sink: The sinks' key within a layer.
      logits_bias: Key of the bias of the logits; "" in a format without.
      causal_mask: Regular expression of keys that hold masks, which are no parameters.
    """

    root: str
    block: str
    sink: str
    logits_bias: str = ""
    causal_mask: str

    @property
    def tokens(self) -> str:
        return f"{self.root}wte.weight"

    @property
    def positions(self) -> str:
        return f"{self.root}wpe.weight"

    def is_mask(self, key: str) -> bool:
        return re.fullmatch(self.causal_mask, key) is not None


@dataclasses.dataclass(frozen=True)
class Entry:
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


def entries(config: ModelConfig, keys: Keys) -> Iterator[Entry]:
    """Yields an entry for every published array that holds parameters."""
    vocab, d_model, width = config.vocab_size, config.d_model, config.attention_width

    def norm(key, path, size, layer=None):
        yield Entry(f"{key}.weight", (f"{path}/gain",), (size,), layer)
        if config.norm == "layer" and config.norm_bias:
            yield Entry(f"{key}.bias", (f"{path}/bias",), (size,), layer)

    def linear(key, paths, inputs, outputs, layer):
        kernels = tuple(f"{path}/kernel" for path in paths)
        yield Entry(f"{key}.weight", kernels, (outputs, inputs), layer, transposed=True)
        if config.bias:
            biases = tuple(f"{path}/bias" for path in paths)
            yield Entry(f"{key}.bias", biases, (outputs,), layer)

    yield Entry(keys.tokens, ("embed/tokens",), (vocab, d_model))
    if config.position != "none":
        table = "sinusoids" if config.position == "concat_sinusoid" else "positions"
        shape = (config.context, config.d_pos or d_model)
        yield Entry(keys.positions, (f"embed/{table}",), shape)
    qkv = tuple(f"blocks/attn/{part}" for part in "qkv")
    for i in range(config.n_layer):
        key = keys.block.format(i)
        yield from norm(f"{key}.ln_1", "blocks/attn_norm", d_model, i)
        yield from norm(f"{key}.ln_2", "blocks/mlp_norm", d_model, i)
        if config.concatenates_positions:
            yield from norm(f"{key}.ln_p1", "blocks/attn_pos_norm", config.d_pos, i)
            yield from norm(f"{key}.ln_p2", "blocks/mlp_pos_norm", config.d_pos, i)
        yield from linear(f"{key}.attn.c_attn", qkv, config.read_width, 3 * width, i)
        yield from linear(f"{key}.attn.c_proj", ("blocks/attn/out",), width, d_model, i)
        if config.sink:
            yield Entry(f"{key}.{keys.sink}", ("blocks/attn/sink",), (config.n_head,), i)
        yield from linear(f"{key}.mlp.c_fc", ("blocks/mlp/fc",), config.read_width, config.mlp_width, i)
        yield from linear(f"{key}.mlp.c_proj", ("blocks/mlp/proj",), config.mlp_width, d_model, i)
    yield from norm(f"{keys.root}ln_f", "head/norm", d_model)
    if not config.tied_embeddings:
        yield Entry(UNEMBED, ("head/unembed",), (vocab, d_model), transposed=True)
    if config.bigram != "none":
        yield Entry("bigram_table", ("head/bigram",), (vocab, vocab))
    if config.logits_bias:
        yield Entry(keys.logits_bias, ("head/logits_bias",), (vocab,))


def params_from_state(config: ModelConfig, state: Mapping[str, np.ndarray], keys: Keys) -> dict[str, Any]:
    """Returns the parameters of a published state dict of arrays.

    Raises:
      UserError: A key is missing, or unknown and no causal mask, or the shape of an array does not fit the
        config.
    """
    remaining = {key: value for key, value in state.items() if not keys.is_mask(key)}

    def take(key, shape):
        if key not in remaining:
            raise UserError(f"the checkpoint lacks {key!r}{closest(key, remaining)}")
        array = np.asarray(remaining.pop(key))
        if array.shape != shape:
            raise UserError(f"{key!r} must have shape {shape} for this config, got {array.shape}")
        return array

    leaves: dict[str, Any] = {}
    for entry in entries(config, keys):
        array = take(entry.key, entry.shape)
        array = array.T if entry.transposed else array
        for path, part in zip(entry.paths, np.split(array, len(entry.paths), axis=-1), strict=True):
            if entry.layer is None:
                leaves[path] = part
            else:
                leaves.setdefault(path, []).append(part)
    if config.tied_embeddings:
        unembed = take(UNEMBED, (config.vocab_size, config.d_model))
        if not np.array_equal(unembed, leaves["embed/tokens"]):
            raise UserError("the config ties the embeddings, but lm_head.weight and wte.weight differ")
    if remaining:
        raise UserError(
            f"the checkpoint has {len(remaining)} keys that do not belong to the config, such as "
            f"{quoted(min(remaining))}"
        )
    stacked = {p: np.stack(leaf) if isinstance(leaf, list) else leaf for p, leaf in leaves.items()}
    return trees.unflatten(stacked)


def read_config(path: pathlib.Path, convert: Callable[[Mapping[str, Any]], ModelConfig]) -> ModelConfig:
    """Returns what `convert` makes of a published config.

    Raises:
      UserError: There is no such file, or it is refused.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} is not a published checkpoint: it has no {path.name}")
    fields = files.read_json(path)
    with located(f"{path}: "):
        return convert(fields)


def read_params(
    path: pathlib.Path,
    config: ModelConfig,
    keys: Keys,
    convert: Callable[[ModelConfig, Mapping[str, np.ndarray]], dict[str, Any]],
) -> model.Params:
    """Returns what `convert` makes of a file's state dict, as float32 jax arrays.

    Raises:
      UserError: The file is damaged, has weights of another type than float32, float16 and bfloat16, or is
        refused.
    """
    state = torch_file.read(path)
    with located(f"{path}: "):
        for key, array in state.items():
            if array.dtype not in _WEIGHT_TYPES and not keys.is_mask(key):
                raise UserError(
                    f"{quoted(key)} is of type {array.dtype}; weights must be float32, float16 or bfloat16"
                )
        params = convert(config, state)
    # Copies, since the arrays of the state are views of the file.
    return jax.tree.map(lambda leaf: jnp.array(np.array(leaf, np.float32)), params)
