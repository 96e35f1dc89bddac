"""A first look at one task: three trials and no controls.

Reproduces: nothing; a circuit somewhat larger than the default settings find. `paper` has the defaults.
Hardware: 2 CPU cores.
Minutes: about a third of the default settings' on the same model; not measured on a machine of its own.
Command: python -m wsparse.prune --run=runs/tiny --task=single_double_quote --config=configs/prune/quick.py
"""

import ml_collections

from wsparse.circuits.settings import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe(trials=3, parallel=1, finalists=1, single_removals=64, sweep=(0.3,), controls=False)
