"""A run's folder as the other commands read it: config, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax

from wsparse import checkpoint, files, model, sparsity
from wsparse.config import TrainConfig, from_dict, to_dict
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds.

    Attributes:
      folder: where it is.
      config: what was trained.
      step: optimizer steps behind `params`.
      params: float32 parameters on the default device.
      tokenizer: what the tokens mean.
    """

    folder: pathlib.Path
    config: TrainConfig
    step: int
    params: model.Params
    tokenizer: tokenizer_lib.Tokenizer


def read_config(folder: str | os.PathLike[str]) -> TrainConfig:
    """The config of a run folder.

    Raises:
      UserError: the folder is missing, or is no run.
    """
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
    return from_dict(TrainConfig, files.read_json(path))


def load(folder: str | os.PathLike[str], *, step: int | None = None) -> Run:
    """Read a run.

    Args:
      folder: the `--workdir` of training.
      step: which checkpoint; None is the newest that is undamaged.

    Raises:
      UserError: the folder is no run, has no usable checkpoint, or lacks its tokenizer.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: model.init(config.model, jax.random.key(config.seed)))
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    found, state = checkpoint.read(folder / "checkpoints", {"params": like}, step=step)
    tokenizer = tokenizer_lib.load(folder / "tokenizer.json")
    return Run(folder, config, found, state["params"], tokenizer)


def sizes(params: model.Params) -> dict[str, Any]:
    """What `summary.json` says about parameters alone.

    "l0" is the share of nonzeros in the projected matrices, "nonzeros" their number, "parameters" that of all
    parameters, and "alive_neurons", per layer, those with weights on both sides.
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
    """Write a run that was not trained here, as `load` and the commands read it.

    Args:
      folder: where it will be, all of it or nothing; it does not exist, or is empty.
      config: with the model's.
      params: the model's parameters.
      tokenizer: what the tokens mean.
      summary: what `summary.json` has beside `sizes`.

    Raises:
      UserError: the folder cannot be made.
    """
    folder = pathlib.Path(folder).absolute()
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    files.make_folder(part, shown=folder)
    try:
        tokenizer.save(part / "tokenizer.json")
        with checkpoint.Checkpointer(part / "checkpoints") as checkpoints:
            checkpoints.save(0, {"params": params}, {"config": to_dict(config)})
        files.write_json(part / "summary.json", sizes(params) | summary)
        files.write_json(part / "config.json", to_dict(config))
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
