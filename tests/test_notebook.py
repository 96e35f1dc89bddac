"""Runs and circuits as notebooks use them give what the pure functions give, and say what they are."""

import html
import json
import re

import jax
import numpy as np
import pytest
import viewer_case as case

import wsparse
from wsparse import hooks, model, runs
from wsparse.circuits import evidence
from wsparse.circuits.circuit import Circuit as StoredCircuit
from wsparse.circuits.pairs import task_loss
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


def test_circuits_are_found_by_task(run):
    assert list(run.circuits) == [case.TASK]
    assert run.circuits[case.TASK].run is run
    assert isinstance(run.circuits[case.TASK], StoredCircuit)
    with pytest.raises(UserError, match=r"no circuit of 'closin' \(did you mean 'closing'\?\)"):
        run.circuits["closin"]


def test_a_circuit_is_saved_without_its_run(run, tmp_path):
    circuit = run.circuits[case.TASK]
    circuit.save(tmp_path)
    files = ("circuit.json", "circuit.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(files)
    stored = run.folder / "circuits" / case.TASK
    assert (tmp_path / files[0]).read_bytes() == (stored / files[0]).read_bytes()
    assert StoredCircuit.load(tmp_path).digest == circuit.digest


def test_a_circuits_page_is_shown_inline_and_nothing_in_it_ends_the_attribute(run, tmp_path):
    circuit = run.circuits[case.TASK]
    page = circuit.show()
    assert page.text.lstrip().lower().startswith("<!doctype html>")
    shown = re.fullmatch(r'<iframe srcdoc="([^"]*)"[^<>]*></iframe>', circuit._repr_html_())
    assert shown is not None
    assert html.unescape(shown[1]) == page.text
    page.save(tmp_path / "page.html")
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

    other = jax.tree.map(lambda leaf: 2 * leaf, source.params)
    save_pretrained("elsewhere/model", case.CONFIG, other, source.tokenizer)
    with pytest.raises(UserError, match=r"runs/model holds another model.*folder="):
        wsparse.load("elsewhere/model")
    with pytest.raises(UserError, match="neither a folder nor a repository id"):
        wsparse.load("no such thing")


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
