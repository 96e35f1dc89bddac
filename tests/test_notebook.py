"""Runs and circuits as notebooks use them give what the pure functions give, and say what they are."""

import dataclasses
import html
import itertools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from matplotlib.collections import LineCollection, PathCollection
import numpy as np
import pytest
import viewer_case as case

import wsparse
from wsparse import hooks, model, prune, runs
from wsparse.circuits import evidence, masks, scoring
from wsparse.circuits.circuit import Circuit as StoredCircuit
from wsparse.circuits.circuit import CircuitNode, Score, Status
from wsparse.circuits.network import residual_links
from wsparse.circuits.pairs import arrays, task_loss
from wsparse.config import DataConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.interop.pretrained import save_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The viewer's run, in a folder with its circuit and its evidence."""
    folder = tmp_path_factory.mktemp("notebook") / "case"
    task = case.write_run(folder)
    where = folder / "circuits" / case.TASK
    evidence.measure(
        case.run(), StoredCircuit.load(where), case.batch(task),
        evidence.Text(case.windows(), "random tokens"), summary=task.summary, options=case.OPTIONS,
    ).save(where)  # fmt: skip
    stored = case.run()
    return wsparse.Run(folder, stored.config, stored.step, stored.params, stored.tokenizer)


def test_logits_and_activations_are_those_of_the_forward_pass(run):
    text = "f('abc"
    tokens = np.array([run.tokenizer.encode(text)])
    logits_BTV, acts = jax.jit(model.forward, static_argnames="config")(run.params, tokens, run.config.model)
    np.testing.assert_allclose(run.logits(text), logits_BTV[0], atol=1e-5)
    logits, cache = run.run_with_cache(text, names_filter="1.mlp.post_act")
    np.testing.assert_allclose(logits, logits_BTV, atol=1e-5)
    np.testing.assert_allclose(cache["1.mlp.post_act"], acts["mlp.post_act"][1], atol=1e-5)
    assert isinstance(cache, hooks.Activations)


def test_a_circuits_own_logits_give_its_loss(run):
    """Which is the loss that pruning's scorer wrote down; the whole model's is another."""
    circuit = run.circuits[case.TASK]
    batch = case.batch(case.tasks.find(str(run.folder / f"{case.TASK}.jsonl")))

    def loss(function) -> float:
        rows = [function(prompt)[-1] for prompt in batch.prompts]
        return float(task_loss(np.stack(rows), batch.answer, batch.other))

    assert loss(circuit.logits) == pytest.approx(circuit.loss, abs=1e-4)
    assert loss(run.logits) != pytest.approx(circuit.loss, abs=1e-2)


@pytest.fixture(scope="module")
def cut_circuit(run):
    """A circuit of most of the model, with a third of the weights cut, and pruning's score of some nodes."""
    stored, rng = run.circuits[case.TASK], np.random.default_rng(5)
    nodes = [CircuitNode(name, 0.5, 0.0) for name in masks.names(case.CONFIG) if rng.random() < 0.7]
    removed = {path: rng.random(array.shape) < 0.3 for path, array in stored.removed.items()}
    file = str(run.folder / f"{case.TASK}.jsonl")
    scorer = scoring.Scorer(run.params, case.CONFIG, jax.tree.map(jnp.asarray, stored.means))
    remaining = {path: weights & ~removed[path] for path, weights in scorer.weights.items()}
    pairs = arrays(case.batch(case.tasks.find(file)))

    def score(names, edges=remaining):
        return scorer.mask(pairs, masks.from_names(names, case.CONFIG), edges)

    names = [node.name for node in nodes]
    loss = score(names).loss
    # Cut weights matter: to leave them as they are, or without their constants, is another circuit.
    assert abs(score(names, scorer.weights).loss - loss) > 1e-2
    return dataclasses.replace(stored, nodes=nodes, edges=[], removed=removed, loss=loss, source=file), score


def test_a_circuits_loss_without_nodes_is_that_of_pruning_and_without_none_its_own(cut_circuit):
    circuit, score = cut_circuit
    names = [node.name for node in circuit.nodes]
    whole = circuit.ablate()
    assert whole.loss == pytest.approx(circuit.loss, abs=1e-6)
    assert whole.accuracy == score(names).accuracy
    losses = []
    for without in (names[:1], names[5:6], names[::3]):
        want = score([name for name in names if name not in without])
        ablated = circuit.ablate(*without)
        nodes = [node for node in circuit.nodes if node.name in without]
        assert circuit.ablate(*nodes).names == ablated.names
        assert (ablated.loss, ablated.accuracy) == pytest.approx((want.loss, want.accuracy), abs=1e-6)
        losses.append(ablated.loss)
    assert max(abs(loss - circuit.loss) for loss in losses) > 1e-2


