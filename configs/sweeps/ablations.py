"""What each part of the method is worth: `tiny` with one part changed, three seeds.

Reproduces: the ablations of Gao et al. 2025 (warm-up, sinks, bigram table, AbsTopK fraction, learning rate,
    floor, gradient scaling), on a model that trains in minutes.
Hardware: 2 CPU cores.
Minutes: those of 54 runs of `tiny`; any number of workers share them.
Command: python -m wsparse.sweep --config=configs/sweeps/ablations.py
"""

from wsparse.sweeps import Plot, Point, Sweep

# Differences from the recipe. Four is the sharkfin factor at its density of 1/16.
ABLATIONS = {
    "the method": {},
    "no warm-up": {"optimizer.warmup": 0.0},
    "warm-up 10%": {"optimizer.warmup": 0.1},
    "no attention sinks": {"model.sink": False},
    "no positions": {"model.position": "none", "model.d_pos": 0},
    "no bigram table": {"model.bigram": "none"},
    "AbsTopK 1/2": {"model.abs_top_k_fraction": 1 / 2},
    "AbsTopK 1/8": {"model.abs_top_k_fraction": 1 / 8},
    "no AbsTopK": {"model.abs_top_k_fraction": None},
    "no sharkfin": {"optimizer.sharkfin": False},
    "no sharkfin, rate x 4": {"optimizer.sharkfin": False, "optimizer.learning_rate": 8e-2},
    "floor 0": {"sparsity.min_per_neuron": 0},
    "floor 1": {"sparsity.min_per_neuron": 1},
    "floor 2": {"sparsity.min_per_neuron": 2},
    "gradients clipped": {"optimizer.gradient_rms": "clip"},
    "gradients as they are": {"optimizer.gradient_rms": "none"},
    "exponential anneal": {"sparsity.anneal": "exponential"},
    "anneal 25% to 75%": {"sparsity.anneal_start": 0.25, "sparsity.anneal_end": 0.75},
}


def get_config() -> Sweep:
    """Returns the sweep."""
    return Sweep(
        recipe="tiny",
        points=tuple(
            Point(axes={"ablation": name}, overrides=changes) for name, changes in ABLATIONS.items()
        ),
        seeds=(0, 1, 2),
        plots=(Plot(x="val_loss", y="ablation"), Plot(x="tasks", y="ablation")),
    )
