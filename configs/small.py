"""A larger model for one machine: d_model 256, 2 layers, 1 weight in 64, and its dense twins.

Reproduces: a weight-sparse model for most of the twenty tasks, on a laptop, beside models that keep all their
    weights (Gao et al. 2025 compare circuits at an equal held-out loss):
    `dense` has the same data, width, depth, heads and AbsTopK. A dense model learns faster, so it gets fewer
    steps, whose schedule ends earlier.
    `dense_narrow` has the same tokens and steps, and a narrower residual stream, d_model 56.
    `dense_plain` has no AbsTopK, as the usual dense transformer, and is so narrow, d_model 28, that its
    held-out loss is about that of `small`: with d_model 24 it is 1.65 (one run), with 56 1.39 (two).
    `dense_equal` has about as many weights as `small` has nonzeros, d_model 12.
Hardware: 2 CPU cores.
Minutes: 40 on one core of an Intel Xeon (seeds 0 to 2), 21.5 on two (one run); 3.4 on an NVIDIA H100 that
    trained five more beside it. `dense_plain`: 5 on one core.
Expected loss: 1.60 held out, `dense_plain` 1.58 (seeds 0 to 2 of both); the other dense variants are not
    measured. Expected L0: exactly
    round(size / 64) in every projected matrix; 1 for the dense variants. No weight is kept for its neuron's
    sake: a floor of 4 would be the whole budget.
Command: python -m wsparse.train --config=configs/small.py
    python -m wsparse.train --config=configs/small.py:dense_narrow
"""

import ml_collections

from wsparse.config import recipe

VARIANTS = ("dense", "dense_narrow", "dense_plain", "dense_equal")
# d_model and n_head of the variants that are narrower.
NARROW = {"dense_narrow": (56, 4), "dense_plain": (28, 2), "dense_equal": (12, 1)}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    config = recipe(
        model={
            "vocab_size": 1024,
            "context": 128,
            "n_layer": 2,
            "d_model": 256,
            "n_head": 16,
            "position": "concat_sinusoid",
            "d_pos": 16,
        },
        sparsity={"density": 1 / 64, "anneal_end": 0.4, "min_per_neuron": 0, "explore_every": 4},
        optimizer={"learning_rate": 1.2e-2},
        data={"source": "idioms", "megabytes": 24.0, "validation_fraction": 0.05},
        steps=4800,
        batch_size=32,
        checkpoint_every=800,
    )
    if variant:
        config.sparsity.density = 1.0
    if variant == "dense":
        config.steps = 440
    if variant in NARROW:
        config.model.d_model, config.model.n_head = NARROW[variant]
    if variant == "dense_plain":
        config.model.abs_top_k_fraction = None
    return config
