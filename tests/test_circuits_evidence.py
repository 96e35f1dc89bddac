"""Evidence of circuits: what the page says is what the model does."""

import base64
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import viewer_case as case

from wsparse import model, runs
from wsparse.circuits import Circuit, evidence, evidence_file, excerpts, graph, model_file, pairs, tasks
from wsparse.errors import UserError
from wsparse.nodes import NODES, Node


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("viewer")


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads(case.data_text(folder))


@pytest.fixture(scope="module")
def circuit(data, folder) -> Circuit:
    del data  # Its fixture has written the folder.
    return Circuit.load(folder / "circuits" / case.TASK)


@pytest.fixture(scope="module")
def batch(folder, data) -> pairs.TaskBatch:
    del data
    task = tasks.find(str(folder / f"{case.TASK}.jsonl"))
    return tasks.build(task, case.run().tokenizer, 4, 0, split="report")


def unpacked(packed: dict) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(packed["data"]), f"<{np.dtype(packed['dtype']).str[1:]}")
    return whole * packed["scale"]


@functools.cache
def _whole_model():
    return jax.jit(lambda params, tokens: model.forward(params, tokens, case.CONFIG)[1])


def whole_model_acts(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Location -> `(L, W, T, ...)`; rows are filled up to one shape, so that one program serves all."""
    filled = np.zeros((10, case.CONFIG.context), np.int32)
    filled[: len(tokens), : tokens.shape[1]] = tokens
    acts = _whole_model()(case.run().params, filled)
    return {name: np.asarray(acts[name])[:, : len(tokens), : tokens.shape[1]] for name in NODES}


def task_losses(batch, without: list[str | None], means) -> list[float]:
    """Losses of the whole model with one node at its mean (None: with all), in NumPy float64."""

    @jax.jit
    def logits(gone):
        def tap(name, value):
            if name not in gone:
                return value
            gone_11N, mean_11N = (gone[name][name.layer][None, None], means[name][name.layer][None, None])
            return jnp.where(gone_11N, mean_11N, value)

        return model.forward(case.run().params, batch.tokens, case.CONFIG, tap=tap)[0]

    means = {name: jnp.asarray(each) for name, each in means.items()}
    rows, losses = np.arange(len(batch.position)), []
    for node in without:
        gone = {name: np.zeros(means[name].shape, bool) for name in NODES}
        if node is not None:
            layer, location, channel = Node.parse(node)
            gone[location][layer, channel] = True
        last = np.asarray(logits(gone), np.float64)[rows, batch.position]
        lead = last[rows, batch.other] - last[rows, batch.answer]
        losses.append(float(np.mean(np.log1p(np.exp(lead)))))
    return losses


# ---- What is measured ----


def test_values_on_prompts_are_those_of_the_forward_pass(data, batch):
    shown = data["circuits"][case.TASK]
    acts = whole_model_acts(batch.tokens[: 2 * case.OPTIONS.pairs])
    lengths = batch.position[: 2 * case.OPTIONS.pairs] + 1
    for name, packed in shown["values"].items():
        layer, location, channel = Node.parse(name)
        values_RT = acts[location][layer, ..., channel]
        expected = np.concatenate([row[:n] for row, n in zip(values_RT, lengths, strict=True)])
        found = unpacked(packed["model"])
        np.testing.assert_allclose(found, expected, atol=packed["model"]["scale"])
        assert not expected.any() or not np.allclose(found[::-1], expected, atol=1e-3)
    assert [row["tokens"] for row in shown["rows"]] == [
        batch.tokens[i, :n].tolist() for i, n in enumerate(lengths)
    ]


def test_values_in_the_circuit_alone_are_those_with_everything_else_at_its_mean(data, circuit):
    values = data["circuits"][case.TASK]["values"]
    kept = {node.name for node in circuit.nodes}
    partners = set(values) - kept
    assert partners  # a query whose key is not in the circuit, or the other way round
    for name in partners:
        layer, location, channel = Node.parse(name)
        found = unpacked(values[name]["circuit"])
        np.testing.assert_allclose(found, circuit.means[location][layer, channel], rtol=1e-3, atol=1e-6)
    assert any(values[name]["model"] != values[name]["circuit"] for name in kept)


def test_ablation_deltas_are_those_of_one_node_at_its_mean(data, circuit, batch):
    nodes = data["circuits"][case.TASK]["nodes"]
    strongest = sorted(nodes, key=lambda node: -abs(node["from_model"]))[:5]
    assert abs(strongest[-1]["from_model"]) > 1e-3
    names = [node["name"] for node in strongest]
    whole, *losses = task_losses(batch, [None, *names], circuit.means)
    assert [node["from_model"] for node in strongest] == pytest.approx(
        [loss - whole for loss in losses], abs=2e-4
    )
    stated = {node.name: node.importance for node in circuit.nodes}
    assert {node["name"]: node["importance"] for node in nodes} == pytest.approx(stated)


def test_the_most_important_nodes_alone_end_at_the_circuits_own_loss(data, circuit):
    prefix = data["circuits"][case.TASK]["prefix"]
    assert [size for size, _ in prefix] == list(range(1, case.N_NODES + 1))
    assert prefix[-1][1] == pytest.approx(circuit.loss, abs=1e-4)
    assert max(abs(value - circuit.loss) for _, value in prefix) > 1e-3


def test_edges_are_the_circuits_with_their_weights(data, circuit):
    shown = data["circuits"][case.TASK]
    names = [node["name"] for node in shown["nodes"]]
    found = {(names[s], names[t]): np.float32(w) for s, t, w in shown["edges"]}
    assert found == {(e.source, e.target): np.float32(e.weight) for e in circuit.edges}


def test_attention_patterns_are_rows_of_shares(data, batch):
    """Against a softmax with a sink, in float64."""
    config, params = case.CONFIG, case.run().params
    acts = whole_model_acts(batch.tokens[: 2 * case.OPTIONS.pairs])
    lengths = batch.position[: 2 * case.OPTIONS.pairs] + 1
    for key, packed in data["circuits"][case.TASK]["patterns"].items():
        layer, head = map(int, key.split("."))
        own = slice(head * config.d_head, (head + 1) * config.d_head)
        sink = np.exp(float(params["blocks"]["attn"]["sink"][layer, head]))
        expected = []
        for row, length in enumerate(lengths):
            q, k = (acts[f"attn.{x}"][layer, row, :length, own].astype(float) for x in "qk")
            weights = np.exp(q @ k.T / np.sqrt(config.d_head))
            weights /= np.tril(weights).sum(1, keepdims=True) + sink
            expected.append(weights[np.tril_indices(length)])
        found = unpacked(packed["model"])
        np.testing.assert_allclose(found, np.concatenate(expected), atol=packed["model"]["scale"])
        assert found.std() > 0.01


def test_excerpts_show_where_a_node_is_highest_lowest_and_at_its_quantiles(data):
    windows = case.windows()
    acts = whole_model_acts(windows)
    for name, about in data["texts"][0]["nodes"].items():
        layer, location, channel = Node.parse(name)
        values = acts[location][layer, ..., channel]
        packed = unpacked(about["values"])
        spans = [*about["highest"], *about["lowest"], *about["sampled"]]
        expected = np.concatenate([values[w, a:b] for w, a, b, *_ in spans] or [np.zeros(0)])
        np.testing.assert_allclose(packed, expected, atol=1.01 * about["values"]["scale"])
        tops = [values[w, t] for w, _, _, t in about["highest"]]
        assert tops == sorted(tops, reverse=True)
        if tops:
            # One excerpt a window, and none of a window in which the node is silent.
            most = values.max(axis=1)
            assert tops[0] == most[most != 0].max()
        bottoms = [values[w, t] for w, _, _, t in about["lowest"]]
        assert bottoms == sorted(bottoms)
        if bottoms:
            least = values.min(axis=1)
            assert bottoms[0] == least[least != 0].min()
        active = values[values != 0]
        for window, _, _, token, quantile in about["sampled"]:
            value = values[window, token]
            assert np.mean(active < value) <= quantile + 1 / active.size
            assert np.mean(active <= value) >= quantile - 1 / active.size
        assert about["zero"] == pytest.approx(np.mean(values == 0))
        assert sum(about["counts"]) == active.size
    assert any(about["highest"] for about in data["texts"][0]["nodes"].values())


def test_token_weights_are_the_largest_of_the_embedding_and_of_the_unembedding(data):
    params = jax.tree.map(np.asarray, case.run().params)
    tables = {
        "act_in": params["embed"]["tokens"].T,
        "resid_delta": params["head"]["norm"]["gain"][:, None] * params["head"]["unembed"],
    }
    seen = set()
    for name, about in data["texts"][0]["nodes"].items():
        kind = name.split(".")[2]
        if kind not in tables:
            assert about["tokens"] == []
            continue
        weights = tables[kind][Node.parse(name).channel]
        order = np.argsort(-np.abs(weights), kind="stable")[:12]
        assert [t for t, _ in about["tokens"]] == order.tolist()
        np.testing.assert_allclose([w for _, w in about["tokens"]], weights[order], rtol=1e-6)
        seen.add(kind)
    assert seen == set(tables)


def test_biases_are_those_of_the_nodes_own_matrix(data):
    biases = {c.target: c.bias for c in graph.CONNECTIONS}
    for name, about in data["texts"][0]["nodes"].items():
        layer, location, channel = Node.parse(name)
        if location not in biases:
            assert about["bias"] is None and about["gain"] is not None
            continue
        leaf = case.run().params
        for key in biases[location].split("/"):
            leaf = leaf[key]
        assert np.float32(about["bias"]) == leaf[layer, channel]


def test_no_stretch_of_text_is_shown_twice():
    windows_WT = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    windows_WT[6:] += 100
    values_WT = np.where(windows_WT % 12 == 5, np.float32(1), np.float32(0))
    found = excerpts.summarize(values_WT, windows_WT)
    texts = [windows_WT[e.window, e.start : e.token + 1].tobytes() for e in found.excerpts]
    assert len(texts) == len(set(texts)) == 2
    assert [(e.kind, e.window) for e in found.excerpts] == [
        (evidence_file.HIGHEST, window) for window in (0, 6)
    ]


def test_excerpts_that_would_look_the_same_are_one():
    random = np.random.default_rng(0)
    windows_WT = random.integers(0, 99, (6, 40)).astype(np.int32)
    values_WT = np.zeros((6, 40), np.float32)
    # Two windows agree in the tokens before the highest value, and not further back.
    windows_WT[:2, 20:31] = np.arange(11)
    values_WT[:2, 30] = 9, 8
    # In another one values stand side by side, which is seen at once.
    values_WT[2, 30:36] = 3, 1, 1, 1, 1, 1
    found = excerpts.summarize(values_WT, windows_WT)
    assert [(e.kind, e.window) for e in found.excerpts] == [(evidence_file.HIGHEST, w) for w in (0, 2)]


# ---- The command ----


@pytest.fixture
def loaded(monkeypatch):
    """The run's checkpoint is the one in memory, and its text random."""
    monkeypatch.setattr(runs, "load", lambda folder: dataclasses.replace(case.run(), folder=folder))
    text = evidence.Text(case.windows(), "random tokens")
    monkeypatch.setattr(evidence, "read_text", lambda run, source: text)


def test_evidence_of_circuits_that_were_found_before_is_measured_by_one_command(
    folder, data, circuit, loaded
):
    where = folder / "circuits" / case.TASK
    before = evidence_file.Evidence.load(where, circuit)
    (where / "evidence.json").unlink()
    names = ["all", str(folder / f"{case.TASK}.jsonl")]
    assert evidence.measure_run(folder, names, case.OPTIONS) == 1
    assert model_file.StoredModel.load(folder / "circuits").digest == circuit.model_digest
    after = evidence_file.Evidence.load(where, circuit)
    assert after.nodes == before.nodes and after.prompts == before.prompts
    for name in evidence_file.ARRAYS:
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_evidence_that_was_measured_before_tokens_were_contrasted_can_be_read(
    folder, data, circuit, tmp_path
):
    evidence_file.Evidence.load(folder / "circuits" / case.TASK, circuit).save(tmp_path)
    with np.load(tmp_path / "evidence.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if not name.startswith("contrast")}
        assert len(kept) == len(arrays) - 3
    np.savez(tmp_path / "evidence.npz", **kept)
    older = evidence_file.Evidence.load(tmp_path, circuit)
    assert older is not None and not older.contrast_tokens_J.size
    kept["contrast_tokens_J"] = np.array([1])
    np.savez(tmp_path / "evidence.npz", **kept)
    with pytest.raises(UserError, match="contrast_counts_J4 must be numbers of shape"):
        evidence_file.Evidence.load(tmp_path, circuit)


def test_the_users_own_task_must_be_named(folder, data, loaded):
    with pytest.raises(UserError, match=r"--task=all,closing\.jsonl"):
        evidence.measure_run(folder, ["all"], case.OPTIONS)
    with pytest.raises(UserError, match=r"no circuit of 'closign' \(did you mean 'closing'"):
        evidence.measure_run(folder, ["closign"], case.OPTIONS)


def test_a_circuit_of_other_parameters_is_refused(folder, data, loaded, monkeypatch):
    other = dataclasses.replace(
        case.run(), folder=folder, params=jax.tree.map(lambda leaf: leaf + 1, case.run().params)
    )
    monkeypatch.setattr(runs, "load", lambda folder: other)
    names = ["all", str(folder / f"{case.TASK}.jsonl")]
    with pytest.raises(UserError, match="belongs to parameters"):
        evidence.measure_run(folder, names, case.OPTIONS)


@pytest.mark.parametrize("options", [{"pairs": 0}, {"max_nodes": 0}])
def test_options_that_measure_nothing_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        evidence.Options(**options)


# ---- Held-out text ----


def test_text_is_from_documents_that_training_held_out(tmp_path):
    run = dataclasses.replace(case.run(), folder=tmp_path)
    windows_WT = run.windows("validation", n=83)
    dataset = run.data
    sides = [
        b"".join(s.read(0, len(s)).astype(np.uint16).tobytes() for _, s in side)
        for side in (dataset.validation, dataset.train)
    ]
    kept = [row.astype(np.uint16).tobytes() for row in windows_WT]
    assert len(kept) > 20 and all(each in sides[0] for each in kept)
    assert np.mean([each in sides[1] for each in kept]) < 0.2  # idioms repeat each other a little


def test_another_text_can_be_given(tmp_path):
    (tmp_path / "a.py").write_text("answer = 42\n" * 30)
    windows_WT = case.run().windows("validation", n=8, source=f"files:{tmp_path}/*.py")
    assert "answer = 42" in case.run().tokenizer.decode(windows_WT[0])
    (tmp_path / "a.py").write_text("short")
    with pytest.raises(UserError, match="less than a window of 24 tokens"):
        case.run().windows("validation", n=8, source=f"files:{tmp_path}/*.py")
