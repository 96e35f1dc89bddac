"""The projection inside optax: exact counts, one compilation, the right matrices, any layout."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import reference

from wsparse import model, sharding, trees
from wsparse.config import MeshConfig, ModelConfig, SparsityConfig
from wsparse.errors import UserError
from wsparse.sparsity import (
    Dense,
    Sparse,
    budget,
    density_schedule,
    find_state,
    l0,
    nonfinite_matrices,
    project_top_k,
    scale_by_gradient_rms,
)
from wsparse.sparsity.project import final_budgets

CONFIG = ModelConfig(
    vocab_size=24, context=8, n_layer=3, d_model=16, n_head=2, d_head=4, d_mlp=24, norm="layer",
    position="concat", d_pos=8, logits_bias=True,
)  # fmt: skip

# Which side of each matrix belongs to a neuron or channel, and what is never projected: written down
# from the method, not read from the rules.
NEURON_AXIS = {
    "blocks/attn/q/kernel": 1,
    "blocks/attn/k/kernel": 1,
    "blocks/attn/v/kernel": 1,
    "blocks/mlp/fc/kernel": 1,
    "blocks/attn/out/kernel": 0,
    "blocks/mlp/proj/kernel": 0,
}
DENSE = {
    "blocks/attn/sink",
    "blocks/attn_norm/gain", "blocks/attn_norm/bias", "blocks/mlp_norm/gain", "blocks/mlp_norm/bias",
    "blocks/attn_pos_norm/gain", "blocks/attn_pos_norm/bias",
    "blocks/mlp_pos_norm/gain", "blocks/mlp_pos_norm/bias",
    "head/norm/gain", "head/norm/bias", "head/bigram", "head/logits_bias",
}  # fmt: skip


@functools.cache
def shapes():
    return trees.flatten(jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0))))


def tree(seed: int, dtype="float32", scale: float = 1.0):
    """Random numbers in the shape of the model's parameters, no zeros, as NumPy arrays."""
    random = np.random.default_rng(seed)
    result = {}
    for path, leaf in shapes().items():
        *parents, name = path.split("/")
        group = functools.reduce(lambda g, part: g.setdefault(part, {}), parents, result)
        values = random.normal(size=leaf.shape)
        values = np.copysign(np.maximum(np.abs(values), 1e-2), values) * scale
        group[name] = values.astype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
    return result


def matrices(params) -> dict[str, np.ndarray]:
    """Projected matrices one by one, named as `l0` must name them."""
    found = {}
    for path, leaf in trees.flatten(params).items():
        if path in DENSE:
            continue
        if path.startswith("blocks/"):
            for layer in range(CONFIG.n_layer):
                found[path.replace("blocks/", f"blocks/{layer}/")] = np.asarray(leaf[layer])
        else:
            found[path] = np.asarray(leaf)
    return found


def neuron_axis(name: str) -> int | None:
    return NEURON_AXIS.get(re.sub(r"blocks/\d+/", "blocks/", name))


def nonzeros_per_neuron(name: str, matrix: np.ndarray) -> np.ndarray:
    return np.count_nonzero(matrix, axis=1 - neuron_axis(name))


def expected_count(name: str, matrix: np.ndarray, density: float, floor: int = 4) -> int:
    """How many of a full matrix stay: round(density * size), or the floor where it is more."""
    k = round(density * matrix.size)
    axis = neuron_axis(name)
    if axis is None:
        return k
    return max(k, matrix.shape[axis] * min(floor, matrix.shape[1 - axis]))


def stepper(optimizer):
    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


# Compiling the projection of a whole model takes seconds, so one compiled step serves this file: its
# density is that of an anneal over 20 steps, then what a table says for the later counts.
STEPS = 20
ANNEAL = density_schedule(SparsityConfig(density=1 / 15, anneal_end=0.5), STEPS)
TABLE = (0.5, 1 / 16, 0.25)


def density_at(count):
    return jnp.where(count < STEPS, ANNEAL(count), jnp.array(TABLE, jnp.float32)[count - STEPS])


OPTIMIZER = project_top_k(density_at)
step = stepper(OPTIMIZER)
fresh_state = jax.jit(OPTIMIZER.init)


