"""Schedules, the gradient's scale and statistics of sparse training follow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsparse.config import OptimizerConfig, SparsityConfig
from wsparse.sparsity import (
    alive_neurons,
    density_schedule,
    exploration_steps,
    gradient_rms,
    kurtosis,
    learning_rate_schedule,
    scale_by_gradient_rms,
)

# Schedules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("anneal", ["linear", "exponential"])
@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [(0.0, 0.5, 100), (0.1, 0.8, 50), (0.25, 1.0, 37), (0.0, 0.5, 1), (0.0, 0.5, 82), (0.0, 1.0, 41)],
)
def test_density_follows_numpy_and_its_ends_are_exact(anneal, start, end, steps):
    target = 1 / 48
    config = SparsityConfig(density=target, anneal_start=start, anneal_end=end, anneal=anneal)
    got = np.asarray(jax.jit(jax.vmap(density_schedule(config, steps)))(jnp.arange(steps)))
    stop = max(end * steps, 1)
    progress = np.clip((np.arange(steps) + 1 - start * steps) / (stop - start * steps), 0, 1)
    want = 1 + (target - 1) * progress if anneal == "linear" else target**progress
    np.testing.assert_allclose(got, want, rtol=1e-5)
    after = np.arange(steps) + 1  # updates done once step i is over
    assert (got[after <= start * steps] == 1).all()
    assert (got[after >= stop] == np.float32(target)).all()
    assert (after >= stop).any()
    assert (got[after < stop] > np.float32(target)).all()
    assert (np.diff(got) <= 0).all()


def test_the_two_anneals_differ():
    schedules = [density_schedule(SparsityConfig(anneal=a), 100) for a in ("linear", "exponential")]
    assert abs(float(schedules[0](20)) - float(schedules[1](20))) > 0.1


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 100), (0.01, 50), (0.0, 20)])
def test_the_learning_rate_warms_up_decays_to_zero_and_follows_the_density(warmup, steps):
    density = density_schedule(SparsityConfig(density=1 / 64), steps)
    rates = {}
    for sharkfin in (False, True):
        config = OptimizerConfig(learning_rate=3e-3, warmup=warmup, sharkfin=sharkfin)
        schedule = learning_rate_schedule(config, steps, density=density)
        rates[sharkfin] = np.asarray(jax.vmap(schedule)(jnp.arange(steps + 1)), np.float64)
    plain = rates[False]
    first = max(round(warmup * steps), 1)
    np.testing.assert_allclose(plain[:first], 3e-3 * (np.arange(first) + 1) / first, rtol=1e-6)
    np.testing.assert_allclose(
        plain[first:], 3e-3 * (steps - np.arange(first, steps + 1)) / (steps - first), rtol=1e-5, atol=1e-12
    )
    assert plain[0] > 0
    assert plain[steps] == 0
    assert rates[True][steps] == 0
    factor = 1 / np.sqrt([float(density(i)) for i in range(steps + 1)])
    np.testing.assert_allclose(rates[True], plain * factor, rtol=1e-5)
    np.testing.assert_allclose(factor[-1], 8)


# Exploration steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 8, 30])
@pytest.mark.parametrize("settings", [
    {"density": 1 / 16, "anneal_end": 0.4},
    {"density": 1 / 1000, "anneal": "exponential", "anneal_start": 0.25, "anneal_end": 0.75},
    {"density": 1 / 64, "anneal_end": 1.0, "overrides": "embed/tokens=1/512"},
])  # fmt: skip
def test_steps_explore_at_high_densities_and_when_due_or_a_density_falls_fast_or_is_reached(every, settings):
    steps, config = 317, SparsityConfig(explore_every=every, **settings)
    explores = exploration_steps(config, steps)
    schedules = [density_schedule(config, steps, target) for target in (None, *dict(config.targets).values())]
    densities = np.stack([np.asarray(jax.vmap(schedule)(jnp.arange(steps))) for schedule in schedules])
    assert explores[0]
    (numbers,) = np.nonzero(explores)
    for last, following in zip(numbers, [*numbers[1:], steps], strict=True):
        assert following - last <= every
        # Between two of them little falls, at low densities, and what is reached is reached in one of them.
        frozen = densities[:, last + 1 : following]
        assert (frozen >= 0.95 * densities[:, [last]]).all()
        assert (frozen[0] <= 1 / 16).all()
        assert ((frozen > densities[:, [-1]]) | (densities[:, [last]] == densities[:, [-1]])).all()
    if settings["anneal_end"] < 1:
        after = numbers[numbers > settings["anneal_end"] * steps]
        assert (np.diff(after) == every).all()
        assert explores.mean() < 0.9
    else:
        assert explores[-1]


def test_every_step_explores_without_phases_or_sparsity():
    assert exploration_steps(SparsityConfig(explore_every=1), 50).all()
    assert exploration_steps(SparsityConfig(explore_every=8, density=1.0), 50).all()
    assert not exploration_steps(SparsityConfig(explore_every=8), 50).all()


# Gradient scale ------------------------------------------------------------------------------------


def random_gradients(scale: float):
    random = np.random.default_rng(0)
    return {"a": random.normal(size=(5, 7)) * scale, "b": {"c": random.normal(size=3) * 10 * scale}}


def as_float32(gradients):
    return jax.tree.map(np.float32, gradients)


@pytest.mark.parametrize("form", ["normalize", "clip"])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 50.0])
def test_gradient_scaling_follows_numpy(form, scale):
    gradients = random_gradients(scale)
    flat = np.concatenate([g.ravel() for g in jax.tree.leaves(gradients)])
    rms = np.sqrt(np.mean(flat**2))
    transform = scale_by_gradient_rms(form)
    got, _ = transform.update(as_float32(gradients), transform.init(gradients))
    factor = 1 / rms if form == "normalize" else min(1.0, 1 / rms)
    jax.tree.map(lambda g, want: np.testing.assert_allclose(g, want * factor, rtol=1e-5), got, gradients)
    np.testing.assert_allclose(gradient_rms(as_float32(gradients)), rms, rtol=1e-6)
    if form == "clip" and rms < 1:
        jax.tree.map(np.testing.assert_array_equal, got, as_float32(gradients))
    else:
        np.testing.assert_allclose(gradient_rms(got), 1, rtol=1e-5)


@pytest.mark.parametrize("form", ["normalize", "clip"])
def test_a_zero_gradient_stays_zero(form):
    transform = scale_by_gradient_rms(form)
    got, _ = transform.update({"a": jnp.zeros((3, 4))}, optax.EmptyState())
    np.testing.assert_array_equal(got["a"], np.zeros((3, 4)))


def test_a_gradient_whose_squares_underflow_is_not_blown_up():
    gradients = {"a": jnp.full((3, 4), 1e-20, jnp.float32)}
    got, _ = scale_by_gradient_rms("normalize").update(gradients, optax.EmptyState())
    assert (got["a"] > gradients["a"]).all() and (got["a"] < 1).all()


def test_bfloat16_gradients_are_measured_in_float32_and_keep_their_dtype():
    gradients = {"a": jnp.full((64, 64), 3.0, jnp.bfloat16)}
    assert gradient_rms(gradients).dtype == jnp.float32
    np.testing.assert_allclose(gradient_rms(gradients), 3, rtol=1e-6)
    got, _ = scale_by_gradient_rms("normalize").update(gradients, optax.EmptyState())
    assert got["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got["a"], np.float32), 1, rtol=1e-2)


def test_a_model_of_more_parameters_than_an_int32_has_a_step():
    leaves = [jax.ShapeDtypeStruct((48, 8192, 8192), jnp.float32)]
    assert jax.eval_shape(gradient_rms, leaves).dtype == jnp.float32


# Statistics ----------------------------------------------------------------------------------------


def test_kurtosis_follows_numpy():
    x = np.random.default_rng(0).standard_t(5, size=(4, 3, 50)) + 7
    centered = x - x.mean(-1, keepdims=True)
    want = ((centered**4).mean(-1) / (centered**2).mean(-1) ** 2).mean()
    np.testing.assert_allclose(kurtosis(jnp.float32(x)), want, rtol=1e-4)


def test_kurtosis_of_known_rows():
    one_hot = np.eye(1, 100, dtype=np.float32)
    np.testing.assert_allclose(kurtosis(jnp.array([[1.0, -1.0, 1.0, -1.0]])), 1, rtol=1e-5)
    np.testing.assert_allclose(kurtosis(jnp.array(one_hot)), (1 - 3 * 0.01 * 0.99) / (0.01 * 0.99), rtol=1e-4)
    assert float(kurtosis(jnp.full((2, 5), 3.0))) == 0  # constant rows stay finite
    gaussian = np.random.default_rng(0).normal(size=(1, 100_000)).astype(np.float32)
    np.testing.assert_allclose(kurtosis(jnp.array(gaussian)), 3, atol=0.1)


def test_kurtosis_does_not_depend_on_the_scale():
    x = np.random.default_rng(1).normal(size=(2, 64)).astype(np.float32)
    np.testing.assert_allclose(kurtosis(jnp.array(x * 1e-4)), kurtosis(jnp.array(x)), rtol=1e-3)


def test_alive_neurons_need_a_way_in_a_way_out_and_to_fire():
    fc, proj = np.zeros((2, 3, 4), np.float32), np.zeros((2, 4, 3), np.float32)
    fc[0, 1, [0, 1, 2]] = 1  # layer 0: neurons 0, 1, 2 have an in-weight
    proj[0, [1, 2, 3], 2] = -1  # and 1, 2, 3 an out-weight
    fc[1], proj[1] = 1, 1
    params = {"blocks": {"mlp": {"fc": {"kernel": fc}, "proj": {"kernel": proj}}}}
    assert alive_neurons(params).tolist() == [2, 4]
    fired = np.array([[True, True, False, True], [False, False, False, True]])
    assert alive_neurons(params, fired).tolist() == [1, 1]
