"""Grids of training runs with seeds: what a file in `configs/sweeps/` is made of."""

from wsparse.sweeps.grid import Plot, Point, Sweep

__all__ = ["Plot", "Point", "Sweep"]
