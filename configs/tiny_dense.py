"""The dense twin of configs/tiny.py: same data, model and steps, every weight kept.

Reproduces: the dense baseline to set beside configs/tiny.py.
Hardware: 2 CPU cores.
Minutes: as configs/tiny.py.
Expected loss: 2.33 held out (seed 0). Expected L0: 1, no weight is removed.
Command: python -m wsparse.train --config=configs/tiny_dense.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={"vocab_size": 1024, "context": 64, "n_layer": 2, "d_model": 128, "n_head": 8},
        sparsity={"density": 1.0, "anneal_end": 0.4},
        optimizer={"learning_rate": 6e-3},
        data={"source": "0.7*idioms+0.3*stdlib", "megabytes": 10.0},
        steps=900,
        batch_size=40,
    )
