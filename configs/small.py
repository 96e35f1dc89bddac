"""A larger model for one machine: sparse, d_model 256, 2 layers, 6.1 million tokens.

Reproduces: a weight-sparse model big enough for most of the twenty tasks, on a laptop.
Hardware: 2 CPU cores.
Minutes: planned for under 60; not measured.
Expected loss: not measured. Expected L0: exactly round(size / 32) in every projected matrix.
Command: python -m wsparse.train --config=configs/small.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={"vocab_size": 1024, "context": 64, "n_layer": 2, "d_model": 256, "n_head": 16},
        sparsity={"density": 1 / 64, "anneal_end": 0.4},
        optimizer={"learning_rate": 6e-3},
        data={"source": "0.8*idioms+0.2*stdlib", "megabytes": 24.0, "validation_fraction": 0.05},
        steps=2000,
        batch_size=64,
        checkpoint_every=500,
    )
