"""What the options of sparse training do to the loss: one changed at a time, three seeds.

Reproduces: the table of docs/training.md. The model is small (d_model 64, 1 weight in 16, floor of 1, an
    exploration step every 8), so that many runs are affordable; the text is generated, the same for everyone.
    The variant `intervals` compares intervals between exploration steps at d_model 128 and 900 steps, where
    seeds differ less.
Hardware: 2 CPU cores.
Minutes: one or two for each of 33 runs, three for each of the variant's 15; workers may share them.
Command: python -m wsparse.sweep --config=configs/sweeps/options.py
    python -m wsparse.sweep --config=configs/sweeps/options.py:intervals
"""

from typing import Any

from wsparse.sweeps import Plot, Point, Sweep

VARIANTS = ("intervals",)
BASE = {
    "model.vocab_size": 1024,
    "model.context": 64,
    "model.n_layer": 2,
    "model.position": "none",
    "model.d_pos": 0,
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
LARGER = {
    "model.d_model": 128,
    "model.n_head": 8,
    "sparsity.min_per_neuron": 4,
    "steps": 900,
    "batch_size": 40,
    "eval_batches": 60,
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
    base: dict[str, Any] = BASE | (LARGER if variant else {})
    changes = INTERVALS if variant else INTERVALS | OTHERS
    return Sweep(
        recipe="tiny",
        points=tuple(
            Point(axes={"option": name}, overrides=base | change) for name, change in changes.items()
        ),
        seeds=(0, 1, 2),
        plots=(Plot(x="val_loss", y="option"),),
    )
