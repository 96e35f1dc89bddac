"""Planted models do their task by the planted circuit alone, and adversaries refuse their decoys."""

import functools

import numpy as np
import pytest

from wsparse.circuits import adversary, masks, planted
from wsparse.circuits.ablation import Background
from wsparse.circuits.subject import Subject

TARGET = 0.15
WITH_DECOY = [name for name in planted.NAMES if planted.make(name).decoy]


@functools.cache
def subject(name: str) -> Subject:
    made = planted.make(name)
    return Subject(made.params, made.config, made.windows)


def chosen(name: str, nodes) -> np.ndarray:
    return masks.from_names(sorted(nodes), planted.make(name).config)


def loss(name: str, nodes_U: np.ndarray) -> float:
    return subject(name).scorer.mask(planted.make(name).pairs(32, 3), nodes_U).loss


def attacked(name: str, nodes_U: np.ndarray) -> float:
    scorer = subject(name).scorer
    background = Background(scorer.means, scorer.means)
    pairs = planted.make(name).pairs(32, 3)
    return adversary.ascend(scorer.params, scorer.config, pairs, nodes_U, scorer.weights, background).loss


def test_there_are_at_least_ten_models_and_four_with_decoys():
    assert len(planted.NAMES) >= 10
    assert len(WITH_DECOY) >= 4


@pytest.mark.parametrize("name", planted.NAMES)
def test_the_planted_circuit_does_the_task_alone_and_holds_under_attack(name):
    nodes_U = chosen(name, planted.make(name).nodes)
    assert loss(name, np.ones_like(nodes_U)) < 0.1
    assert loss(name, nodes_U) < TARGET
    assert attacked(name, nodes_U) < 0.3


@pytest.mark.parametrize("name", planted.NAMES)
def test_no_planted_node_can_be_left_out_and_a_random_set_does_not_do_the_task(name):
    nodes_U = chosen(name, planted.make(name).nodes)
    order = np.flatnonzero(nodes_U)
    spans = [[i, i + 1] for i in range(order.size)]
    pairs = planted.make(name).pairs(32, 3)
    without = subject(name).scorer.without(pairs, nodes_U, None, order, spans).loss
    assert without.min() > TARGET
    rng = np.random.default_rng(0)
    random_U = np.zeros_like(nodes_U)
    random_U[rng.choice(np.flatnonzero(~nodes_U), order.size, replace=False)] = True
    assert loss(name, random_U) > 0.6


def test_a_second_path_does_the_task_without_the_first():
    made = planted.make("redundant")
    assert loss("redundant", chosen("redundant", made.second)) < TARGET
    only_first = chosen("redundant", made.nodes - made.second)
    assert loss("redundant", ~only_first) < TARGET
    assert loss("redundant", ~chosen("redundant", made.nodes | made.second)) > 0.6


@pytest.mark.parametrize("name", WITH_DECOY)
def test_mean_ablation_accepts_a_decoy_and_an_adversary_refuses_it(name):
    decoy_U = chosen(name, planted.make(name).decoy)
    assert loss(name, decoy_U) < TARGET
    assert attacked(name, decoy_U) > 0.6
    # And the model does not use it: it does the task as well without what is the decoy's alone.
    own_U = decoy_U & ~chosen(name, planted.make(name).nodes)
    assert loss(name, ~own_U) < TARGET
