"""A sweep checks all of its cells first, computes each once, and goes on where it stopped."""

import csv
import errno
import json
import signal
import statistics
import time

from helpers import start_python
import jax
import pytest
from train_case import one_device, source, stop_at  # noqa: F401

from wsparse import files, locks, recipes, runs, sparsity, sweep, trees
from wsparse.config import to_dict
from wsparse.errors import UserError
from wsparse.step import init_state
from wsparse.sweeps import Plot, Point, Sweep, grid, records, report, worker

RECIPE = """
from wsparse.config import recipe

def get_config():
    return recipe(
        model={{"vocab_size": 300, "context": 24, "n_layer": 1, "d_model": 16, "n_head": 2, "d_head": 8}},
        sparsity={{"density": 0.5}},
        data={{"source": {source!r}, "megabytes": 1.0, "validation_fraction": 0.1}},
        steps=6, batch_size=4, log_every=2, eval_batches=1,
    )
"""


@pytest.fixture
def recipe(tmp_path, source):  # noqa: F811
    path = tmp_path / "base.py"
    path.write_text(RECIPE.format(source=source))
    return str(path)


@pytest.fixture
def in_process(one_device, monkeypatch):  # noqa: F811
    """Cells are computed in this process, whose tasks are two."""
    monkeypatch.setattr(sweep, "_process", worker.run)
    known = records.task_lib.TASKS
    monkeypatch.setattr(
        records.task_lib, "TASKS", {name: known[name] for name in ("for_while", "class_init")}
    )


def densities(recipe, *values, **options) -> Sweep:
    points = [Point(axes={"density": v}, overrides={"sparsity.density": v}) for v in values]
    return Sweep(recipe=recipe, points=tuple(points), **options)


# ---- Grids ----


def test_a_cell_is_the_recipe_with_its_points_overrides_and_a_seed(recipe):
    cells = grid.cells(densities(recipe, 0.25, 0.5, seeds=(3, 4)))
    assert [cell.name for cell in cells] == [
        "density=0.25_seed=3", "density=0.25_seed=4", "density=0.5_seed=3", "density=0.5_seed=4",
    ]  # fmt: skip
    base = to_dict(grid.cells(densities(recipe, 0.5))[0].config)
    expected = base | {"seed": 4, "sparsity": base["sparsity"] | {"density": 0.25}}
    assert to_dict(cells[1].config) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sparsity.densty": 0.5}, "unknown config key 'sparsity.densty' (did you mean 'density'?)"),
        ({"sparsty.density": 0.5}, "unknown config key 'sparsty' (did you mean 'sparsity'?)"),
        ({"steps.density": 0.5}, "'steps' is not a group of keys"),
        ({"sparsity.density": 2.0}, "sparsity.density must be in (0, 1], got 2.0"),
        ({"steps": "many"}, "'steps' must be of type int"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_the_name_of_its_cell(recipe, overrides, message, tmp_path):
    points = (Point(axes={"n": 1}), Point(axes={"n": 2}, overrides=overrides))
    with pytest.raises(UserError) as error:
        sweep.run(Sweep(recipe=recipe, points=points), tmp_path / "sweep")
    assert str(error.value).startswith("n=2_seed=0: ")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": ()}, "at least one point"),
        ({"tasks": "all"}, "tasks must be a tuple, such as (x,), got 'all'"),
        ({"seeds": 3}, "seeds must be a tuple"),
        ({"seeds": (0, "1")}, "width=1_seed=1: config key 'seed' must be of type int"),
        ({"seeds": (0, 0)}, "two points of the sweep are width=1_seed=0"),
        ({"seeds": ()}, "at least one point and one seed"),
        ({"tasks": ("for_whale",)}, "did you mean 'for_while'?"),
        ({"tasks": ("all",), "prune": "quik"}, "did you mean 'quick'?"),
        ({"recipe": "tinny"}, "did you mean 'tiny'?"),
        ({"plots": (Plot(x="widht"),)}, "did you mean 'width'?"),
        ({"plots": (Plot(x="width", lines=("val_loss",)),)}, "known are width"),
        ({"points": (Point(axes={"edges": 1}),)}, "a name of its own"),
        ({"points": (Point(axes={"width": (1, 2)}),)}, "must be text or a number"),
        ({"points": (Point(axes={"width": 1}), Point(axes={"depth": 1}))}, "all points must lie on"),
        ({"points": (Point(axes={"width": 1}), Point(axes={"width": "wide"}))}, "all text or all numbers"),
        ({"points": (Point(axes={"width": "a b"}), Point(axes={"width": "a/b"}))}, "two points"),
    ],
)
def test_a_sweep_that_cannot_be_computed_is_refused(options, message):
    with pytest.raises(UserError) as error:
        grid.cells(Sweep(**({"points": (Point(axes={"width": 1}),)} | options)))
    assert message in str(error.value)


