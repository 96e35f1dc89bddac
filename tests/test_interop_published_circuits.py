"""Published circuits are read and replayed: files made with PyTorch, numbers by the NumPy reference."""

import json
import shutil
import types

import numpy as np
import published_case as case
import pytest
from test_interop_torch_file import archive, entries_of

from wsparse import locks, runs
from wsparse.circuits import report
from wsparse.circuits.circuit import Circuit
from wsparse.config import TrainConfig
from wsparse.errors import UserError
from wsparse.interop import published_circuits, torch_file, viz_data
from wsparse.interop.torch_file import TorchFileError

TEXTS = ("first", "second")
FILES = {k: case.SWEEP / str(k) / viz_data.FILE for k in (12, 60)}


@pytest.fixture(scope="module")
def replay():
    published = viz_data.read(FILES[60], case.CONFIG)
    means = viz_data.read_means(case.FOLDER / "viz" / "sink_bigram" / viz_data.MEANS_FILE, case.CONFIG)
    tree = published_circuits.stacked(means, case.CONFIG)
    return published, published_circuits.make_replay(case.PARAMS, case.CONFIG, published, case.ANSWERS, tree)


@pytest.fixture(scope="module")
def rows(replay):
    return {row.quantity: row for row in published_circuits.compare("60", *replay, max_nodes=40)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of the golden model; its vocabulary of 96 is too small for a tokenizer of bytes."""
    tokens = dict(zip(TEXTS, case.ANSWERS, strict=True))
    tokenizer = types.SimpleNamespace(encode=lambda text: [tokens[text]] if text in tokens else [1, 2])
    config = TrainConfig(model=case.CONFIG)
    made = runs.Run(tmp_path / "run", config, 0, case.PARAMS, tokenizer)
    monkeypatch.setattr(runs, "load", lambda folder: made)
    return made


# ---- Reading ----


def same(got, want, tolerance=0.0):
    if isinstance(want, np.ndarray):
        alike = type(got) is np.ndarray and (got.dtype, got.shape) == (want.dtype, want.shape)
        return alike and np.allclose(got, want, rtol=0, atol=tolerance)
    if isinstance(want, dict):
        return list(got) == list(want) and all(same(got[k], v, tolerance) for k, v in want.items())
    if isinstance(want, (list, tuple)):
        parts = zip(got, want, strict=False)
        alike = type(got) is type(want) and len(got) == len(want)
        return alike and all(same(*each, tolerance) for each in parts)
    return type(got) is type(want) and (got == want or abs(got - want) <= tolerance)


TREE = {
    "empty": np.zeros(0, np.int64), "flat": np.zeros((0, 3), np.float32), "scalar": np.array(2.5),
    "list": [1, 2.5, None, True, "text", [np.arange(3)]], "tuple": (1, ("a", -1), {}),
    "keys": {3: 1, 0.001: 2, "x": {}}, "long": 2**70, "nothing": [],
}  # fmt: skip


def test_trees_are_what_pytorch_has_written(tmp_path):
    torch = pytest.importorskip("torch")
    for protocol in (2, 4):
        torch.save(case.with_tensors(torch, TREE), tmp_path / "tree.pt", pickle_protocol=protocol)
        assert same(torch_file.read_tree(tmp_path / "tree.pt"), TREE)
    torch.save({torch.tensor(7): [1]}, tmp_path / "key.pt")
    assert torch_file.read_tree(tmp_path / "key.pt") == {7: [1]}


def test_the_plain_reader_goes_on_refusing_trees(tmp_path):
    with pytest.raises(TorchFileError):
        torch_file.read(FILES[12])
    torch = pytest.importorskip("torch")
    for value in ([1], {"x": 1.0}, {1: torch.ones(2)}, {"x": torch.ones(0)}):
        torch.save(value, tmp_path / "tree.pt")
        with pytest.raises(TorchFileError):
            torch_file.read(tmp_path / "tree.pt")


def test_a_tree_calls_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    for value in ({"x": {1, 2}}, {"x": 1j}, {(1, 2): 3}, {None: 1}, [torch.float32], {"x": print}):
        torch.save(value, tmp_path / "tree.pt")
        with pytest.raises(TorchFileError) as error:
            torch_file.read_tree(tmp_path / "tree.pt")
        assert "\n" not in str(error.value)


def test_a_circuit_is_read_as_it_was_written(replay):
    published, _ = replay
    assert published.size == sum(channels.size for channels in published.kept.values())
    assert published.size > 90 and any(not channels.size for channels in published.kept.values())
    assert published.tokens_BT.shape == (8, int(published.length_B.max()))
    assert set(published.length_B[:4]) == set(published.length_B[4:])
    assert published.prune_config == {"k_coef": 1e-4, "target": None, "seeds": [0, 1]}
    assert 0 < published.circuit_loss == published.search_loss


# ---- Stored against recomputed ----

EQUAL = {
    "loss of the model": 1, "loss of the circuit": 1, "last loss of the search": 1,
    "losses without a node": 40, "losses without a block": 6, "nodes of the model": 1,
}  # fmt: skip


@pytest.mark.parametrize("quantity", EQUAL)
def test_numbers_are_those_of_the_reference(quantity, rows):
    assert rows[quantity].numbers == EQUAL[quantity]
    assert rows[quantity].difference < 1e-5
    assert rows[quantity].stored == pytest.approx(rows[quantity].recomputed, abs=1e-5)


def test_activations_and_weights_are_those_of_the_reference(replay, rows):
    published, _ = replay
    assert rows["activations"].numbers == published.size * int(published.length_B.sum())
    assert rows["activations"].difference < 1e-5
    assert rows["weights between nodes"].numbers > 50
    assert rows["weights between nodes"].difference == 0
    assert abs(rows["weights between nodes"].stored) > 0


def test_the_final_stream_is_part_of_a_published_circuit(rows):
    """Left alone, as in our circuits, the loss is another; the table says so."""
    assert rows["the same, the final stream left alone"].difference > 1e-3


def test_a_changed_mask_answer_or_mean_gives_another_loss(replay):
    """Negative controls: the table would show it."""
    published, good = replay
    effects = {
        place: np.abs(losses - published.circuit_loss) for place, losses in published.node_losses.items()
    }
    place = max(effects, key=lambda place: effects[place].max(initial=0))
    index = effects[place].argmax()
    fewer = {**published.kept, place: np.delete(published.kept[place], index)}
    loss = good.score(good.gates(published.kept)).loss
    assert loss == pytest.approx(published.circuit_loss, abs=1e-5)
    changed = good.score(good.gates(fewer)).loss
    assert changed == pytest.approx(published.node_losses[place][index], abs=1e-5)
    assert abs(changed - loss) > 1e-3
    zeros = {name: 0 * mean for name, mean in good.means.items()}
    for answers, means in ((case.ANSWERS[::-1], good.means), (case.ANSWERS, zeros)):
        other = published_circuits.make_replay(case.PARAMS, case.CONFIG, published, answers, means)
        assert abs(other.score(other.gates(published.kept)).loss - loss) > 1e-3


# ---- Into a run ----


def test_a_sweep_becomes_circuit_folders_and_a_table(run):
    rows = published_circuits.import_circuits(run.folder, case.SWEEP, answers=TEXTS, max_nodes=2)
    assert {row.circuit for row in rows} == {"12", "60"}
    folder = run.folder / "circuits"
    assert (folder / "two_tokens@published.md").read_text() == published_circuits.table(rows)
    circuit = Circuit.load(folder / "two_tokens@published-60")
    circuit.check(case.PARAMS)
    assert circuit.task == "two_tokens" and circuit.form == "first or second"
    published = viz_data.read(FILES[60], case.CONFIG)
    names = {f"{place}.{c}" for place, kept in published.kept.items() for c in kept if place != "final_resid"}
    assert {node.name for node in circuit.nodes} == names
    stored = json.loads((folder / "two_tokens@published-60" / "comparison.json").read_text())["rows"]
    alone = next(row for row in stored if row["quantity"].startswith("the same"))
    assert circuit.loss == pytest.approx(alone["recomputed"], abs=1e-6)
    importance = {node.name: node.importance for node in circuit.nodes}
    place, losses = "2.attn.v", published.node_losses["2.attn.v"]
    first = f"{place}.{published.kept[place][0]}"
    assert importance[first] == pytest.approx(losses[0] - published.circuit_loss)
    assert len(report.table(report.collect(folder)).splitlines()) > 2


def test_what_is_wrong_is_one_line_and_nothing_is_written(run, tmp_path):
    def refused(source=case.SWEEP, answers=TEXTS, **options):
        with pytest.raises(UserError) as error:
            published_circuits.import_circuits(run.folder, source, answers=answers, **options)
        assert "\n" not in str(error.value)
        assert not (run.folder / "circuits").exists()
        return str(error.value)

    assert "--answer must be given twice" in refused(answers=("first",))
    assert "--answer must be given twice" in refused(answers=("first", "first"))
    assert "must be the name of a task" in refused(task="../elsewhere")
    assert "must be the name of a task" in refused(task="two_tokens@mine")
    assert "is 2 tokens of the run's tokenizer" in refused(answers=("first", "third"))
    assert f"has no K/{viz_data.FILE}" in refused(tmp_path)
    shutil.copytree(case.SWEEP, tmp_path / "sweep")
    path = tmp_path / "sweep" / "60" / viz_data.FILE
    content = bytearray(path.read_bytes())
    content[content.index(b"circuit_data")] ^= 1
    path.write_bytes(content)
    assert "is damaged" in refused(tmp_path / "sweep")
    path.write_bytes(b"")
    assert "is not a PyTorch file" in refused(tmp_path / "sweep")
    means = tmp_path / "means.pt"
    torch_file.write(means, {"0.attn.q": np.zeros(3, np.float32)})
    assert "has no mean of 0.attn.act_in" in refused(means=means)


def test_circuits_are_not_imported_while_another_command_writes_there(run):
    folder = run.folder / "circuits"
    folder.mkdir(parents=True)
    with locks.hold(folder, "pruning"), pytest.raises(UserError, match="is pruning there"):
        published_circuits.import_circuits(run.folder, case.SWEEP, answers=TEXTS, max_nodes=2)
    assert not list(folder.iterdir())


BROKEN = {
    "lacks 'importances'": lambda tree: tree.pop("importances"),
    "of a model with d_model 64": lambda tree: tree["importances"]["beeg_model_config"].update(d_model=64),
    "a location that the model has not: '7.attn.q'": lambda tree: tree["circuit_data"].update(
        {"7.attn.q": np.array([1])}
    ),
    "must be different channels of 32": lambda tree: tree["circuit_data"].update(
        {"0.attn.q": np.array([1, 1])}
    ),
    "interv_loss must be a number": lambda tree: tree["importances"].update(interv_loss=float("nan")),
    "ch_interv_losses of 2.attn.v must be": lambda tree: tree["importances"]["ch_interv_losses"][
        "2.attn.v"
    ].pop(),
    "task_samples must be an even number": lambda tree: tree["importances"].update(
        task_samples=(np.ones((3, 4), np.int64), {})
    ),
    "prompts of 1 to 16 tokens": lambda tree: tree["importances"].update(
        task_samples=(np.zeros((2, 4), np.int64), {})
    ),
    "a token that is not one of the model's 96": lambda tree: tree["importances"].update(
        task_samples=(np.full((2, 4), 96), {})
    ),
    "that is not kept": lambda tree: tree["importances"]["pair_data_connections"][3][2].append(31),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_of_another_form_says_which_entry_is_wrong(message, monkeypatch):
    tree = thawed(torch_file.read_tree(FILES[60]))
    BROKEN[message](tree)
    monkeypatch.setattr(torch_file, "read_tree", lambda path: tree)
    with pytest.raises(UserError, match=message):
        viz_data.read(FILES[60], case.CONFIG)


def test_settings_of_the_search_are_kept_where_json_can_hold_them(monkeypatch):
    tree = thawed(torch_file.read_tree(FILES[12]))
    nested: list = [1]
    nested.append(nested)
    tree["prune_config"] |= {
        "lr": np.array([0.5], np.float32), "table": np.zeros(3), 7: 1, "nan": float("nan"), "nested": nested,
    }  # fmt: skip
    monkeypatch.setattr(torch_file, "read_tree", lambda path: tree)
    kept = viz_data.read(FILES[12], case.CONFIG).prune_config
    assert json.loads(json.dumps(kept)) == {"k_coef": 1e-4, "target": None, "seeds": [0, 1], "lr": 0.5}


def test_a_mutated_pickle_gives_a_circuit_or_one_line(tmp_path):
    entries = entries_of(FILES[12])
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    rng, messages = np.random.default_rng(0), []
    for _ in range(60):
        pickled = bytearray(entries[name])
        for place in rng.integers(0, len(pickled), 2):
            pickled[place] = rng.integers(256)
        path = tmp_path / viz_data.FILE
        path.write_bytes(archive(entries | {name: bytes(pickled)}))
        try:
            viz_data.read(path, case.CONFIG)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)


def test_means_over_a_runs_own_text_are_those_of_the_reference(run, monkeypatch):
    windows = np.random.default_rng(0).integers(0, case.CONFIG.vocab_size, (2, 5)).astype(np.int32)
    monkeypatch.setattr(runs.Run, "windows", lambda self, split: windows)
    means = published_circuits.own_means(run)
    params = case.as_numpy(case.PARAMS)
    seen = [case.Masked(params, None, {}).run(window)[1] for window in windows]
    for name in ("attn.act_in", "attn.y", "mlp.resid_delta"):
        want = np.mean([acts[name] for acts in seen], axis=(0, 2))
        np.testing.assert_allclose(means[name], want, atol=1e-5)
    want = np.mean([acts["final_resid"] for acts in seen], axis=(0, 1))
    np.testing.assert_allclose(means["final_resid"], want, atol=1e-5)


def thawed(tree):
    """A copy whose dicts and lists may be changed."""
    if isinstance(tree, dict):
        return {key: thawed(value) for key, value in tree.items()}
    return [thawed(value) for value in tree] if isinstance(tree, list) else tree


@pytest.mark.slow
def test_the_files_are_those_that_the_case_makes():
    for name, tree in case.trees().items():
        assert same(torch_file.read_tree(case.FOLDER / name), tree, 1e-6), name
