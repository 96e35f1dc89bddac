"""Figures, drawn without a display; a file appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from typing import Any

from wsparse import files


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], *rows_and_columns: int, **options: Any) -> Iterator[Any]:
    """`with figure(path) as axes:` draws a PNG, saved when the block ends without an error.

    Args:
      path: Path of the PNG.
      *rows_and_columns: Numbers of axes, as in `matplotlib.pyplot.subplots`.
      **options: Other options of `subplots`.
    """
    # Imported lazily: matplotlib takes a second, and most commands draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    canvas, axes = plt.subplots(*rows_and_columns, layout="constrained", **options)
    try:
        yield axes
        for panel in canvas.axes:
            panel.spines[["top", "right"]].set_visible(False)
        with files.replacing(path) as part:
            canvas.savefig(part, dpi=150, format="png")
    finally:
        plt.close(canvas)
