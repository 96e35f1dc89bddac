"""A narrow dense twin of configs/small.py, trained to the same held-out loss.

Reproduces: the other dense model whose circuits are set beside those of configs/small.py. Same data, tokens
    and steps, no weight sparsity, and a narrower residual stream: d_model 56 comes to the loss of the sparse
    model's 256 (64 to 2.320).
Hardware: 2 CPU cores.
Minutes: 30 on one core of a 2.5 GHz Xeon whose other core did other work.
Expected loss: 2.34 held out (seed 0). Expected L0: 1, no weight is removed.
Command: python -m wsparse.train --config=configs/small_dense_narrow.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={"vocab_size": 1024, "context": 64, "n_layer": 2, "d_model": 56, "n_head": 4},
        sparsity={"density": 1.0, "anneal_end": 0.4},
        optimizer={"learning_rate": 6e-3},
        data={"source": "0.8*idioms+0.2*stdlib", "megabytes": 24.0, "validation_fraction": 0.05},
        steps=2400,
        batch_size=64,
        checkpoint_every=600,
    )
