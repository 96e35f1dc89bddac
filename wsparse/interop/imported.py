"""Run folders of models from elsewhere."""

from __future__ import annotations

import pathlib

from wsparse import model, runs
from wsparse.config import DataConfig, ModelConfig, TrainConfig
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError


def check_out(out: pathlib.Path) -> None:
    """Raises a UserError if nothing can be written to `out`, because something is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not empty: choose another folder")


def write(
    out: pathlib.Path,
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    data: DataConfig,
    origin: pathlib.Path,
) -> TrainConfig:
    """Writes a run folder, which `prune`, `sample` and the other commands take like one trained here.

    Args:
      out: The run folder.
      config: Model config.
      params: Parameters.
      tokenizer: Tokenizer of the model.
      data: Where the run's text comes from. It is read when it is first needed.
      origin: Where the model was, for the summary.

    Returns:
      The config of the run, with defaults for the training (sparsity, optimizer, steps), which is unknown.

    Raises:
      UserError: The tokenizer does not fit the model.
    """
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            "give the model's own tokenizer with --tokenizer"
        )
    run_config = TrainConfig(model=config, data=data)
    runs.create(out, run_config, params, tokenizer, summary={"imported_from": str(origin)})
    return run_config
