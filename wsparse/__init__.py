"""Weight-sparse transformers in JAX, and the small circuits inside them.

    import wsparse

    run = wsparse.load("runs/tiny")
    circuit = run.prune("fstring_brace")
    circuit.show()

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsparse.config import ModelConfig, TrainConfig
    from wsparse.hooks import run_with_cache, run_with_taps
    from wsparse.model import forward, init
    from wsparse.notebook import Circuit, Run, load
    from wsparse.sparsity import abs_top_k, project_top_k

__version__ = "0.1.0"

__all__ = [
    "Circuit", "ModelConfig", "Run", "TrainConfig", "abs_top_k", "forward", "init", "load", "project_top_k",
    "run_with_cache", "run_with_taps",
]  # fmt: skip

_MODULES = {
    "config": ("ModelConfig", "TrainConfig"),
    "hooks": ("run_with_cache", "run_with_taps"),
    "model": ("forward", "init"),
    "notebook": ("Circuit", "Run", "load"),
    "sparsity": ("abs_top_k", "project_top_k"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if sys.argv[:1] == ["-m"]:
    # Python imports the package before a command in it, `python -m wsparse.NAME`: while that imports the
    # rest, a signal ends it in one line.
    from wsparse import signals

    signals.handle()
