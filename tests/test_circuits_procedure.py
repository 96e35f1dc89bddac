"""The search, the planted circuit that it finds, and its completion."""

import dataclasses
import re

import circuits_case as case
from circuits_case import PLANTED, PLANTED_EDGES, PLANTED_NODES, planted_pairs
import numpy as np
import pytest

from wsparse.circuits import clean_up, discretize, masks, procedure
from wsparse.circuits.search import FAST, Pruner, search
from wsparse.errors import UserError


@pytest.fixture
def subject():
    return case.subject()


@pytest.fixture
def pairs():
    return case.pairs()


@pytest.fixture
def circuit():
    return case.circuit()


def test_the_planted_circuit_is_found_exactly(circuit):
    assert {node.name for node in circuit.nodes} == PLANTED_NODES
    assert {(edge.source, edge.target) for edge in circuit.edges} == PLANTED_EDGES
    assert circuit.loss < 0.12


def test_the_planted_circuit_is_necessary_and_its_controls_fail(circuit):
    # What is left prefers one answer whatever the prompt.
    assert circuit.scores.necessity.accuracy == 0.5
    assert circuit.scores.necessity.loss > 0.6
    assert circuit.scores.model.accuracy == 1.0
    for control in circuit.controls.values():
        assert not control.reached
        assert control.least_loss > 0.4


def test_a_circuit_that_misses_the_target_on_other_pairs_is_chosen_again_for_a_lower_loss(subject, logged):
    settings = dataclasses.replace(
        case.SETTINGS, target=0.2, margin=0.01, trials=2, necessity=0.0, controls=False, sweep=(0.3,)
    )
    alike = planted_pairs(16, 3)
    # No circuit does these.
    inverted = alike._replace(answer=alike.other, other=alike.answer)

    def found(confirm):
        pairs = dataclasses.replace(case.pairs(), confirm=confirm)
        search = procedure.CircuitSearch(subject, pairs, case.pruner(), settings)
        return search.circuit(search.trials(), started=0.0)

    # One of the two neurons is enough for 0.2, and both are needed for half of it.
    assert [len(found(confirm).nodes) for confirm in (None, alike)] == [6, 6]
    assert not any("chosen again" in line for line in logged)
    again = found(inverted)
    assert {node.name for node in again.nodes} == PLANTED_NODES
    assert again.scores.discretize_loss < 0.1
    # For a fourth of it there is none, and the last one stands.
    assert sum("chosen again" in line for line in logged) == 2


def test_a_smaller_circuit_that_misses_on_other_pairs_gives_way_to_one_that_does_not(subject, monkeypatch):
    settings = dataclasses.replace(
        case.SETTINGS,
        target=0.16,
        margin=0.02,
        trials=2,
        finalists=2,
        necessity=0.0,
        controls=False,
        sweep=(0.3,),
    )

    def of(nodes: set[str]) -> discretize.Subgraph:
        kept = np.array([name in nodes for name in masks.names(PLANTED)])
        return discretize.subgraph_of(subject.scorer, kept, 0.1)

    # Without its last node nothing reaches the answer.
    circuits = [of(PLANTED_NODES - {"1.mlp.resid_delta.11"}), of(PLANTED_NODES)]

    def found(order, confirm) -> set[str]:
        results = iter(circuits[number] for number in order)

        def cleaned(*_, **__) -> clean_up.CleanUp:
            result = next(results)
            return clean_up.CleanUp(result, [], result, subject.config)

        monkeypatch.setattr(procedure, "clean_up", cleaned)
        pairs = dataclasses.replace(case.pairs(), confirm=confirm)
        search = procedure.CircuitSearch(subject, pairs, case.pruner(), settings)
        return {node.name for node in search.circuit(search.trials(), started=0.0).nodes}

    for order in ([0, 1], [1, 0]):
        assert found(order, planted_pairs(16, 3)) == PLANTED_NODES
        # Negative control: where nothing is tried on other pairs, the smaller one is chosen.
        assert len(found(order, None)) == len(PLANTED_NODES) - 1


def test_where_the_model_cannot_do_a_task_the_hint_is_a_target_that_would_try_it(subject, pairs):
    """The number comes from the pairs that circuits are chosen on; the report split has no part in it."""
    rows = np.array(pairs.discretize.answer)
    others = np.array(pairs.discretize.other)
    # A part of the pairs with their answers exchanged: a loss between that of the model and chance.
    swapped = np.arange(rows.size) // 2 < 2
    mixed = pairs.discretize._replace(
        answer=np.where(swapped, others, rows), other=np.where(swapped, rows, others)
    )
    inverted = pairs.report._replace(answer=pairs.report.other, other=pairs.report.answer)

    def searched(discretize, report, **settings):
        of_pairs = dataclasses.replace(pairs, discretize=discretize, report=report)
        changed = dataclasses.replace(case.SETTINGS, **settings)
        return procedure.CircuitSearch(subject, of_pairs, case.pruner(), changed)

    low = {"target": 0.01, "margin": 0.0}
    hopeless = searched(mixed, pairs.report, **low)
    assert hopeless.is_hopeless()
    hint = hopeless.hint()
    target = float(re.fullmatch(r"the model cannot do it at 0\.01: --target=(0\.\d+) would try it", hint)[1])
    model_loss = subject.score(mixed).loss
    assert model_loss + 0.05 <= target <= model_loss + 0.06
    assert not searched(mixed, pairs.report, target=target, margin=0.0).is_hopeless()
    assert searched(mixed, inverted, **low).hint() == hint
    # Every objective would accept what it is told.
    robust = searched(mixed, pairs.report, **low, objective="robust", robust_target=0.02).hint()
    assert robust.endswith(f": --target={target:g} --robust_target={target:g} would try it")
    # Where the target is raised to above the model's loss, what adversaries may bring is no laxer for it.
    raised = searched(mixed, pairs.report, target=0.05, margin=0.0, objective="robust", robust_target=0.1)
    assert raised.target > 0.1
    bank = raised._criterion().scorer.bank
    assert bank is not None and float(bank.weight) == 1.0
    backwards = pairs.discretize._replace(answer=others, other=rows)
    assert "no target would try it" in searched(backwards, pairs.report, **low).hint()


