"""Planted models do their task by the planted circuit alone, and adversaries refuse their decoys."""

import numpy as np
import planted
import pytest

TARGET = 0.15
WITH_DECOY = [name for name in planted.NAMES if planted.make(name).decoy]


def loss(made: planted.Planted, nodes_U: np.ndarray) -> float:
    return made.subject.scorer.mask(made.pairs(32, 3), nodes_U).loss


def attacked(made: planted.Planted, nodes_U: np.ndarray) -> float:
    return made.attacked(made.pairs(32, 3), nodes_U)


def test_there_are_at_least_ten_models_and_four_with_decoys():
    assert len(planted.NAMES) >= 10
    assert len(WITH_DECOY) >= 4


@pytest.mark.parametrize("name", planted.NAMES)
def test_the_planted_circuit_does_the_task_alone_and_holds_under_attack(name):
    made = planted.make(name)
    nodes_U = made.chosen(made.nodes)
    assert loss(made, np.ones_like(nodes_U)) < 0.1
    assert loss(made, nodes_U) < TARGET
    assert attacked(made, nodes_U) < 0.3


@pytest.mark.parametrize("name", planted.NAMES)
def test_no_planted_node_can_be_left_out_and_a_random_set_does_not_do_the_task(name):
    made = planted.make(name)
    nodes_U = made.chosen(made.nodes)
    order = np.flatnonzero(nodes_U)
    spans = [[i, i + 1] for i in range(order.size)]
    without = made.subject.scorer.without(made.pairs(32, 3), nodes_U, None, order, spans).loss
    assert without.min() > TARGET
    rng = np.random.default_rng(0)
    random_U = np.zeros_like(nodes_U)
    random_U[rng.choice(np.flatnonzero(~nodes_U), order.size, replace=False)] = True
    assert loss(made, random_U) > 0.6


def test_a_second_path_does_the_task_without_the_first():
    made = planted.make("redundant")
    assert loss(made, made.chosen(made.second)) < TARGET
    only_first = made.chosen(made.nodes - made.second)
    assert loss(made, ~only_first) < TARGET
    assert loss(made, ~made.chosen(made.nodes | made.second)) > 0.6


@pytest.mark.parametrize("name", WITH_DECOY)
def test_mean_ablation_accepts_a_decoy_and_an_adversary_refuses_it(name):
    made = planted.make(name)
    decoy_U = made.chosen(made.decoy)
    assert loss(made, decoy_U) < TARGET
    assert attacked(made, decoy_U) > 0.6
    # And the model does not use it: it does the task as well without what is the decoy's alone.
    own_U = decoy_U & ~made.chosen(made.nodes)
    assert loss(made, ~own_U) < TARGET
