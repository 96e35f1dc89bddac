"""Tables and comparisons of runs."""

import dataclasses
import json

import circuits_case as case
import pytest

from wsparse.circuits import compare, report
from wsparse.circuits.circuit import CurvePoint
from wsparse.errors import UserError


@pytest.fixture
def circuit():
    return case.circuit()


def write_run(folder, circuit, edges_by_task, val_loss):
    for task, edges in edges_by_task.items():
        counts = dataclasses.replace(circuit.counts, edges=edges, edges_between_nodes=2 * edges)
        curve = [CurvePoint(0.12, 3, edges, 0.1)]
        one = dataclasses.replace(circuit, task=task, counts=counts, curve=curve)
        one.save(folder / "circuits" / task)
        status = {"task": task, "status": "found", "model": {"loss": 0.09, "accuracy": 1.0}}
        (folder / "circuits" / task / "status.json").write_text(json.dumps(status))
    hopeless = folder / "circuits" / "hopeless"
    hopeless.mkdir()
    status = {"task": "hopeless", "status": "the model cannot do it", "model": {"loss": 0.7, "accuracy": 0.5}}
    (hopeless / "status.json").write_text(json.dumps(status))
    (folder / "summary.json").write_text(json.dumps({"val_loss": val_loss, "nonzeros": 1234}))


def test_two_runs_are_compared_on_the_tasks_that_both_can_do(circuit, tmp_path, logged):
    write_run(tmp_path / "a", circuit, {"one": 4, "two": 9, "mine": 5}, 2.0)
    write_run(tmp_path / "b", circuit, {"one": 64, "two": 36}, 2.01)
    result = compare.compare(tmp_path / "a", tmp_path / "b")
    assert [t["task"] for t in result["tasks"]] == ["one", "two"]
    assert [t["ratio"] for t in result["tasks"]] == [16.0, 4.0]
    assert result["geometric_mean_edges"] == pytest.approx([6.0, 48.0])
    assert result["ratio_edges"] == pytest.approx(8.0)
    assert result["val_loss"] == [2.0, 2.01]
    assert result["only_first"] == ["mine"]
    compare.run([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "8.0" in logged[0]
    assert (tmp_path / "a" / "circuits" / "compare.png").stat().st_size > 1000
    with pytest.raises(UserError, match="has no circuits"):
        compare.compare(tmp_path / "a", tmp_path / "nothing")
    with pytest.raises(UserError, match="two run folders"):
        compare.run([str(tmp_path / "a")])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        compare.run([str(tmp_path / "a"), str(tmp_path / "b")], out=str(tmp_path / "file"))


def test_the_old_form_of_a_comparisons_flag_is_read_with_a_note(capsys):
    assert compare.joined(["--runs", "a", "b", "--out=c"]) == ["--runs=a,b", "--out=c"]
    assert "--runs=A,B now" in capsys.readouterr().err
    assert compare.joined(["--runs=a,b"]) == ["--runs=a,b"]


def test_circuits_at_other_targets_are_not_averaged_with_the_rest(circuit, tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, circuit, {"one": 4, "two": 9, "loose": 1}, 2.0)
        loose = dataclasses.replace(circuit, task="loose", target=0.4)
        loose.save(tmp_path / name / "circuits" / "loose")
    result = compare.compare(tmp_path / "a", tmp_path / "b")
    assert result["target"] == circuit.target
    assert [row["task"] for row in result["tasks"]] == ["one", "two"]
    assert result["other_targets"] == ["loose"]
    table = report.table(report.collect(tmp_path / "a" / "circuits"))
    assert f"over 2 tasks with target {circuit.target:.3g}: 6.0 edges" in table
    assert "over 1 tasks with target 0.4:" in table


def test_a_table_and_a_plot_without_controls_and_common_targets(circuit, tmp_path):
    write_run(tmp_path / "a", circuit, {"one": 4, "two": 9}, 2.0)
    folder = tmp_path / "a" / "circuits"
    bare = dataclasses.replace(circuit, task="one", controls={}, curve=[CurvePoint(0.3, 1, 2, 0.2)])
    bare.save(folder / "one")
    # A legend without entries is a warning, and warnings are errors.
    report.write(folder, report.collect(folder), title="a")
    (line,) = [line for line in (folder / "table.txt").read_text().splitlines() if line.startswith("one")]
    assert "nan" not in line and line.split().count("-") == 2


def test_a_comparison_sets_apart_what_is_empty_or_misses_the_target_on_the_report_split(
    circuit, tmp_path, logged
):
    held = dataclasses.replace(circuit, loss=circuit.target)
    edges_of = {"one": (4, 64), "empty": (0, 36), "overfit": (2, 2000)}
    for i, name in enumerate("ab"):
        write_run(tmp_path / name, held, {task: edges[i] for task, edges in edges_of.items()}, 2.0)
    where = tmp_path / "b" / "circuits" / "overfit"
    counts = dataclasses.replace(circuit.counts, edges=2000, edges_between_nodes=4000)
    fails = dataclasses.replace(held, task="overfit", counts=counts, loss=circuit.target + 0.1)
    fails.save(where)
    result = compare.compare(tmp_path / "a", tmp_path / "b")
    assert result["held"] == ["one"]
    assert result["ratio_edges_held"] == pytest.approx(16.0)
    assert result["ratio_edges"] == pytest.approx((16 * 36 * 1000) ** (1 / 3))
    compare.run([str(tmp_path / "a"), str(tmp_path / "b")])
    lines = logged[0].splitlines()
    starred = [line.split()[0] for line in lines if line.endswith("  *")]
    assert sorted(starred) == ["empty", "overfit"]


def test_the_table_names_every_task_and_the_geometric_mean(circuit, tmp_path):
    write_run(tmp_path / "a", circuit, {"one": 4, "two": 9}, 2.0)
    rows = report.collect(tmp_path / "a" / "circuits")
    report.write(tmp_path / "a" / "circuits", rows, title="a")
    text = (tmp_path / "a" / "circuits" / "table.txt").read_text()
    assert "hopeless" in text
    assert "the model cannot do it" in text
    assert "geometric mean over 2 tasks: 6.0 edges (12.0" in text
    assert report.geometric_mean([0, 1, 16]) == pytest.approx(16 ** (1 / 3))


def test_a_circuit_as_text_has_every_node_in_order_and_every_weight(circuit):
    lines = report.text(circuit).splitlines()
    assert circuit.task in lines[0]
    listed = [line.split()[0] for line in lines[4:]]
    assert sorted(listed) == sorted(node.name for node in circuit.nodes)
    assert [name.split(".")[0] for name in listed] == sorted(n.split(".")[0] for n in listed)
    line_of = dict(zip(listed, lines[4:], strict=True))
    assert circuit.edges
    for edge in circuit.edges:
        assert f"{edge.weight:+.3f} {edge.source}" in line_of[edge.target]
    # Reads come before what is made of them.
    assert all(listed.index(e.source) < listed.index(e.target) for e in circuit.edges)
