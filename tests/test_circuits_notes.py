"""Notes on a circuit: the file, what it refuses, other circuits, and the tour that is made from evidence."""

import dataclasses
import json
import logging
import pathlib
import shutil

import numpy as np
import pytest
import viewer_case as case

from wsparse.circuits import Circuit
from wsparse.circuits.evidence_file import Evidence
from wsparse.circuits.notes import FILE, Edit, Group, Notes, Step, beside, fitted
from wsparse.circuits.tour import first_tour
from wsparse.errors import UserError
from wsparse.viewer import contents

A, B = "0.attn.q.3", "1.mlp.post_act.17"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A run with a circuit and its evidence."""
    folder = tmp_path_factory.mktemp("notes")
    case.data_text(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> pathlib.Path:
    return shutil.copytree(folder, tmp_path / "run")


@pytest.fixture(scope="module")
def circuit(folder) -> Circuit:
    return Circuit.load(folder / "circuits" / case.TASK)


@pytest.fixture(scope="module")
def evidence(folder, circuit) -> Evidence:
    found = Evidence.load(folder / "circuits" / case.TASK, circuit)
    assert found is not None
    return found


def notes_on(circuit: Circuit, **changes) -> Notes:
    """Notes of every kind on a circuit."""
    first, second, third = (node.name for node in circuit.nodes[:3])
    edge = circuit.edges[0]
    values = {
        "caption": "What is known of it",
        "labels": {first: "is the string open?"},
        "groups": (Group(name="both", nodes=(first, second)), Group(name="one", nodes=(third,), open=True)),
        "pins": (third, first),
        "tour": (
            Step(caption="first", node=first, pair=1, token=2, edits=(Edit(name=first, mode="zero"),)),
            Step(caption="an edge", edge=f"{edge.source}>{edge.target}",
                 edits=(Edit(name=f"{edge.source}>{edge.target}", mode="set", value=0.5),)),
            Step(caption="all of it"),
        ),
    } | changes  # fmt: skip
    return Notes(task=circuit.task, circuit=circuit.digest, **values)


# ---- The file ----


def test_notes_come_back_from_their_file_and_what_is_empty_is_not_in_it(circuit, tmp_path):
    notes = notes_on(circuit)
    notes.save(tmp_path)
    assert Notes.load(tmp_path / FILE) == beside(tmp_path) == notes
    values = json.loads((tmp_path / FILE).read_text())
    assert values["schema"] == 1 and values["tour"][2] == {"caption": "all of it"}
    # What says the least is kept: pair 0 is a pair, value 0 is a value.
    least = Step(caption="x", pair=0, token=0, edits=(Edit(name=A, mode="set", value=0.0),))
    notes_on(circuit, tour=(least,)).save(tmp_path / "other.json")
    assert Notes.load(tmp_path / "other.json").tour == (least,)
    assert beside(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"must be of schema 1, got '2'"),
        ({"schema": None}, "must be of schema 1"),
        ({"labls": {}}, r"unknown config key 'labls' \(did you mean 'labels'\?\)"),
        ({"circuit": None}, "'circuit' must be of type str"),
        ({"labels": {"q.3": "x"}}, "a node is written layer.location.channel"),
        ({"labels": {"0.attn.w.3": "x"}}, "there is no node location 'attn.w'"),
        ({"labels": {A: "  "}}, "the label of .* must not be empty"),
        ({"labels": {A: "x" * 81}}, "must have at most 80 characters, got 81"),
        ({"labels": [A]}, "'labels' must be a group of keys"),
        ({"caption": "x" * 2001}, "at most 2000 characters"),
        ({"pins": [A, A]}, f"pinned nodes must be there once, got '{A}' twice"),
        ({"groups": [{"name": "g", "nodes": []}]}, "group 'g' must have at least one node"),
        ({"groups": [{"name": "g", "nodes": [A]}, {"name": "h", "nodes": [B, A]}]}, "nodes in a group must"),
        ({"groups": [{"name": "g", "nodes": [A]}, {"name": "g", "nodes": [B]}]}, "names of groups must be"),
        ({"tour": [{"caption": ""}]}, "the caption of a step must not be empty"),
        ({"tour": [{"caption": "x", "node": A, "edge": f"{A}>{B}"}]}, "a node or an edge, not both"),
        ({"tour": [{"caption": "x", "node": f"{A}>{B}"}]}, "must be source>target"),
        ({"tour": [{"caption": "x", "edge": A}]}, "a step's edge must be source>target"),
        ({"tour": [{"caption": "x", "pair": -1}]}, "pair of a step must be at least 0, got -1"),
        ({"tour": [{"caption": "x", "token": 1.5}]}, r"'tour\[0\].token' must be of type int"),
        ({"tour": [{"caption": "x", "edits": [{"name": A, "mode": "off"}]}]}, "must be one of 'mean'"),
        ({"tour": [{"caption": "x", "edits": [{"name": A, "mode": "set"}]}]}, "exactly when its mode is"),
        ({"tour": [{"caption": "x", "edits": [{"name": A, "mode": "set", "value": 1e999}]}]}, "finite"),
    ],
)
def test_a_notes_file_that_breaks_a_rule_is_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / FILE
    path.write_text(json.dumps({"schema": 1, "task": "t", "circuit": "c"}))
    assert Notes.load(path) == Notes(task="t", circuit="c")
    path.write_text(json.dumps({"schema": 1, "task": "t", "circuit": "c"} | change))
    with pytest.raises(UserError, match=message) as caught:
        Notes.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_example_of_the_documentation_is_a_notes_file(tmp_path):
    document = (pathlib.Path(__file__).parents[1] / "docs" / "viewer.md").read_text()
    [example] = [text.split("```")[0] for text in document.split("```json\n")[1:]]
    (tmp_path / FILE).write_text(example)
    notes = Notes.load(tmp_path / FILE)
    assert notes.labels and notes.groups and notes.pins and len(notes.tour) == 2


# ---- Which circuit they are on ----


def test_notes_of_a_circuit_that_name_what_it_has_not_are_refused_with_the_nearest_name(circuit):
    names = [node.name for node in circuit.nodes]
    assert fitted(notes_on(circuit), circuit, names) == (notes_on(circuit), [])
    wrong = f"{names[0].rsplit('.', 1)[0]}.999"
    with pytest.raises(UserError, match=rf"name the node '{wrong}', which its circuit has not \(did you"):
        fitted(notes_on(circuit, labels={wrong: "x"}), circuit, names)
    with pytest.raises(UserError, match="name the edge"):
        fitted(notes_on(circuit, tour=(Step(caption="x", edge=f"{A}>{A}"),)), circuit, names)


def test_notes_of_another_circuit_keep_what_is_here_and_say_so(circuit):
    names = [node.name for node in circuit.nodes]
    notes = dataclasses.replace(
        notes_on(circuit, labels={names[0]: "here", "9.attn.q.9": "gone"}, pins=("9.attn.q.9",)),
        circuit="0" * 64,
    )
    gone = Step(caption="stays", node="9.attn.q.9", edits=(Edit(name="9.attn.q.9", mode="mean"),))
    notes = dataclasses.replace(notes, groups=(Group(name="g", nodes=("9.attn.q.9",)),), tour=(gone,))
    found, [remark] = fitted(notes, circuit, names)
    assert remark.startswith(
        "The notes were written for another circuit of this task, 000000000000; this one"
    )
    assert circuit.digest[:12] in remark and "1 of its nodes and edges are not here" in remark
    assert found.labels == {names[0]: "here"} and found.pins == () and found.groups == ()
    assert found.tour == (Step(caption="stays"),)


def test_notes_are_of_the_same_task_by_whatever_name_of_its_circuits(circuit):
    names = [node.name for node in circuit.nodes]
    named = dataclasses.replace(notes_on(circuit), task=f"{circuit.task}@tight")
    assert fitted(named, circuit, names) == (named, [])
    with pytest.raises(
        UserError, match=f"notes are on the task 'another', the circuit is of '{circuit.task}'"
    ):
        fitted(dataclasses.replace(named, task="another"), circuit, names)


def test_notes_on_nodes_that_the_page_has_not_are_left_out_and_counted(circuit):
    first = circuit.nodes[0].name
    found, [remark] = fitted(notes_on(circuit, tour=()), circuit, [first])
    assert found.labels == {first: "is the string open?"} and found.pins == (first,)
    assert [group.nodes for group in found.groups] == [(first,)]
    assert "Notes on 2 nodes and edges are left out" in remark


# ---- The page's data ----


def test_the_page_has_the_notes_beside_a_circuit_or_those_that_are_given(copied, circuit, caplog, tmp_path):
    caplog.set_level(logging.INFO, "wsparse")
    plain = contents.read_run(copied, contents.Options())["circuits"][case.TASK]["written"]
    assert plain["labels"] == {} and plain["measured"] and plain["tour"]
    notes_on(circuit).save(copied / "circuits" / case.TASK)
    beside_it = contents.read_run(copied, contents.Options())["circuits"][case.TASK]["written"]
    assert beside_it["caption"] == "What is known of it" and not beside_it["measured"]
    assert [step["caption"] for step in beside_it["tour"]] == ["first", "an edge", "all of it"]
    given = tmp_path / "given.json"
    dataclasses.replace(notes_on(circuit, caption="given", tour=()), circuit="1" * 64).save(given)
    options = contents.Options(notes=(str(given),))
    written = contents.read_run(copied, options)["circuits"][case.TASK]["written"]
    # Notes without a tour have the one that is made from evidence.
    assert written["caption"] == "given" and written["measured"] and written["tour"] == plain["tour"]
    assert "another circuit of this task, 111111111111" in written["remarks"][0]
    assert written["remarks"][0] in caplog.text
    assert "What is known of it" in contents.circuit_page(copied / "circuits" / case.TASK)


def test_notes_files_on_a_task_that_is_not_shown_or_twice_on_one_are_refused(copied, circuit, tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    dataclasses.replace(notes_on(circuit), task="closin").save(path)
    with pytest.raises(
        UserError, match=r"task 'closin', of which no circuit is shown \(did you mean 'closing'"
    ):
        contents.read_run(copied, contents.Options(notes=(str(path),)))
    notes_on(circuit).save(path)
    notes_on(circuit).save(other)
    with pytest.raises(UserError, match=r"b\.json is the second file with notes on 'closing'"):
        contents.read_run(copied, contents.Options(notes=(str(path), str(other))))
    (copied / "circuits" / case.TASK / FILE).write_text("{")
    with pytest.raises(UserError, match=r"notes\.json: not JSON"):
        contents.read_run(copied, contents.Options())


# ---- The tour that is made from evidence ----


def test_a_first_tour_goes_from_the_answers_to_the_embedding_and_names_only_what_is_there(circuit, evidence):
    tour = first_tour(circuit, evidence)
    assert tour == first_tour(circuit, evidence)
    notes = Notes(task=circuit.task, circuit=circuit.digest, tour=tour)
    assert fitted(notes, circuit, [node.name for node in circuit.nodes]) == (notes, [])
    overview, *trail, removal = tour
    assert overview.node is None and overview.edge is None and str(len(circuit.nodes)) in overview.caption
    assert "does not say what a node means" in overview.caption
    assert ".resid_delta." in (trail[0].node or "") and ".act_in." in (trail[-1].node or "")
    assert any(".attn.q." in str(step.node) or ".attn.k." in str(step.node) for step in trail)
    # Each edge leads into what the trail has reached: a node, or the source of the edge before.
    reached = {trail[0].node}
    for step in trail[1:]:
        if step.edge:
            source, target = step.edge.split(">")
            assert target in reached
            reached.add(source)
        else:
            reached.add(step.node)
    assert removal.edits == (Edit(name=evidence.nodes[0].name, mode="mean"),)


def test_a_first_tour_names_blanks_by_their_escapes(circuit, evidence):
    last = str(evidence.prompt_tokens_X[evidence.prompts[0].length - 1])
    index = next(i for i, node in enumerate(evidence.nodes) if ".act_in." in node.name)
    top = evidence.top_tokens_NK.copy()
    top[index:, 0] = int(last)
    text = "\N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE} é"
    changed = dataclasses.replace(
        evidence, token_texts=evidence.token_texts | {last: text}, top_tokens_NK=top
    )
    captions = " ".join(step.caption for step in first_tour(circuit, changed))
    assert r'"\u00a0\u200b é"' in captions and "\N{ZERO WIDTH SPACE}" not in captions


def test_the_numbers_of_a_first_tour_are_those_of_circuit_and_evidence(circuit, evidence):
    """The first write and the first edge, computed again from the arrays."""
    lengths = [prompt.length for prompt in evidence.prompts]
    starts = np.cumsum([0, *lengths])
    row_of = {place: i for i, place in enumerate(evidence.places)}

    def prompt_values(name, row):
        return evidence.circuit_values_PX[row_of[name], starts[row] : starts[row + 1]]

    def push(node):
        first, second = node.answer_weights
        last = [prompt_values(node.name, r)[-1] - prompt_values(node.name, r + 1)[-1] for r in (0, 2)]
        return abs(first - second) * np.mean(np.abs(last))

    writes = [node for node in evidence.nodes if node.answer_weights is not None]
    best = max(writes, key=push)
    _, write, edge, *_ = first_tour(circuit, evidence)
    assert write.node == best.name
    shown = write.caption.replace("\N{MINUS SIGN}", "-")
    for number in (*best.answer_weights, prompt_values(best.name, 0)[-1], prompt_values(best.name, 1)[-1]):
        assert f"{number:+.3g}" in shown

    def change(name):
        return np.mean([np.abs(prompt_values(name, r) - prompt_values(name, r + 1)).max() for r in (0, 2)])

    into = [each for each in circuit.edges if each.target == best.name]
    strongest = max(into, key=lambda each: abs(each.weight) * change(each.source))
    assert edge.edge == f"{strongest.source}>{strongest.target}"
    assert f"{strongest.weight:+.3g}" in edge.caption.replace("\N{MINUS SIGN}", "-")
    assert f"changes by {change(strongest.source):.3g}." in edge.caption


def test_a_first_tour_begins_at_the_most_important_write_where_pairs_have_answers_of_their_own(
    circuit, evidence
):
    nodes = [dataclasses.replace(node, answer_weights=None) for node in evidence.nodes]
    _, write, *_ = first_tour(circuit, dataclasses.replace(evidence, answers=None, nodes=nodes))
    assert write.node == next(node.name for node in nodes if ".resid_delta." in node.name)
    assert "for the answer" not in write.caption


def test_a_circuit_without_edges_has_a_tour_too(circuit, evidence):
    bare = dataclasses.replace(circuit, edges=[])
    assert [bool(step.node) for step in first_tour(bare, evidence)] == [False, True, True]
