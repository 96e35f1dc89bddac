"""One layer, d_model 128, 1 weight in 32: the model with the smallest circuits.

Reproduces: `single_double_quote` in no more nodes and edges than in Gao et al. 2025 (12 and 9): one head, of
    which one key and two values are needed. A model with a single layer can do the task in one way only, and
    its attention reads the embedding itself.
Hardware: 2 CPU cores.
Minutes: 15 on two cores of a 2.5 GHz Xeon that did other work beside it; 5.6 of processor time.
Expected loss: 2.83 held out (seed 0). Expected L0: exactly round(size / 32) in every projected matrix,
    14,372 nonzero weights in all.
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