def update_at(density: float, params, updates):
    """One update at a density of `TABLE`."""
    state = fresh_state(params)._replace(count=jnp.int32(STEPS + TABLE.index(density)))
    return step(params, state, updates)


@functools.cache
def one_update(density: float):
    """Parameters, incoming updates, and what one projected update makes of them."""
    params, updates = tree(0), tree(1, scale=0.1)
    return params, updates, *update_at(density, params, updates)


def no_updates(params):
    return jax.tree.map(np.zeros_like, params)


# One update ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.5, 1 / 16])
def test_every_matrix_keeps_exactly_its_budget_or_its_floor(density):
    _, _, after, _ = one_update(density)
    for name, matrix in matrices(after).items():
        assert np.count_nonzero(matrix) == expected_count(name, matrix, density), name
        assert np.isfinite(matrix).all()


def test_both_budget_and_floor_decide_in_the_test_above():
    """Negative control: at 1/2 no floor binds, at 1/16 some do and some do not."""
    full = matrices(tree(0))
    over = {d: [expected_count(n, m, d) - round(d * m.size) for n, m in full.items()] for d in (0.5, 1 / 16)}
    assert set(over[0.5]) == {0}
    assert 0 in over[1 / 16]
    assert max(over[1 / 16]) > 0


def test_what_stays_is_exactly_p_plus_u_and_is_the_largest():
    params, updates, after, _ = one_update(0.5)
    before = matrices(jax.tree.map(np.add, params, updates))
    for name, matrix in matrices(after).items():
        kept = matrix != 0
        np.testing.assert_array_equal(matrix[kept], before[name][kept], err_msg=name)
        if neuron_axis(name) is None:
            magnitude = np.abs(before[name].astype(np.float64))
            assert magnitude[kept].min() >= magnitude[~kept].max(), name


def test_every_neuron_and_channel_keeps_its_floor_on_its_own_side():
    _, _, after, _ = one_update(1 / 16)
    checked = {name: m for name, m in matrices(after).items() if neuron_axis(name) is not None}
    assert len(checked) == 6 * CONFIG.n_layer
    for name, matrix in checked.items():
        assert nonzeros_per_neuron(name, matrix).min() >= 4, name
    # Negative control: the residual stream's side is not protected.
    assert min(np.count_nonzero(m, axis=neuron_axis(n)).min() for n, m in checked.items()) < 4


def test_without_a_floor_the_budget_alone_decides():
    params = {"blocks": {"mlp": tree(0)["blocks"]["mlp"]}}
    optimizer = project_top_k(1 / 16, min_per_neuron=0)
    after, _ = stepper(optimizer)(params, optimizer.init(params), no_updates(params))
    found = matrices(after)
    assert {n: np.count_nonzero(m) for n, m in found.items()} == {
        n: round(m.size / 16) for n, m in found.items()
    }
    kernels = {n: m for n, m in found.items() if neuron_axis(n) is not None}
    assert min(nonzeros_per_neuron(n, m).min() for n, m in kernels.items()) < 4


@pytest.mark.parametrize("density", [0.5, 1 / 16])
def test_bfloat16_parameters_are_counted_and_kept_exactly(density):
    """Ties abound: bfloat16 has few values."""
    part = lambda seed: {"blocks": {"mlp": {"fc": tree(seed, "bfloat16")["blocks"]["mlp"]["fc"]}}}
    params, updates = part(0), part(1)
    optimizer = project_top_k(density)
    after, state = stepper(optimizer)(params, optimizer.init(params), updates)
    before = matrices(jax.tree.map(np.add, params, updates))
    for name, matrix in matrices(after).items():
        assert matrix.dtype == jnp.bfloat16
        assert np.count_nonzero(matrix) == expected_count(name, matrix, density), name
        np.testing.assert_array_equal(matrix[matrix != 0], before[name][matrix != 0])
    assert np.asarray(state.nonzeros["blocks/mlp/fc/bias"]).tolist() == [round(density * 24)] * 3


def test_a_neuron_with_fewer_weights_than_the_floor_keeps_all_it_has():
    params = tree(0)
    params["blocks"]["mlp"]["fc"]["kernel"][1, :, 5] = 0
    params["blocks"]["mlp"]["fc"]["kernel"][1, :2, 5] = 1e-6
    after, _ = update_at(0.5, params, no_updates(params))
    fc = np.asarray(after["blocks"]["mlp"]["fc"]["kernel"])
    assert np.count_nonzero(fc[1, :, 5]) == 2
    assert np.count_nonzero(fc[1]) == fc[1].size // 2


