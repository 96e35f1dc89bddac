"""Parameters with a density of their own, floors of every height, and what is said of them."""

import signal

from helpers import assert_bitwise, assert_one_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_case as case

from wsparse import sharding, sparsity, step, train, trees
from wsparse.config import MeshConfig, ModelConfig, SparsityConfig, TrainConfig
from wsparse.errors import UserError
from wsparse.sparsity import alive_neurons, budget_warnings, project_top_k, turnover

one_device, source = case.one_device, case.source

# Densities that one compiled update goes through.
CASES = 25
RANDOM = np.random.default_rng(0)
EMBED, OTHERS = RANDOM.uniform(0.01, 1, CASES), RANDOM.uniform(0.01, 0.4, CASES)
SHAPES = {"embed/tokens": (9, 8), "blocks/mlp/fc/kernel": (2, 8, 16), "blocks/mlp/proj/kernel": (2, 16, 8)}


def random_params(seed: int):
    random = np.random.default_rng(seed)
    return trees.unflatten({path: random.normal(size=s).astype(np.float32) for path, s in SHAPES.items()})


def update(floor: int):
    """A jitted projection whose densities are those of a case."""
    optimizer = project_top_k(
        lambda count: jnp.float32(OTHERS)[count],
        overrides=[("embed/.*", lambda count: jnp.float32(EMBED)[count])],
        min_per_neuron=floor,
    )

    @jax.jit
    def projected(params, number):
        state = optimizer.init(params)._replace(count=number)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates)

    return projected


@pytest.mark.parametrize("floor", [0, 1, 2, 4])
def test_counts_are_those_of_each_parameters_density_or_of_the_floor(floor):
    projected, bound, dead = update(floor), 0, 0
    for number in range(CASES):
        params = random_params(number)
        after = trees.flatten(jax.device_get(projected(params, number)))
        k = round(np.float32(EMBED[number]) * 72)
        assert np.count_nonzero(after["embed/tokens"]) == k
        fc, proj = after["blocks/mlp/fc/kernel"], after["blocks/mlp/proj/kernel"]
        for layer in range(2):
            for counts in ((fc[layer] != 0).sum(0), (proj[layer] != 0).sum(1)):
                budget = round(np.float32(OTHERS[number]) * 128)
                assert counts.sum() == max(budget, floor * 16)
                assert counts.min() >= floor
                bound += counts.sum() > budget
        alive = [sum(i.any() and o.any() for i, o in zip(fc[n].T, proj[n], strict=True)) for n in range(2)]
        assert alive_neurons(trees.unflatten(after)).tolist() == alive
        dead += 32 - sum(alive)
    # Cases of both kinds were met: floors that bind, and neurons that die without one.
    assert (bound > 0) == (dead == 0) == (floor > 0)


