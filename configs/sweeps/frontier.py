"""The frontier of capability and size of circuits (Gao et al. 2025, figure 3): width against nonzero weights.

Reproduces: held-out loss against edges of circuits, for widths of 128 to 1024 with 8,192 to 65,536 nonzero
    weights (the budget). At an equal budget a wider model is the sparser one. No weight is kept for its
    neuron's sake (`min_per_neuron` 0), but each token has two in the embedding and in the unembedding. The
    text is generated, the same for everyone.
    The variant `quick` has four small models, briefly trained: it shows that all works.
Hardware: 2 CPU cores.
Minutes: not measured; a step at width 1024 takes many times one at 128.
Command: python -m wsparse.sweep --config=configs/sweeps/frontier.py
    python -m wsparse.sweep --config=configs/sweeps/frontier.py:quick
"""

from typing import Any

from wsparse.sweeps import Plot, Point, Sweep

VARIANTS = ("quick",)
LAYERS, VOCABULARY, POSITIONS = 2, 1024, 16


def point(width: int, nonzeros: int, **changes: Any) -> Point:
    """Returns the model of a width whose projected matrices have a number of nonzeros in all."""
    embeddings = 2 * VOCABULARY * width
    # Of each layer q, k, v, out, fc and proj, with their biases; positions are read by four of them.
    others = LAYERS * (12 * width**2 + (9 + 7 * POSITIONS) * width)
    # At least two nonzeros for each token, in and out: with less, tokens cannot be told apart.
    embedded = max(nonzeros * embeddings / (embeddings + others), 4 * VOCABULARY)
    overrides = {
        "model.vocab_size": VOCABULARY,
        "model.n_layer": LAYERS,
        "model.d_model": width,
        "model.n_head": width // 16,
        "model.position": "concat_sinusoid",
        "model.d_pos": POSITIONS,
        "sparsity.density": (nonzeros - embedded) / others,
        "sparsity.overrides": ",".join(
            f"{path}={embedded / embeddings}" for path in ("embed/tokens", "head/unembed")
        ),
        "sparsity.min_per_neuron": 0,
        "data.source": "idioms",
    }
    return Point(axes={"width": width, "budget": nonzeros}, overrides=overrides | changes)


def get_config(variant: str = "") -> Sweep:
    """Returns the sweep."""
    plots = (
        Plot(x="edges", y="val_loss", lines=("budget", "width")),
        Plot(x="edges_shared", y="val_loss", lines=("budget", "width")),
        Plot(x="budget", y="tasks", lines=("width",)),
    )
    widths, budgets = (128, 256, 512, 1024), (8_192, 16_384, 32_768, 65_536)
    if variant == "quick":
        points = tuple(point(d, n, **{"steps": 600}) for d in (64, 128) for n in (16_384, 32_768))
        return Sweep(points=points, tasks=("all",), plots=plots)
    points = tuple(point(d, n) for d in widths for n in budgets)
    return Sweep(points=points, seeds=(0,), tasks=("all",), plots=plots)
