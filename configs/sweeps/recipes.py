"""Every recipe for one machine, three seeds each, pruned for every task: the runs behind docs/results.md.

Reproduces: the tables of docs/results.md and of the README, with
    `python -m wsparse.results --add=runs/sweeps/recipes`, which keeps the numbers and writes the tables.
Hardware: 2 CPU cores.
Minutes: those of each recipe, three times, and some for each circuit.
Command: python -m wsparse.sweep --config=configs/sweeps/recipes.py
"""

from wsparse import recipes
from wsparse.sweeps import Plot, Point, Sweep


def get_config() -> Sweep:
    """Returns the sweep."""
    names = [name for name in recipes.names() if not name.startswith("gao")]
    return Sweep(
        points=tuple(Point(axes={"recipe": name}, recipe=name) for name in names),
        seeds=(0, 1, 2),
        tasks=("all",),
        prune="results",
        plots=tuple(Plot(x=metric, y="recipe") for metric in ("val_loss", "tasks", "edges_shared")),
    )
