"""Any mesh computes what one device computes, and every array has a place on it."""

import dataclasses
import logging
import re

from helpers import check
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from wsparse import model, sharding, sparsity, step, trees
from wsparse.config import MeshConfig, TrainConfig, from_dict
from wsparse.step import EVAL_BATCH, init_state, make_program

CONFIG = from_dict(
    TrainConfig,
    {
        # 300 tokens do not divide by 8, nor 2 heads by 4.
        "model": {"vocab_size": 300, "context": 16, "n_layer": 2, "d_model": 32, "n_head": 2,
                  "d_head": 8, "d_mlp": 64},
        # The first step already prunes to the target.
        "sparsity": {"density": 0.25, "anneal_end": 0.001},
        "steps": 100,
        "batch_size": 8,
        "optimizer": {"learning_rate": 0.01},
    },
)  # fmt: skip
MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "fsdp=2 tensor=4": MeshConfig(data=1, fsdp=2, tensor=4),
    "data=2 fsdp=2 tensor=2": MeshConfig(data=2, fsdp=2, tensor=2),
}
SHAPES = jax.eval_shape(lambda: init_state(CONFIG))


def mesh_of(config: MeshConfig):
    return sharding.make_mesh(config)


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def specs(tree, mesh):
    return {path: s.spec for path, s in trees.flatten(sharding.tree_shardings(tree, mesh)).items()}


# The mesh ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshConfig(data=-1, fsdp=8), (1, 8, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=4), (1, 2, 4)),
    ],
    ids=str,
)
def test_the_axis_that_is_minus_one_takes_the_devices_that_are_left(config, shape):
    mesh = sharding.make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_over_given_devices_uses_no_other():
    mesh = sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[2:6])
    assert tuple(mesh.shape.values()) == (2, 1, 2)
    assert set(mesh.devices.flat) == set(jax.devices()[2:6])


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=-1, fsdp=3),
        MeshConfig(data=4),
        MeshConfig(data=16),
        MeshConfig(data=-1, fsdp=16),
    ],
    ids=str,
)
def test_a_mesh_that_is_not_all_devices_is_refused_in_one_line(config):
    check("must be the 8 devices", lambda: sharding.make_mesh(config))


# The rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESHES)
def test_every_leaf_of_the_state_has_a_sharding_that_divides_it(name):
    mesh = mesh_of(MESHES[name])
    flat = trees.flatten(SHAPES)
    found = trees.flatten(sharding.tree_shardings(SHAPES, mesh))
    assert set(found) == set(flat)
    for path, leaf in flat.items():
        found[path].shard_shape(leaf.shape)  # Raises when an axis does not divide.


@pytest.mark.parametrize("name", MESHES)
def test_moments_lie_where_their_parameters_lie(name):
    found = specs(SHAPES, mesh_of(MESHES[name]))
    parameters = {p.removeprefix("params/"): s for p, s in found.items() if p.startswith("params/")}
    followed = 0
    for path, spec in found.items():
        if match := re.fullmatch(r"optimizer/\d+/(?:mu|nu)/(.*)", path):
            assert spec == parameters[match[1]], path
            followed += 1
    assert followed == 2 * len(parameters)


def with_gate(params):
    """The parameters of a block with a kernel that no table mentions."""
    gate = {"gate": {"kernel": params["blocks"]["mlp"]["fc"]["kernel"]}}
    return params | {"blocks": params["blocks"] | {"mlp": params["blocks"]["mlp"] | gate}}


