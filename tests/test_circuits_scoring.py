"""Scores and sizes of masks, cuts and calibration, against plain computations."""

import dataclasses
import functools

import circuits_case as case
from circuits_case import PLANTED, PLANTED_NODES, planted_pairs, planted_params, windows
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import model, taps, trees
from wsparse.circuits import discretize, graph, masks, measurements, procedure, scoring
from wsparse.circuits.circuit import Score


@pytest.fixture
def subject():
    return case.subject()


def masked_loss(subject, pairs, gates_U: np.ndarray) -> float:
    """Returns the task loss of the model's own forward pass with gates of its nodes, in float64."""
    gates, rows = masks.unflatten(jnp.asarray(gates_U, jnp.float32), PLANTED), np.arange(len(pairs.position))
    logits, _ = model.forward(subject.params, pairs.tokens, PLANTED, tap=taps.mask(gates, subject.means))
    last = np.asarray(logits, np.float64)[rows, pairs.position]
    margin = last[rows, pairs.answer] - last[rows, pairs.other]
    return float(np.mean(np.logaddexp(0, -margin)))


def test_spans_score_what_a_masked_forward_pass_gives(subject):
    pairs = planted_pairs(4, 3)
    rng = np.random.default_rng(0)
    size = masks.n_nodes(PLANTED)
    order = rng.permutation(size).astype(np.int32)
    all_nodes, spans = np.ones(size, bool), [[k, size] for k in (3, 50, size)]
    score = subject.scorer.without(pairs, all_nodes, None, np.argsort(order), spans)
    for k, loss in zip((3, 50, size), score.loss, strict=True):
        assert loss == pytest.approx(masked_loss(subject, pairs, order < k), rel=1e-5)
    assert len(set(score.loss.tolist())) == 3


def test_scoring_stops_after_the_first_span_that_reaches_the_loss_asked_for(subject):
    pairs = planted_pairs(4, 3)
    size = masks.n_nodes(PLANTED)
    order = np.random.default_rng(0).permutation(size).astype(np.int32)
    arguments = (pairs, np.ones(size, bool), None, np.argsort(order))
    # More than one call holds, and the span that ends it in the second.
    spans = [[k, size] for k in range(size - 40, size)]
    everything = subject.scorer.without(*arguments, spans).loss
    until = np.min(everything[:30])
    first = np.flatnonzero(everything <= until)[0]
    found = subject.scorer.without(*arguments, spans, until=until)
    np.testing.assert_array_equal(found.loss[: first + 1], everything[: first + 1])
    assert np.isnan(found.loss[first + 1 :]).all()
    assert found.loss.shape == found.accuracy.shape == (40,)


def test_cutting_all_edges_of_a_read_equals_closing_its_node(subject):
    pairs = planted_pairs(8, 3)
    everything = np.ones(masks.n_nodes(PLANTED), bool)
    closed = masks.unflatten(everything.copy(), PLANTED)
    closed["attn.act_in"][0, 5] = False
    closed["mlp.post_act"][1, 7] = False
    without_nodes = subject.scorer.mask(pairs, np.asarray(masks.flatten(closed)))
    edges = {path: weights.copy() for path, weights in subject.scorer.weights.items()}
    for path in ("q", "k", "v"):
        edges[f"blocks/attn/{path}/kernel"][0, 5] = False
    edges["blocks/mlp/proj/kernel"][1, 7] = False
    without_edges = subject.scorer.mask(pairs, everything, edges)
    assert without_edges.loss == pytest.approx(without_nodes.loss, abs=1e-5)
    assert abs(without_edges.loss - subject.scorer.mask(pairs, everything).loss) > 1e-3


def test_attributions_are_the_slope_of_the_loss_in_each_gate(subject):
    pairs = planted_pairs(8, 3)
    everything = np.ones(masks.n_nodes(PLANTED), bool)
    of_nodes, of_edges = subject.scorer.attributions(pairs, everything)
    names = masks.names(PLANTED)
    index = names.index("0.attn.act_in.5")

    def loss(gate):
        gates_U = jnp.ones(len(names)).at[index].set(gate)
        tap = taps.mask(masks.unflatten(gates_U, PLANTED), subject.means)
        logits, _ = model.forward(subject.params, pairs.tokens, PLANTED, tap=tap)
        last = np.asarray(logits, np.float64)[np.arange(16), pairs.position]
        return np.mean(np.logaddexp(0, last[np.arange(16), pairs.other] - last[np.arange(16), pairs.answer]))

    slope = (loss(1.01) - loss(0.99)) / 0.02
    assert of_nodes[index] == pytest.approx(-slope, rel=0.02)
    # All that leaves this node leaves through its edges.
    leaving = sum(of_edges[f"blocks/attn/{p}/kernel"][0, 5].sum() for p in "qkv")
    assert leaving == pytest.approx(of_nodes[index], rel=1e-3)


