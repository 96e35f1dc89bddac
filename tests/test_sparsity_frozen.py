"""Frozen steps over the nonzeros: kernels against NumPy, steps against those with masks, and resuming."""

import json
import pathlib
import types

from helpers import assert_bitwise, run_python
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import train_case as case

from wsparse import sparsity
from wsparse.config import SparsityConfig, to_dict
from wsparse.loop import Loop
from wsparse.ops import cpu
from wsparse.sparsity import frozen
from wsparse.step import init_state

source, one_device = case.source, case.one_device

needs_kernels = pytest.mark.skipif(not cpu.load(), reason="no C++ compiler")
SPARSITY = {"density": 0.1, "anneal_end": 0.3, "explore_every": 4, "min_per_neuron": 1}

# Trains a run, stopped after some steps and started again; or compares the two kinds of step.
PROGRAM = """
import json, pathlib, signal, sys
import jax, jax.numpy as jnp, numpy as np
from wsparse import sharding, train, trees
from wsparse.config import TrainConfig, from_dict
from wsparse.loop import Loop
from wsparse.ops import cpu
from wsparse.step import make_program

assert cpu.enable()
job = json.loads(sys.argv[1])
config, stops, calls = from_dict(TrainConfig, job["config"]), job["stops"], 0
advance = Loop._advance

def stopping(loop, state, batch):
    global calls
    if loop.step in stops:
        stops.remove(loop.step)
        signal.raise_signal(signal.SIGINT)
    calls += loop.program.frozen_step is not None and bool(loop.frozen[loop.step])
    return advance(loop, state, batch)

Loop._advance = stopping
if job["folder"]:
    while train.run(config, pathlib.Path(job["folder"])) != 0:
        pass
    print(json.dumps({"frozen": calls}))
else:
    program = make_program(config, sharding.make_mesh(config.mesh))
    state = program.init()
    shape = (config.accumulate, config.batch_size // config.accumulate, config.model.context + 1)
    batch = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
    for _ in range(job["steps"]):
        state, _ = program.step(state, batch)
    masked = jax.tree.map(jnp.copy, state)
    places, fits = program.find_places(state.params)
    for _ in range(2):
        masked, want = program.step(masked, batch)
        state, found = program.frozen_step(state, places, batch)
    worst, supports = 0.0, True
    for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(state), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.max(np.abs(a - b) / (np.max(np.abs(a)) + 1e-30))))
        supports &= bool(np.array_equal(a != 0, b != 0))
    loss = abs(float(want["loss"]) - float(found["loss"]))
    print(json.dumps({"fits": bool(fits), "worst": worst, "loss": loss, "supports": supports}))
"""


def run(**job) -> dict:
    """Runs the program in a process with one device, where the kernels are on."""
    settings = {"WSPARSE_CPU_KERNELS": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = run_python("-c", PROGRAM, json.dumps(job), **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_kernels
@given(st.data())
def test_places_are_the_flat_indices_of_the_nonzeros_filled_up_with_the_size(data):
    rows, columns = data.draw(st.integers(1, 19)), data.draw(st.integers(1, 40))
    capacity = data.draw(st.integers(1, 60))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    w = random.normal(size=(2, rows, columns)) * (random.random((2, rows, columns)) < 0.1)
    places, counts = map(np.asarray, cpu.places(w.astype(np.float32), capacity))
    for matrix, found, count in zip(w, places, counts, strict=True):
        nonzero = np.flatnonzero(matrix)
        assert count == nonzero.size
        kept = nonzero[:capacity]
        np.testing.assert_array_equal(found[: kept.size], kept)
        assert np.all(found[kept.size :] == rows * columns)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 31, 300, 600])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (17, 33), (64, 48)])