def test_gains_sinks_tables_and_norm_biases_stay_dense():
    params, updates, after, _ = one_update(1 / 16)
    flat = [trees.flatten(t) for t in (params, updates, after)]
    assert set(flat[0]) > DENSE
    for path in DENSE:
        np.testing.assert_array_equal(flat[2][path], flat[0][path] + flat[1][path], err_msg=path)
    # Negative control: embeddings and linear biases are projected.
    for path in (
        "embed/tokens",
        "embed/positions",
        "head/unembed",
        "blocks/attn/q/bias",
        "blocks/mlp/proj/bias",
    ):
        assert (np.asarray(flat[2][path]) == 0).any(), path


def test_fixed_sinusoids_stay_dense():
    config = dataclasses.replace(CONFIG, position="concat_sinusoid")
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    assert "embed/sinusoids" in trees.flatten(params)
    names = l0(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params))
    assert "embed/tokens" in names
    assert not any("sinusoid" in name for name in names)


def test_each_layer_of_a_stack_is_a_matrix_of_its_own():
    """A layer a thousand times larger than the others does not take their budget."""
    params = tree(2)
    params["blocks"]["mlp"]["fc"]["kernel"][1] *= 1000
    after, _ = update_at(0.25, params, no_updates(params))
    fc = np.asarray(after["blocks"]["mlp"]["fc"]["kernel"])
    assert np.count_nonzero(fc, axis=(1, 2)).tolist() == [fc[0].size // 4] * CONFIG.n_layer


def test_l0_names_and_counts_every_matrix():
    _, _, after, state = one_update(0.5)
    want = {name: (np.count_nonzero(m), m.size) for name, m in matrices(after).items()}
    assert l0(after) == want
    assert "blocks/2/mlp/fc/kernel" in want
    assert "embed/tokens" in want
    reported = {path: np.asarray(counts).tolist() for path, counts in state.nonzeros.items()}
    assert reported["blocks/mlp/fc/kernel"] == [want[f"blocks/{i}/mlp/fc/kernel"][0] for i in range(3)]
    assert reported["embed/tokens"] == [want["embed/tokens"][0]]
    assert sum(map(sum, reported.values())) == sum(nonzeros for nonzeros, _ in want.values())


def test_the_state_starts_with_the_counts_of_the_first_parameters():
    params = {"w": np.array([[1.0, 0.0], [0.0, 2.0]], np.float32), "b": np.zeros(3, np.float32)}
    state = project_top_k(0.5).init(params)
    assert int(state.count) == 0
    assert {path: np.asarray(n).tolist() for path, n in state.nonzeros.items()} == {"w": [2], "b": [0]}


def test_l0_counts_subnormals():
    """A weight too small for the arithmetic is still a weight in the file."""
    assert l0({"w": jnp.array([1e-40, 0.0, -0.0, 1.0], jnp.float32)}) == {"w": (2, 4)}


def test_updates_of_lower_precision_than_the_parameters_leave_exact_zeros():
    params = {"w": np.array([1.001, -2.003, 3.007, 4.009], np.float32)}
    updates = {"w": np.full(4, 1e-3, jnp.bfloat16)}
    optimizer = project_top_k(0.5)
    after, _ = stepper(optimizer)(params, optimizer.init(params), updates)
    assert np.count_nonzero(after["w"]) == 2


@pytest.mark.parametrize("density", [1 / 1000, 0.1, 1 / 3, 0.5, 1.0])
def test_the_budget_is_the_rounded_product(density):
    for size in (1, 3, 7, 1000, 4096, 2048 * 8192):
        assert int(budget(density, size)) == round(density * size)
        traced = int(jax.jit(budget, static_argnums=1)(np.float32(density), size))
        assert abs(traced - density * size) <= 0.5 + 1e-6 * size


@pytest.mark.parametrize("shape", [(19, 10), (19, 50), (39, 10), (512, 300)])
@pytest.mark.parametrize("density", [0.07, 0.15, 0.3, 1 / 3, 1.0])
def test_final_budgets_are_those_of_the_schedules_to_the_last_weight(density, shape):
    config, size = SparsityConfig(density=density, min_per_neuron=0), math.prod(shape)
    params = {"head": {"unembed": jax.ShapeDtypeStruct(shape, np.float32)}}
    found = final_budgets(config, params)["head/unembed"]
    last = density_schedule(config, 10)(jnp.int32(9))
    assert found.k == int(jax.jit(budget, static_argnums=1)(last, size))
    assert (found.shape, found.floor) == (shape, 0)


def test_a_budget_of_a_schedule_is_not_always_the_product_in_double_precision():
    """Negative control of the test above."""
    assert round(0.15 * 190) == 28
    assert int(jax.jit(budget, static_argnums=1)(np.float32(0.15), 190)) == 29


# Flags and refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_matrices_are_named(bad):
    params, updates = tree(0), tree(1)
    updates["blocks"]["attn"]["q"]["kernel"][2, 0, 0] = bad
    params["embed"]["tokens"][3, 4] = bad
    params["head"]["norm"]["gain"][0] = bad  # dense: not the projection's to judge
    _, state = update_at(0.5, params, updates)
    assert nonfinite_matrices(state.finite) == ["blocks/2/attn/q/kernel", "embed/tokens"]
    assert nonfinite_matrices(one_update(0.5)[3].finite) == []


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(UserError, match=r"density must be in \(0, 1\], got"):
        project_top_k(density)


def test_an_update_without_parameters_is_refused():
    optimizer = project_top_k(0.5)
    params = {"w": jnp.ones(4)}
    with pytest.raises(UserError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params))


