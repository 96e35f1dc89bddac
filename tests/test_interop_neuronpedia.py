"""Attribution graphs fit the published schema, and say what the unrolled circuit says."""

import copy
import dataclasses
import json
import pathlib

from helpers import run_python
import jsonschema
import numpy as np
import pytest
import viewer_case as case

from wsparse import runs
from wsparse.circuits import notes
from wsparse.circuits.circuit import Circuit
from wsparse.circuits.notes import Group, Notes
from wsparse.circuits.unrolled import unroll
from wsparse.errors import UserError
from wsparse.interop import neuronpedia
from wsparse.interop.neuronpedia import graph

SCHEMA = json.loads((pathlib.Path(__file__).parent / "attribution_graph.schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that can be loaded, with a circuit."""
    folder = tmp_path_factory.mktemp("neuronpedia") / "My Run"
    given = case.run()
    runs.create(folder, given.config, given.params, given.tokenizer, summary={})
    case.write_run(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return runs.load(folder)


@pytest.fixture(scope="module")
def circuit(folder):
    return Circuit.load(folder / "circuits" / case.TASK)


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("graph") / "graph.json"
    neuronpedia.export(folder, str(folder / f"{case.TASK}.jsonl"), out, number=1)
    return json.loads(out.read_text())


def pair_of(feature):
    """Layer and index of a feature's number, as Neuronpedia's page takes it apart."""
    width = int((np.sqrt(8 * feature + 1) - 1) // 2)
    index = feature - width * (width + 1) // 2
    return width - index, index


def test_the_graph_fits_the_schema(made):
    jsonschema.validate(made, SCHEMA)


@pytest.mark.parametrize(
    "damage",
    [
        lambda graph: graph.pop("qParams"),
        lambda graph: graph["metadata"].pop("scan"),
        lambda graph: graph["nodes"][3].pop("jsNodeId"),
        lambda graph: graph["nodes"][3].update(ctx_idx="2"),
        lambda graph: graph["nodes"][3].update(feature_type="neuron"),
        lambda graph: graph["nodes"][-1].update(clerp="Output"),
        lambda graph: graph["links"][0].update(weight=None),
    ],
)
def test_a_graph_that_does_not_fit_is_refused_by_the_schema(damage, made):
    """Negative control of the test above."""
    damaged = copy.deepcopy(made)
    damage(damaged)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, SCHEMA)


def test_links_and_nodes_are_those_of_the_unrolled_circuit(made, run, circuit, folder):
    batch = case.batch(case.tasks.find(str(folder / f"{case.TASK}.jsonl")))
    tokens = batch.tokens[1][: batch.position[1] + 1].tolist()
    answers = [int(batch.answer[1]), int(batch.other[1])]
    found = unroll(run.params, run.config.model, circuit, tokens, answers)
    assert made["metadata"]["prompt"] == batch.prompts[1] == "".join(made["metadata"]["prompt_tokens"])
    assert sorted(link["weight"] for link in made["links"]) == sorted(found.links.values())
    assert len(made["nodes"]) == len(found.values)
    activations = [node["activation"] for node in made["nodes"] if node["activation"] is not None]
    assert sorted(activations) == sorted(value for value in found.values.values() if value is not None)
    logits = [node for node in made["nodes"] if node["feature_type"] == "logit"]
    assert {node["feature"] for node in logits} == set(answers)
    (target,) = (node for node in logits if node["is_target_logit"])
    assert target["feature"] == answers[0]
    assert target["clerp"] == f'Output "{batch.answers[1]}" (p={target["token_prob"]:.3f})'


def test_identities_are_unique_and_every_end_of_a_link_is_a_node(made):
    ids = [node["node_id"] for node in made["nodes"]]
    assert len(set(ids)) == len(ids)
    ends = {end for link in made["links"] for end in (link["source"], link["target"])}
    assert ends <= set(ids)
    assert set(made["qParams"]["pinnedIds"]) <= set(ids)
    # The same node of the circuit at several tokens is highlighted together, and nothing else is.
    hovered = {}
    for node in made["nodes"]:
        hovered.setdefault(node["jsNodeId"], set()).add(
            (node["feature_type"], node["feature"], node["layer"])
        )
    assert all(len(each) == 1 for each in hovered.values())


def test_ids_take_apart_into_layer_feature_and_token(made, circuit):
    names = {node.name for node in circuit.nodes}
    locations = list(case.NODES)
    for node in made["nodes"]:
        layer, index, position = node["node_id"].split("_")
        assert (node["layer"], node["ctx_idx"]) == (layer, int(position))
        if node["feature_type"] == "cross layer transcoder":
            assert pair_of(node["feature"]) == (int(layer), int(index))
            depth, place = divmod(int(layer) - 1, len(locations))
            name = f"{depth}.{locations[place]}.{index}"
            assert name in names and node["clerp"].startswith(f"{name}, ")
        elif node["feature_type"] == "mlp reconstruction error":
            assert index == "-1"
        elif node["feature_type"] == "embedding":
            assert layer == "E" and node["feature"] == int(position)


def test_links_lead_to_a_higher_layer(made):
    """The page draws them upward; it needs a layer above 0 that is no logit's."""
    layers = {node["node_id"]: -1 if node["layer"] == "E" else int(node["layer"]) for node in made["nodes"]}
    assert all(layers[link["source"]] < layers[link["target"]] for link in made["links"])
    features = [node for node in made["nodes"] if node["feature_type"] != "logit"]
    assert 0 < max(layers[node["node_id"]] for node in features) < max(layers.values())


def test_labels_name_nodes_and_groups_become_supernodes(run, circuit, tmp_path):
    shown = {node["clerp"].split(",")[0] for node in _features(graph(run, circuit, [5, 6, 7], [1]))}
    a, b, c, d, *_ = sorted(name for name in shown if "resid_delta" in name or "act_in" in name)
    written = Notes(
        task="closing",
        circuit=circuit.digest,
        caption="For the page.",
        labels={a: "opens?", c: "closes"},
        groups=(Group(name="both", nodes=(a, b), open=True),),
        pins=(d,),
    )
    written.save(tmp_path)
    made = graph(run, circuit, [5, 6, 7], [1], notes=notes.beside(tmp_path))
    jsonschema.validate(made, SCHEMA)
    clerps = {node["node_id"]: node["clerp"] for node in _features(made)}
    supernodes = {label: ids for label, *ids in made["qParams"]["supernodes"]}
    assert set(supernodes) == {"both", "closes"}
    assert {clerps[place] for place in supernodes["both"]} == {"opens?", clerps_of(b, clerps)}
    assert {clerps[place] for place in supernodes["closes"]} == {"closes"}
    logits = [node["node_id"] for node in made["nodes"] if node["feature_type"] == "logit"]
    pinned = [place for place, clerp in clerps.items() if clerp.startswith(f"{d},")]
    assert pinned
    assert set(made["qParams"]["pinnedIds"]) == {
        *supernodes["both"], *supernodes["closes"], *pinned, *logits
    }  # fmt: skip


def clerps_of(name, clerps):
    return next(clerp for clerp in clerps.values() if clerp.startswith(f"{name},"))


def _features(made):
    return [node for node in made["nodes"] if node["feature_type"] == "cross layer transcoder"]


def test_notes_on_a_node_that_is_not_in_the_circuit_are_refused(run, circuit):
    name = circuit.nodes[0].name
    written = Notes(task="closing", circuit=circuit.digest, pins=(f"{name}9",))
    with pytest.raises(
        UserError, match=rf"name the node '{name}9', which its circuit has not \(did you mean"
    ):
        graph(run, circuit, [5], [1], notes=written)


def test_notes_on_another_circuit_are_used_as_far_as_they_fit(run, circuit, logged):
    name = circuit.nodes[0].name
    written = Notes(task="closing", circuit="f" * 64, labels={name: "opens?", f"{name}9": "elsewhere"})
    made = graph(run, circuit, [5, 6, 7], [1], notes=written)
    assert any("another circuit" in line for line in logged)
    assert "elsewhere" not in {label for label, *_ in made["qParams"]["supernodes"]}


def test_a_named_circuit_is_exported_under_its_own_name_and_notes_on_another_task_are_refused(run, circuit):
    named = dataclasses.replace(circuit, name="tight")
    made = [graph(run, each, [5, 6, 7], [1])["metadata"] for each in (circuit, named)]
    assert [each["slug"] for each in made] == ["my-run-closing", "my-run-closing-tight"]
    assert made[1]["generation_settings"]["task"] == "closing@tight"
    assert "circuit of closing@tight (" in made[1]["info"]["description"]
    with pytest.raises(UserError, match="notes are on the task 'opening', the circuit is of 'closing'"):
        graph(run, circuit, [5], [1], notes=Notes(task="opening", circuit=circuit.digest))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("nothing", {}, "no circuit in .*nothing"),
        (case.TASK, {}, "come from a file of yours"),
        (f"{case.TASK}.jsonl", {"number": 8}, "--number must be from 0 to 7, got 8"),
        (case.TASK, {"prompt": "x" * 25}, "1 to 24 tokens, this one has 25"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(task, options, message, folder, tmp_path):
    task = str(folder / task) if task.endswith(".jsonl") else task
    with pytest.raises(UserError, match=message):
        neuronpedia.export(folder, task, tmp_path / "graph.json", **options)
    with pytest.raises(UserError, match="is not a run folder"):
        neuronpedia.export(tmp_path, task, tmp_path / "graph.json", **options)
    with pytest.raises(UserError, match="is not a writable directory"):
        neuronpedia.export(folder, task, tmp_path / "missing" / "graph.json", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_runs_a_circuit_on_a_prompt_of_the_users(folder, tmp_path):
    out = tmp_path / "graph.json"
    arguments = (f"--run={folder}", f"--task={case.TASK}", f"--out={out}", "--prompt=f('abc", "--slug=mine")
    done = run_python("-m", "wsparse.interop.neuronpedia", *arguments)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    jsonschema.validate(made, SCHEMA)
    assert made["metadata"]["slug"] == "mine" and made["metadata"]["scan"] == "my-run"
    assert made["metadata"]["prompt_tokens"] == list("f('abc")
    assert sum(node["feature_type"] == "logit" for node in made["nodes"]) == 5
    counts = f"{len(made['nodes'])} nodes, {len(made['links'])} links"
    assert done.stdout.startswith(f"written to {out}: {counts}")
