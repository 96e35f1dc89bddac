"""Figures: drawn without a display, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
from typing import Any

from wsparse import files


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], *rows_and_columns: int, **options: Any) -> Iterator[Any]:
    """`with figure(path) as axes:` draws a PNG, saved when the block ends well.

    Args:
      path: of the PNG.
      *rows_and_columns: of the axes, as in `matplotlib.pyplot.subplots`.
      **options: of `subplots`.
    """
    # Here, not above: matplotlib takes a second to import, and most commands draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(*rows_and_columns, layout="constrained", **options)
    try:
        yield axes
        for each in drawn.axes:
            each.spines[["top", "right"]].set_visible(False)
        with files.replacing(path) as part:
            drawn.savefig(part, dpi=150, format="png")
    finally:
        plt.close(drawn)