def test_edge_counts_equal_a_brute_force_count():
    rng = np.random.default_rng(1)
    params = planted_params()
    weights = graph.nonzero(params)
    kept = rng.random(masks.n_nodes(PLANTED)) < 0.4
    chosen = {name for name, k in zip(masks.names(PLANTED), kept, strict=True) if k}
    flat = trees.flatten(params)
    expected = 0
    for source, target, path in (
        ("attn.act_in", "attn.q", "blocks/attn/q/kernel"),
        ("attn.act_in", "attn.k", "blocks/attn/k/kernel"),
        ("attn.act_in", "attn.v", "blocks/attn/v/kernel"),
        ("attn.v", "attn.resid_delta", "blocks/attn/out/kernel"),
        ("mlp.act_in", "mlp.post_act", "blocks/mlp/fc/kernel"),
        ("mlp.post_act", "mlp.resid_delta", "blocks/mlp/proj/kernel"),
    ):
        for layer, i, o in np.argwhere(np.asarray(flat[path]) != 0):
            expected += f"{layer}.{source}.{i}" in chosen and f"{layer}.{target}.{o}" in chosen
    edges = graph.between(kept, weights, PLANTED)
    assert graph.count(edges) == expected > 10
    assert graph.degrees(edges, PLANTED).sum() == 2 * expected


def test_models_without_biases_can_lose_edges():
    config = dataclasses.replace(PLANTED, bias=False)
    params = model.init(config, jax.random.key(0))
    one = procedure.Subject(params, config, windows())
    pairs = planted_pairs(4, 0)
    everything = np.ones(masks.n_nodes(config), bool)
    logits, _ = model.forward(params, pairs.tokens, config)
    last = np.asarray(logits)[np.arange(8), pairs.position]
    margins = last[np.arange(8), pairs.answer] - last[np.arange(8), pairs.other]
    np.testing.assert_allclose(one.scorer.margins(pairs, everything), margins, atol=1e-6)
    nothing = {path: np.zeros_like(weights) for path, weights in one.scorer.weights.items()}
    assert np.isfinite(one.scorer.mask(pairs, everything, nothing).loss)


class FakeScorer:
    """Losses given by a table over the number of nodes, each of which is worth as much as its index says."""

    def __init__(self, losses):
        self.losses = losses
        self.config = PLANTED
        self.weights = {c.kernel: np.zeros((2, 1, 1), bool) for c in graph.CONNECTIONS}

    def without(self, pairs, nodes_U, edges, order, spans, *, until=-np.inf):
        loss = np.array([self.losses(nodes_U.sum() - (hi - lo)) for lo, hi in spans])
        after = np.cumsum(loss <= until) > (loss <= until)
        return scoring.MaskScores(*[np.where(after, np.nan, loss)] * 2)

    def mask(self, pairs, nodes_U, edges=None):
        return Score(self.losses(nodes_U.sum()), 1.0)

    def openings(self, pairs, nodes_U, others_U):
        return -np.arange(nodes_U.size, dtype=float)


@pytest.mark.parametrize("smallest", [1, 2, 17, 90, 224])
def test_discretize_finds_the_smallest_size_of_a_falling_loss(smallest, monkeypatch):
    monkeypatch.setattr(discretize, "subgraph_of", lambda scorer, kept, loss: (kept, loss))
    size = masks.n_nodes(PLANTED)
    scorer = FakeScorer(lambda k: 0.1 if k >= smallest else 0.6)
    tau = np.linspace(1, -1, size)
    (kept, loss), least = discretize.discretize(scorer, None, tau, 0.15)
    assert kept.sum() == smallest
    # Open nodes in the order of tau, then closed ones in that of the estimates.
    n_open = size // 2
    assert kept[: min(smallest, n_open)].all()
    assert kept[size - max(smallest - n_open, 0) :].all()
    assert (loss, least) == (0.1, 0.1)


def test_discretize_accepts_a_size_below_a_bump_and_never_one_that_misses(monkeypatch):
    monkeypatch.setattr(discretize, "subgraph_of", lambda scorer, kept, loss: (kept, loss))
    size = masks.n_nodes(PLANTED)

    def bumpy(k):
        return 0.6 if k < 20 or 60 < k < 120 else 0.1

    (kept, loss), _ = discretize.discretize(FakeScorer(bumpy), None, np.linspace(1, -1, size), 0.15)
    assert kept.sum() == 20
    assert loss <= 0.15
    cut = discretize.discretize(FakeScorer(lambda k: 0.5), None, np.ones(size), 0.15)
    assert cut.subgraph is None
    assert cut.least_loss == 0.5


