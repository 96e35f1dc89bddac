"""How far our numbers are from recorded ones: `python -m wsparse.interop.parity tests/golden`.

Each folder below the given one is a published checkpoint with an `expected.npz`: `tokens`, `logits`, `loss`
and `act/NAME` for every recorded location, computed by the published code. Prints a table in Markdown, and
leaves with status 1 when an error is above 1e-5.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np

from wsparse import model, nodes
from wsparse.errors import UserError, run_plain
from wsparse.interop import openai

TOLERANCE = 1e-5
# Recorded under other names than ours.
_RECORDED = {"attn.resid_in": "resid_in", "mlp.resid_mid": "resid_mid"}


class Error(NamedTuple):
    """Largest and mean absolute difference, both divided by the largest recorded magnitude."""

    max: float
    mean: float


def measure(folder: pathlib.Path) -> dict[str, Error]:
    """Errors of a checkpoint's logits, loss, and each activation, over all its layers.

    Raises:
      UserError: the folder is no checkpoint, has no recorded numbers, or some that are of no location.
    """
    config, params = openai.load(folder)
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
        raise UserError(f"{folder / 'expected.npz'} has numbers of no location: {min(expected)}")
    return errors


def relative_error(got: np.ndarray | np.floating, want: np.ndarray) -> Error:
    """How far `got` is from `want`, as a fraction of the largest magnitude of `want`."""
    difference = np.abs(np.asarray(got, np.float64) - want) / np.max(np.abs(want))
    return Error(float(np.max(difference)), float(np.mean(difference)))


def _loss(logits_BTV: np.ndarray, tokens_BT: np.ndarray) -> np.floating:
    """Mean cross-entropy; the recorded one wraps around: the last target is the first token."""
    log_p = np.asarray(jax.nn.log_softmax(logits_BTV), np.float64)
    return -np.mean(np.take_along_axis(log_p, np.roll(tokens_BT, -1, 1)[..., None], 2))


def table(errors: Mapping[str, Mapping[str, Error]]) -> str:
    """Markdown: one row per activation, the largest and the mean error per model."""
    models = list(errors)
    rows = [
        f"| activation | {' | '.join(f'{name}: max | mean' for name in models)} |",
        f"|---|{'---|---|' * len(models)}",
    ]
    for name in errors[models[0]]:
        cells = [f"{value:.1e}" for each in models for value in errors[each][name]]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m wsparse.interop.parity", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="a folder of checkpoints")
    folder = parser.parse_args().folder
    models = sorted(path.parent for path in folder.glob(f"*/{openai.CONFIG_FILE}"))
    if not models:
        raise UserError(f"{folder} has no published checkpoint in a folder of its own")
    errors = {path.name: measure(path) for path in models}
    print(table(errors))
    worst = max(value.max for each in errors.values() for value in each.values())
    print(f"\nlargest: {worst:.1e}; allowed: {TOLERANCE:.0e}")
    sys.exit(0 if worst <= TOLERANCE else 1)


if __name__ == "__main__":
    run_plain(main)
