"""Circuits held to the model's own probabilities of the candidates instead of the labels."""

import dataclasses

import circuits_case as case
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import trees
from wsparse.circuits import masks, procedure
from wsparse.circuits.ablation import answer_logits
from wsparse.circuits.pairs import PairArrays, row_losses
from wsparse.circuits.settings import Settings
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.errors import UserError

ROWS = 4
MARGINS = hnp.arrays(np.float32, ROWS, elements=st.floats(-20, 20, width=32))


def rows(certainty=None) -> PairArrays:
    zeros, ones = np.zeros(ROWS, np.int32), np.ones(ROWS, np.int32)
    return PairArrays(zeros[:, None], zeros, zeros, ones, certainty)


def logits(margins_B) -> jax.Array:
    return jnp.stack([jnp.asarray(margins_B), jnp.zeros(ROWS)], axis=1)


@given(MARGINS, hnp.arrays(np.float32, ROWS, elements=st.floats(0, 1, width=32)))
def test_the_loss_is_the_cross_entropy_against_both_probabilities(margins_B, certainty_B):
    wide = margins_B.astype(np.float64)
    want = certainty_B * np.logaddexp(0, -wide) + (1 - certainty_B) * np.logaddexp(0, wide)
    got = row_losses(logits(margins_B), rows(jnp.asarray(certainty_B)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@given(MARGINS)
def test_without_doubt_the_loss_is_that_of_the_label(margins_B):
    certain = row_losses(logits(margins_B), rows(jnp.ones(ROWS)))
    np.testing.assert_array_equal(certain, row_losses(logits(margins_B), rows()))


@given(MARGINS, MARGINS)
def test_no_logits_do_better_than_those_that_the_probabilities_are_from(own_B, other_B):
    held = rows(jax.nn.sigmoid(jnp.asarray(own_B)))
    assert np.all(row_losses(logits(own_B), held) <= row_losses(logits(other_B), held) + 1e-5)


def log_softmax(logits_BV) -> np.ndarray:
    wide = logits_BV.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


LOGITS = hnp.arrays(np.float32, (ROWS, 5), elements=st.floats(-20, 20, width=32))


@given(LOGITS, LOGITS)
def test_against_a_reference_the_loss_is_the_divergence_and_the_candidates_entropy(own_BV, other_BV):
    held = rows()._replace(reference=jnp.asarray(log_softmax(own_BV), jnp.float32))
    own, other = log_softmax(own_BV), log_softmax(other_BV)
    two = log_softmax(own[:, :2])
    want = np.sum(np.exp(own) * (own - other), axis=1) - np.sum(np.exp(two) * two, axis=1)
    np.testing.assert_allclose(row_losses(jnp.asarray(other_BV), held), want, rtol=1e-3, atol=1e-4)
    # At the reference itself it is what it is against the candidates' probabilities alone.
    certain = rows(jax.nn.sigmoid(jnp.asarray(own_BV[:, 0] - own_BV[:, 1])))
    at_own = (row_losses(jnp.asarray(own_BV), each) for each in (held, certain))
    np.testing.assert_allclose(*at_own, rtol=1e-3, atol=1e-4)


def test_a_circuit_held_to_the_vocabulary_is_nearer_the_model_on_all_tokens():
    flat, pairs = dict(trees.flatten(case.planted_params())), case.pairs()
    # A third token depends on the first too, through a neuron that the two candidates do not need.
    for path, place, value in (
        ("blocks/mlp/fc/kernel", (1, slice(None), 9), np.eye(case.PLANTED.d_model)[9] * 3),
        ("blocks/mlp/proj/kernel", (1, 9), np.eye(case.PLANTED.d_model)[12] * 3),
        ("head/unembed", (12, 0), 1.5),
    ):
        flat[path] = jnp.asarray(flat[path]).at[place].set(value)
    subject = procedure.Subject(trees.unflatten(flat), case.PLANTED, case.windows())
    settings = dataclasses.replace(case.SETTINGS, trials=2, sweep=(), controls=False, necessity=0.0)
    model_BV = answer_logits(subject.params, subject.config, pairs.report)
    divergences = []
    for held_to in ("labels", "vocabulary"):
        held = subject.held(pairs, held_to)
        assert held.report.reference is None
        search = procedure.CircuitSearch(subject, held, case.pruner(), settings)
        circuit = search.circuit(search.trials(), started=0.0)
        assert circuit is not None and circuit.status == "found"
        found = Subnetwork.of(subject.params, subject.config, circuit)
        circuit_BV = answer_logits(found.params, found.scorer.config, pairs.report, found.ablation())
        model, alone = (log_softmax(np.asarray(logits_BV)) for logits_BV in (model_BV, circuit_BV))
        divergences.append(np.mean(np.sum(np.exp(model) * (model - alone), axis=1)))
    assert divergences[1] < settings.target < divergences[0]


def test_the_report_split_keeps_its_labels_and_the_others_take_the_models_certainty():
    subject, pairs = case.subject(), case.pairs()
    assert subject.held(pairs, "labels") is pairs
    held = subject.held(dataclasses.replace(pairs, confirm=case.planted_pairs(4, 3)), "model")
    all_U = np.ones(masks.n_nodes(subject.config), bool)
    for split in (held.search, held.discretize, held.confirm):
        want = 1 / (1 + np.exp(-subject.scorer.margins(split, all_U).astype(np.float64)))
        np.testing.assert_allclose(split.certainty, want, rtol=1e-5)
    assert held.report.certainty is None
    assert subject.held(pairs, "model").confirm is None


def test_masks_of_a_model_that_is_wrong_learn_its_wrong_answers():
    subject, pairs = case.subject(), case.pairs()

    def exchanged(split: PairArrays) -> PairArrays:
        return split._replace(answer=split.other, other=split.answer)

    wrong = dataclasses.replace(pairs, search=exchanged(pairs.search), discretize=exchanged(pairs.discretize))
    settings = dataclasses.replace(case.SETTINGS, trials=2, sweep=(), controls=False)
    search = procedure.CircuitSearch(subject, subject.held(wrong, "model"), case.pruner(), settings)
    circuit = search.circuit(search.trials(), started=0.0)
    assert circuit is not None
    # The report split has the right labels: the circuit does what the model does.
    assert circuit.loss < settings.target
    assert circuit.nodes
    assert procedure.CircuitSearch(subject, wrong, case.pruner(), settings).is_hopeless()


def test_settings_refuse_an_unknown_reference():
    with pytest.raises(UserError, match="held_to must be one of labels, model"):
        Settings(held_to="truth")