def test_custom_rules_decide_and_an_unmatched_parameter_is_refused():
    rules = ((r"a", Dense()), (r"b", Sparse(neuron_axis=0)))
    params = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32)}
    optimizer = project_top_k(0.25, min_per_neuron=1, rules=rules)
    after, _ = stepper(optimizer)(params, optimizer.init(params), no_updates(params))
    assert l0(after, rules) == {"b": (2, 8)}
    np.testing.assert_array_equal(after["a"], params["a"])
    np.testing.assert_array_equal(after["b"], [[1, 0, 0, 0], [1, 0, 0, 0]])
    with pytest.raises(UserError, match="no rule matches parameter 'c'"):
        optimizer.init({"c": jnp.ones(4)})


def test_one_projection_is_found_in_a_state_and_none_or_two_are_refused():
    params = {"w": jnp.ones(4)}
    one = optax.chain(optax.adamw(0.1), project_top_k(0.5))
    assert int(find_state(one.init(params)).count) == 0
    for transforms, number in [((optax.sgd(0.1),), 0), ((project_top_k(0.5),) * 2, 2)]:
        with pytest.raises(UserError, match=f"one projection, got {number}"):
            find_state(optax.chain(*transforms).init(params))


# Inside optax's combinators ------------------------------------------------------------------------

SMALL = {
    "a": np.arange(1, 13, dtype=np.float32).reshape(3, 4),
    "b": np.arange(1, 9, dtype=np.float32).reshape(2, 4),
}
SMALL_UPDATES = {
    "a": np.where(SMALL["a"] % 2 == 0, -20.0, 0.5).astype(np.float32),
    "b": np.array([[9, 0, -9, 0], [0, 0, 0, -4]], np.float32),
}


