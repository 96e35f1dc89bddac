"""Circuits that hold when closed nodes are let through, at random or by an adversary.

Reproduces: masks against stochastic and adversarial ablation. docs/results.md says how large such circuits
    are by the recipe `results:robust`; those of this one are not measured.
Hardware: 2 CPU cores.
Minutes: several times those of `quick` on the same model; not measured on a machine of its own.
Command: python -m wsparse.prune --run=runs/tiny --task=if_equals --config=configs/prune/robust.py
"""

import ml_collections

from wsparse.circuits.settings import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        objective="robust",
        # Gates and adversaries need time to answer each other.
        steps=600,
        trials=2,
        parallel=2,
        finalists=1,
        single_removals=64,
        sweep=(0.3,),
        controls=False,
    )