def test_a_sampled_product_is_the_product_at_the_places_and_0_beyond(rows, shape):
    random = np.random.default_rng(rows)
    x, dy = (random.normal(size=(rows, width)).astype(np.float32) for width in shape)
    size = shape[0] * shape[1]
    places = np.sort(random.choice(size, max(size // 3, 1), replace=False))
    places = np.append(places, [size, size]).astype(np.int32)
    found = np.asarray(cpu.sampled_product(x, dy, places))
    want = (x.astype(np.float64).T @ dy).ravel()[places[:-2]]
    np.testing.assert_allclose(found[:-2], want, rtol=1e-4, atol=1e-4)
    assert np.all(found[-2:] == 0)


def test_frozen_steps_come_after_an_exploration_at_the_final_density():
    config = SparsityConfig(density=1 / 32, anneal_end=0.5, explore_every=4)
    frozen_steps, explores = sparsity.frozen_steps(config, 40), sparsity.exploration_steps(config, 40)
    assert not np.any(frozen_steps & explores)
    assert frozen_steps.any() and not frozen_steps[:20].any()
    assert not sparsity.frozen_steps(SparsityConfig(density=1 / 32), 40).any()


def test_steps_that_have_no_room_for_the_nonzeros_are_dense_and_said_to_be_once(logged):
    steps = []
    program = types.SimpleNamespace(
        frozen_step=lambda *_: steps.append("frozen"),
        step=lambda *_: steps.append("dense"),
        find_places=lambda _: ({}, next(fits)),
    )
    state = types.SimpleNamespace(params={})
    loop = types.SimpleNamespace(program=program, frozen=[True] * 9, step=3, places=None, places_fit=True)
    fits = iter([False, False, True, False])
    for _ in range(4):
        for _ in range(2):
            Loop._advance(loop, state, None)
        # An exploration.
        loop.places = None
    assert steps == ["dense"] * 4 + ["frozen"] * 2 + ["dense"] * 2
    assert [line.split(":")[0] for line in logged] == ["step 3"] * 2
    assert all("too many nonzeros" in line for line in logged)


@needs_kernels
def test_unpacked_trees_are_what_was_packed(source, one_device):
    state = init_state(case.make_config(source))
    thin = lambda leaf: np.where(np.abs(leaf) > 0.04, leaf, 0) if leaf.ndim > 1 else leaf
    params = jax.tree.map(thin, jax.device_get(state.params))
    capacities = frozen.capacities(SparsityConfig(density=0.5), params)
    places, fits = frozen.find_places(params, capacities)
    assert fits and {path.split("/")[0] for path in places} == {"embed", "blocks", "head"}
    packed = frozen.pack(params, places)
    assert sum(leaf.size for leaf in jax.tree.leaves(packed)) < sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )
    zeros = jax.tree.map(np.zeros_like, params)
    assert_bitwise(frozen.unpack(packed, zeros, places), params)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_step_is_the_step_with_masks(source, accumulate):
    config = case.make_config(source, sparsity=SPARSITY, accumulate=accumulate)
    explores = sparsity.exploration_steps(config.sparsity, config.steps)
    steps = int(np.flatnonzero(sparsity.frozen_steps(config.sparsity, config.steps))[0])
    assert explores[steps - 1] and not explores[steps + 1]
    found = run(config=to_dict(config), stops=[], folder="", steps=steps)
    assert found["fits"] and found["supports"]
    assert found["worst"] < 1e-4 and found["loss"] < 1e-5


@pytest.mark.slow
@needs_kernels
def test_a_run_with_frozen_steps_resumes_bitwise_and_keeps_its_counts(source, tmp_path, one_device):
    config = case.make_config(source, sparsity=SPARSITY, checkpoint_every=7)
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder, stops in zip(folders, ([], [17, 22, 30]), strict=True):
        assert run(config=to_dict(config), stops=stops, folder=str(folder))["frozen"] > 10
    (_, whole), (_, parts) = (case.final_state(folder) for folder in folders)
    assert_bitwise(parts, whole)
    reported = sparsity.find_state(whole.optimizer).nonzeros
    counts = sparsity.l0(whole.params, sparsity.MODEL_RULES)
    assert sum(map(np.sum, reported.values())) == sum(nonzeros for nonzeros, _ in counts.values())
    records = [[r["loss"] for r in case.train_records(folder)] for folder in folders]
    assert records[0] == records[1] and pathlib.Path(folders[0] / "summary.json").exists()