def test_logits_are_those_that_the_losses_are_from_with_cut_weights_as_they_are_there(cut_circuit, run):
    circuit, _ = cut_circuit
    batch = case.batch(case.tasks.find(circuit.source))
    names = [node.name for node in circuit.nodes]
    for ablated in (circuit.ablate(), circuit.ablate(*names[::3])):
        logits_NV = ablated.logits(batch.prompts)
        assert logits_NV.shape == (len(batch.prompts), 257)
        assert float(task_loss(logits_NV, batch.answer, batch.other)) == pytest.approx(ablated.loss, abs=1e-5)
    np.testing.assert_array_equal(circuit.logits(batch.prompts), circuit.ablate().logits(batch.prompts))
    # Every token of one text, the last of several: of texts of any length.
    for several in (circuit, circuit.ablate(names[0]), run):
        texts = ["f('abc", "x", 'f("a']
        last = np.stack([np.asarray(several.logits(text))[-1] for text in texts])
        assert several.logits(texts[0]).shape == (6, 257)
        np.testing.assert_array_equal(several.logits(texts), last)
        with pytest.raises(UserError, match="at least one text"):
            several.logits([])


def test_a_loop_of_ablations_and_texts_compiles_the_model_no_more(cut_circuit, compilations):
    circuit, _ = cut_circuit
    fresh = dataclasses.replace(circuit)
    fresh.ablate(fresh.nodes[0].name).logits("f('abc")
    with compilations() as compiled:
        for node in fresh.nodes[:5]:
            ablated = fresh.ablate(node.name)
            assert ablated.loss > 0
            ablated.logits("f('" + node.name)
    # Of the scorer, if no test before has; the forward pass is compiled.
    assert sum("_score_spans" in name for name in compiled) <= 1
    assert not any("_forward" in name for name in compiled)


@pytest.mark.parametrize(
    ("name", "near"),
    [("0.attn.v.x", True), ("0.attn.vv.1", True), ("7.mlp.post_act.1", True), ("?", False)],
)
def test_a_node_that_is_not_in_the_circuit_is_refused_with_the_nearest(name, near, run):
    circuit = run.circuits[case.TASK]
    with pytest.raises(
        UserError, match=rf"^no node {re.escape(repr(name))} in the circuit of 'closing'"
    ) as e:
        circuit.ablate(circuit.nodes[0].name, name)
    nearest = re.search(r" \(did you mean '(.*)'\?\)$", str(e.value))
    assert bool(nearest) == near
    assert nearest is None or nearest[1] in [node.name for node in circuit.nodes]
    # A node of the model is refused too where the circuit is without it.
    others = set(masks.names(case.CONFIG)) - {node.name for node in circuit.nodes}
    with pytest.raises(UserError, match="no node"):
        circuit.ablate(min(others))


