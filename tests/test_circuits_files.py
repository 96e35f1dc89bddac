"""Circuit files keep what was found, and refuse what is damaged or contradicts itself."""

import json

import circuits_case as case
from circuits_case import PLANTED, planted_pairs
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import model, taps, trees
from wsparse.circuits import Circuit
from wsparse.errors import UserError


@pytest.fixture
def subject():
    return case.subject()


@pytest.fixture
def circuit():
    return case.circuit()


def test_a_circuit_survives_saving_and_loading(circuit, subject, tmp_path):
    circuit.save(tmp_path / "planted")
    loaded = Circuit.load(tmp_path / "planted" / "circuit.json")
    assert loaded.nodes == circuit.nodes
    assert loaded.edges == circuit.edges
    assert loaded.config == PLANTED
    assert loaded.loss == circuit.loss
    assert loaded.controls == circuit.controls
    assert loaded.scores == circuit.scores and loaded.counts == circuit.counts
    assert loaded.curve == circuit.curve
    for kind in ("means", "tau", "removed"):
        for name, array in getattr(circuit, kind).items():
            np.testing.assert_array_equal(getattr(loaded, kind)[name], array)
    # What was saved is enough to score the circuit again.
    tap = taps.mask(
        {name: jnp.asarray(gates, jnp.float32) for name, gates in loaded.mask().items()},
        {name: jnp.asarray(mean) for name, mean in loaded.means.items()},
    )
    pairs = planted_pairs(16, 2)
    logits, _ = model.forward(subject.params, pairs.tokens, loaded.config, tap=tap)
    rows = np.arange(32)
    last = np.asarray(logits)[rows, 5]
    margin = last[rows, pairs.answer] - last[rows, pairs.other]
    expected = np.mean(np.logaddexp(0, -margin))
    assert loaded.scores.sufficiency.loss == pytest.approx(expected, abs=0.02)


def test_a_circuit_refuses_parameters_of_another_model(circuit, subject):
    circuit.check(subject.params)
    other = trees.unflatten(trees.flatten(subject.params))
    other["head"]["unembed"] = other["head"]["unembed"].at[0, 0].add(1e-6)
    with pytest.raises(UserError, match="belongs to parameters"):
        circuit.check(other)


def test_a_damaged_or_missing_circuit_is_refused_by_name(circuit, tmp_path):
    with pytest.raises(UserError, match="no circuit in"):
        Circuit.load(tmp_path / "nothing")
    circuit.save(tmp_path / "c")
    path = tmp_path / "c" / "circuit.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema": 99}))
    with pytest.raises(UserError, match="schema"):
        Circuit.load(tmp_path / "c")
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "curve"}))
    with pytest.raises(UserError, match="curve"):
        Circuit.load(tmp_path / "c")
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Circuit.load(tmp_path / "c")
    path.write_text(json.dumps(values))
    (tmp_path / "c" / "circuit.npz").write_bytes(b"PK\x03\x04nonsense")
    with pytest.raises(UserError, match="damaged"):
        Circuit.load(tmp_path / "c")


def change_node(**values):
    return lambda circuit: circuit["nodes"][0].update(values)


def change_edge(**values):
    return lambda circuit: circuit["edges"][0].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_node(name="9.attn.q.1"), "node '9.attn.q.1' is not in this model"),
        (change_node(importance="large"), r"'nodes\[0\].importance' must be of type float, got 'large'"),
        (change_edge(weight=None), r"'edges\[0\].weight' must be of type float, got None"),
        (change_edge(source="0.attn.q.0"), "an edge ends at '0.attn.q.0'"),
        (lambda circuit: circuit["model"]["config"].update(d_mlp=99), r"means of mlp\.post_act must"),
    ],
)
def test_a_circuit_that_contradicts_itself_is_refused(damage, message, circuit, tmp_path):
    circuit.save(tmp_path)
    values = json.loads((tmp_path / "circuit.json").read_text())
    assert "0.attn.q.0" not in {node["name"] for node in values["nodes"]}
    damage(values)
    (tmp_path / "circuit.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"is damaged: .*{message}"):
        Circuit.load(tmp_path)
