"""Support phases: between exploration steps the support rests, and its weights are trained by Adam."""

import signal

from conftest import collect_compilations
from helpers import assert_bitwise
import jax
import numpy as np
import optax
import pytest
import train_case as case

from wsparse import sharding, sparsity, train, trees
from wsparse.config import MeshConfig
from wsparse.sparsity import project_top_k, resting_moments, scale_by_gradient_rms, support_phases

finished, one_device, source = case.finished, case.one_device, case.source

B1, B2, EPS, RATE, DECAY = 0.9, 0.95, 0.1, 0.05, 0.1
DENSITY = 0.25


def chain(*, phases: bool) -> optax.GradientTransformationExtraArgs:
    return optax.chain(
        scale_by_gradient_rms("normalize", phases=phases),
        resting_moments(optax.scale_by_adam(b1=B1, b2=B2, eps=EPS)),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(RATE),
        project_top_k(DENSITY),
    )


def steps(optimizer, n: int):
    """Yields `(gradients, params)` of every step, the parameters after it."""
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(12, 10)).astype(np.float32)}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    yield None, np.asarray(params["w"]), state
    for _ in range(n):
        gradients = {"w": random.normal(size=(12, 10)).astype(np.float32)}
        params, state = step(params, state, gradients)
        yield gradients["w"], np.asarray(params["w"]), state


def reference(gradients: list[np.ndarray], weights: np.ndarray, every: int) -> list[np.ndarray]:
    """The same in NumPy and float64, an entry at a time."""
    weights = weights.astype(np.float64)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    scale, after = 1.0, []
    for count, gradient in enumerate(gradients):
        explore, before = count % every == 0, weights.copy()
        if explore:
            scale = 1 / np.sqrt(np.mean(np.square(gradient.astype(np.float64))))
        for place in np.ndindex(weights.shape):
            if not explore and weights[place] == 0:
                continue
            g = gradient[place] * scale
            first[place] = B1 * first[place] + (1 - B1) * g
            second[place] = B2 * second[place] + (1 - B2) * g * g
            mean = first[place] / (1 - B1 ** (count + 1))
            variance = second[place] / (1 - B2 ** (count + 1))
            weights[place] -= RATE * (mean / (np.sqrt(variance) + EPS) + DECAY * weights[place])
        if explore:
            k = round(DENSITY * weights.size)
            threshold = np.sort(np.abs(weights), axis=None)[-k]
            weights[np.abs(weights) < threshold] = 0
            if every > 1:
                entered = (before == 0) & (weights != 0)
                first[entered], second[entered] = 0, 0
        after.append(weights.copy())
    return after


@pytest.mark.parametrize("every", [1, 3, 4])
def test_weights_are_those_of_adam_on_the_support_with_moments_that_rest(every):
    optimizer = support_phases(chain(phases=True), every)
    (_, start, _), *rest = list(steps(optimizer, 9))
    expected = reference([gradient for gradient, *_ in rest], start, every)
    for (_, weights, _), want in zip(rest, expected, strict=True):
        np.testing.assert_array_equal(weights != 0, want != 0)
        np.testing.assert_allclose(weights, want, rtol=2e-5, atol=1e-6)


def test_phases_of_another_length_give_other_weights():
    """The comparison above can tell them apart."""
    optimizer = support_phases(chain(phases=True), 3)
    (_, start, _), *rest = list(steps(optimizer, 9))
    expected = reference([gradient for gradient, *_ in rest], start, 4)
    assert np.abs(rest[-1][1] - expected[-1]).max() > 1e-2


def test_with_an_exploration_in_every_step_nothing_changes_bitwise():
    plain = list(steps(chain(phases=False), 5))
    phased = list(steps(support_phases(chain(phases=True), 1), 5))
    for (_, a, _), (_, b, _) in zip(plain, phased, strict=True):
        np.testing.assert_array_equal(a, b)


def test_between_explorations_counts_are_exact_and_absent_entries_rest():
    every = 4
    before = None
    for number, (_, weights, state) in enumerate(steps(support_phases(chain(phases=True), every), 13)):
        if number == 0:
            continue
        assert int(sparsity.find_state(state).nonzeros["w"][0]) == np.count_nonzero(weights) == 30
        adam = next(part for part in state.inner if hasattr(part, "mu"))
        if before is not None and (number - 1) % every != 0:
            was, moments = before
            np.testing.assert_array_equal(weights != 0, was != 0)
            absent = was == 0
            np.testing.assert_array_equal(np.asarray(adam.mu["w"])[absent], moments[absent])
            assert np.all(weights[~absent] != was[~absent])
        before = weights, np.asarray(adam.mu["w"])


def test_a_run_in_phases_is_exact_compiles_once_and_resumes_bitwise(source, tmp_path, one_device):
    config = case.make_config(
        source, sparsity={"density": 0.25, "anneal_end": 0.5, "explore_every": 3}, checkpoint_every=7
    )
    with collect_compilations() as compiled:
        assert train.run(config, tmp_path / "whole") == 0
    assert sum("train_step" in name for name in compiled) <= 1
    for number in (8, 12):
        with pytest.MonkeyPatch.context() as monkeypatch:
            case.stop_at(monkeypatch, number, signal.SIGINT)
            assert train.run(config, tmp_path / "parts") == 128 + signal.SIGINT
    assert train.run(config, tmp_path / "parts") == 0
    (_, found), (_, want) = (case.final_state(tmp_path / name) for name in ("parts", "whole"))
    assert_bitwise(found, want)
    reported = sparsity.find_state(want.optimizer).nonzeros
    counts = sparsity.l0(want.params, sparsity.MODEL_RULES)
    assert sum(map(np.sum, reported.values())) == sum(nonzeros for nonzeros, _ in counts.values())
    for path, (nonzeros, size) in counts.items():
        if path.endswith("kernel"):
            assert nonzeros == round(0.25 * size), path


def test_phases_on_a_sharded_mesh_keep_the_counts_and_follow_one_device(source):
    config = case.make_config(source, sparsity={"density": 0.25, "anneal_end": 0.1, "explore_every": 3})
    windows = np.random.default_rng(0).integers(0, 300, (7, 1, 8, 17))
    states = []
    for shape, devices in ((MeshConfig(), jax.devices()[:1]), (MeshConfig(fsdp=2, tensor=2), None)):
        program = case.train_make_program(config, sharding.make_mesh(shape, devices))
        state = program.init()
        for window in windows:
            state, _ = program.step(state, sharding.put_batch(window, program.mesh))
        states.append(jax.device_get(state))
    one, sharded = (trees.flatten(state.params) for state in states)
    counts = [sparsity.find_state(state.optimizer).nonzeros for state in states]
    jax.tree.map(np.testing.assert_array_equal, *counts)
    for path, leaf in one.items():
        np.testing.assert_allclose(sharded[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)