def test_a_parameter_that_a_table_of_the_model_does_not_mention_is_named():
    params = with_gate(SHAPES.params)
    unknown = "no rule matches parameter 'blocks/mlp/gate/kernel'"
    check(unknown, lambda: sharding.tree_shardings(params, one_device()))
    check(unknown, lambda: jax.eval_shape(step.make_optimizer(CONFIG).init, params))
    check(unknown, lambda: trees.match(sparsity.MODEL_RULES, "blocks/mlp/gate/kernel"))
    check(unknown, lambda: trees.match(step.DECAY_RULES, "blocks/mlp/gate/kernel"))
    # A tree that is not of this library's models is projected by the default rules.
    assert isinstance(trees.match(sparsity.DEFAULT_RULES, "head/kernel"), sparsity.Sparse)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "layer", "position": "added", "logits_bias": True},
        {"position": "concat", "d_pos": 4, "norm": "layer", "bigram": "frozen"},
        {"position": "concat_sinusoid", "d_pos": 4, "tied_embeddings": True, "sink": False},
    ],
    ids=str,
)
def test_the_tables_mention_every_parameter_of_every_variant(change):
    config = dataclasses.replace(CONFIG.model, **change)
    for path in trees.flatten(jax.eval_shape(lambda: model.init(config, jax.random.key(0)))):
        for table in (sharding.RULES, sparsity.MODEL_RULES, step.DECAY_RULES):
            trees.match(table, path)


def test_an_axis_that_does_not_divide_a_parameter_is_logged_once(caplog):
    sharding._log_dropped.cache_clear()
    with caplog.at_level(logging.INFO, "wsparse.sharding"):
        for _ in range(2):
            sharding.tree_shardings(SHAPES, mesh_of(MESHES["fsdp=8"]))
            sharding.tree_shardings(SHAPES, mesh_of(MESHES["fsdp=2 tensor=4"]))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines))
    assert (
        "blocks/attn/sink is not sharded over tensor: its dimension 1, of size 2, does not divide over "
        "4 devices" in lines
    )
    assert not [line for line in lines if "mlp/fc/kernel" in line]


def test_matrices_are_spread_and_bookkeeping_is_not():
    found = specs(SHAPES, mesh_of(MESHES["fsdp=2 tensor=4"]))
    for path in ("q/kernel", "k/kernel", "v/kernel"):
        assert found[f"params/blocks/attn/{path}"] == P(None, None, ("tensor", "fsdp"))
    assert found["params/blocks/mlp/fc/kernel"] == P(None, None, ("tensor", "fsdp"))
    assert found["params/blocks/mlp/proj/kernel"] == P(None, ("tensor", "fsdp"), None)
    assert found["params/blocks/attn/out/kernel"] == P(None, ("tensor", "fsdp"), None)
    assert found["params/head/unembed"] == P("fsdp", "tensor")
    assert found["params/embed/tokens"] == P("tensor", "fsdp")
    for path, spec in found.items():
        if "nonzeros" in path or "finite" in path or path.endswith(("count", "step")):
            assert not any(spec), path
    # Negative control: most bytes really are spread over the mesh's 8 devices.
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in trees.flatten(SHAPES).items()}
    spread = sum(
        size
        for path, size in sizes.items()
        if {"fsdp", "tensor"} <= {axis for each in found[path] for axis in _axes(each)}
    )
    assert spread > 0.95 * sum(sizes.values())


def _axes(dimension) -> tuple[str, ...]:
    return (dimension,) if isinstance(dimension, str) else dimension or ()


def test_layers_are_never_spread():
    for config in MESHES.values():
        for path, spec in specs(SHAPES.params, mesh_of(config)).items():
            if path.startswith("blocks/"):
                assert not spec or spec[0] is None, path


def test_an_axis_that_does_not_divide_a_dimension_is_dropped_from_it_alone():
    mesh = mesh_of(MESHES["fsdp=2 tensor=4"])
    shapes = {
        "embed": {"tokens": jax.ShapeDtypeStruct((301, 32), np.float32)},
        "head": {"unembed": jax.ShapeDtypeStruct((33, 301), np.float32)},
        "blocks": {"attn": {"sink": jax.ShapeDtypeStruct((3, 2), np.float32)}},
    }
    assert specs(shapes, mesh) == {
        "embed/tokens": P(None, "fsdp"),
        "head/unembed": P(None, None),
        "blocks/attn/sink": P(None, None),
    }
    fits = {"embed": {"tokens": jax.ShapeDtypeStruct((304, 32), np.float32)}}
    assert specs(fits, mesh) == {"embed/tokens": P("tensor", "fsdp")}


# Batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESHES)
def test_the_global_batch_has_the_rows_in_order(name):
    mesh = mesh_of(MESHES[name])
    rows = np.arange(2 * 8 * 5, dtype=np.int32).reshape(2, 8, 5)
    batch = sharding.put_batch(rows, mesh)
    assert batch.shape == rows.shape
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch, rows)
    parallel = mesh.shape["data"] * mesh.shape["fsdp"]
    for shard in batch.addressable_shards:
        assert shard.data.shape == (2, 8 // parallel, 5)
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    evaluation = sharding.put_batch(rows[0], mesh, EVAL_BATCH)
    np.testing.assert_array_equal(evaluation, rows[0])
    assert evaluation.addressable_shards[0].data.shape == (8 // parallel, 5)


@pytest.mark.parametrize(
    ("name", "batch_size", "accumulate", "fits"),
    [
        ("data=8", 8, 1, True),
        ("data=8", 12, 1, False),
        ("data=8", 16, 2, True),
        ("data=8", 8, 2, False),
        ("fsdp=2 tensor=4", 6, 1, True),
        ("fsdp=2 tensor=4", 6, 2, False),
        ("data=2 fsdp=2 tensor=2", 2, 1, False),
    ],
)
def test_a_batch_must_divide_over_the_data_parallel_devices(name, batch_size, accumulate, fits):
    mesh = mesh_of(MESHES[name])
    call = lambda: sharding.check_batch(mesh, batch_size, accumulate)
    if fits:
        call()
    else:
        check("must be a multiple of the . data-parallel devices", call)
        settings = {"batch_size": batch_size, "accumulate": accumulate}
        config = from_dict(TrainConfig, settings)
        check("must be a multiple", lambda: make_program(config, mesh))


# Steps ------------------------------------------------------------------------------------------------

BATCHES = np.random.default_rng(0).integers(0, 300, (2, 1, 8, 17)).astype(np.int32)


def start():
    """A state to start from, made without jax's random numbers, whose compilation takes seconds."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        if path.startswith("params/") and not path.endswith("gain"):
            return (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return (np.ones if path.endswith(("gain", "finite")) else np.zeros)(leaf.shape, leaf.dtype)

    return trees.map_with_path(fill, SHAPES)


def two_steps(mesh):
    """`(state, losses)` after two training steps on a mesh."""
    program = make_program(CONFIG, mesh)
    state = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), start(), program.abstract_state)
    losses = []
    for rows in BATCHES:
        state, report = program.step(state, sharding.put_batch(rows, mesh))
        losses.append(float(report["loss"]))
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(program.abstract_state), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def alone():
    return two_steps(one_device())


@pytest.mark.parametrize(
    "name",
    # Each mesh is compiled for, which takes long; one has all three axes.
    ["data=2 fsdp=2 tensor=2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MESHES)[:3])],
)
def test_two_steps_on_a_mesh_agree_with_one_device(name, alone):
    want_state, want_losses = alone
    state, losses = two_steps(mesh_of(MESHES[name]))
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    want = trees.flatten(want_state)
    for path, leaf in trees.flatten(state).items():
        if leaf.dtype != np.float32:
            # Counters, and the number of nonzeros of every matrix.
            np.testing.assert_array_equal(leaf, want[path], err_msg=path)
            continue
        np.testing.assert_array_equal(leaf != 0, want[path] != 0, err_msg=f"support of {path}")
        np.testing.assert_allclose(leaf, want[path], rtol=1e-4, atol=2e-5, err_msg=path)


def test_two_steps_change_far_more_than_the_tolerance_and_prune(alone):
    """Negative control of the test above."""
    state, losses = alone
    before, after = trees.flatten(start()), trees.flatten(state)
    fc = "params/blocks/mlp/fc/kernel"
    kept = after[fc] != 0
    assert np.count_nonzero(kept[0]) == round(0.25 * kept[0].size)
    assert np.median(np.abs(after[fc] - before[fc])[kept]) > 1e-3
    assert np.median(np.abs(after["params/head/bigram"] - before["params/head/bigram"])) > 1e-4
    assert abs(losses[0] - losses[1]) > 1e-3
