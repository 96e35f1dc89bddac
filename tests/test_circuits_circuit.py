"""The circuit file: typed, read strictly, and damaged files are refused in one line."""

import dataclasses
import json
import shutil

from helpers import run_python
import numpy as np
import pytest
import viewer_case as case

from wsparse.circuits import procedure, report
from wsparse.circuits.circuit import FOUND, NOT_CONFIRMED, Circuit, Status
from wsparse.config import from_dict
from wsparse.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A circuit's folder with its status."""
    folder = tmp_path_factory.mktemp("circuit")
    case.write_run(folder)
    return folder / "circuits" / case.TASK


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "circuits" / saved.name)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", {}, "'scores.model' is missing"),
        ("scores", None, "'scores' must be a group of keys, got None"),
        ("counts", {"nodes": "9"}, "'counts.nodes' must be of type int, got '9'"),
        ("controls", [], r"'controls' must be a group of keys, got \[\]"),
        ("controls", {"x": {"reached": True}}, "'controls.x.least_loss' is missing"),
        ("curve", "flat", "'curve' must be a list, got 'flat'"),
        ("curve", [{"target": 0.1}], r"'curve\[0\].nodes' is missing"),
        ("hyperparameters", None, "'hyperparameters' must be a group"),
        ("hyperparameters", {"settings": []}, "hyperparameters.settings must be a group"),
        ("nodes", {"a": 1}, "'nodes' must be a list"),
        ("nodes", [5], r"'nodes\[0\]' must be a group"),
        ("model", None, "'model' must be a group"),
        ("model", {"digest": "x"}, "'config' must be a group"),
        ("loss", True, "'loss' must be of type float, got True"),
        ("los", 1, r"unknown config key 'los' \(did you mean 'loss'\?\)"),
        ("task", "x" * 10**6, None),
        ("loss", "x" * 10**6, "'loss' must be of type float"),
    ],
)
def test_a_damaged_circuit_json_is_refused_by_the_name_of_the_key(folder, key, value, message):
    edit(folder / "circuit.json", lambda values: values.update({key: value}))
    if message is None:
        assert Circuit.load(folder).task == value
        return
    with pytest.raises(UserError, match=rf"is damaged: .*{message}") as caught:
        Circuit.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nonsense", b"\x93NUMPY"])
def test_damaged_arrays_are_refused(folder, content):
    (folder / "circuit.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: circuit\.npz cannot be read"):
        Circuit.load(folder)
    np.savez(folder / "circuit.npz")
    with pytest.raises(UserError, match=r"the means of .* must have shape"):
        Circuit.load(folder)
    with (folder / "circuit.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match=r"circuit\.npz cannot be read"):
        Circuit.load(folder)


def test_arrays_with_any_byte_changed_are_read_or_refused(folder):
    """What zipfile, zlib and NumPy's parser of headers raise is of many kinds."""
    path, random = folder / "circuit.npz", np.random.default_rng(0)
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    refused = 0
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        content = path.read_bytes()
        for place in random.integers(len(content), size=150):
            changed = bytearray(content)
            changed[place] ^= int(random.integers(1, 256))
            path.write_bytes(changed)
            try:
                Circuit.load(folder)
            except UserError:
                refused += 1
    assert refused > 100


def test_what_json_cannot_hold_leaves_the_circuit_that_was_there(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    circuit = dataclasses.replace(Circuit.load(folder), hyperparameters={"x": np.zeros(2)}, means={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        circuit.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["removed/blocks/mlp/fc/kernel", "means/attn.q"])
@pytest.mark.parametrize("change", [lambda array: None, lambda array: array[:1]])
def test_arrays_of_another_shape_are_refused(folder, name, change):
    with np.load(folder / "circuit.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    changed = change(arrays.pop(name))
    if changed is not None:
        arrays[name] = changed
    np.savez(folder / "circuit.npz", **arrays)
    with pytest.raises(UserError, match=rf"{name.rpartition('/')[2]} must|{name[8:]} must"):
        Circuit.load(folder)


@pytest.mark.parametrize("status", [{}, [], {"task": "a", "status": "found", "model": None}])
def test_a_damaged_status_is_refused_by_every_table(folder, status):
    (folder / "status.json").write_text(json.dumps(status))
    with pytest.raises(UserError, match=r"status\.json is damaged: "):
        Status.load(folder)
    with pytest.raises(UserError, match=r"status\.json is damaged: "):
        report.collect(folder.parent)


def test_older_files_with_british_keys_and_untyped_scores_still_load(folder):
    def older(values):
        scores = values["scores"]
        scores["discretise_loss"] = 0.25
        for name in ("discretize_loss", "sufficient", "trials"):
            del scores[name]
        # What was not reached had no size at all.
        scores["attribution_baseline"] = {"reached": False, "least_loss": 0.5}
        values["hyperparameters"]["settings"] = {"discretise_pairs": 47, "sweep": [0.3]}

    edit(folder / "circuit.json", older)
    loaded = Circuit.load(folder)
    assert loaded.scores.discretize_loss == 0.25
    settings = from_dict(procedure.Settings, loaded.hyperparameters["settings"])
    assert settings.discretize_pairs == 47


def test_a_circuit_above_its_target_on_the_report_split_is_marked(folder):
    edit(folder / "circuit.json", lambda values: values.update(loss=0.179, target=0.15))
    circuit = Circuit.load(folder)
    assert circuit.status == NOT_CONFIRMED and NOT_CONFIRMED in repr(circuit)
    assert "not confirmed: the target is 0.15" in report.summary(circuit)
    [row] = [r for r in report.collect(folder.parent) if r["task"] == case.TASK]
    assert row["status"] == NOT_CONFIRMED
    assert report.table([row]).splitlines()[1].endswith("  *")
    edit(folder / "circuit.json", lambda values: values.update(loss=0.15))
    assert Circuit.load(folder).status == FOUND
    assert "above" not in report.summary(Circuit.load(folder))


def test_only_circuits_of_the_robust_objective_are_held_to_the_adversary(folder):
    circuit = Circuit.load(folder)
    scores = dataclasses.replace(circuit.scores, attacked=0.5)

    def attacked(objective, **changes):
        settings = {"objective": objective, "robust_target": 0.3}
        return dataclasses.replace(
            circuit, loss=0.1, scores=scores, hyperparameters={"settings": settings}, **changes
        )

    assert [attacked(name).status for name in ("mean", "stochastic")] == [FOUND, FOUND]
    refuted = attacked("robust", target=0.15)
    assert refuted.status == NOT_CONFIRMED
    assert "(not confirmed: the target under attack is 0.3)" in report.summary(refuted)
    damaged = dataclasses.replace(refuted, hyperparameters={"settings": {"objective": "robust"}})
    damaged.save(folder)
    with pytest.raises(UserError, match=r"hyperparameters\.settings\.robust_target must be a number"):
        Circuit.load(folder)
    # Where the model is above both targets, so is what its circuits are held to.
    assert attacked("robust", target=0.6).status == FOUND


def test_reading_a_circuit_imports_no_jax(saved):
    code = (
        "import sys; from wsparse.circuits.circuit import Circuit; from wsparse.circuits import report;"
        f"report.table(report.collect(__import__('pathlib').Path({str(saved.parent)!r})));"
        "sys.exit('jax' in sys.modules)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
