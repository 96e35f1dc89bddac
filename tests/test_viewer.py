"""The viewer's data: what the page says is what the model does, and nothing in it can run."""

import base64
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import types

from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import viewer_case as case

from wsparse import model, runs, view
from wsparse.circuits import Circuit, graph, masks, tasks
from wsparse.data import batches
from wsparse.errors import UserError
from wsparse.nodes import NODES
from wsparse.viewer import activations, collect, held_out, page

DOC = pathlib.Path(__file__).parents[1] / "docs" / "viewer.md"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is most of the time of these tests, and the optimizer most of compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
def batch(folder, data) -> tasks.TaskBatch:
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
            gone_11N, mean_11N = (
                gone[name][name.layer][None, None],
                means[name][name.layer][None, None],
            )
            return jnp.where(gone_11N, mean_11N, value)

        return model.forward(case.run().params, batch.tokens, case.CONFIG, tap=tap)[0]

    means = {name: jnp.asarray(each) for name, each in means.items()}
    rows, losses = np.arange(len(batch.position)), []
    for node in without:
        gone = {name: np.zeros(means[name].shape, bool) for name in NODES}
        if node is not None:
            layer, location, channel = activations.place(node)
            gone[location][layer, channel] = True
        last = np.asarray(logits(gone), np.float64)[rows, batch.position]
        lead = last[rows, batch.other] - last[rows, batch.answer]
        losses.append(float(np.mean(np.log1p(np.exp(lead)))))
    return losses


# ---- The page ----


@given(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(["int8", "int16"]),
)
def test_packed_arrays_come_back_within_half_a_step(values, dtype):
    packed = page.packed(values, dtype)
    largest = np.max(np.abs(values), initial=0)
    assert packed["scale"] == pytest.approx(largest / np.iinfo(dtype).max, abs=1e-300)
    np.testing.assert_allclose(unpacked(packed), values, rtol=0, atol=0.501 * packed["scale"])


def test_numbers_keep_every_digit_of_a_float32_and_what_is_not_finite_becomes_null():
    third = np.float32(1 / 3)
    found = json.loads(page.embedded({"a": third, "b": [np.nan, np.inf], "c": np.int32(4)}))
    assert np.float32(found["a"]) == third and np.float32(round(found["a"], 5)) != third
    assert found["b"] == [None, None] and found["c"] == 4


@pytest.mark.parametrize(
    "text",
    ["</script><script>alert(1)</script>", "<!--<script>", "&lt;", "\u2028", "\ud800", "'\"\\"],
)
def test_embedded_text_cannot_end_its_element_and_comes_back(text):
    embedded = page.embedded({text: [text]})
    assert not set("<>&\u2028") & set(embedded)
    assert json.loads(embedded) == {text: [text]}


def test_the_policy_names_exactly_the_scripts_and_the_style_of_the_page(data):
    text = page.render(data, title="a </title> & b")
    assert "<title>a &lt;/title&gt; &amp; b</title>" in text
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    allowed = set(re.findall(r"'sha256-([^']*)'", policy))
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    inline = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in inline}
    assert len(inline) == 3 and hashes == allowed
    changed = hashlib.sha256((inline[0] + " ").encode()).digest()
    assert base64.b64encode(changed).decode() not in allowed


