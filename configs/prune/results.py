"""Every task of several models on little time: the settings of the comparison in docs/results.md.

Reproduces: sparse models beside their dense twins in docs/results.md. Smallest sufficient circuits: nothing
    is added to make them necessary.
Hardware: 2 CPU cores.
Minutes: see docs/results.md, beside each model.
Command: python -m wsparse.prune --run=RUN --task=all --config=configs/prune/results.py
"""

import ml_collections

from wsparse.circuits.settings import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        trials=3,
        parallel=1,
        finalists=1,
        max_tokens=44,
        discretize_pairs=32,
        confirm_pairs=128,
        sweep=(0.3,),
        single_removals=64,
        necessity=0.0,
    )