@pytest.mark.parametrize("name", list(recipes.names("sweeps")))
def test_every_sweep_of_the_package_has_cells_that_are_valid(name):
    cells = grid.cells(recipes.load_as(Sweep, name, "sweeps", ""))
    assert len({json.dumps(to_dict(cell.config)) for cell in cells}) == len(cells) > 1


def test_models_of_the_frontier_have_the_nonzeros_of_their_budget():
    for cell in grid.cells(recipes.load_as(Sweep, "frontier", "sweeps", "")):
        state = jax.eval_shape(lambda config=cell.config: init_state(config))
        counts = sparsity.find_state(state.optimizer).nonzeros
        sizes = {path: leaf.size for path, leaf in trees.flatten(state.params).items() if path in counts}
        own = dict(cell.config.sparsity.targets)
        assert own.keys() == {"embed/tokens", "head/unembed"}
        nonzeros = {path: own.get(path, cell.config.sparsity.density) * size for path, size in sizes.items()}
        assert sum(nonzeros.values()) == pytest.approx(cell.axes["budget"], rel=1e-6)
        assert min(nonzeros[path] for path in own) >= 2 * cell.config.model.vocab_size * (1 - 1e-9)


# ---- Cells ----


def test_a_sweep_trains_scores_and_tables_its_cells_and_does_nothing_the_second_time(
    recipe, in_process, tmp_path, logged, compilations
):
    plan = densities(recipe, 0.25, seeds=(0, 1), plots=(Plot(x="density", lines=("density",)),))
    folder = tmp_path / "sweep"
    assert sweep.listing(plan, folder).splitlines()[1:] == [
        "density=0.25_seed=0  new", "density=0.25_seed=1  new",
    ]  # fmt: skip
    assert sweep.run(plan, folder) == 0
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == [cell.name for cell in grid.cells(plan)]
    for row in rows:
        summary = files.read_json(folder / row["cell"] / "summary.json")
        assert float(row["val_loss"]) == summary["val_loss"]
        assert int(row["nonzeros"]) == summary["nonzeros"]
        assert summary["machine"]
        # They are runs like others.
        assert runs.load(folder / row["cell"]).config.seed == int(row["seed"])
    losses = [float(row["val_loss"]) for row in rows]
    expected = f"{statistics.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
    assert expected in (folder / "table.txt").read_text()
    assert (folder / "val_loss_by_density.png").read_bytes()[:4] == b"\x89PNG"
    logged.clear()
    with compilations() as compiled:
        assert sweep.run(plan, folder) == 0
    assert not compiled
    assert not any(line.startswith("[") for line in logged)
    assert "held-out loss" in sweep.listing(plan, folder).splitlines()[1]