def kept_half(w: np.ndarray) -> np.ndarray:
    order = np.argsort(-np.abs(w).ravel(), kind="stable")[: w.size // 2]
    mask = np.isin(np.arange(w.size), order).reshape(w.shape)
    return np.where(mask, w, 0)


SUM = {name: SMALL[name] + SMALL_UPDATES[name] for name in SMALL}


@pytest.mark.parametrize(
    ("optimizer", "projected"),
    [
        (optax.chain(optax.scale(1.0), project_top_k(0.5)), {"a", "b"}),
        (optax.masked(project_top_k(0.5), {"a": True, "b": False}), {"a"}),
        (
            optax.multi_transform(
                {"sparse": project_top_k(0.5), "dense": optax.identity()}, {"a": "dense", "b": "sparse"}
            ),
            {"b"},
        ),
    ],
    ids=["chain", "masked", "multi_transform"],
)
def test_inside_a_combinator_exactly_the_chosen_parameters_are_projected(optimizer, projected):
    after, state = stepper(optimizer)(SMALL, optimizer.init(SMALL), SMALL_UPDATES)
    for name in SMALL:
        want = kept_half(SUM[name]) if name in projected else SUM[name]
        np.testing.assert_array_equal(after[name], want)
    found = find_state(state)
    assert set(found.nonzeros) == projected
    assert int(found.count) == 1


def test_behind_a_whole_optimizer_the_reported_counts_are_the_real_ones():
    """What the compiler fuses with the addition must not make the selection see other numbers."""
    optimizer = optax.chain(
        scale_by_gradient_rms("normalize"),
        optax.adamw(0.05, b1=0.9, b2=0.95, eps=0.1, weight_decay=0.1),
        project_top_k(1 / 4),
    )
    random = np.random.default_rng(0)
    params = {"w": random.normal(size=(40, 30)).astype(np.float32), "b": np.zeros(8, np.float32)}
    state, run = optimizer.init(params), stepper(optimizer)
    for _ in range(20):
        gradients = {n: random.normal(size=p.shape).astype(np.float32) for n, p in params.items()}
        params, state = run(params, state, gradients)
        reported = find_state(state).nonzeros
        assert {n: int(c[0]) for n, c in reported.items()} == {"w": 300, "b": 2}
        assert {n: np.count_nonzero(p) for n, p in params.items()} == {"w": 300, "b": 2}


def test_multi_steps_projects_after_each_real_update_and_waits_in_between():
    every = 3
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(1.0), project_top_k(0.5)), every)
    params, state = SMALL, optimizer.init(SMALL)
    step = stepper(optimizer)
    for i in range(3 * every):
        gradients = {name: -u * (1 + i) for name, u in SMALL_UPDATES.items()}
        before = jax.tree.map(np.asarray, params)
        params, state = step(params, state, gradients)
        real = (i + 1) % every == 0
        for name in SMALL:
            if real:
                scale = np.float32(i)  # the mean of i-1, i, i+1
                want = kept_half(before[name] + SMALL_UPDATES[name] * scale)
                np.testing.assert_allclose(params[name], want, rtol=1e-6)
                assert np.count_nonzero(params[name]) == SMALL[name].size // 2
            else:
                np.testing.assert_array_equal(params[name], before[name])
        assert int(find_state(state.inner_opt_state).count) == (i + 1) // every


def test_one_compilation_serves_the_whole_anneal_with_exact_counts(compilations):
    params = tree(3)
    gradients = [tree(10 + i, scale=0.1) for i in range(STEPS)]
    state = fresh_state(params)
    with compilations() as names:
        params, state = step(params, state, gradients[0])
    assert len(names) <= 1, names  # 0 when an earlier test has compiled the very same step
    history = [(params, state)]
    with compilations() as names:
        for gradient in gradients[1:]:
            params, state = step(params, state, gradient)
            history.append((params, state))
    assert names == []

    totals = []
    for i, (after, state) in enumerate(history):
        assert int(state.count) == i + 1
        density, found = float(ANNEAL(i)), matrices(after)
        for name, matrix in found.items():
            count = np.count_nonzero(matrix)
            if i + 1 >= STEPS // 2:
                assert count == expected_count(name, matrix, 1 / 15), (i, name)
            else:  # half a weight either way is rounding's to decide
                axis = neuron_axis(name)
                floor = 0 if axis is None else 4 * matrix.shape[axis]
                assert count == floor or abs(count - density * matrix.size) < 0.501, (i, name)
                assert count >= floor
        totals.append(sum(np.count_nonzero(m) for m in found.values()))
        assert totals[-1] == sum(int(np.sum(counts)) for counts in state.nonzeros.values())
    assert all(a > b for a, b in itertools.pairwise(totals[:10])), totals
    assert len(set(totals[9:])) == 1, totals


# Sharded -------------------------------------------------------------------------------------------


