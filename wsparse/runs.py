"""A run's folder as an object: config, parameters, tokenizer, text."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np

from wsparse import checkpoint, files, model, sparsity
from wsparse.config import TrainConfig, from_dict, to_dict
from wsparse.data import batches, dataset, tokens
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError, located

log = logging.getLogger(__name__)

# Text that is read of a source which is not the run's own, in bytes.
_OTHER_TEXT_BYTES = 150_000
# `data.source` of a model whose text nobody has named; no source of documents has this name.
UNKNOWN_TEXT = "unknown"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A run folder that was read.

    Attributes:
      step: Optimizer steps behind `params`.
      params: Float32 parameters on the default device.
    """

    folder: pathlib.Path
    config: TrainConfig
    step: int
    params: model.Params
    tokenizer: tokenizer_lib.Tokenizer

    def __repr__(self) -> str:
        shape = self.config.model
        return (
            f"Run({str(self.folder)!r}, step={self.step}, n_layer={shape.n_layer}, d_model={shape.d_model}, "
            f"density={self.config.sparsity.density:.3g}, parameters={model.count_parameters(self.params):,})"
        )

    @functools.cached_property
    def data(self) -> dataset.Dataset:
        """The tokens that the run was trained on and held out, from its folder.

        A run that has none there yet, such as an imported one, gets them from the sources of its config.
        """
        folder, config = self.folder / "data", self.config
        if config.data.source == UNKNOWN_TEXT:
            raise UserError(
                f"the text of the model in {self.folder} is not known: name its source, or one of such text, "
                f"at data.source in {self.folder / 'config.json'}"
            )
        if not folder.exists():
            log.info("%s keeps no text yet: reading %s", self.folder, config.data.source)
        data = dataset.open_dataset(folder, config, tokenizer=self.tokenizer)
        metadata = checkpoint.read_metadata(self.folder / "checkpoints", self.step)
        if metadata.get("data_digest", data.digest) != data.digest:
            log.warning(
                "the text in %s is not what this run was trained on (its digest differs): its sources are "
                "others on this machine, or have changed",
                folder,
            )
        return data

    def windows(
        self, split: tokens.Split, *, n: int = 512, seed: int | None = None, source: str = ""
    ) -> np.ndarray:
        """Returns at most `n` different windows of text, int32 `(W, context)`, the same at each call.

        Args:
          split: "train", or "validation" for text that training held out.
          seed: Seed of the order; by default that of the training, whose first windows these are then.
          source: Source of other text to draw from instead, such as "files:GLOB"; it is not kept.
        """
        context, data = self.config.model.context, self.config.data
        if source:
            components = dataset.other_text(source, data, self.tokenizer, max_bytes=_OTHER_TEXT_BYTES)
        else:
            components = self.data.side(split)
        seed = data.seed if seed is None else seed
        windows_WT = batches.windows(components, n=n, context=context, seed=seed)
        if not len(windows_WT):
            raise UserError(
                f"{source!r} has less than a window of {context} tokens: name a source with more text"
            )
        return windows_WT


def read_config(folder: str | os.PathLike[str]) -> TrainConfig:
    """Returns the config of a run folder."""
    path = pathlib.Path(folder) / "config.json"
    try:
        path.lstat()
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is not a run folder: it has no config.json; train one with "
            "python -m wsparse.train --config=tiny"
        ) from error
    except OSError:
        pass  # Reading it says what is wrong.
    values = files.read_json(path)
    if "model_type" in values:
        raise UserError(
            f"{folder} is a model in the layout of the Hugging Face Hub, not a run: "
            f"wsparse.load({str(folder)!r}) makes a run of it"
        )
    with located(f"{path}: "):
        return from_dict(TrainConfig, values)


def load(folder: str | os.PathLike[str], *, step: int | None = None) -> Run:
    """Returns the run in the `--workdir` of training, at its newest undamaged checkpoint by default.

    Raises:
      UserError: The folder is not a run, does not have a usable checkpoint, or its tokenizer is missing or
        another run's.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: model.init(config.model, jax.random.key(config.seed)))
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    step, state = checkpoint.read(folder / "checkpoints", {"params": like}, step=step)
    path = folder / "tokenizer.json"
    tokenizer = tokenizer_lib.load(path)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, but the run's model has "
            f"{config.model.vocab_size}: it is another run's, restore this run's"
        )
    original = checkpoint.read_metadata(folder / "checkpoints", step).get("tokenizer")
    if original is not None and tokenizer_lib.from_json(original).digest != tokenizer.digest:
        raise UserError(f"{path} is not the tokenizer this run was trained with: restore it")
    return Run(folder, config, step, state["params"], tokenizer)


def sizes(params: model.Params) -> dict[str, Any]:
    """Returns what `summary.json` says about parameters alone.

    "l0" is the fraction of nonzeros in the projected matrices; "alive_neurons", per layer, the number of
    those with weights on both sides.
    """
    counts = sparsity.l0(params).values()
    nonzeros = sum(count for count, _ in counts)
    return {
        "l0": nonzeros / sum(size for _, size in counts),
        "nonzeros": nonzeros,
        "parameters": model.count_parameters(params),
        "alive_neurons": jax.device_get(sparsity.alive_neurons(params)).tolist(),
    }


def create(
    folder: str | os.PathLike[str],
    config: TrainConfig,
    params: model.Params,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    summary: dict[str, Any],
) -> None:
    """Writes a run that was not trained here, as `load` and the commands read it.

    Args:
      folder: Folder to make, all of it or nothing; it does not exist, or is empty.
      config: Config with the model's.
      params: Parameters of the model.
      tokenizer: Tokenizer of the model.
      summary: Entries of `summary.json` beside `sizes`.
    """
    with files.new_folder(folder) as part:
        tokenizer.save(part / "tokenizer.json")
        with checkpoint.Checkpointer(part / "checkpoints") as checkpoints:
            metadata = {"config": to_dict(config), "tokenizer": tokenizer.to_json()}
            checkpoints.save(0, {"params": params}, metadata)
        files.write_json(part / "summary.json", sizes(params) | summary)
        files.write_json(part / "config.json", to_dict(config))