def test_a_cell_that_fails_is_named_and_others_go_on(recipe, in_process, tmp_path, logged, monkeypatch):
    plan, folder = densities(recipe, 0.25, 0.5), tmp_path / "sweep"

    def process(own, cell):
        if cell.axes["density"] == 0.25:
            (own / "log.txt").parent.mkdir(parents=True)
            (own / "log.txt").write_text("step 1\nerror: NaN or infinity at step 1\n")
            return 2
        return worker.run(own, cell)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_process", process)
        assert sweep.run(plan, folder) == 1
    assert "  failed: NaN or infinity at step 1" in logged
    assert "density=0.25_seed=0  failed: NaN or infinity at step 1" in sweep.listing(plan, folder)
    assert worker.result(folder / "density=0.5_seed=0", grid.cells(plan)[1])
    # It is not tried again unasked.
    assert sweep.run(plan, folder) == 1
    assert sweep.run(plan, folder, retry=True) == 0


def test_an_interrupted_cell_goes_on(recipe, in_process, tmp_path, monkeypatch):
    plan, folder = densities(recipe, 0.25), tmp_path / "sweep"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGTERM)
        assert sweep.run(plan, folder) == 1
    assert "interrupted, step 4 of 6" in sweep.listing(plan, folder)
    assert sweep.run(plan, folder) == 0


def test_other_settings_of_pruning_or_scoring_are_another_cell_and_another_config_is_refused(
    recipe, in_process, tmp_path
):
    folder = tmp_path / "sweep"
    assert sweep.run(densities(recipe, 0.25), folder) == 0
    again = densities(recipe, 0.25, pairs=7)
    assert "interrupted, step 6 of 6" in sweep.listing(again, folder)
    assert sweep.run(again, folder) == 0
    assert files.read_json(folder / "results.json")["cells"][0]["record"]["pairs"] == 7
    longer = Sweep(recipe=recipe, points=(Point(axes={"density": 0.25}, overrides={"steps": 9}),))
    with pytest.raises(UserError, match=r"density=0\.25_seed=0 holds a run of a different config"):
        sweep.run(longer, folder)


def test_a_cell_that_another_worker_computes_is_waited_for(recipe, in_process, tmp_path, monkeypatch, logged):
    plan, folder = densities(recipe, 0.25), tmp_path / "sweep"
    own = folder / "density=0.25_seed=0"
    own.mkdir(parents=True)
    held = locks.hold(own, "computing this cell", name=worker.LOCK)
    held.__enter__()
    # The process of a cell that is begun in the same moment finds it taken.
    assert worker.run(own, grid.cells(plan)[0]) == worker.BUSY

    def other_worker(seconds):
        held.__exit__(None, None, None)
        assert worker.run(own, grid.cells(plan)[0]) == 0

    monkeypatch.setattr(sweep.time, "sleep", other_worker)
    assert sweep.run(plan, folder) == 0
    assert "cells with other workers: 1; waiting for them, in case one dies" in logged
    assert not any(line.startswith("[1/1]") for line in logged)


def test_a_cell_whose_lock_cannot_be_written_fails_and_is_not_waited_for(
    recipe, in_process, tmp_path, monkeypatch, logged
):
    plan, folder = densities(recipe, 0.25), tmp_path / "sweep"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def process(own, cell):
        try:
            return worker.run(own, cell)
        except UserError as error:
            # As `run_command` does.
            (own / "log.txt").write_text(f"error: {error}\n")
            return 2

    def wait(seconds):
        raise AssertionError("waited for a cell that nobody computes")

    monkeypatch.setattr(sweep, "_process", process)
    monkeypatch.setattr(sweep.time, "sleep", wait)
    with monkeypatch.context() as patch:
        patch.setattr(locks, "_write", full)
        assert sweep.run(plan, folder) == 1
    assert "failed: cannot write" in sweep.listing(plan, folder)
    assert sweep.run(plan, folder, retry=True) == 0


# ---- Numbers ----


def record(loss, *, edges=None, **task_losses):
    circuits = {
        task: {"status": "found", "nodes": 2, "edges": n} if n is not None else {"status": "not found"}
        for task, n in (edges or {}).items()
    }
    return {
        "val_loss": loss, "nonzeros": 10, "parameters": 20, "tokens_per_s": 1.0, "seconds": 90.0,
        "task_losses": task_losses, "circuits": circuits,
    }  # fmt: skip


