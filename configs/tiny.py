"""A first weight-sparse model of Python code: 2 layers, d_model 128, 1 weight in 16.

Reproduces: on a laptop, the kind of model in which Gao et al. 2025 find circuits. `wsparse tasks
    --run=runs/tiny` says which of the twenty tasks it does; docs/results.md has three seeds.
    The variant `dense` is its baseline: the same data, model and steps with every weight kept.
    `dense_plain` is the usual dense transformer, without AbsTopK, and as narrow as it takes for a held-out
    loss like that of `tiny`: d_model 20.
Hardware: 2 CPU cores.
Minutes: 2.6 to 3.0 on two cores of a 2.5 GHz Xeon with the extra `cpu`, the making of the data included.
Expected loss: 1.77 to 1.79 held out (seeds 0 to 2), `dense_plain` 1.77; `dense` is not measured.
    Expected L0: exactly round(size / 16) in every projected matrix, 42,896 nonzero weights in all; 1 for the
    dense variants.
Command: python -m wsparse.train --config=configs/tiny.py
    python -m wsparse.train --config=configs/tiny.py:dense_plain
"""

import ml_collections

from wsparse.config import recipe

VARIANTS = ("dense", "dense_plain")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    config = recipe(
        model={
            "vocab_size": 1024,
            "context": 128,
            "n_layer": 2,
            "d_model": 128,
            "n_head": 8,
            # Without positions no head finds the nearest of several quotes or brackets.
            "position": "concat_sinusoid",
            "d_pos": 16,
        },
        sparsity={"density": 1 / 16, "anneal_end": 0.4},
        optimizer={"learning_rate": 2e-2},
        data={"source": "idioms", "megabytes": 10.0},
        steps=1250,
        batch_size=16,
    )
    if variant:
        config.sparsity.density = 1.0
    if variant == "dense_plain":
        config.model.d_model, config.model.n_head = 20, 2
        config.model.abs_top_k_fraction = None
    return config
