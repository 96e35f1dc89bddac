"""Results of runs are kept by recipe and seed, and the docs' tables are made of nothing else."""

import dataclasses
import json
import re

from helpers import REPO
import pytest
from train_case import finished, source  # noqa: F401

from wsparse import recipes, results
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.config import TrainConfig, from_dict
from wsparse.errors import UserError
from wsparse.sweeps import records


def tiny(**changes) -> TrainConfig:
    return dataclasses.replace(results._recipe("tiny"), **changes)


def entry(name="tiny", seed=0, *, loss=2.5, edges=None, config=None, digest="a", machine="2 cores", **losses):
    def circuit(n):
        if n is None:
            return {"status": "not found", "model_loss": 0.12}
        size = {"nodes": 3, "edges": n, "edges_between_nodes": 2 * n}
        controls = {"shuffled_labels": 0.7, "random_model": 0.8}
        known = {"loss": 0.1, "attacked": 2.0, "model_loss": 0.05, "target": 0.15, "controls": controls}
        return {"status": "found", **size, **known}

    return {
        "name": name, "seed": seed, "config": config or results._telling(results._recipe(name)),
        "digest": digest, "prune": "results" if edges else "", "machine": machine, "pairs": 128,
        "val_loss": loss, "nonzeros": 41104, "parameters": 9, "tokens_per_s": 1.0, "steps": 5,
        "seconds": 150.0, "task_losses": losses, "refused": [],
        "circuits": {task: circuit(n) for task, n in (edges or {}).items()},
    }  # fmt: skip


def table(kind, entries, *names) -> list[list[str]]:
    text = f"before\n<!-- results: {kind} {' '.join(names)} -->\nold\n<!-- end of results -->\nafter\n"
    text = results.rewritten(text, entries)
    assert text.startswith("before\n<!--") and text.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- Names ----


@pytest.mark.parametrize("name", list(recipes.names()))
def test_a_run_of_a_recipe_has_its_name_whatever_the_seed_and_the_mesh(name):
    config = dataclasses.replace(results._recipe(name), seed=7, log_every=3)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1))
    assert results.name(config) == name


def test_a_run_with_overrides_is_named_after_the_nearest_recipe():
    config = tiny(steps=450)
    assert results.name(config) == "tiny,steps=450"
    dense = dataclasses.replace(config.sparsity, density=1.0)
    assert results.name(dataclasses.replace(config, sparsity=dense)) == "tiny:dense,steps=450"


# ---- Runs ----


def test_a_complete_run_is_taken_in_with_what_its_folder_says(finished, monkeypatch):  # noqa: F811
    two = {name: records.task_lib.TASKS[name] for name in ("for_while", "class_init")}
    monkeypatch.setattr(records.task_lib, "TASKS", two)
    run = results.entry(finished.workdir, pairs=8)
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert (run["val_loss"], run["nonzeros"]) == (summary["val_loss"], summary["nonzeros"])
    assert run["machine"] == summary["machine"]
    assert run["seed"] == finished.config.seed and run["circuits"] == {} and run["prune"] == ""
    assert set(run["task_losses"]) | set(run["refused"]) == set(two)
    assert from_dict(TrainConfig, run["config"]).model == finished.config.model
    assert results.run_folders(finished.workdir.parent) == [finished.workdir]


def test_runs_of_several_machines_come_together_and_survive_the_file(tmp_path):
    path = tmp_path / "results.json"
    assert results.read(path) == []
    first = [entry(seed=0, edges={"x": 3}), entry(seed=1)]
    results.write(path, first)
    assert results.read(path) == first
    assert len(path.read_text().splitlines()) == 4
    same, other = entry(seed=0, loss=2.4), entry(seed=1, loss=2.3, digest="b")
    found = results.merged(first, [other, same, entry("small")])
    assert [(run["name"], run["seed"], run["val_loss"]) for run in found] == [
        ("small", 0, 2.5), ("tiny", 0, 2.4), ("tiny", 1, 2.3),
    ]  # fmt: skip
    # The same model scored anew has the circuits that were found in it; another model has not.
    assert found[1]["circuits"] == first[0]["circuits"] and found[1]["prune"] == "results"
    assert results.merged([entry(edges={"x": 3})], [entry(digest="b")])[0]["circuits"] == {}


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no complete one"):
        results.run_folders(tmp_path)


# ---- Tables ----


def test_a_table_of_models_has_medians_ranges_and_the_number_of_seeds():
    entries = [
        entry(seed=0, loss=2.6, x=0.1, y=0.2), entry(seed=1, loss=2.5, x=0.1, y=0.1),
        entry(seed=2, loss=2.7, x=0.3, y=0.4),
    ]  # fmt: skip
    header, _, row, unmeasured = table("models", entries, "tiny", "tiny:dense")
    assert header[2:] == ["held-out loss", "tasks below 0.15", "nonzero weights", "minutes", "seeds"]
    assert row[0] == "`tiny`" and row[1].startswith("d_model 128, 2 layers, 1 weight in 16")
    assert row[2:] == ["2.600 (2.500 to 2.700)", "1 (0 to 2) of 2", "41,104", "2.5", "3"]
    assert unmeasured[0] == "`tiny:dense`" and unmeasured[2:] == ["not measured", "", "", "", ""]


