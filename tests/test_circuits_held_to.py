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

from wsparse.circuits import masks, procedure
from wsparse.circuits.pairs import PairArrays, row_losses
from wsparse.circuits.settings import Settings
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