def test_what_is_forbidden_is_not_added_to_open_nodes(monkeypatch):
    monkeypatch.setattr(discretize, "subgraph_of", lambda scorer, kept, loss: (kept, loss))
    size = masks.n_nodes(PLANTED)
    tau = np.where(np.arange(size) < 4, 1.0, -1.0)
    forbidden = np.arange(size) >= 30

    def found(smallest):
        scorer = FakeScorer(lambda k: 0.1 if k >= smallest else 0.6)
        return discretize.discretize(scorer, None, tau, 0.15, forbidden_U=forbidden).subgraph

    kept, _ = found(smallest=20)
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2, 3, *range(14, 30)])
    assert found(smallest=30)[0].sum() == 30
    # What needs them is no circuit.
    assert found(smallest=31) is None


def test_with_no_open_node_a_circuit_is_grown_from_none(monkeypatch):
    monkeypatch.setattr(discretize, "subgraph_of", lambda scorer, kept, loss: (kept, loss))
    scorer = FakeScorer(lambda k: 0.1 if k >= 5 else 0.6)
    kept, _ = discretize.discretize(scorer, None, -np.ones(masks.n_nodes(PLANTED)), 0.15).subgraph
    assert kept.sum() == 5


def test_openings_are_the_slopes_along_the_path_from_the_circuit_to_the_model(subject):
    pairs, names = planted_pairs(16, 3), masks.names(PLANTED)
    nodes = np.array([name in PLANTED_NODES for name in names])
    missing = np.flatnonzero(nodes)[[0, -1]]
    nodes[missing] = False
    estimates = subject.scorer.openings(pairs, nodes, np.ones(nodes.size, bool))
    assert not np.any(estimates[nodes])

    loss, step = functools.partial(masked_loss, subject, pairs), 1e-2
    for node in missing:
        aside = step * (np.arange(nodes.size) == node)
        path = [nodes + share * ~nodes for share in (0.125, 0.375, 0.625, 0.875)]
        slopes = [(loss(gates + aside) - loss(gates - aside)) / (2 * step) for gates in path]
        assert estimates[node] == pytest.approx(np.mean(slopes), rel=0.02)
    # The nodes that are missing are those that are found, though nothing reads the first without the last.
    assert set(np.argsort(estimates)[:2]) == set(missing)
    # Nodes that may not be opened stay closed.
    np.testing.assert_array_equal(subject.scorer.openings(pairs, nodes, nodes), np.zeros(nodes.size))


def test_calibration_finds_the_scale_and_shift_of_a_fine_grid_search():
    rng = np.random.default_rng(0)
    margins = rng.normal(0.4, 1.0, 400).astype(np.float32)
    margins[::2] += 0.7
    fit = measurements.calibrate(margins)
    sides = np.where(np.arange(400) % 2 == 0, 1, -1)
    scales, shifts = np.meshgrid(np.linspace(0.01, 3, 300), np.linspace(-2, 2, 401))
    losses = np.logaddexp(0, -(scales[..., None] * margins + shifts[..., None] * sides)).mean(-1)
    losses += 0.01 * (np.log(scales) ** 2 + shifts**2)
    fitted = measurements.calibrated_loss(margins, **fit)
    fitted += 0.01 * (np.log(fit["scale"]) ** 2 + fit["shift"] ** 2)
    assert fitted <= losses.min() + 1e-4
    at = np.unravel_index(losses.argmin(), losses.shape)
    assert fit["scale"] == pytest.approx(scales[at], abs=0.02)
    assert fit["shift"] == pytest.approx(shifts[at], abs=0.02)


def test_calibration_of_separable_pairs_stays_near_one_and_holds_on_other_pairs():
    rng = np.random.default_rng(0)
    fit = measurements.calibrate(rng.normal(3.0, 0.5, 96).astype(np.float32))
    # A scale of 18 and a shift of -5 came of this without the penalty.
    assert 1 < fit["scale"] < 4
    assert abs(fit["shift"]) < 0.5
    others = rng.normal(1.5, 1.5, 400).astype(np.float32)
    raw = measurements.calibrated_loss(others, scale=1.0, shift=0.0)
    assert measurements.calibrated_loss(others, **fit) < 1.5 * raw
    assert measurements.calibrated_loss(others, scale=18.4, shift=-4.75) > 3 * raw
