"""Ablation in every strength: what closed nodes, cut edges and norms are while a circuit runs."""

import dataclasses
import functools
import itertools

import circuits_case as case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import model, taps
from wsparse.circuits import ablation, adversary, graph, masks
from wsparse.circuits.ablation import CONTENDERS, NORMS, Ablation, Background
from wsparse.circuits.pairs import margins
from wsparse.circuits.subject import Subject
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.nodes import NODES

CONFIG = dataclasses.replace(case.PLANTED, sink=True, abs_top_k_fraction=0.5)
NODES_U = np.random.default_rng(4).random(masks.n_nodes(CONFIG)) < 0.6


@pytest.fixture(scope="module")
def scorer():
    """A model in which everything matters a little."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
        model.init(CONFIG, jax.random.key(0)),
    )
    return Subject(params, CONFIG, case.windows()).scorer


@pytest.fixture(scope="module")
def pairs():
    return case.pairs().report


def background(scorer, pairs, kind=Ablation()):  # noqa: B008
    return ablation.make_background(
        kind, scorer.params, scorer.config, scorer.means, pairs, windows_WT=case.windows(),
        nodes_U=NODES_U, edges=scorer.weights, fit=case.pairs().discretize,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "contenders"))
def run_circuit(params, pairs, nodes_U, edges, given, strengths, *, config, contenders="all"):
    return ablation.circuit_logits(
        params, config, pairs, nodes_U, edges, given, contenders=contenders, strengths=strengths
    )


def logits(scorer, pairs, nodes_U=NODES_U, edges=None, kind=Ablation(), strengths=0.0):  # noqa: B008
    given = background(scorer, pairs, kind)
    nodes_U = nodes_U.astype(np.float32)
    return np.asarray(
        run_circuit(scorer.params, pairs, nodes_U, edges, given, strengths, config=scorer.config)
    )


def whole(scorer, pairs):
    logits_BPV, _ = model.forward(
        scorer.params, pairs.tokens, scorer.config, positions_BP=pairs.position[:, None]
    )
    return np.asarray(logits_BPV[:, 0])


def test_strength_0_is_mean_ablation_and_strength_1_the_whole_model(scorer, pairs):
    loss = scorer.mask(pairs, NODES_U).loss
    margin_B = np.asarray(margins(jnp.asarray(logits(scorer, pairs)), pairs.answer, pairs.other))
    assert np.logaddexp(0, -margin_B).mean() == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(logits(scorer, pairs, strengths=1.0), whole(scorer, pairs), atol=1e-5)
    assert np.abs(logits(scorer, pairs) - whole(scorer, pairs)).max() > 0.01


def test_strengths_of_every_row_equal_a_run_for_each_row(scorer, pairs):
    n_rows = len(pairs.position)
    strengths_BU = np.random.default_rng(0).random((n_rows, NODES_U.size), np.float32)
    together = logits(scorer, pairs, strengths=strengths_BU)
    for row in range(0, n_rows, 7):
        alone = logits(scorer, pairs, strengths=strengths_BU[row])
        np.testing.assert_allclose(together[row], alone[row], atol=1e-5)
    assert np.abs(together - logits(scorer, pairs, strengths=strengths_BU[0])).max() > 1e-3


def test_a_strength_moves_a_closed_node_between_its_constant_and_its_value(scorer, pairs):
    strengths_U = np.random.default_rng(1).random(NODES_U.size).astype(np.float32)
    recorded = {}

    def run(strengths):
        shares = NODES_U + (1 - NODES_U) * strengths

        tap = taps.NodeAblation(
            masks.unflatten(jnp.asarray(shares, jnp.float32), scorer.config), scorer.means
        )
        return model.forward(scorer.params, pairs.tokens, scorer.config, tap=tap)[1]

    recorded = {r: run(np.full_like(strengths_U, r)) for r in (0.0, 1.0)}
    acts = run(strengths_U)
    # At the first location of the first layer nothing upstream differs.
    mean_N = np.asarray(scorer.means["attn.act_in"])[0]
    value = np.asarray(recorded[1.0]["attn.act_in"][0])
    share_N = masks.unflatten(NODES_U + (1 - NODES_U) * strengths_U, scorer.config)["attn.act_in"][0]
    want = share_N * value + (1 - share_N) * mean_N
    np.testing.assert_allclose(acts["attn.act_in"][0], want, atol=1e-5)


def test_resampled_and_partner_constants_are_the_values_of_those_prompts(scorer, pairs):
    _, acts = model.forward(scorer.params, pairs.tokens, scorer.config)
    partner = background(scorer, pairs, Ablation(constants="partner")).constants
    for name in NODES:
        swapped = np.asarray(acts[name]).reshape(acts[name].shape[0], -1, 2, *acts[name].shape[2:])
        want = swapped[:, :, ::-1].reshape(acts[name].shape)
        np.testing.assert_allclose(partner[name], want, atol=1e-5)
    resampled = background(scorer, pairs, Ablation(constants="resample")).constants
    rows = np.random.default_rng(0).integers(0, len(case.windows()), len(pairs.position))
    text = case.windows()[rows, : pairs.tokens.shape[1]]
    _, acts = model.forward(scorer.params, text, scorer.config)
    np.testing.assert_allclose(resampled["mlp.post_act"], acts["mlp.post_act"], atol=1e-5)


def test_with_everything_at_its_partners_values_the_answers_are_exchanged(pairs):
    scorer = case.subject().scorer
    nothing = np.zeros_like(NODES_U)
    got = logits(scorer, pairs, nothing, kind=Ablation(constants="partner"))
    want = whole(scorer, pairs).reshape(-1, 2, got.shape[1])[:, ::-1].reshape(got.shape)
    # Only the tokens' own embeddings, which are no nodes, are not exchanged.
    assert np.all((got[:, 3] > got[:, 4]) == (want[:, 3] > want[:, 4]))


def test_optimal_constants_are_no_worse_than_means_where_they_are_fitted(scorer):
    fit = case.pairs().discretize
    random_U = np.random.default_rng(2).random(NODES_U.size) < 0.3
    kind = Ablation(constants="optimal")
    learned = ablation.make_background(
        kind, scorer.params, scorer.config, scorer.means, fit, nodes_U=random_U, edges=scorer.weights, fit=fit
    )

    def loss(given):
        found = ablation.circuit_logits(
            scorer.params, scorer.config, fit, random_U.astype(np.float32), None, given
        )
        return float(np.logaddexp(0, -np.asarray(margins(found, fit.answer, fit.other))).mean())

    means = Background(scorer.means, scorer.means)
    assert loss(learned) < loss(means)


def test_frozen_norms_are_the_models_own_so_that_the_whole_model_is_unchanged(scorer, pairs):
    everything = np.ones_like(NODES_U)
    frozen = logits(scorer, pairs, everything, kind=Ablation(norm="frozen"))
    np.testing.assert_allclose(frozen, whole(scorer, pairs), atol=1e-5)
    ablated = [logits(scorer, pairs, kind=Ablation(norm=norm)) for norm in NORMS]
    assert np.abs(ablated[0] - ablated[1]).max() > 1e-3


def test_with_strict_edges_only_the_circuits_edges_carry_what_varies(scorer, pairs):
    edges = graph.between(NODES_U, scorer.weights, scorer.config)
    strict = logits(scorer, pairs, edges=edges)
    # A closed value may then be anything at all: what arrives of it is a constant.
    shifted = background(scorer, pairs)
    moved = {**shifted.constants, "attn.v": shifted.constants["attn.v"] + 5.0}
    given = shifted._replace(constants=moved)
    args = (scorer.params, scorer.config, pairs, NODES_U.astype(np.float32))
    np.testing.assert_allclose(ablation.circuit_logits(*args, edges, given), strict, atol=1e-5)
    loose = logits(scorer, pairs)
    assert np.abs(np.asarray(ablation.circuit_logits(*args, None, given)) - loose).max() > 1e-3


def test_every_kind_of_ablation_traces_under_vmap_over_masks_and_strengths(scorer, pairs):
    masks_MU = jnp.ones((2, NODES_U.size))
    n_rows, length = pairs.tokens.shape
    given = background(scorer, pairs, Ablation(norm="frozen"))
    by_place = {
        name: jnp.zeros((2, n_rows, length, width)) for name, (_, width) in masks.shapes(CONFIG).items()
    }
    for constants, scales, contenders in itertools.product(
        (given.constants, by_place), (None, given.scales), CONTENDERS
    ):
        kind = Background(given.means, constants, scales)

        def run(mask_U, strengths_U, kind=kind, contenders=contenders):
            return ablation.circuit_logits(
                scorer.params, scorer.config, pairs, mask_U, scorer.weights, kind,
                contenders=contenders, strengths=strengths_U,
            )  # fmt: skip

        together = jax.eval_shape(jax.vmap(run), masks_MU, masks_MU)
        assert together.shape == (2, n_rows, CONFIG.vocab_size)


def test_masks_and_strengths_in_one_call_equal_a_call_for_each(scorer, pairs):
    given = background(scorer, pairs, Ablation(constants="resample", norm="frozen"))
    rng = np.random.default_rng(3)
    masks_MU = (rng.random((2, NODES_U.size)) < 0.5).astype(np.float32)
    strengths_MU = rng.random((2, NODES_U.size), np.float32)

    def run(mask_U, strengths_U):
        return ablation.circuit_logits(
            scorer.params, scorer.config, pairs, mask_U, scorer.weights, given,
            contenders="kept", strengths=strengths_U,
        )  # fmt: skip

    found = jax.jit(jax.vmap(run))(masks_MU, strengths_MU)
    np.testing.assert_allclose(found[1], jax.jit(run)(masks_MU[1], strengths_MU[1]), atol=1e-4)


def test_an_adversary_ascends_and_leaves_the_circuits_nodes_alone(scorer, pairs):
    attack = adversary.ascend(Subnetwork(scorer, NODES_U, scorer.weights), pairs, steps=10)
    assert attack.worst[-1] >= attack.losses[0]
    assert attack.loss == pytest.approx(attack.worst[-1])
    assert not attack.strengths[NODES_U].any()
    assert attack.strengths.min() >= 0 and attack.strengths.max() <= 1
    assert attack.strengths[~NODES_U].std() > 0


def test_ascents_start_at_the_model_and_at_random_and_each_step_sees_the_next_part(
    scorer, pairs, monkeypatch
):
    n_pairs = len(pairs.position) // 2
    monkeypatch.setattr(adversary, "_PAIRS_PER_STEP", n_pairs // 3)
    found = Subnetwork(scorer, NODES_U, scorer.weights)
    attack = adversary.ascend(found, pairs, seed=5, steps=10, starts=3)
    given, nodes_U = background(scorer, pairs), NODES_U.astype(np.float32)

    @jax.jit
    def loss(strengths_U, rows):
        logits_BV = run_circuit(
            scorer.params, rows, nodes_U, scorer.weights, given, strengths_U, config=scorer.config
        )
        return jnp.mean(jax.nn.softplus(-margins(logits_BV, rows.answer, rows.other)))

    slope = jax.jit(jax.grad(loss))
    seen, rng = [], np.random.default_rng(5)
    _, corners_U, between_U = (rng.random(NODES_U.size, np.float32) for _ in range(3))
    for start_U in (np.ones_like(corners_U), corners_U > 0.5, between_U):
        strengths_U = jnp.float32(start_U)
        seen.append([(float(loss(strengths_U, pairs)), strengths_U)])
        for step in range(10):
            # Every third pair; those after the last whole three are in no part.
            members = np.arange(step % 3, n_pairs // 3 * 3, 3)
            rows = np.stack([2 * members, 2 * members + 1], axis=1).ravel()
            part = jax.tree.map(lambda array, rows=rows: array[rows], pairs)
            moved_U = strengths_U + adversary.STEP_SIZE * jnp.sign(slope(strengths_U, part))
            strengths_U = jnp.clip(moved_U, 0, 1)
            if step % 5 == 4:
                seen[-1].append((float(loss(strengths_U, pairs)), strengths_U))
    losses = np.array([[value for value, _ in ascent] for ascent in seen])
    np.testing.assert_allclose(attack.losses, losses.max(axis=0), rtol=1e-4)
    largest = max((each for ascent in seen for each in ascent), key=lambda each: each[0])
    np.testing.assert_allclose(attack.strengths, largest[1] * ~NODES_U, atol=1e-6)


def test_no_further_start_is_tried_once_one_has_refuted_a_circuit(scorer, pairs, monkeypatch):
    tried, ascend = [], adversary._ascend

    def counted(*arrays, **options):
        tried.append(arrays[-1])
        return ascend(*arrays, **options)

    monkeypatch.setattr(adversary, "_ascend", counted)
    found = Subnetwork(scorer, NODES_U, scorer.weights)
    least = adversary.ascend(found, pairs, steps=10, starts=3).loss
    assert len(tried) == 3
    adversary.ascend(found, pairs, steps=10, starts=3, until=least)
    assert len(tried) == 6
    adversary.ascend(found, pairs, steps=10, starts=3, until=-1.0)
    assert len(tried) == 7


def test_an_adversary_with_a_budget_ablates_no_more_nodes_and_finds_the_planted_one(pairs):
    scorer = case.subject().scorer
    empty = Subnetwork(scorer, np.zeros_like(NODES_U), scorer.weights)
    attack = adversary.ablate_few(empty, pairs, budget=1, steps=5)
    ablated = np.flatnonzero(attack.strengths == 0)
    names = masks.names(scorer.config)
    assert len(ablated) == 1 and names[ablated[0]] in case.PLANTED_NODES
    assert attack.loss > 0.6
