"""The procedure of Gao et al. 2025 on a laptop: a target of 0.15 nats, controls, the whole curve.

Reproduces: the circuits of docs/results.md that were found by default: the settings are the defaults of
    `wsparse.circuits.settings.Settings`. The paper runs thousands of steps in each of many trials.
Hardware: 2 CPU cores.
Minutes: see docs/results.md.
Command: python -m wsparse.prune --run=runs/tiny --task=all --config=configs/prune/paper.py
"""

import ml_collections

from wsparse.circuits.settings import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe()