def test_losses_are_refused_where_the_pairs_are_unknown_or_others(run, cut_circuit, tmp_path):
    circuit, _ = cut_circuit
    unknown = run.circuits[case.TASK].ablate()
    with pytest.raises(UserError, match=r"come from a file of yours: name it, task='closing\.jsonl'"):
        unknown.loss  # noqa: B018
    assert unknown.logits("f('abc").shape == (6, 257)
    assert circuit.ablate(task=circuit.source).loss == circuit.ablate().loss
    with pytest.raises(UserError, match=r"task must be the file of 'closing', got 'other\.jsonl'"):
        circuit.ablate(task="other.jsonl")
    lines = (run.folder / f"{case.TASK}.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    crossed = [pair | {"answer_a": pair["answer_b"], "answer_b": pair["answer_a"]} for pair in pairs]
    (tmp_path / "closing.jsonl").write_text("\n".join(map(json.dumps, crossed)))
    with pytest.raises(UserError, match=r"are others than the circuit was measured on: its loss is"):
        circuit.ablate(task=str(tmp_path / "closing.jsonl")).loss  # noqa: B018


def test_a_circuit_becomes_a_graph_that_networkx_writes_and_reads(run, tmp_path):
    networkx = pytest.importorskip("networkx")
    circuit = run.circuits[case.TASK]
    graph = circuit.to_networkx()
    assert graph.graph["task"] == "closing" and graph.graph["loss"] == circuit.loss
    assert set(graph) == {node.name for node in circuit.nodes}
    assert {(a, b): data["weight"] for a, b, data in graph.edges(data=True)} == {
        (edge.source, edge.target): edge.weight for edge in circuit.edges
    }
    for node in circuit.nodes:
        layer, part, kind, channel = node.name.split(".")
        of_head = {"head": int(channel) // 4} if kind in ("q", "k", "v") else {}
        assert graph.nodes[node.name] == {
            "layer": int(layer), "location": f"{part}.{kind}", "channel": int(channel),
            "importance": node.importance, "tau": node.tau, **of_head,
        }  # fmt: skip
    networkx.write_graphml(graph, tmp_path / "circuit.graphml")
    read = networkx.read_graphml(tmp_path / "circuit.graphml")
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert dict(read.edges) == dict(graph.edges)


def test_residual_edges_lead_from_what_is_written_to_later_reads_of_the_channel():
    names = [
        "0.attn.act_in.3", "0.attn.resid_delta.3", "0.mlp.act_in.3", "0.mlp.act_in.4",
        "1.attn.act_in.3", "1.attn.resid_delta.4", "0.mlp.resid_delta.9", "0.mlp.post_act.3",
    ]  # fmt: skip
    assert residual_links(names) == [
        ("0.attn.resid_delta.3", "0.mlp.act_in.3"),
        ("0.attn.resid_delta.3", "1.attn.act_in.3"),
    ]


def test_a_graph_without_networkx_is_refused_with_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(UserError, match=re.escape("pip install 'wsparse[networkx]'")):
        run.circuits[case.TASK].to_networkx()


def test_a_figure_has_every_node_and_edge_of_the_circuit_in_columns(run):
    circuit = run.circuits[case.TASK]
    figure = circuit.plot()
    (axes,) = figure.axes
    (nodes,) = [each for each in axes.collections if isinstance(each, PathCollection)]
    x, y = np.asarray(nodes.get_offsets()).T
    assert len(x) == len(circuit.nodes) == len(set(zip(x, y, strict=True)))
    place = dict(zip([node.name for node in circuit.nodes], zip(x, y, strict=True), strict=True))
    columns = {name: (int(name[0]), name.split(".")[1]) for name in place}
    for a, b in itertools.product(place, place):
        if columns[a] < columns[b]:
            assert place[a][0] < place[b][0]
    drawn = [
        tuple(map(tuple, s))
        for c in axes.collections
        if isinstance(c, LineCollection)
        for s in c.get_segments()
    ]
    assert {(place[edge.source], place[edge.target]) for edge in circuit.edges} <= set(drawn)
    assert circuit.edges and axes.get_title().startswith("closing: ")
    named = dataclasses.replace(circuit, name="tight").plot()
    assert named.axes[0].get_title().startswith("closing@tight: ")
    assert figure._repr_png_().startswith(b"\x89PNG")
    # A circuit of constants alone has nothing to draw, and a name for it.
    empty = dataclasses.replace(circuit, nodes=[], edges=[]).plot()
    assert "0 nodes, 0 edges" in empty.axes[0].get_title()
    assert empty._repr_png_().startswith(b"\x89PNG")


def test_activations_on_texts_of_all_lengths_are_compiled_once(run, compilations):
    with compilations() as compiled:
        for text in ("f('abc", "x = 1", "def f(a):"):
            logits, cache = run.run_with_cache(text, names_filter=["attn.q", "attn.k"])
            time = len(text)
            assert logits.shape == (1, time, 257)
            assert cache["1.attn.q"].shape == (1, time, 8) and cache["attn.q"].shape == (2, 1, time, 8)
            assert cache["blocks.1.attn.hook_pattern"].shape == (1, 2, time, time)
    assert sum("_forward" in name for name in compiled) == 1


def test_where_the_model_cannot_do_a_task_the_error_is_the_hint_of_pruning(run, monkeypatch):
    monkeypatch.setattr(prune, "run", lambda *args, **options: [])
    folder = run.folder / "circuits" / "if_equals"
    for hint, shown in (("--target=0.45 would", "--target=0.45 would"), ("", "the model cannot do it")):
        Status(task="if_equals", status="the model cannot do it", model=Score(0.6, 0.5), hint=hint).save(
            folder
        )
        with pytest.raises(UserError, match=f"no circuit of 'if_equals' in .*: {re.escape(shown)}$"):
            run.prune("if_equals")


def test_the_examples_of_the_docs_run(run, tmp_path, monkeypatch):
    """On the circuit of this file's run, which is in the place of the one that they find."""
    pytest.importorskip("networkx")
    monkeypatch.chdir(tmp_path)
    text = (pathlib.Path(__file__).parent.parent / "docs" / "circuits.md").read_text()
    section = re.search(r"## In a notebook\n(.*?)\n## ", text, re.DOTALL)
    assert section is not None
    circuit = dataclasses.replace(run.circuits[case.TASK], source=str(run.folder / f"{case.TASK}.jsonl"))
    names: dict = {"run": run, "circuit": circuit}
    lines = "".join(re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)).splitlines()
    made_here = ("run = wsparse.load(", "circuit = run.prune(")
    assert sum(line.startswith(made_here) for line in lines) == 2
    exec("\n".join(line for line in lines if not line.startswith(made_here)), names)
    assert names["without"].names == (names["largest"].name,)
    assert (tmp_path / "circuit.graphml").exists()


def test_circuits_are_found_by_task(run):
    assert list(run.circuits) == [case.TASK]
    assert run.circuits[case.TASK].run is run
    assert isinstance(run.circuits[case.TASK], StoredCircuit)
    with pytest.raises(UserError, match=r"run\.prune\('closing', name='tight'\) looks for one"):
        run.circuits["closing@tight"]
    with pytest.raises(UserError, match=r"run\.prune\('closing', name='tight'\) finds it"):
        run.prune("closing@tight")
    with pytest.raises(UserError, match=r"^[^'].*no circuit of 'closin' \(did you mean 'closing'\?\)"):
        run.circuits["closin"]
    assert run.circuits.get("closin") is None


def test_a_circuit_is_saved_without_its_run(run, tmp_path):
    circuit = run.circuits[case.TASK]
    circuit.save(tmp_path)
    files = ("circuit.json", "circuit.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(files)
    stored = run.folder / "circuits" / case.TASK
    assert (tmp_path / files[0]).read_bytes() == (stored / files[0]).read_bytes()
    assert StoredCircuit.load(tmp_path).digest == circuit.digest
    assert wsparse.Circuit.load(tmp_path).digest == circuit.digest


def test_a_circuits_page_is_shown_inline_and_nothing_in_it_ends_the_attribute(run, tmp_path):
    circuit = run.circuits[case.TASK]
    page = circuit.show()
    assert page.text.lstrip().lower().startswith("<!doctype html>")
    shown = re.fullmatch(r'<iframe srcdoc="([^"]*)"[^<>]*></iframe>', circuit._repr_html_())
    assert shown is not None
    assert html.unescape(shown[1]) == page.text
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page.text
    # A page that cannot be written leaves the earlier one.
    with pytest.raises(UnicodeEncodeError):
        dataclasses.replace(page, text="half a pair: \ud800").save(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == page.text


def test_representations_are_one_short_line(run):
    _, cache = run.run_with_cache("x = 1")
    circuit = run.circuits[case.TASK]
    for shown in (run, run.circuits, circuit, circuit.show(), cache):
        assert len(repr(shown)) < 160 + len(str(run.folder))
        assert "\n" not in repr(shown)
    assert "n_layer=2" in repr(run)
    assert "task='closing'" in repr(circuit)


def test_a_text_that_does_not_fit_is_refused(run):
    for text, count in (("", 0), ("x" * 25, 25)):
        with pytest.raises(UserError, match=f"must have 1 to 24 tokens, this one has {count}"):
            run.logits(text)


def test_an_unknown_setting_or_task_of_pruning_is_refused_before_anything_is_computed(run):
    with pytest.raises(UserError, match=r"trails.*did you mean 'trials'"):
        run.prune(str(run.folder / f"{case.TASK}.jsonl"), trails=3)
    with pytest.raises(UserError, match="single_double_quote"):
        run.prune("single_double_qote")


def test_a_pretrained_folder_becomes_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = case.run()
    save_pretrained("model", case.CONFIG, source.params, source.tokenizer)
    run = wsparse.load("model")
    assert run.folder.as_posix() == "runs/model"
    np.testing.assert_array_equal(run.logits("x = 1"), wsparse.load("runs/model").logits("x = 1"))
    assert wsparse.load("model", folder="runs/model").step == 0
    # An earlier call may have been stopped before it had copied the circuits.
    pathlib.Path("model/circuits/a").mkdir(parents=True)
    pathlib.Path("model/circuits/a/circuit.json").write_text("{}")
    assert list(wsparse.load("model").circuits) == ["a"]

    doubled = jax.tree.map(lambda leaf: 2 * leaf, source.params)
    gelu = dataclasses.replace(case.CONFIG, activation="gelu")
    for config, params in ((case.CONFIG, doubled), (gelu, source.params)):
        save_pretrained("elsewhere/model", config, params, source.tokenizer)
        with pytest.raises(UserError, match=r"runs/model holds another model.*folder="):
            wsparse.load("elsewhere/model")


def test_a_run_that_keeps_other_circuits_than_its_model_came_with_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    source = case.run()
    save_pretrained("model", case.CONFIG, source.params, source.tokenizer)
    for name in ("a", "b"):
        pathlib.Path("model/circuits", name).mkdir(parents=True)
        pathlib.Path("model/circuits", name, "circuit.json").write_text("{}")
    wsparse.load("model")
    pathlib.Path("runs/model/circuits/own").mkdir()
    pathlib.Path("runs/model/circuits/own/circuit.json").write_text("{}")
    wsparse.load("model")
    assert not caplog.messages
    pathlib.Path("model/circuits/b/circuit.json").write_text('{"schema": 1}')
    wsparse.load("model")
    (message,) = caplog.messages
    assert (
        "runs/model keeps its own circuits" in message and message.count("'b'") == 1 and "'a'" not in message
    )
    assert "another folder=" in message


def test_the_text_of_a_pretrained_model_is_the_one_that_it_was_saved_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(source="stories", domain="stories", megabytes=0.1, validation_fraction=0.1, seed=3)
    config = dataclasses.replace(case.run().config, data=data)
    source = dataclasses.replace(case.run(), folder=tmp_path / "source", config=config)
    save_pretrained("model", case.CONFIG, source.params, source.tokenizer, data=data)
    run = wsparse.load("model")
    assert run.config.data == data
    np.testing.assert_array_equal(run.windows("train", n=8), source.windows("train", n=8))
    with pytest.raises(UserError, match=r"of runs/model is of the source 'stories': .*folder=.*data\.source"):
        wsparse.load("model", source="idioms")
    assert wsparse.load("model", folder="other", source="idioms").config.data.source == "idioms"


def test_a_model_whose_text_is_unknown_is_given_none_until_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = case.run()
    save_pretrained("model", case.CONFIG, source.params, source.tokenizer)
    run = wsparse.load("model")
    assert run.logits("x").shape == (1, 257)
    for use in (lambda: run.windows("train"), lambda: run.prune("single_double_quote")):
        with pytest.raises(UserError, match=r"is not known: name its source, .* in runs/model/config\.json$"):
            use()
    with pytest.raises(UserError, match=r"did you mean 'idioms'"):
        wsparse.load("model", folder="named", source="idoms")
    assert wsparse.load("model", folder="named", source="idioms").config.data.source == "idioms"


def test_weights_in_16_bits_become_the_same_run_at_every_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = case.run()
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), source.params)
    save_pretrained("model", case.CONFIG, halves, source.tokenizer)
    first, again = wsparse.load("model"), wsparse.load("model")
    assert first.params["embed"]["tokens"].dtype == jnp.float32
    np.testing.assert_array_equal(first.logits("x = 1"), again.logits("x = 1"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no such thing", "neither a folder nor a repository id"),
        (
            "runs/tiny",
            r"^there is no run runs/tiny: train one with .* --workdir=runs/tiny; .*revision='main'$",
        ),
        ("mine/tiny", r"^there is no run mine/tiny: train one with"),
    ],
)
def test_a_run_that_does_not_exist_is_not_looked_for_on_the_hub(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine").mkdir()
    with pytest.raises(UserError, match=message):
        wsparse.load(place)


@pytest.fixture
def stored(tmp_path):
    """A run's folder."""
    source = case.run()
    tokenizer = tokenizer_lib.train(["no merges"], case.CONFIG.vocab_size)
    runs.create(tmp_path / "run", source.config, source.params, tokenizer, summary={})
    return tmp_path / "run"


def test_a_run_loads_with_its_newest_checkpoint(stored):
    run = wsparse.load(stored)
    assert run.step == 0
    np.testing.assert_array_equal(run.params["embed"]["tokens"], case.run().params["embed"]["tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vocab: {**vocab, "ab": 256}, "has 258 tokens, .* model has 257"),
        (lambda vocab: {**vocab, "!": 10**6}, "must have the ids 0 to 256"),
        (lambda vocab: dict.fromkeys(vocab, 7), "must have the ids 0 to"),
        (lambda vocab: {}, "tokens"),
        (lambda vocab: {**vocab, "A": vocab["B"], "B": vocab["A"]}, "not the tokenizer .* trained with"),
    ],
    ids=["another size", "an id of a million", "all ids equal", "empty", "two exchanged"],
)
def test_the_tokenizer_of_another_run_is_refused(stored, change, message):
    path = stored / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] = change(values["model"]["vocab"])
    for token in values["added_tokens"]:
        token["id"] = len(values["model"]["vocab"])
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        wsparse.load(stored)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
