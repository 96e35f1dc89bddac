"""Tables and plots of a sweep: every metric by every axis, medians with the range over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import csv
import pathlib
import statistics
from typing import Any, NamedTuple

from wsparse import files, plots
from wsparse.sweeps import records
from wsparse.sweeps.grid import Cell, Plot, Sweep
from wsparse.sweeps.records import METRICS

# The cells that are finished, with their records.
Results = list[tuple[Cell, dict[str, Any]]]

_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
# Columns of the table, and the form of their numbers.
_COLUMNS = {
    "val_loss": ".3f", "nonzeros": ",.0f", "tasks": ".0f", "circuits": ".0f", "edges": ".1f",
    "edges_shared": ".1f", "minutes": ".1f",
}  # fmt: skip


class Group(NamedTuple):
    """The cells of one point: its place, and the metrics of each seed."""

    axes: Mapping[str, Any]
    seeds: list[dict[str, Any]]

    def values(self, name: str) -> list[Any]:
        """Returns the place on an axis, or the values of a metric; none where no seed has it."""
        if name in self.axes:
            return [self.axes[name]]
        return [metrics[name] for metrics in self.seeds if name in metrics]


def line(record: Mapping[str, Any]) -> str:
    """Returns a cell's results in one line."""
    values = records.metrics(record)
    text = f"held-out loss {values['val_loss']:.4f}, {values['nonzeros']:,} nonzero weights"
    if "tasks" in values:
        text += f", {values['tasks']} of {len(record['task_losses'])} tasks below {records.BAR}"
    if "edges" in values:
        text += f", circuits: {values['circuits']}, of {values['edges']:.1f} edges"
    return text


def write(folder: pathlib.Path, sweep: Sweep, results: Results) -> str:
    """Writes `results.json`, `results.csv`, `table.txt` and the plots, and returns the table."""
    if not results:
        return "no cell is finished"
    shared = sorted(records.shared_tasks(record for _, record in results))
    rows: list[dict[str, Any]] = [
        {"cell": cell.name, **cell.axes, "seed": cell.seed, **records.metrics(record, shared)}
        for cell, record in results
    ]
    whole = [row | {"record": record} for row, (_, record) in zip(rows, results, strict=True)]
    files.write_json(folder / "results.json", {"shared_tasks": shared, "cells": whole})
    with (
        files.replacing(folder / "results.csv") as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        columns = [*rows[0], *(name for name in METRICS if name not in rows[0])]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    groups: dict[tuple[Any, ...], Group] = {}
    for row, (cell, _) in zip(rows, results, strict=True):
        groups.setdefault(tuple(cell.axes.values()), Group(cell.axes, [])).seeds.append(row)
    text = table(list(groups.values()), shared)
    files.write_text(folder / "table.txt", f"{text}\n")
    for plot in sweep.plots:
        draw(plot, list(groups.values()), folder / f"{plot.y}_by_{plot.x}.png")
    return text


def table(groups: Sequence[Group], shared: Sequence[str]) -> str:
    """Returns the points with the median and range of every metric that some of them have."""
    names = [name for name in _COLUMNS if any(group.values(name) for group in groups)]
    lines = [[*groups[0].axes, "seeds", *names]]
    for group in groups:
        cells = [records.spread(group.values(name), _COLUMNS[name]) for name in names]
        lines.append([*map(str, group.axes.values()), str(len(group.seeds)), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in lines]
    text += ["", "Medians, and ranges over seeds.", *(f"{name}: {METRICS[name]}." for name in names)]
    if "edges_shared" in names:
        text.append(f"Tasks of all models: {', '.join(shared)}.")
    return "\n".join(text)


def draw(plot: Plot, groups: Sequence[Group], path: pathlib.Path) -> None:
    """Draws a plot of the points that have both of its metrics."""
    groups = [group for group in groups if group.values(plot.x) and group.values(plot.y)]
    if not groups:
        return
    names = {side: _names(groups, side) for side in (plot.x, plot.y)}
    places = [tuple(_place(group, side, names[side]) for side in (plot.x, plot.y)) for group in groups]
    with plots.figure(path, figsize=(6.4, 4.4)) as axes:
        colors = _draw_lines(axes, plot, groups, places)
        for ((x, *x_range), (y, *y_range)), color in zip(places, colors, strict=True):
            bars = {"xerr": [[d] for d in x_range], "yerr": [[d] for d in y_range]}
            axes.errorbar(x, y, **bars, color=color, marker="o", capsize=2, linewidth=1.2)
        for side, which in ((plot.x, "x"), (plot.y, "y")):
            _decorate(axes, which, side, names[side], [group.values(side) for group in groups])


def _names(groups: Sequence[Group], side: str) -> list[str]:
    """Returns the names on an axis, or nothing for numbers."""
    values = [value for group in groups for value in group.values(side)]
    return list(dict.fromkeys(values)) if isinstance(values[0], str) else []


def _place(group: Group, side: str, names: list[str]) -> tuple[float, float, float]:
    """Returns the median, and how far the range is below and above it."""
    values = [names.index(value) if names else value for value in group.values(side)]
    middle = statistics.median(values)
    return middle, middle - min(values), max(values) - middle


def _draw_lines(axes: Any, plot: Plot, groups: Sequence[Group], places: Sequence[Any]) -> list[str]:
    """Joins points of equal value on the plot's line axes, and returns the color of every point."""
    colors = [_COLORS[0]] * len(groups)
    for kind, axis in enumerate(plot.lines):
        # Along a line, points are in the order of the other axes.
        others = [name for name in groups[0].axes if name != axis]
        for number, value in enumerate(dict.fromkeys(group.axes[axis] for group in groups)):
            line = [i for i, group in enumerate(groups) if group.axes[axis] == value]
            line.sort(key=lambda i: [groups[i].axes[name] for name in others])
            x, y = ([places[i][side][0] for i in line] for side in (0, 1))
            if kind == 0:
                color = _COLORS[number % len(_COLORS)]
                axes.plot(x, y, color=color, label=f"{axis} {_shown(value)}")
                for i in line:
                    colors[i] = color
            else:
                axes.plot(x, y, color="#999999", linestyle="--", linewidth=0.8, zorder=0)
                axes.annotate(
                    f"{axis} {_shown(value)}", (x[-1], y[-1]), xytext=(4, 4), textcoords="offset points",
                    color="#777777", fontsize=8,
                )  # fmt: skip
    if plot.lines:
        axes.legend(frameon=False)
    return colors


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _decorate(axes: Any, which: str, side: str, names: list[str], values: list[list[Any]]) -> None:
    """Labels and scales one axis of the figure."""
    from matplotlib import ticker

    getattr(axes, f"set_{which}label")(METRICS.get(side, side))
    if names:
        getattr(axes, f"set_{which}ticks")(range(len(names)), names)
        if which == "y":
            axes.invert_yaxis()
        return
    numbers = {number for group in values for number in group}
    if min(numbers) > 0 and max(numbers) / min(numbers) >= 6:
        getattr(axes, f"set_{which}scale")("log")
        axis = getattr(axes, f"{which}axis")
        # 1, 2 and 5 of each decade, or the places of a grid.
        locator = (
            ticker.LogLocator(subs=(1, 2, 5)) if side in METRICS else ticker.FixedLocator(sorted(numbers))
        )
        axis.set_major_locator(locator)
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        axis.set_minor_locator(ticker.NullLocator())
