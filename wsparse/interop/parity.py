"""Compares our numbers with recorded ones: `python -m wsparse.interop.parity --folder=tests/golden`.

Each folder inside it is a published checkpoint of either format with an `expected.npz`: `tokens`, `logits`,
`loss` and `act/NAME` for every recorded location, computed by PyTorch. Prints a table in Markdown; the exit
status is 1 if an error is above 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from wsparse import markdown, model, nodes
from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.interop import openai, sparse_pretrain
from wsparse.ops import cpu

TOLERANCE = 1e-5
# What reads a checkpoint with a config of this name.
_LOADERS = {openai.CONFIG_FILE: openai.load, sparse_pretrain.CONFIG_FILE: sparse_pretrain.load}
# Locations that are recorded under another name.
_RECORDED = {"attn.resid_in": "resid_in", "mlp.resid_mid": "resid_mid"}


class Error(NamedTuple):
    """Largest and mean absolute difference, both divided by the largest recorded magnitude."""

    max: float
    mean: float


def measure(folder: pathlib.Path) -> dict[str, Error]:
    """Returns the errors of a checkpoint's logits, loss and activations, over all its layers.

    Raises:
      UserError: The folder is not a checkpoint, has no recorded numbers, or has some of an unknown location.
    """
    loaders = (load for name, load in _LOADERS.items() if (folder / name).is_file())
    config, params = next(loaders, openai.load)(folder)
    try:
        with np.load(folder / "expected.npz") as file:
            expected = dict(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'expected.npz'} cannot be read: {error}") from error
    tokens = expected.pop("tokens").astype(np.int32)
    with jax.default_matmul_precision("highest"):
        logits, acts = jax.device_get(
            jax.jit(model.forward, static_argnames="config")(params, tokens, config)
        )
    errors = {
        "logits": relative_error(logits, expected.pop("logits")),
        "loss": relative_error(_loss(logits, tokens), expected.pop("loss")),
    }
    for location in (*nodes.NODES, *nodes.OTHER_LOCATIONS):
        values = acts[location]
        name = _RECORDED.get(location, location)
        keys = [f"act/{i}.{name}" for i in range(config.n_layer)]
        keys = [f"act/{location}"] if location == "final_resid" else keys
        want = np.stack([expected.pop(key) for key in keys])
        errors[location] = relative_error(values.reshape(want.shape), want)
    if expected:
        raise UserError(f"{folder / 'expected.npz'} has numbers of an unknown location: {min(expected)}")
    return errors


def relative_error(got: np.ndarray | np.floating, want: np.ndarray) -> Error:
    """Returns the distance of `got` from `want`, as a fraction of the largest magnitude of `want`."""
    difference = np.abs(np.asarray(got, np.float64) - want) / np.max(np.abs(want))
    return Error(float(np.max(difference)), float(np.mean(difference)))


def _loss(logits_BTV: np.ndarray, tokens_BT: np.ndarray) -> np.floating:
    """Returns the mean cross-entropy; as recorded, the last target is the first token."""
    log_p = np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)
    return -np.mean(np.take_along_axis(log_p, np.roll(tokens_BT, -1, 1)[..., None], 2))


def table(errors: Mapping[str, Mapping[str, Error]]) -> str:
    """Returns a Markdown table: a row per activation, the largest and the mean error per model."""
    columns = list(errors.values())
    header = ["activation", *(cell for name in errors for cell in (f"{name}: max", "mean"))]
    rows = [[name, *(f"{value:.1e}" for column in columns for value in column[name])] for name in columns[0]]
    return markdown.table(header, rows)


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    del argv
    cpu.enable()
    options: Any = flags.FLAGS
    folder = pathlib.Path(options.folder)
    models = sorted(path.parent for name in _LOADERS for path in folder.glob(f"*/{name}"))
    if not models:
        raise UserError(f"{folder} has no published checkpoint in a folder of its own")
    errors = {path.name: measure(path) for path in models}
    print(table(errors))
    worst = max(error.max for column in errors.values() for error in column.values())
    print(f"largest: {worst:.1e}; allowed: {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE else 1


def _define_flags() -> None:
    flags.DEFINE_string("folder", None, "A folder of published checkpoints.", required=True)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