def test_the_first_override_that_matches_decides():
    first, all_of_it = ("embed/tokens", 0.25), (r"embed/.*", 0.5)
    params = random_params(0)
    for overrides, k in (((first, all_of_it), 18), ((all_of_it, first), 36)):
        optimizer = project_top_k(0.125, overrides=overrides)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        assert np.count_nonzero(optax.apply_updates(params, updates)["embed"]["tokens"]) == k


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("embed/token", ["'embed/token'", "did you mean 'embed/tokens'?"]),
        ("blocks/mlp/*/kernel", ["blocks/mlp/fc/kernel"]),
        ("head/bigram", ["head/unembed"]),
    ],
)
def test_an_override_of_no_projected_parameter_is_refused_before_anything_compiles(pattern, words):
    config = TrainConfig(
        model=ModelConfig(n_layer=1, d_model=16, n_head=1),
        sparsity=SparsityConfig(overrides=f"{pattern}=0.5"),
    )
    with pytest.raises(UserError) as error:
        step.make_program(config, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert_one_line(error, "no projected parameter", *words)


def test_every_parameters_density_anneals_to_its_own_target():
    config = TrainConfig(
        sparsity=SparsityConfig(density=1 / 64, overrides="a=1/8,b=1", anneal_start=0.25, anneal_end=0.75),
        steps=100,
    )
    schedules = [
        sparsity.density_schedule(config.sparsity, 100, target) for _, target in config.sparsity.targets
    ]
    assert [float(schedule(49)) for schedule in schedules] == pytest.approx([1 - 7 / 16, 1])
    assert [float(schedule(74)) for schedule in schedules] == [1 / 8, 1]


@pytest.mark.parametrize("density", [1 / 16, 1 / 1000])
@pytest.mark.parametrize(("start", "end"), [(0.0, 0.4), (0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("anneal", ["linear", "exponential"])
def test_the_average_density_is_that_of_the_closed_form(anneal, start, end, density):
    """What docs/training.md says an anneal costs."""
    steps = 20_000
    config = SparsityConfig(density=density, anneal=anneal, anneal_start=start, anneal_end=end)
    found = np.mean(np.asarray(jax.vmap(sparsity.density_schedule(config, steps))(jnp.arange(steps))))
    middle = (1 + density) / 2 if anneal == "linear" else (1 - density) / np.log(1 / density)
    assert found == pytest.approx(start + (end - start) * middle + (1 - end) * density, rel=1e-3)


# In a run ----------------------------------------------------------------------------------------------


def test_a_run_with_overrides_is_exact_resumes_bitwise_and_refuses_others(source, tmp_path, one_device):
    settings = {"density": 0.125, "anneal_end": 0.5, "min_per_neuron": 1, "explore_every": 3}
    overrides = "embed/tokens=1/4,blocks/mlp/.*/kernel=0.5"
    config = case.make_config(source, sparsity={**settings, "overrides": overrides}, log_every=4)
    assert train.run(config, tmp_path / "whole") == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Between a step that explores and the record after it.
        case.stop_at(monkeypatch, 26, signal.SIGINT)
        assert train.run(config, tmp_path / "parts") == 128 + signal.SIGINT
    other = case.make_config(source, sparsity={**settings, "overrides": "embed/tokens=1/4"}, log_every=4)
    with pytest.raises(UserError) as error:
        train.run(other, tmp_path / "parts")
    assert_one_line(error, "sparsity.overrides", overrides)
    assert train.run(config, tmp_path / "parts") == 0
    (_, found), (_, want) = (case.final_state(tmp_path / name) for name in ("parts", "whole"))
    assert_bitwise(found, want)
    for path, (nonzeros, size) in sparsity.l0(want.params).items():
        density = 0.25 if path == "embed/tokens" else 0.5 if "/mlp/" in path and "kernel" in path else 0.125
        assert path.endswith("bias") or nonzeros == round(density * size), path
    records, whole = (case.train_records(tmp_path / name) for name in ("parts", "whole"))
    shares = [record["turnover"] for record in whole]
    assert [record["turnover"] for record in records] == shares
    assert all(0 < share < 1 for share in shares[1:])


def test_turnover_is_the_share_of_the_weights_that_were_zero_before():
    random = np.random.default_rng(0)
    before = random.normal(size=(20, 10)) * (random.random((20, 10)) < 0.3)
    after = random.normal(size=(20, 10)) * (random.random((20, 10)) < 0.4)
    want = np.count_nonzero((before == 0) & (after != 0)) / np.count_nonzero(after)
    params = {"w": before, "gain": np.zeros(50)}
    updates = {"w": after - before, "gain": np.ones(50)}
    found = turnover(params, updates, {"w": np.array([np.count_nonzero(after)])})
    assert float(found) == pytest.approx(want)
    assert 0.5 < want < 1


# Warnings ----------------------------------------------------------------------------------------------


def warnings(d_model: int = 256, **settings) -> list[str]:
    config = TrainConfig(
        model=ModelConfig(vocab_size=1024, n_layer=2, d_model=d_model), sparsity=SparsityConfig(**settings)
    )
    return budget_warnings(config.sparsity, jax.eval_shape(lambda: step.init_state(config)).params)


def test_a_floor_that_takes_a_whole_budget_is_named():
    (line,) = warnings(density=1 / 64, min_per_neuron=4)
    for word in ("min_per_neuron=4", "blocks/attn/q/kernel", "blocks/mlp/proj/kernel"):
        assert word in line
    assert "\n" not in line
    assert warnings(density=1 / 64, min_per_neuron=3) == []
    assert warnings(density=1 / 63, min_per_neuron=4) == []
    (line,) = warnings(density=1 / 64, min_per_neuron=4, overrides="blocks/mlp/.*=1/32")
    assert "blocks/mlp" not in line


def test_embeddings_of_fewer_than_two_weights_a_token_are_named_with_the_override_that_helps():
    (line,) = warnings(density=1 / 256, min_per_neuron=0, overrides="blocks/mlp/fc/kernel=1/32")
    _, overrides, _ = line.split("'")
    assert overrides == "embed/tokens=1/128,head/unembed=1/128,blocks/mlp/fc/kernel=1/32"
    assert warnings(density=1 / 256, min_per_neuron=0, overrides=overrides) == []
    assert warnings(density=1 / 128, min_per_neuron=0) == []
    assert warnings(density=1.0) == []
