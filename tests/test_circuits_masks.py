"""Masks, and learning them by one pure function, one trial or many."""

import functools

import circuits_case as case
from circuits_case import PLANTED, planted_pairs, planted_params, windows
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse.circuits import HParams, masks, procedure, prune
from wsparse.circuits.search import Pruner


@pytest.fixture
def subject():
    return case.subject()


def test_flatten_and_unflatten_are_inverse_and_agree_with_the_names():
    size = masks.n_nodes(PLANTED)
    vector = np.arange(size)
    mask = masks.unflatten(vector, PLANTED)
    np.testing.assert_array_equal(np.asarray(masks.flatten(mask)), vector)
    names = masks.names(PLANTED)
    assert len(names) == size == 2 * (16 + 8 * 3 + 16 + 16 + 24 + 16)
    layer, location, channel = 1, "mlp.post_act", 8
    assert names[mask[location][layer, channel]] == f"{layer}.{location}.{channel}"
    np.testing.assert_array_equal(np.flatnonzero(masks.from_names([names[3], names[40]], PLANTED)), [3, 40])


def test_the_gate_is_a_step_with_the_derivative_of_a_sigmoid():
    tau = jnp.array([-0.5, -1e-9, 0.0, 1e-9, 0.7])
    np.testing.assert_array_equal(masks.heaviside(tau, 0.5), [0, 0, 0, 1, 1])
    slope = jax.vmap(jax.grad(masks.heaviside), (0, None))(tau, 0.5)
    s = 1 / (1 + np.exp(-np.asarray(tau, np.float64) / 0.5))
    np.testing.assert_allclose(slope, s * (1 - s) / 0.5, rtol=1e-6)


def test_tied_gates_give_queries_and_keys_one_tau():
    learned = prune(
        planted_params(),
        PLANTED,
        planted_pairs(8, 0),
        procedure.Subject(planted_params(), PLANTED, windows()).node_means,
        HParams(),
        jax.random.key(0),
        steps=3,
        pairs_per_step=4,
    )
    np.testing.assert_array_equal(learned.tau["attn.q"], learned.tau["attn.k"])
    assert not np.array_equal(learned.tau["attn.q"], learned.tau["attn.v"])


def test_vmapped_trials_and_trials_over_devices_equal_a_single_run(subject):
    assert jax.device_count() == 8
    pairs = planted_pairs(8, 0)
    tried = [HParams(k_coef=k, learning_rate=2e-2) for k in (1e-4, 1e-3, 2e-3, 4e-2)]
    settings = {"steps": 5, "pairs_per_step": 4}
    spread = Pruner(PLANTED, procedure.Settings(**settings), parallel=4)
    assert spread.devices == 4
    together = spread(subject.params, pairs, subject.node_means, tried, range(4))
    one = functools.partial(prune, config=PLANTED, **settings)
    for i in (0, 3):
        alone = jax.jit(one)(
            subject.params,
            task_batch=pairs,
            means=subject.node_means,
            hparams=tried[i],
            key=jax.random.key(i),
        )
        np.testing.assert_allclose(masks.flatten(alone.tau), together[i], atol=2e-4)
    assert not np.allclose(together[0], together[3], atol=2e-2)


def test_one_compilation_serves_all_trials_tasks_and_models(subject, compilations):
    pruner = Pruner(PLANTED, procedure.Settings(steps=5, pairs_per_step=4), parallel=2)
    other = subject.reinitialized(3)
    arguments = [
        (subject, planted_pairs(8, 0), [HParams()] * 2),
        (subject, planted_pairs(8, 1), [HParams(k_coef=1e-2)] * 2),
        (other, planted_pairs(8, 2), [HParams(learning_rate=0.1)]),
    ]
    pruner(subject.params, arguments[0][1], subject.node_means, [HParams()] * 2, [0, 1])
    with compilations() as counted:
        for where, task, hparams in arguments:
            seeds = range(len(hparams))
            pruner(where.params, task, where.node_means, hparams, seeds)
    assert "trials" not in str(counted)


def test_a_larger_penalty_leaves_fewer_gates_open(subject):
    pairs = planted_pairs(16, 0)
    pruner = Pruner(PLANTED, procedure.Settings(steps=60, pairs_per_step=8), parallel=2)
    tau = pruner(
        subject.params,
        pairs,
        subject.node_means,
        [HParams(k_coef=1e-5, learning_rate=1e-2), HParams(k_coef=1e-2, learning_rate=1e-2)],
        [0, 0],
    )
    n_open = (tau > 0).sum(1)
    assert n_open[1] < n_open[0] / 2