def test_a_sharded_update_of_the_model_is_bitwise_that_of_one_device():
    params, updates, want, want_state = one_update(1 / 16)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    layout = sharding.tree_shardings(params, mesh)
    assert not layout["blocks"]["mlp"]["fc"]["kernel"].is_fully_replicated
    after, state = update_at(1 / 16, *jax.device_put((params, updates), (layout, layout)))
    assert len(after["blocks"]["mlp"]["fc"]["kernel"].sharding.device_set) == 8
    for path, leaf in trees.flatten(after).items():
        got, expected = np.asarray(leaf), np.asarray(trees.flatten(want)[path])
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), err_msg=path)
    for path, counts in state.nonzeros.items():
        assert counts.tolist() == want_state.nonzeros[path].tolist()


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4}
_BYTES |= {"u32": 4, "s64": 8, "u64": 8, "f64": 8}


def collectives(hlo: str) -> list[tuple[str, int]]:
    """`(operation, bytes of the result)` of every collective in compiled HLO, part by part of a tuple."""
    operations = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = []
    for result, operation in re.findall(rf"= (.+?) ({operations})(?:-start)?\(", hlo):
        arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
        for kind, dims in arrays:
            size = _BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
            found.append((operation, size))
    return found


# Matrices so wide that one device's share of a stack is 128 kB or more: twice what a collective may carry.
WIDE = {
    "blocks": {
        "attn": {"q": {"kernel": (2, 256, 1024), "bias": (2, 1024)}},
        "mlp": {"proj": {"kernel": (2, 1024, 256)}},
    },
    "embed": {"tokens": (1024, 256)},
}


@pytest.mark.parametrize(
    "axes",
    [{"data": 1, "fsdp": 8}, {"data": 1, "tensor": 8}, {"data": 1, "fsdp": 4, "tensor": 2}],
    ids=["fsdp", "tensor", "both"],
)
def test_no_weight_crosses_devices_in_the_projection_and_its_bits_are_numpys(axes):
    random = np.random.default_rng(0)

    def draw(shapes):
        """Small integers: ties everywhere."""
        if isinstance(shapes, dict):
            return {name: draw(inner) for name, inner in shapes.items()}
        return random.integers(-40, 41, shapes).astype(np.float32)

    params, updates = draw(WIDE), draw(WIDE)
    mesh = sharding.make_mesh(MeshConfig(**axes))
    optimizer = project_top_k(1 / 50)
    layout = sharding.tree_shardings(params, mesh)
    assert not layout["blocks"]["attn"]["q"]["kernel"].is_fully_replicated
    state = jax.jit(optimizer.init)(params)
    state_layout = sharding.tree_shardings(state, mesh)
    update = jax.jit(
        optimizer.update, in_shardings=(layout, state_layout, layout), out_shardings=(layout, state_layout)
    )
    compiled = update.lower(updates, state, params).compile()

    found = collectives(compiled.as_text())
    assert found, "a sharded selection has to count across devices"
    assert {operation for operation, _ in found} == {"all-reduce"}, found
    # The largest are counts per layer and neuron.
    assert max(size for _, size in found) <= 4 * 2 * 1024 < 64 * 1024, found

    placed = jax.device_put((updates, state, params), (layout, state_layout, layout))
    projected, _ = compiled(*placed)
    after = trees.flatten(jax.tree.map(lambda p, u: p + np.asarray(u), params, projected))
    total = trees.flatten(jax.tree.map(np.add, params, updates))
    for path, axis in [("blocks/attn/q/kernel", 1), ("blocks/mlp/proj/kernel", 0)]:
        for got, w in zip(after[path], total[path], strict=True):
            np.testing.assert_array_equal(got, reference.keep_top_k(w, round(w.size / 50), 4, axis))
    got, w = after["embed/tokens"], total["embed/tokens"]
    np.testing.assert_array_equal(got, reference.keep_top_k(w, round(w.size / 50)))


def test_the_collective_search_finds_a_gathered_weight():
    """Negative control: a selection by sorting gathers, and the parser sees it."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    row = NamedSharding(mesh, P("x", None))
    spec = jax.ShapeDtypeStruct((512, 512), np.float32)
    by_sorting = jax.jit(
        lambda w: jnp.where(jnp.abs(w) >= jnp.sort(jnp.abs(w).ravel())[-100], w, 0.0),
        in_shardings=row,
        out_shardings=row,
    )
    found = collectives(by_sorting.lower(spec).compile().as_text())
    assert any(op != "all-reduce" and size >= 512 * 512 * 4 for op, size in found), found
