"""Tasks, masks and circuits: what a model does for a task, in as few nodes and edges as possible."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsparse.circuits.circuit import Circuit
    from wsparse.circuits.mask_learning import HParams, Masks, PairArrays, prune

__all__ = ["Circuit", "HParams", "Masks", "PairArrays", "prune"]


def __getattr__(name: str) -> Any:
    """Names are fetched when asked for, so that `python -m wsparse.circuits.tasks` loads itself once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "circuit" if name == "Circuit" else "mask_learning"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
