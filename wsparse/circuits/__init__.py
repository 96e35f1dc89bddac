"""Tasks, masks and circuits: what a model does for a task, in as few nodes and edges as possible."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsparse.circuits.circuit import Circuit
    from wsparse.circuits.mask_learning import HParams, Masks, prune
    from wsparse.circuits.pairs import PairArrays

__all__ = ["Circuit", "HParams", "Masks", "PairArrays", "prune"]


def __getattr__(name: str) -> Any:
    """Imports on first use: a reader of circuit files needs no jax, which masks and pairs import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"Circuit": "circuit", "PairArrays": "pairs"}.get(name, "mask_learning")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
