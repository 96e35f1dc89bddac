"""Weight-sparse transformers in JAX, and the small circuits inside them.

    import wsparse

    run = wsparse.load("runs/tiny")
    circuit = run.prune("single_double_quote")
    circuit.show()

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsparse.config import ModelConfig as ModelConfig
    from wsparse.config import TrainConfig as TrainConfig
    from wsparse.hooks import run_with_cache as run_with_cache
    from wsparse.hooks import run_with_taps as run_with_taps
    from wsparse.model import forward as forward
    from wsparse.model import init as init
    from wsparse.notebook import Circuit as Circuit
    from wsparse.notebook import Run as Run
    from wsparse.notebook import load as load
    from wsparse.sparsity import abs_top_k as abs_top_k
    from wsparse.sparsity import project_top_k as project_top_k

__version__ = "0.1.0"

_MODULES = {
    "Circuit": "wsparse.notebook",
    "ModelConfig": "wsparse.config",
    "Run": "wsparse.notebook",
    "TrainConfig": "wsparse.config",
    "abs_top_k": "wsparse.sparsity",
    "forward": "wsparse.model",
    "init": "wsparse.model",
    "load": "wsparse.notebook",
    "project_top_k": "wsparse.sparsity",
    "run_with_cache": "wsparse.hooks",
    "run_with_taps": "wsparse.hooks",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


if sys.argv[:1] == ["-m"]:
    # Python imports the package before a command in it, `python -m wsparse.NAME`: while that imports the
    # rest, a signal ends it in one line.
    from wsparse import signals

    signals.handle()