def test_a_table_of_circuits_counts_seeds_and_compares_tasks_that_both_have():
    entries = [
        entry(seed=0, edges={"x": 4, "y": None, "z": 100}), entry(seed=1, edges={"x": 8, "y": 1, "z": 100}),
        entry("small", edges={"x": 24, "y": 16, "z": None}),
    ]  # fmt: skip
    header, _, x, y, z, mean = table("circuits", entries, "tiny", "small")
    assert header[1:7] == ["`tiny`: seeds", "nodes", "edges", "loss", "the model's", "attacked"]
    assert x[:7] == ["`x`", "2 of 2", "3", "6 (4 to 8)", "0.100", "0.050", "2.000"]
    assert x[7:] == ["1 of 1", "3", "24", "0.100", "0.050", "2.000", "4.0"]
    assert y[1:4] == ["1 of 2", "3", "1"] and y[-1] == "16.0"
    assert z[7:] == ["0 of 1", "-", "-", "-", "-", "-", "-"]
    # x and y: the square roots of 6 * 1 and of 24 * 16.
    assert mean[0] == "**geometric mean** of the medians of 2 tasks that all have"
    assert (mean[3], mean[9], mean[-1]) == ("**2.4**", "**19.6**", "8.0")


def test_a_table_says_how_many_circuits_are_confirmed():
    entries = [
        entry(seed=0, edges={"x": 4, "y": None, "z": 100}), entry(seed=1, edges={"x": 8, "y": 1, "z": 100}),
    ]  # fmt: skip
    circuits = entries[1]["circuits"]
    circuits["z"]["status"] = "found, not confirmed on the report split"
    circuits["w"] = {"status": "not tried: the model cannot do the task", "model_loss": 0.7}
    row = table("confirmed", entries, "tiny")[2]
    assert row == ["`tiny`", "7", "4 of 6 (67%)", "4 of 5 (80%)", "0 of 5", "2"]
    assert table("confirmed", [entry()], "tiny")[2][2:4] == ["-", "-"]
    circuits["x"]["controls"]["random_model"] = 0.12
    assert table("confirmed", entries, "tiny")[2][4] == "1 of 5"
    # A control that was not made is none that fails.
    for run in entries:
        for circuit in run["circuits"].values():
            circuit["controls"] = {}
    assert table("confirmed", entries, "tiny")[2][4] == "not made"


def test_a_table_of_audits_counts_the_seeds_that_pass_each_test_by_task():
    entries = [entry(seed=seed, edges={"x": 4, "y": 8, "z": None}) for seed in range(3)]
    for seed, (one, two) in enumerate([("passed", "failed"), ("failed", "failed"), ("passed", "not run")]):
        verdicts = {"sufficiency": one, "adversarial_steps": two, "selectivity": "reported"}
        entries[seed]["circuits"]["x"]["audit"] = verdicts
    entries[0]["circuits"]["y"]["audit"] = {"sufficiency": "passed"}
    header, _, *rows = table("audits", entries, "tiny")
    # Columns of audited tasks, rows of tests that have a criterion.
    assert header == ["test", "`tiny`: `x`", "`tiny`: `y`"]
    assert rows == [
        ["The circuit alone", "2 of 3", "1 of 1"],
        [CLAIMS["adversarial_steps"].title, "0 of 2", "-"],
    ]


def test_a_table_of_ratios_is_over_tasks_and_seeds_that_both_have():
    sparse = [
        entry(seed=0, edges={"x": 4, "y": 10, "z": 5}),
        entry(seed=1, edges={"x": 9, "y": 10, "z": None}),
    ]
    dense = [entry("small", edges={"x": 24, "y": 90, "z": None}), entry("small", seed=1, edges={"x": 54})]
    header, _, row = table("ratios", [*sparse, *dense], "tiny", "small")
    assert header[:4] == ["ratio of", "nodes", "edges", "weights between nodes"]
    # x: the square root of 24 * 54 over that of 4 * 9; y: 90 over 10; z is not one that both have.
    value = (6.0 * 9.0) ** 0.5
    assert row[0] == "`small` to `tiny`" and row[2] == row[3] and row[4:6] == ["2", "2 and 2"]
    middle, low, high = (float(part) for part in re.findall(r"[\d.]+", row[2]))
    assert middle == pytest.approx(value, abs=0.05)
    # Intervals cover both tasks, and for x the models of both: 24 over 9 to 54 over 4.
    assert 24 / 9 - 0.1 <= low < middle < high <= 54 / 4 + 0.1
    assert row[1] == "1.0 (1.0 to 1.0)"
    assert table("ratios", [*sparse, entry("small", edges={"w": 3})], "tiny", "small")[2][1:5] == [
        *"---",
        "0",
    ]


