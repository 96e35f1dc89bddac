"""Every task of several models on little time: the settings of the comparisons in docs/results.md.

Reproduces: sparse models beside their dense twins in docs/results.md. Smallest sufficient circuits: nothing
    is added to make them necessary. The variant `robust` holds them to an adversary, with fewer trials; the
    variants `model` and `vocabulary` to the model's own answers, or to its probabilities of all tokens.
Hardware: 2 CPU cores.
Minutes: 8 for all tasks of `tiny`, 18 for those of `small`, on one core; several for a task of `tiny` with
    `robust`.
Command: python -m wsparse.prune --run=RUN --task=all --config=results
"""

from typing import Any

import ml_collections

from wsparse.circuits.settings import recipe

VARIANTS = ("model", "robust", "vocabulary")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "model": {"held_to": "model"},
        "vocabulary": {"held_to": "vocabulary"},
        # Gates and adversaries need time to answer each other. Trying single nodes takes most of the time,
        # and hardly ever finds one that the next adversary does not need.
        "robust": {
            "objective": "robust",
            "steps": 400,
            "trials": 1,
            "single_removals": 0,
            "sweep": (),
            "controls": False,
        },
    }
    settings: dict[str, Any] = {
        "trials": 3,
        "parallel": 1,
        "finalists": 1,
        "max_tokens": 44,
        "discretize_pairs": 32,
        "confirm_pairs": 128,
        "sweep": (0.3,),
        "single_removals": 64,
        "necessity": 0.0,
    }
    return recipe(**settings | changes[variant])
