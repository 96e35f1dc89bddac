"""One layer, d_model 128, 1 weight in 32.

Reproduces: a model whose attention reads the embedding itself, so that a circuit is read in one step.
Hardware: 2 CPU cores.
Minutes: not measured. Expected loss: not measured. Expected L0: exactly round(size / 32) in every projected
    matrix.
Command: python -m wsparse.train --config=configs/one_layer.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={
            "vocab_size": 1024,
            "context": 128,
            "n_layer": 1,
            "d_model": 128,
            "n_head": 8,
            "position": "concat_sinusoid",
            "d_pos": 16,
        },
        sparsity={"density": 1 / 32, "anneal_end": 0.4},
        optimizer={"learning_rate": 6e-3},
        data={"source": "idioms", "megabytes": 10.0},
        steps=1800,
        batch_size=20,
    )
