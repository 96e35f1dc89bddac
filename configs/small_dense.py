"""The dense twin of configs/small.py: the same model with all its weights, stopped at the same loss.

Reproduces: the dense model whose circuits are set beside those of configs/small.py. Same data, width, depth,
    heads and AbsTopK; a dense model learns faster, so it gets fewer steps, whose schedule ends at the sparse
    model's loss. configs/small_dense_narrow.py gets all of the steps and fewer channels instead.
Hardware: 2 CPU cores.
Minutes: 25 on two cores of a 2.5 GHz Xeon that did much other work beside it.
Expected loss: 2.34 held out (seed 0). Expected L0: 1, no weight is removed.
Command: python -m wsparse.train --config=configs/small_dense.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={"vocab_size": 1024, "context": 64, "n_layer": 2, "d_model": 256, "n_head": 16},
        sparsity={"density": 1.0, "anneal_end": 0.4},
        optimizer={"learning_rate": 6e-3},
        data={"source": "0.8*idioms+0.2*stdlib", "megabytes": 24.0, "validation_fraction": 0.05},
        steps=440,
        batch_size=64,
        checkpoint_every=600,
    )
