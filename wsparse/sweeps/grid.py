"""A sweep: points of a grid, each a recipe with overrides, and the cells (a point with a seed) to train."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from wsparse import recipes
from wsparse.circuits import tasks as task_lib
from wsparse.circuits.settings import Settings
from wsparse.config import TrainConfig, check, from_dict, require, setting
from wsparse.errors import UserError, closest, located
from wsparse.sweeps.records import METRICS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a grid.

    Attributes:
      axes: Where it lies: a number or a name on each axis of the grid.
      overrides: Values by dotted config key, such as `{"model.d_model": 128}`.
      recipe: Recipe that they override; by default the sweep's.
    """

    axes: Mapping[str, Any]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """One metric or axis against another: medians over seeds, with the range.

    Attributes:
      x: A metric of `records.METRICS`, or an axis.
      y: The same. Names on an axis are listed along it.
      lines: Axes on which points of equal value are joined, on the first by colored lines, then by gray.
    """

    x: str
    y: str = "val_loss"
    lines: tuple[str, ...] = ()

    def __post_init__(self):
        _require_tuples(self, "lines")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid of runs, and what is measured of each; returned by `get_config()` of a file."""

    points: tuple[Point, ...]
    recipe: str = "tiny"
    # Of the initial parameters. The data is the same, so that held-out losses can be compared.
    seeds: tuple[int, ...] = (0,)
    # Names or files of the tasks to find circuits of, or "all"; none by default.
    tasks: tuple[str, ...] = ()
    # Recipe of the settings of pruning.
    prune: str = "quick"
    pairs: int = setting(128, "Pairs of the report split that models are scored on, per task.", "at least 1")
    plots: tuple[Plot, ...] = ()

    def __post_init__(self):
        check(self)
        _require_tuples(self, "points", "seeds", "tasks", "plots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A point with a seed, complete: what a worker needs to know.

    Attributes:
      name: Name of its folder.
      tasks: Tasks to find circuits of.
      settings: Settings of that search; None searches for nothing.
    """

    name: str
    axes: dict[str, Any]
    seed: int
    config: TrainConfig
    pairs: int
    tasks: tuple[str, ...] = ()
    settings: Settings | None = None


def _require_tuples(value: Any, *names: str) -> None:
    # ("all") is a string, and a string has letters.
    for name in names:
        given = getattr(value, name)
        require(isinstance(given, (tuple, list)), f"{name} must be a tuple, such as (x,)", given)


def cells(sweep: Sweep) -> list[Cell]:
    """Returns the cells of a sweep, checked.

    Raises:
      UserError: A recipe, key, value, task, axis or metric is unknown or refused; a point is named.
    """
    _check_grid(sweep)
    for name in sweep.tasks if sweep.tasks != ("all",) else ():
        task_lib.find(name)
    settings = from_dict(Settings, recipes.load(sweep.prune, "prune").to_dict()) if sweep.tasks else None
    found: dict[str, Cell] = {}
    for point in sweep.points:
        for seed in sweep.seeds:
            name = "_".join(f"{axis}={_in_file_name(value)}" for axis, value in point.axes.items())
            name = f"{name}_seed={seed}"
            if name in found:
                raise UserError(f"two points of the sweep are {name}: give each its own values on the axes")
            with located(f"{name}: "):
                config = _config(point.recipe or sweep.recipe, {**point.overrides, "seed": seed})
            found[name] = Cell(
                name=name, axes=dict(point.axes), seed=seed, config=config, pairs=sweep.pairs,
                tasks=_tasks(sweep, config), settings=settings,
            )  # fmt: skip
    return list(found.values())


def _tasks(sweep: Sweep, config: TrainConfig) -> tuple[str, ...]:
    return task_lib.names_of(config.data.domain) if sweep.tasks == ("all",) else sweep.tasks


def _check_grid(sweep: Sweep) -> None:
    if not (sweep.points and sweep.seeds):
        raise UserError("a sweep must have at least one point and one seed")
    axes = list(sweep.points[0].axes)
    for point in sweep.points:
        if list(point.axes) != axes:
            raise UserError(f"all points must lie on the axes {axes} of the first, got {dict(point.axes)}")
        for axis, value in point.axes.items():
            require(
                isinstance(value, (str, int, float)),
                f"a place on axis {axis!r} must be text or a number",
                value,
            )
    for axis in axes:
        # Along a line of a plot, points are sorted by their places.
        places = list(dict.fromkeys(point.axes[axis] for point in sweep.points))
        if len({isinstance(place, str) for place in places}) > 1:
            raise UserError(f"the places on axis {axis!r} must be all text or all numbers, got {places}")
    if wrong := [axis for axis in axes if not axis.isidentifier() or axis in ("cell", "seed", *METRICS)]:
        raise UserError(f"an axis must have a name of its own, of letters and digits, got {wrong[0]!r}")
    for plot in sweep.plots:
        for name in (plot.x, plot.y, *plot.lines):
            known = axes if name in plot.lines else [*axes, *METRICS]
            if name not in known:
                raise UserError(f"a plot of {name!r}{closest(name, known)}: known are {', '.join(known)}")


def _config(recipe: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """Returns the config of a recipe with overrides by dotted key."""
    values = recipes.load(recipe).to_dict()
    for key, value in overrides.items():
        *groups, name = key.split(".")
        group = values
        for part in groups:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise UserError(f"config key {key!r}: {part!r} is not a group of keys")
        group[name] = value
    return from_dict(TrainConfig, values)


def _in_file_name(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text)
