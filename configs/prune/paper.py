"""The procedure of Gao et al. 2025 on a laptop: a target of 0.15 nats, controls, the whole curve.

Reproduces: the procedure, not the size: the paper runs thousands of steps in each of many trials. The
    settings are the defaults of `wsparse.circuits.settings.Settings`; docs/results.md has circuits of the
    recipe `results`.
Hardware: 2 CPU cores.
Minutes: not measured.
Command: python -m wsparse.prune --run=runs/tiny --task=all --config=configs/prune/paper.py
"""

import ml_collections

from wsparse.circuits.settings import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe()
