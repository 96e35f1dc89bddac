"""A model of little stories in English, for the tasks of stories: 2 layers, d_model 128, 1 weight in 16.

Reproduces: the kind of text of the replications in PyTorch, whose models have 2 layers, read the data set
    SimpleStories and do tasks such as `pronoun`, `tense` and `indirect_object`. Their tokenizer and sizes are
    others.
    The variant `generated` reads the generated source `stories` instead, which takes no network; it is
    smaller, as fits a few hundred words.
Hardware: 2 CPU cores. The data set is streamed from the Hugging Face Hub and needs the extra `datasets`.
Minutes: not measured: the recipe was not run on the data set.
Expected loss: not measured. Expected L0: exactly round(size / 16) in every projected matrix.
Command: python -m wsparse.train --config=configs/stories.py
    python -m wsparse.train --config=configs/stories.py:generated
"""

import ml_collections

from wsparse.config import recipe

VARIANTS = ("generated",)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; every key can be overridden with `--config.key=value`."""
    config = recipe(
        model={
            "vocab_size": 2048,
            "context": 256,
            "n_layer": 2,
            "d_model": 128,
            "n_head": 8,
            "position": "concat_sinusoid",
            "d_pos": 16,
        },
        sparsity={"density": 1 / 16, "anneal_end": 0.4},
        optimizer={"learning_rate": 2e-2},
        data={"source": "hf:SimpleStories/SimpleStories:train:story", "domain": "stories", "megabytes": 40.0},
        steps=5000,
        batch_size=16,
    )
    if variant:
        config.data.source, config.data.megabytes = "stories", 4.0
        config.model.vocab_size, config.model.context = 512, 128
        config.steps = 1000
    return config
