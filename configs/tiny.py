"""A first weight-sparse model of Python code: 2 layers, d_model 128, 1 weight in 16.

Reproduces: on a laptop, the kind of model in which Gao et al. 2025 find circuits. It closes a string with
    the quote that opened it in over 99% of the prompts of `single_double_quote`, and does eleven of
    the twenty tasks below a loss of 0.15: `python -m wsparse.circuits.tasks --run=runs/tiny`.
Hardware: 2 CPU cores.
Minutes: 2.7 on two cores of a 2.5 GHz Xeon with the extra `cpu`, the making of the data included.
Expected loss: 2.59 held out (seed 0). Expected L0: exactly round(size / 16) in every projected matrix,
    41,104 nonzero weights in all.
Command: python -m wsparse.train --config=configs/tiny.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={"vocab_size": 1024, "context": 64, "n_layer": 2, "d_model": 128, "n_head": 8},
        sparsity={"density": 1 / 16, "anneal_end": 0.4},
        optimizer={"learning_rate": 6e-3},
        data={"source": "0.7*idioms+0.3*stdlib", "megabytes": 10.0},
        steps=900,
        batch_size=40,
    )
