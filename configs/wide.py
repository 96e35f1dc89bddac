"""A wide model of few weights: d_model 1024, 2 layers, 1 weight in 1000.

Reproduces: width at a fixed number of nonzeros, what makes circuits small in Gao et al. 2025, at the greatest
    sparsity that they name. Embedding and unembedding keep 1 weight in 128, eight for each token: with one in
    1000 most tokens could not be told apart. No weight is kept for its neuron's sake.
Hardware: 2 CPU cores, with the CPU kernels: most steps cost what the nonzeros cost (`explore_every`).
Minutes: about 57, by the times of single steps on two quiet cores of an AMD EPYC (docs/results.md); 3.0 on an
    NVIDIA H100 that trained five more beside it.
Expected loss: 1.69 to 1.70 held out (seeds 0 to 2). Expected L0: exactly round(size / 1000), and
    round(size / 128) in the two embeddings.
Command: python -m wsparse.train --config=configs/wide.py
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    return recipe(
        model={
            "vocab_size": 1024,
            "context": 128,
            "n_layer": 2,
            "d_model": 1024,
            "n_head": 64,
            "position": "concat_sinusoid",
            "d_pos": 16,
        },
        sparsity={
            "density": 1 / 1000,
            "overrides": "embed/tokens=1/128,head/unembed=1/128",
            "anneal": "exponential",
            "anneal_end": 0.4,
            "min_per_neuron": 0,
            "explore_every": 8,
        },
        optimizer={"learning_rate": 4e-3},
        data={"source": "idioms", "megabytes": 24.0, "validation_fraction": 0.05},
        steps=3600,
        batch_size=16,
        checkpoint_every=500,
    )
