"""What the options of sparse training do to the loss: one changed at a time, three seeds.

Reproduces: the table of docs/training.md. The model is small (d_model 64, 1 weight in 16, floor of 1, an
    exploration step every 8), so that many runs are affordable; the text is generated, the same for everyone.
    The variant `wide` compares intervals at d_model 256 and 1 weight in 64.
Hardware: 2 CPU cores.
Minutes: about one for each of 33 runs on an idle machine; any number of workers share them.
Command: python -m wsparse.sweep --config=configs/sweeps/options.py
"""

from typing import Any

from wsparse.sweeps import Plot, Point, Sweep

VARIANTS = ("wide",)
BASE = {
    "model.vocab_size": 1024,
    "model.context": 64,
    "model.n_layer": 2,
    "model.d_model": 64,
    "model.n_head": 4,
    "sparsity.density": 1 / 16,
    "sparsity.anneal_end": 0.4,
    "sparsity.min_per_neuron": 1,
    "sparsity.explore_every": 8,
    "optimizer.learning_rate": 6e-3,
    "data.source": "idioms",
    "data.megabytes": 10.0,
    "data.validation_fraction": 0.05,
    "steps": 600,
    "batch_size": 16,
    "eval_batches": 80,
}
WIDE = {
    "model.d_model": 256,
    "model.n_head": 16,
    "sparsity.density": 1 / 64,
    "sparsity.min_per_neuron": 0,
}
INTERVALS = {f"explore_every={n}": {"sparsity.explore_every": n} for n in (1, 4, 8, 16, 32)}
OTHERS = {
    **{f"min_per_neuron={n}": {"sparsity.min_per_neuron": n} for n in (0, 2, 4)},
    "exponential": {"sparsity.anneal": "exponential"},
    "25% to 75%": {"sparsity.anneal_start": 0.25, "sparsity.anneal_end": 0.75},
    "exponential, 25% to 75%": {
        "sparsity.anneal": "exponential",
        "sparsity.anneal_start": 0.25,
        "sparsity.anneal_end": 0.75,
    },
}


def get_config(variant: str = "") -> Sweep:
    """Returns the sweep."""
    base: dict[str, Any] = BASE | (WIDE if variant == "wide" else {})
    changes = INTERVALS if variant == "wide" else INTERVALS | OTHERS
    return Sweep(
        recipe="tiny",
        points=tuple(
            Point(axes={"option": name}, overrides=base | change) for name, change in changes.items()
        ),
        seeds=(0, 1, 2),
        plots=(Plot(x="val_loss", y="option"),),
    )