def test_ratios_are_also_of_circuits_at_one_target_and_of_tasks_that_no_control_does():
    edges = {"x": 10, "y": 10, "z": 10}
    sparse = entry(edges=edges)
    dense = entry("small", edges={"x": 20, "y": 80, "z": 640})
    dense["circuits"]["y"]["target"] = 0.2
    sparse["circuits"]["z"]["controls"]["random_model"] = 0.1
    rows = table("ratios", [sparse, dense], "tiny", "small")[2:]
    assert [(row[0].removeprefix("`small` to `tiny`"), row[2].split()[0], row[4]) for row in rows] == [
        ("", "10.1", "3"),
        (", all at the target 0.15", "11.3", "2"),
        (", without `z`, which a control does", "4.0", "2"),
    ]


def test_tables_can_be_of_some_tasks_and_say_for_which_circuits_were_searched():
    entries = [entry(edges={"x": 4, "y": 10}, x=0.1, y=0.1), entry("small", edges={"x": 24, "y": 90}, x=0.1)]
    assert [row[0] for row in table("circuits", entries, "tasks=y", "tiny", "small")[2:-1]] == ["`y`"]
    assert table("ratios", entries, "tasks=y", "tiny", "small")[2][2].startswith("9.0")
    markers = "<!-- results: ratios {} -->\n<!-- end of results -->"
    assert "--task=all --config" in results.rewritten(markers.format("tiny small"), entries)
    assert "--task=y --config" in results.rewritten(markers.format("tasks=y tiny small"), entries)
    del entries[0]["circuits"]["y"], entries[1]["circuits"]["y"]
    assert "--task=x --config" in results.rewritten(markers.format("tiny small"), entries)
    with pytest.raises(UserError, match="no circuit of 'z'"):
        table("ratios", entries, "tasks=z", "tiny", "small")


def test_the_interval_of_a_ratio_draws_models_with_all_their_circuits():
    # One model has large circuits for every task: that is one observation, however many tasks there are.
    tasks = "abcdefghijkl"
    sparse = [entry(seed=seed, edges=dict.fromkeys(tasks, 10)) for seed in range(3)]
    dense = [
        entry("small", seed=seed, edges=dict.fromkeys(tasks, n)) for seed, n in enumerate((10, 10, 1000))
    ]
    middle, low, high = re.findall(r"[\d.]+", table("ratios", [*sparse, *dense], "tiny", "small")[2][2])
    assert (middle, low, high) == ("4.6", "1.0", "100.0")


def test_circuits_of_other_settings_are_kept_beside_each_other_and_chosen_by_name():
    mean, robust = entry(edges={"x": 4}, x=0.1), entry(edges={"x": 40}, x=0.1) | {"prune": "robust"}
    both = results.merged([mean], [robust])
    assert [run["prune"] for run in both] == ["results", "robust"]
    for prune, edges in (("results", "4"), ("robust", "40")):
        assert table("circuits", both, f"prune={prune}", "tiny")[2][3] == edges
    # One row for the model, and a newer one has neither's circuits.
    assert table("models", both, "tiny")[2][-1] == "1"
    newer = results.merged(both, [entry(digest="b")])
    assert [(run["digest"], run["circuits"]) for run in newer] == [("b", {})]
    scored = results.merged(both, [entry(loss=2.0)])
    assert [(run["prune"], run["val_loss"]) for run in scored] == [("results", 2.0), ("robust", 2.0)]


def test_a_table_of_tasks_has_every_task_and_what_was_not_scored_is_a_dash():
    rows = table("tasks", [entry(a=0.1), entry(seed=1, a=0.3, b=0.2), entry("small", b=0.5)])
    assert rows[2:] == [["`a`", "0.200 (0.100 to 0.300)", "-"], ["`b`", "0.200", "0.500"]]


def test_commands_and_machines_are_told_below_and_so_is_a_recipe_that_has_changed():
    old = results._telling(tiny(steps=1))
    entries = [entry(edges={"x": 1}, config=old), entry("small", edges={"x": 1}, machine="1 x H100")]
    text = results.rewritten("<!-- results: circuits -->\n<!-- end of results -->", entries)
    commands = "--config.seed=SEED`, then `python -m wsparse.prune --run=RUN --task=all --config=results`"
    assert commands in text
    assert "; trained on 2 cores (tiny); 1 x H100 (small)." in text
    assert "`tiny`\\*" in text and "`small`\\*" not in text
    assert "\\*: the recipe has changed since." in text
    # A second time changes nothing.
    assert results.rewritten(text, entries) == text


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("model", "no table 'model' (did you mean 'models'?)"),
        ("models tinny", "'tinny' (did you mean 'tiny'?)"),
    ],
)
def test_a_marker_that_says_something_unknown_is_refused_with_its_document(marker, message):
    with pytest.raises(UserError) as error:
        results.rewritten(f"<!-- results: {marker} -->\n<!-- end of results -->", [], "README.md")
    assert str(error.value).startswith("README.md: ") and message in str(error.value)


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_the_tables_of_the_docs_are_those_of_the_stored_results(document):
    stored = results.read(REPO / "docs" / "results.json")
    text = (REPO / document).read_text()
    if not stored:
        pytest.skip("nothing is stored yet")
    assert results.rewritten(text, stored) == text, "run python -m wsparse.results"