def test_metrics_count_tasks_below_the_bar_and_average_edges_over_own_and_over_shared_tasks():
    a = record(2.0, edges={"x": 2, "y": 8, "z": None}, x=0.1, y=0.149, z=0.15)
    b = record(2.1, edges={"x": 4}, x=0.1)
    shared = records.shared_tasks([a, b, record(3.0)])
    assert shared == {"x"}
    metrics = records.metrics(a, shared)
    assert (metrics["tasks"], metrics["circuits"], metrics["minutes"]) == (2, 2, 1.5)
    assert metrics["edges"] == pytest.approx(4.0)
    assert metrics["edges_shared"] == pytest.approx(2.0)
    # What was not measured is not a number.
    assert "edges" not in records.metrics(record(3.0), shared)


def test_a_plot_leaves_out_points_without_its_metrics(tmp_path):
    groups = [
        report.Group({"width": d, "budget": n}, [{"val_loss": 2.0 + d / n, "edges": 3.0 * d}] * 2)
        for d in (16, 256) for n in (1000, 2000)
    ]  # fmt: skip
    groups.append(report.Group({"width": 512, "budget": 1000}, [{"val_loss": 2.0}]))
    report.draw(Plot(x="edges", lines=("budget", "width")), groups, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
    report.draw(Plot(x="nodes"), groups, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


# ---- Processes ----

FILE = """
from wsparse.sweeps import Point, Sweep

def get_config():
    mini = {{
        "model.vocab_size": 512, "model.n_layer": 1, "model.d_model": 32, "model.n_head": 2,
        "model.context": 48, "data.source": "idioms", "data.megabytes": 0.3, "steps": 40, "batch_size": 8,
    }}
    points = [Point(axes={{"density": r}}, overrides=mini | {{"sparsity.density": r}}) for r in (0.25, 0.5)]
    return Sweep(points=tuple(points), tasks=("indent_for",), prune={prune!r}, pairs=16)
"""
PRUNE = """
from wsparse.circuits.settings import recipe

def get_config():
    return recipe(target=0.69, trials=2, parallel=1, steps=3, pairs_per_step=4, search_pairs=8,
                  discretize_pairs=8, report_pairs=8, finalists=1, single_removals=8,
                  sweep=(), controls=False, necessity=0.0)
"""


@pytest.mark.slow
def test_two_workers_share_a_sweep_and_one_that_is_interrupted_saves_its_cell(tmp_path):
    (tmp_path / "prune.py").write_text(PRUNE)
    (tmp_path / "mine.py").write_text(FILE.format(prune=str(tmp_path / "prune.py")))
    folder, limit = tmp_path / "runs/sweeps/mine", time.monotonic() + 500

    def start():
        return start_python("-m", "wsparse.sweep", "--config=mine.py", cwd=tmp_path)

    def wait_for(condition):
        while not condition():
            assert time.monotonic() < limit
            time.sleep(0.1)

    workers = [start()]
    try:
        wait_for(lambda: list(folder.glob("*/metrics.jsonl")))
        workers[0].send_signal(signal.SIGINT)
        out, err = workers[0].communicate(timeout=100)
        assert (workers[0].returncode, err.splitlines()) == (
            130, ["SIGINT: stopped; run the same command again to go on"],
        )  # fmt: skip
        # Its cell's process has ended as well, and saved.
        assert not locks.is_held(folder / "density=0.25_seed=0", name=worker.LOCK)
        assert "run the same command again" in (folder / "density=0.25_seed=0/log.txt").read_text()
        workers = [start(), start()]
        said = ""
        for process in workers:
            out, err = process.communicate(timeout=400)
            assert (process.returncode, err) == (0, ""), out
            said += out
    finally:
        for process in workers:
            process.kill()
    assert said.count("held-out loss") >= 2
    rows = files.read_json(folder / "results.json")["cells"]
    assert [row["density"] for row in rows] == [0.25, 0.5]
    assert all(set(row["record"]["circuits"]) == {"indent_for"} for row in rows)
