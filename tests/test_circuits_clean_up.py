"""The way of a clean-up leads to its result, and a circuit can be chosen on it by other pairs."""

import numpy as np
import planted
import pytest

from wsparse.circuits.clean_up import CleanUp, clean_up
from wsparse.circuits.criterion import Criterion
from wsparse.circuits.discretize import Subgraph, subgraph_of
from wsparse.circuits.subject import Subject

TARGET = 0.15


@pytest.fixture(scope="module")
def way() -> tuple[CleanUp, Subject]:
    made = planted.make("carried and neurons")
    subject = made.subject
    pairs = made.pairs(16, 1)
    every_U = np.ones(sum(mean.size for mean in subject.node_means.values()), bool)
    start = subgraph_of(subject.scorer, every_U, 0.0)
    return clean_up(Criterion(subject.scorer, pairs), pairs, start, TARGET, single_removals=32), subject


def test_every_stage_has_the_loss_that_it_says_and_fewer_edges_or_nodes(way):
    cleaned, subject = way
    pairs, sizes = planted.make("carried and neurons").pairs(16, 1), []
    for n in range(len(cleaned.stages) + 1):
        subgraph = cleaned.after(n)
        sizes.append(subgraph.n_nodes + subgraph.n_edges)
        if n:
            loss = subject.scorer.mask(pairs, subgraph.nodes, subgraph.remaining(subject.scorer)).loss
            assert loss == pytest.approx(subgraph.loss, abs=1e-5)
    assert len(sizes) > 2
    assert sizes == sorted(set(sizes), reverse=True)
    np.testing.assert_array_equal(cleaned.result.nodes, subgraph.nodes)
    assert cleaned.result.n_edges == subgraph.n_edges


def test_removals_are_taken_back_until_another_loss_is_within_its_bound(way):
    cleaned, _ = way

    def loss(subgraph: Subgraph) -> float:
        return 1 / (subgraph.n_nodes + subgraph.n_edges)

    last = len(cleaned.stages)
    assert cleaned.last_within(loss, loss(cleaned.result)).n_edges == cleaned.result.n_edges
    for n in range(last):
        chosen, wanted = cleaned.last_within(loss, loss(cleaned.after(n))), cleaned.after(n)
        assert (chosen.n_nodes, chosen.n_edges) == (wanted.n_nodes, wanted.n_edges)


def test_where_the_start_is_not_within_the_bound_the_result_is_kept(way):
    cleaned, _ = way
    assert cleaned.last_within(lambda subgraph: 1.0, 0.5).n_edges == cleaned.result.n_edges