def test_the_page_names_no_other_file(data):
    code = page.render(data, title="x").replace(page.static(page.LIBRARY), "")
    assert not re.findall(r"\b(?:src|href)\s*=\s*[\"']", code)
    assert set(re.findall(r"https?://[^\s'\"]+", code)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in code and "insertAdjacentHTML" not in code


def test_the_vendored_library_is_the_one_that_the_documentation_records():
    digest = hashlib.sha256(page.static(page.LIBRARY).encode()).hexdigest()
    assert digest in DOC.read_text()
    assert "Permission to use, copy, modify" in page.static("d3.LICENSE")


# ---- What is measured ----


def test_values_on_prompts_are_those_of_the_forward_pass(data, batch):
    shown = data["circuits"][case.TASK]
    acts = whole_model_acts(batch.tokens[: 2 * case.OPTIONS.pairs])
    lengths = batch.position[: 2 * case.OPTIONS.pairs] + 1
    for name, packed in shown["values"].items():
        layer, location, channel = activations.place(name)
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
        layer, location, channel = activations.place(name)
        found = unpacked(values[name]["circuit"])
        np.testing.assert_allclose(
            found, circuit.means[location][layer, channel], rtol=1e-3, atol=1e-6
        )
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
    for name, about in data["nodes"].items():
        layer, location, channel = activations.place(name)
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
    assert any(about["highest"] for about in data["nodes"].values())


def test_token_weights_are_the_largest_of_the_embedding_and_of_the_unembedding(data):
    params = jax.tree.map(np.asarray, case.run().params)
    tables = {
        "act_in": params["embed"]["tokens"].T,
        "resid_delta": params["head"]["norm"]["gain"][:, None] * params["head"]["unembed"],
    }
    seen = set()
    for name, about in data["nodes"].items():
        kind = name.split(".")[2]
        if kind not in tables:
            assert about["tokens"] == []
            continue
        weights = tables[kind][activations.place(name).channel]
        order = np.argsort(-np.abs(weights), kind="stable")[:12]
        assert [t for t, _ in about["tokens"]] == order.tolist()
        np.testing.assert_allclose([w for _, w in about["tokens"]], weights[order], rtol=1e-6)
        seen.add(kind)
    assert seen == set(tables)


def test_biases_are_those_of_the_nodes_own_matrix(data):
    biases = {c.target: c.bias for c in graph.CONNECTIONS}
    for name, about in data["nodes"].items():
        layer, location, channel = activations.place(name)
        if location not in biases:
            assert about["bias"] is None and about["gain"] is not None
            continue
        leaf = case.run().params
        for key in biases[location].split("/"):
            leaf = leaf[key]
        assert np.float32(about["bias"]) == leaf[layer, channel]


def test_a_circuit_that_is_too_large_is_cut_by_importance_with_a_note(circuit, batch, monkeypatch):
    monkeypatch.setattr(
        collect, "_on_rows", lambda *args: ({"model": [0] * 4, "circuit": [0] * 4}, {})
    )
    shown = collect._most_important(circuit, 5)
    found = collect._circuit(case.run(), circuit, shown, batch, 2, lambda count: None)
    least = min(node.importance for node in shown)
    assert all(n.importance <= least for n in circuit.nodes if n not in shown)
    assert len(found["nodes"]) == 5 and found["total_nodes"] == case.N_NODES
    assert f"5 of {case.N_NODES} nodes are shown" in found["notes"][0]
    assert all(s < 5 and t < 5 for s, t, _ in found["edges"])


def test_a_loss_that_differs_from_the_files_is_noted(circuit, batch, monkeypatch):
    monkeypatch.setattr(
        collect, "_on_rows", lambda *args: ({"model": [0] * 4, "circuit": [0] * 4}, {})
    )
    shown = collect._most_important(circuit, 5)
    notes = [
        collect._circuit(case.run(), each, shown, batch, 2, lambda count: None)["notes"]
        for each in (circuit, dataclasses.replace(circuit, loss=circuit.loss + 0.1))
    ]
    assert len(notes[0]) == 1 and len(notes[1]) == 2 and "has changed since" in notes[1][1]


# ---- Held-out text ----


def test_text_is_from_documents_that_training_held_out():
    run = case.run()
    windows_WT = held_out.windows(run, tokens=2000)
    dataset = batches.open_dataset(
        run.config.data, vocab_size=257, context=case.CONFIG.context, tokenizer_file=None
    )
    sides = [
        b"".join(s.read(0, len(s)).astype(np.uint16).tobytes() for _, s in side)
        for side in (dataset.validation, dataset.train)
    ]
    kept = [row.astype(np.uint16).tobytes() for row in windows_WT]
    assert len(kept) > 20 and all(each in sides[0] for each in kept)
    assert np.mean([each in sides[1] for each in kept]) < 0.2  # idioms repeat each other a little


def test_another_text_can_be_given(tmp_path):
    (tmp_path / "a.py").write_text("answer = 42\n" * 30)
    windows_WT = held_out.windows(case.run(), tokens=200, source=f"files:{tmp_path}/*.py")
    assert "answer = 42" in case.run().tokenizer.decode(windows_WT[0])
    (tmp_path / "a.py").write_text("short")
    with pytest.raises(UserError, match="less than a window of 24 tokens"):
        held_out.windows(case.run(), tokens=200, source=f"files:{tmp_path}/*.py")


# ---- The command ----


@pytest.fixture
def loaded(monkeypatch, data):
    """The run's checkpoint is the one in memory."""
    del data
    monkeypatch.setattr(runs, "load", lambda folder: dataclasses.replace(case.run(), folder=folder))


def test_the_command_writes_one_page(folder, loaded, tmp_path, monkeypatch, capsys, data):
    out = tmp_path / "report.html"
    given = types.SimpleNamespace(
        run=str(folder),
        out=str(out),
        task=["all", str(folder / f"{case.TASK}.jsonl")],
        source="",
        pairs=2,
        max_nodes=2000,
    )
    monkeypatch.setattr(flags, "FLAGS", given)
    monkeypatch.setattr(held_out, "windows", lambda run, *, tokens, source: case.windows())
    assert view.main([]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    [text] = re.findall(r'id="data">(.*?)</script>', out.read_text(), re.DOTALL)
    written = json.loads(text)
    assert written["circuits"] == data["circuits"] and written["nodes"] == data["nodes"]
    assert "1 circuits of 2 tasks" in capsys.readouterr().out

    monkeypatch.setattr(
        page, "render", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    before = out.read_bytes()
    assert view.main([]) == 130
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_users_own_task_must_be_named(folder, loaded):
    with pytest.raises(UserError, match=r"--task=all,closing\.jsonl"):
        collect.collect(folder, collect.Options())


def test_a_circuit_of_other_parameters_is_refused(folder, loaded, monkeypatch):
    other = dataclasses.replace(
        case.run(), folder=folder, params=jax.tree.map(lambda leaf: leaf + 1, case.run().params)
    )
    monkeypatch.setattr(runs, "load", lambda folder: other)
    options = collect.Options(task=("all", str(folder / f"{case.TASK}.jsonl")))
    with pytest.raises(UserError, match="belongs to parameters"):
        collect.collect(folder, options)


def test_what_is_missing_is_said_with_the_command_that_makes_it(folder, tmp_path, data):
    with pytest.raises(UserError, match="is not a run folder"):
        view.write(tmp_path, tmp_path / "report.html", collect.Options())
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no circuits: python -m wsparse\.prune --run="):
        collect.collect(tmp_path, collect.Options())
    with pytest.raises(UserError, match="did you mean 'closing'"):
        collect.read_circuits(folder, ["closign"])
    with pytest.raises(UserError, match=r"has no circuits \(1 tasks were tried"):
        collect.read_circuits(folder, ["hard"])


@pytest.mark.parametrize("options", [{"pairs": 0}, {"max_nodes": 0}, {"task": ()}])
def test_options_that_show_nothing_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        collect.Options(**options)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(folder, tmp_path):
    for out in (tmp_path, tmp_path / "missing" / "report.html"):
        with pytest.raises(UserError, match="cannot write"):
            view.write(folder, out, collect.Options())


def test_masks_and_places_agree():
    for name in masks.names(case.CONFIG)[::37]:
        assert activations.place(name).name == name
