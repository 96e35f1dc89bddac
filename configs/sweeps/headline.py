"""Circuits of a sparse model beside those of its dense twins, three seeds each, for every task.

Reproduces: the ratios of docs/results.md (Gao et al. 2025, figure 3, at one point): `small` and four dense
    twins. The variant `tiny` has the smaller model and a narrow twin; `robust` and `tiny_robust` are the
    same models, pruned against an adversary.
Hardware: 2 CPU cores.
Minutes: those of each recipe, three times, and for the circuits of a model, on one core: 8 for `tiny`, 18
    for `small`, 1 to 3 for dense twins.
Command: python -m wsparse.sweep --config=headline:tiny --workdir=runs/sweeps/tiny
    python -m wsparse.results --add=runs/sweeps/tiny
    The same with `tiny_robust` and the same folder prunes the same models again.
"""

from wsparse.sweeps import Plot, Point, Sweep

VARIANTS = ("robust", "tiny", "tiny_robust")
# The sparse model, and its dense twins.
MODELS = {
    "small": ("small", "small:dense", "small:dense_narrow", "small:dense_plain", "small:dense_equal"),
    "tiny": ("tiny", "tiny:dense_plain"),
}


def get_config(variant: str = "") -> Sweep:
    """Returns the sweep."""
    models = MODELS["tiny" if variant.startswith("tiny") else "small"]
    return Sweep(
        points=tuple(Point(axes={"recipe": name}, recipe=name) for name in models),
        seeds=(0, 1, 2),
        tasks=("all",),
        prune="results:robust" if variant.endswith("robust") else "results",
        plots=tuple(Plot(x=metric, y="recipe") for metric in ("val_loss", "tasks", "edges_shared")),
    )
