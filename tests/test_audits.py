"""The audit passes a planted circuit, and fails a decoy, a circuit for nonsense, and a random one."""

import dataclasses
import pathlib

import audit_case
import numpy as np
from planted_case import PLANTED, chosen, pairs
import pytest

from wsparse import runs
from wsparse.circuits import Circuit, discretize, graph, masks, tasks
from wsparse.circuits.audits import (
    attention_patterns,
    interchange,
    mask_runs,
    matrix,
    minimality,
    necessity,
    node_roles,
    nonsense,
    random_sets,
    seeds,
    selectivity,
    statistics,
    strengths,
    sufficiency,
)
from wsparse.circuits.audits.context import Context, Options
from wsparse.circuits.settings import Settings
from wsparse.errors import UserError

SETTINGS = Settings(steps=100, pairs_per_step=8, necessity=0.5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[runs.Run, Circuit, tasks.Task]:
    """A run folder, a circuit and a task, whose model is then replaced by the planted one."""
    folder: pathlib.Path = tmp_path_factory.mktemp("audits") / "run"
    path = audit_case.write_run(folder)
    run = runs.load(folder)
    circuit = Circuit.load(folder / "circuits" / audit_case.TASK)
    hyperparameters = {"k_coef": 3e-3, "learning_rate": 1e-2, "settings": {}}
    circuit = dataclasses.replace(circuit, target=0.15, hyperparameters=hyperparameters)
    return run, circuit, tasks.find(str(path))


@pytest.fixture
def context(stored):
    """Returns a function that makes the context of a node set."""
    run, circuit, task = stored

    def make(nodes, **options) -> Context:
        nodes_U = chosen(nodes)
        weights = PLANTED.subject.scorer.weights
        edges = graph.between(nodes_U, weights, PLANTED.subject.config)
        changed = Options(draws=16, resamples=200, **options)
        return Context(
            run, circuit, task, PLANTED.subject, pairs(), nodes_U, edges, dict(weights), SETTINGS, changed
        )

    return make


def true() -> frozenset[str]:
    return PLANTED.nodes


def decoy() -> frozenset[str]:
    return PLANTED.decoy


def test_sufficiency_passes_what_does_the_task_under_mean_ablation(context):
    assert sufficiency.sufficiency(context(true())).verdict == "passed"
    assert sufficiency.sufficiency(context(decoy())).verdict == "passed"
    failed = sufficiency.sufficiency(context(audit_case.OTHER_NODES))
    assert failed.verdict == "failed"
    loss = failed.measurements[0]
    assert loss.low <= loss.value <= loss.high


def test_divergences_are_those_of_scipys_formula(context):
    made = context(decoy())
    found = {m.name: m.value for m in sufficiency.sufficiency(made).measurements}
    model_BV, circuit_BV = (
        np.exp(logits.astype(np.float64)) for logits in (made.model_logits, made.logits())
    )
    p, q = (values / values.sum(1, keepdims=True) for values in (model_BV, circuit_BV))
    want = np.sum(p * np.log(p / q), axis=1).mean()
    assert found["KL from model to circuit over the vocabulary"] == pytest.approx(want, rel=1e-3)
    assert want > 0


def test_adversaries_pass_the_true_circuit_and_fail_the_decoy(context):
    for test in (strengths.adversarial_steps, strengths.adversarial_budgets):
        assert test(context(true())).verdict == "passed"
    failed = strengths.adversarial_steps(context(decoy()))
    assert failed.verdict == "failed"
    assert [m.value for m in failed.measurements] == sorted(m.value for m in failed.measurements)
    assert failed.measurements[-1].value > failed.measurements[-1].control


def test_a_model_that_loses_its_circuit_to_a_budget_of_one_fails(context):
    assert strengths.adversarial_budgets(context(audit_case.OTHER_NODES)).verdict == "failed"


def test_partial_ablation_lets_the_true_circuit_hold_and_a_random_one_fail(context):
    assert strengths.partial_ablation(context(true())).verdict == "passed"
    assert strengths.partial_ablation(context(audit_case.OTHER_NODES)).verdict == "failed"


def test_necessity_compares_with_random_sets_like_the_circuit(context):
    passed = necessity.necessity(context(true()))
    assert passed.verdict == "passed"
    assert passed.measurements[0].value > 0.5 > passed.measurements[0].control
    assert necessity.necessity(context(decoy() - true())).verdict == "failed"


def test_roles_are_kept_in_the_true_circuit_and_not_in_the_decoy(context):
    assert node_roles.node_roles(context(true())).verdict == "passed"
    failed = node_roles.node_roles(context(decoy()))
    assert failed.verdict == "failed"
    # The write is undone in the model by another value channel.
    assert any("0.attn.resid_delta.12" in m.name for m in failed.measurements)


def test_decisions_follow_the_values_of_the_true_circuit_only(context):
    assert interchange.interchange(context(true())).verdict == "passed"
    assert interchange.interchange(context(audit_case.OTHER_NODES)).verdict == "failed"


def test_a_node_that_the_circuit_does_not_need_is_found(context):
    assert minimality.minimality(context(true())).verdict == "passed"
    assert minimality.minimality(context(true() | audit_case.OTHER_NODES)).verdict == "failed"


def test_the_matrix_has_every_kind_and_passes_where_all_with_means_do(context):
    passed = matrix.matrix(context(true()))
    assert passed.verdict == "passed"
    names = [m.name for m in passed.measurements]
    assert names[0] == "mean" and len(set(names)) == len(names)
    assert {name.split(",")[0] for name in names} == set(matrix.CONSTANTS)
    assert matrix.matrix(context(audit_case.OTHER_NODES)).verdict == "failed"
    assert matrix.norm_scale(context(true())).verdict == "passed"


def test_uniform_attention_of_circuit_and_model_is_equal_and_no_head_is_no_test(context):
    passed = attention_patterns.attention_patterns(context(true()))
    assert passed.verdict == "passed"
    assert passed.measurements[0].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="it uses no attention"):
        attention_patterns.attention_patterns(context({"1.mlp.post_act.3"}))