def test_a_circuit_with_a_backup_is_completed_by_the_fewest_nodes_that_carry_it(subject, pairs):
    scorer, everything = subject.scorer, masks.names(PLANTED)
    one_neuron = np.array([name == "1.mlp.post_act.7" for name in everything])
    subgraph = discretize.subgraph_of(scorer, one_neuron, 0.6)
    tau = np.zeros(one_neuron.size)

    def completed(start, **limits):
        return clean_up.complete(scorer, pairs.discretize, start, tau, **limits)

    # The other neuron does the task alone; both share a path whose every node is a bottleneck.
    assert scorer.mask(pairs.discretize, ~one_neuron).loss < 0.3
    whole = completed(subgraph, target=2.0, necessity=0.6)
    added = {everything[i] for i in np.flatnonzero(whole.nodes & ~one_neuron)}
    assert len(added) == 1 and added <= PLANTED_NODES
    assert scorer.mask(pairs.discretize, ~whole.nodes).loss >= 0.6
    assert whole.loss == scorer.mask(pairs.discretize, whole.nodes).loss
    # Nothing is added where nothing is missing, where it cannot help, or where the circuit would suffer.
    assert completed(whole, target=2.0, necessity=0.6) is whole
    assert completed(subgraph, target=2.0, necessity=50.0) is subgraph
    assert completed(subgraph, target=0.01, necessity=0.6) is subgraph


def test_every_planted_node_matters_when_removed_alone(circuit):
    # One of the two neurons alone nearly does.
    assert min(node.importance for node in circuit.nodes) > 0.01
    assert sorted(node.importance for node in circuit.nodes)[-5] > 0.3


def test_the_curve_has_a_point_for_every_reachable_target(circuit):
    targets = [point.target for point in circuit.curve]
    assert targets == sorted(targets)
    # The model itself is near the target that was set, so that the circuit's is above it.
    assert circuit.target > case.SETTINGS.target
    assert circuit.target == pytest.approx(circuit.scores.model.loss + 0.05, abs=0.01)
    assert circuit.target in targets and 0.3 in targets
    edges = [point.edges for point in circuit.curve]
    assert edges[-1] <= edges[targets.index(circuit.target)]


def test_edges_carry_the_models_weights(circuit, subject):
    weights = {(e.source, e.target): e.weight for e in circuit.edges}
    assert weights["1.mlp.act_in.9", "1.mlp.post_act.8"] == -3.0
    assert weights["0.attn.v.3", "0.attn.resid_delta.9"] == 3.0
    assert circuit.counts.edges == len(circuit.edges)
    # Unembedding: channel 11 has two entries; embedding: channels 5 (two tokens) and 9 (none).
    assert circuit.counts.unembedding_edges == 2
    assert circuit.counts.embedding_edges == 2


def test_the_search_starts_at_the_centres_and_repeats_itself(subject):
    pruner = Pruner(PLANTED, procedure.Settings(steps=2, pairs_per_step=2), parallel=2)

    def objective(tau_U):
        return float(np.abs(tau_U).sum()), None

    def trials(sampler):
        return search(
            pruner,
            subject.params,
            planted_pairs(4, 0),
            subject.node_means,
            objective,
            trials=5,
            sampler=sampler,
            seed=3,
        )

    first, second, at_random = trials("tpe"), trials("tpe"), trials("random")
    assert [t.hparams for t in first] == [t.hparams for t in second]
    assert first[0].hparams == FAST
    assert [t.number for t in at_random] == list(range(5))
    assert len({t.hparams.k_coef for t in at_random}) == 5


def test_the_digest_of_pairs_follows_every_split_and_not_what_they_are_padded_to(subject, pairs):
    def padded(rows):
        return rows._replace(tokens=np.pad(rows.tokens, ((0, 0), (0, 3)), constant_values=7))

    longer = {split: padded(getattr(pairs, split)) for split in ("search", "discretize", "report")}
    assert dataclasses.replace(pairs, **longer).digest == pairs.digest
    assert subject.held(pairs, "vocabulary").digest == pairs.digest
    others = {split: planted_pairs(16, 9) for split in ("search", "discretize", "confirm", "report")}
    changed = [dataclasses.replace(pairs, **{split: rows}).digest for split, rows in others.items()]
    swapped = pairs.report._replace(answer=pairs.report.other, other=pairs.report.answer)
    changed.append(dataclasses.replace(pairs, report=swapped).digest)
    assert len({pairs.digest, *changed}) == 6


def test_settings_that_make_no_sense_are_refused_by_name():
    with pytest.raises(UserError, match="trials must be at least 1, got 0"):
        procedure.Settings(trials=0)
    with pytest.raises(UserError, match="between 0 and ln 2"):
        procedure.Settings(target=0.9)
    with pytest.raises(UserError, match="margin"):
        procedure.Settings(margin=-1.0)
    with pytest.raises(UserError, match="necessity"):
        procedure.Settings(necessity=-1.0)