def test_tests_that_learn_masks_need_seeds(context):
    for test in (seeds.stability, seeds.exclusion, nonsense.nonsense, nonsense.random_weights):
        with pytest.raises(UserError, match="--seeds"):
            test(context(true()))


def test_tests_that_compare_refuse_one_seed_or_one_pair(context):
    with pytest.raises(UserError, match="--seeds"):
        seeds.stability(context(true(), seeds=1))
    one = dataclasses.replace(pairs(), report=PLANTED.pairs(1, 2))
    with pytest.raises(UserError, match="second pair"):
        interchange.interchange(dataclasses.replace(context(true()), pairs=one))


def test_a_seed_that_needs_most_of_the_model_does_not_succeed(context, monkeypatch):
    made = context(true(), seeds=2)
    own = mask_runs._own_nodes(made)
    scorer, order = made.subject.scorer, np.arange(made.nodes_U.size)
    found = [discretize.subgraph_of(scorer, order < n_nodes, 0.1) for n_nodes in (own, 2 * own, 2 * own + 1)]
    monkeypatch.setattr(mask_runs, "subgraphs", lambda *args, **kwargs: ([*found, None], 0.1))
    assert mask_runs.successes(made, range(4))[0] == found[:2]


def test_a_circuit_that_matters_to_nothing_is_not_selective():
    assert selectivity._is_selective(own=0.5, others=0.2)
    assert not selectivity._is_selective(own=0.3, others=0.2)
    assert not selectivity._is_selective(own=0.0, others=-0.01)


@pytest.mark.slow
def test_seeds_find_the_planted_circuit_again_and_nothing_in_random_weights(context):
    made = context(true(), seeds=4)
    stable = seeds.stability(made)
    found = {m.name: m for m in stable.measurements}
    assert found["seeds that succeed"].value == 1.0
    overlap = found["mean Jaccard index of two seeds' nodes"]
    assert overlap.value > overlap.control
    assert nonsense.random_weights(made).verdict == "passed"


@pytest.mark.slow
def test_inverted_labels_cost_more_than_the_task(context):
    result = nonsense.nonsense(context(true(), seeds=2))
    inverted = result.measurements[0]
    assert inverted.name.startswith("inverted labels")
    assert inverted.value is None or inverted.value > inverted.control


def test_matched_sets_have_the_circuits_sizes_and_none_of_its_nodes(context):
    made = context(true())
    rng = np.random.default_rng(0)
    matched_U = random_sets.matched(made.nodes_U, made.activity, made.config, rng)
    same_U = random_sets.same_sizes(made.nodes_U, made.config, rng)
    for name, kept_LN in masks.unflatten(made.nodes_U, made.config).items():
        for drawn_U in (matched_U, same_U):
            np.testing.assert_array_equal(masks.unflatten(drawn_U, made.config)[name].sum(1), kept_LN.sum(1))
    assert not np.any(matched_U & made.nodes_U)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        low, high = statistics.interval(rng.normal(1.0, 1.0, 60), rng, 300)
        covered.append(low <= 1.0 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99
