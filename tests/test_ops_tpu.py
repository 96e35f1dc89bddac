"""The TPU kernels select bit for bit what the plain JAX selects, and Mosaic compiles them."""

import functools

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest
import reference

from wsparse import aot, hlo
from wsparse.ops import attention, selection, top_k, tpu, tpu_attention

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, np.inf, -np.inf, np.nan, 3e38]),
    st.floats(width=32),
)
# One shape and two k: each is a compilation. Other widths are below.
ROWS = hnp.arrays(np.float32, st.just((40, 37)), elements=VALUES)


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"uint{8 * array.dtype.itemsize}")


def keep(k: int):
    return lambda x, *values: selection.keep_largest_per_row(x, k, *values)


@functools.partial(jax.jit, static_argnums=0)
def by_kernel(k, *arrays):
    return tpu.by_rows(keep(k), *arrays, interpret=True)


def brute_force(x: np.ndarray, k: int) -> np.ndarray:
    """Mask of the k largest magnitudes of each row: by their bits, NaNs alike and first, stably."""
    width = x.dtype.itemsize
    keys = (bits(x) & np.array((1 << (8 * width - 1)) - 1, f"uint{8 * width}")).astype(np.int64)
    infinity = int(bits(np.array(np.inf, x.dtype)))
    order = np.argsort(-np.minimum(keys, infinity + 1), axis=-1, kind="stable")
    kept = np.zeros(x.shape, bool)
    np.put_along_axis(kept, order[..., :k], True, axis=-1)
    return kept


@given(x=ROWS, k=st.sampled_from([1, 30]), half=st.booleans())
def test_rows_keep_what_a_stable_sort_keeps_and_gradients_pass_there_alone(x, k, half):
    with np.errstate(over="ignore"):
        x = x.astype(ml_dtypes.bfloat16) if half else x
    kept = brute_force(x, k)
    result = by_kernel(k, x)
    np.testing.assert_array_equal(bits(result), np.where(kept, bits(x), 0))
    # The backward pass knows the result only: nothing else is stored.
    gradient = np.arange(1, x.size + 1).reshape(x.shape).astype(x.dtype)
    passed = by_kernel(k, result, gradient)
    np.testing.assert_array_equal(bits(passed), np.where(kept, bits(gradient), 0))


def test_the_comparison_above_sees_a_tie_broken_the_other_way():
    """Negative control."""
    x = np.full((40, 37), 2, np.float32)
    kept = brute_force(x, 1)
    np.testing.assert_array_equal(bits(by_kernel(1, x)), np.where(kept, bits(x), 0))
    assert (bits(by_kernel(1, x)) != np.where(kept[:, ::-1], bits(x), 0)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("width", "k"), [(200, 50), (128, 127)])
def test_rows_equal_the_plain_jax_on_activations(dtype, width, k):
    x = jax.nn.gelu(jax.random.normal(jax.random.key(width), (4, 33, width)) * 3).astype(dtype)
    expected = jnp.where(selection.largest_per_row(x, k), x, jnp.zeros_like(x))
    np.testing.assert_array_equal(bits(by_kernel(k, x)), bits(expected))


@functools.cache
def whole_matrices(axis: int | None):
    """The selection of whole matrices by the kernel, interpreted, compiled once."""

    def run(stack, k):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpu, "by_matrix", functools.partial(tpu.by_matrix, interpret=True))
            patch.setattr(top_k.lax, "platform_dependent", lambda *arrays, tpu, default: tpu(*arrays))
            return top_k._select_by_kernel(stack, k, axis, 2)

    return jax.jit(run)


@given(
    stack=hnp.arrays(
        np.float32, (2, 6, 5), elements=st.floats(-4, 4, width=32).map(lambda v: round(v * 4) / 4)
    ),
    density=st.floats(0, 1),
    axis=st.sampled_from([None, 0, 1]),
)
def test_whole_matrices_keep_what_numpy_keeps(stack, density, axis):
    k = np.array([round(density * 30), round(density * 15)], np.int32)
    selection = whole_matrices(axis)(stack, k)
    assert selection.finite.all()
    for kept, count, w, budget in zip(*selection[:2], stack, k, strict=True):
        expected = reference.keep_top_k(w, int(budget), 0 if axis is None else 2, axis)
        np.testing.assert_array_equal(kept, expected != 0)
        assert int(count) == np.count_nonzero(expected)


@pytest.mark.parametrize("spec", [P("a", None, None), P(None, None, "b"), P("a", None, "b"), P()], ids=str)
def test_rows_over_a_mesh_stay_where_they_are_and_divided_rows_come_together(spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (2, 4, 24))

    @jax.jit
    def run(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return tpu.by_rows(keep(6), x, interpret=True)

    result = run(jax.device_put(x, NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(bits(result), bits(by_kernel(6, x)))
    assert len({str(shard.index) for shard in result.addressable_shards}) == 8


def test_kernels_follow_the_platform_unless_told(monkeypatch):
    monkeypatch.delenv("WSPARSE_TPU_KERNELS", raising=False)
    assert not tpu.available()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert tpu.available()
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "0")
    assert not tpu.available()
    monkeypatch.undo()
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    assert tpu.available()


def test_a_cpu_runs_the_plain_jax_where_kernels_are_forced(monkeypatch):
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    x = jax.random.normal(jax.random.key(0), (4, 32))
    value, pull = jax.vjp(lambda x: top_k.abs_top_k(x, 8), x)
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "0")
    expected, expected_pull = jax.vjp(lambda x: top_k.abs_top_k(x, 8), x)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(pull(x)[0], expected_pull(x)[0])
    assert np.count_nonzero(value) == 32


# Attention --------------------------------------------------------------------------------------------

attend = functools.partial(tpu_attention.attend, interpret=True)


def heads_of(*shape: int, dtype=np.float32) -> list[np.ndarray]:
    """Queries, keys, values and the result's gradient."""
    return [np.asarray(jax.random.normal(jax.random.key(i), shape), dtype) for i in range(4)]


@pytest.mark.parametrize(
    ("time", "heads", "width", "scores"),
    [(128, 8, 16, 1 << 18), (256, 16, 16, 1 << 15), (256, 2, 128, 1 << 18), (128, 32, 4, 1 << 18)],
    ids=["one block", "two blocks of queries, two tiles", "wide heads", "narrow heads"],
)
def test_attention_and_its_gradients_equal_a_float64_reference(monkeypatch, time, heads, width, scores):
    monkeypatch.setattr(tpu_attention, "_SCORES", scores)
    q, k, v, dy = heads_of(2, time, heads, width)
    sink = np.linspace(-3, 3, heads, dtype=np.float32)
    positions = np.broadcast_to(np.arange(time), (2, time))
    y, pull = jax.vjp(attend, q, k, v, sink)
    expected, gradients = reference.attention(q, k, v, sink, positions, dy)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=3e-6)
    for got, wanted in zip(pull(dy), gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    # Negative control: neighboring heads' sinks exchanged.
    other, _ = reference.attention(q, k, v, sink[::-1], positions, dy)
    assert np.abs(other - expected).max() > 1e-2


def test_a_block_of_queries_divides_them_and_its_scores_fit():
    for time in range(128, 8193, 128):
        _, block, grid, _ = tpu_attention._specs((2, time, 256))
        queries = block.block_shape[1]
        assert grid == (2, 2, time // queries) and time % queries == 0
        assert queries == 128 or queries * time <= 1 << 18
    assert tpu_attention._specs((2, 256, 256))[1].block_shape[1] == 256


def test_attention_of_bfloat16_is_as_exact_as_the_plain_jax():
    q, k, v, dy = heads_of(2, 128, 8, 16, dtype=ml_dtypes.bfloat16)
    sink = np.linspace(-3, 3, 8, dtype=np.float32)
    positions = np.broadcast_to(np.arange(128), (2, 128))
    expected, gradients = reference.attention(q, k, v, sink, positions, dy)

    def errors(function):
        y, pull = jax.vjp(function, q, k, v, sink)
        pairs = zip((y, *pull(dy)), (expected, *gradients), strict=True)
        return np.array([np.sqrt(np.mean((np.float64(a) - b) ** 2)) for a, b in pairs])

    assert (errors(attend) <= 1.1 * errors(attention.attend_plainly)).all()


def test_attention_without_a_sink_and_with_large_scores_stays_exact():
    q, k, v, _ = heads_of(1, 128, 8, 16)
    np.testing.assert_allclose(
        attend(30 * q, k, v, None), attention.attend_plainly(30 * q, k, v, None), rtol=1e-4, atol=1e-5
    )


def test_attention_works_under_vmap_and_checkpoint():
    q, k, v, _ = (np.stack([each, 2 * each]) for each in heads_of(1, 128, 8, 16))
    sink = np.zeros(8, np.float32)

    def value(function):
        each = jax.checkpoint(lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v, sink))))
        return jax.value_and_grad(lambda *xs: jnp.sum(jax.vmap(each)(*xs)), argnums=(0, 1, 2))

    got, expected = value(attend)(q, k, v), value(attention.attend_plainly)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize(
    ("batch", "spread"),
    [(4, P(("data", "fsdp"), None, ("tensor",))), (2, P(("data",), None, ("fsdp",)))],
    ids=["all axes", "what divides"],
)
def test_attention_over_a_mesh_has_batches_and_heads_apart(batch, spread):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    q, k, v, dy = heads_of(batch, 128, 16, 16)
    sink = np.linspace(-3, 3, 16, dtype=np.float32)

    def run(q, k, v, sink, dy):
        y, pull = jax.vjp(attend, q, k, v, sink)
        return y, pull(dy)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rows, tiles = tpu.partition(batch, 2, last=("tensor",))
    assert P(rows, None, tiles) == spread
    placed = jax.device_put((q, k, v, sink, dy), NamedSharding(mesh, P()))

    @jax.jit
    def over_mesh(*operands):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*operands)

    got, expected = over_mesh(*placed), jax.jit(run)(q, k, v, sink, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "takes"),
    [
        ((2, 256, 128, 16), jnp.bfloat16, True),
        ((2, 256, 2, 128), jnp.float32, True),
        ((2, 100, 8, 16), jnp.float32, False),
        ((2, 128, 7, 16), jnp.float32, False),
        ((2, 128, 16, 24), jnp.float32, False),
        ((2, 128, 1, 256), jnp.float32, False),
        ((2, 16384, 8, 16), jnp.float32, False),
        ((2, 128, 8, 16), jnp.float16, False),
    ],
)
def test_attention_that_does_not_fit_the_tiles_is_left_to_plain_jax(shape, dtype, takes):
    assert tpu_attention.takes(jax.ShapeDtypeStruct(shape, dtype)) == takes


# Compiled by Mosaic -----------------------------------------------------------------------------------


@pytest.fixture(params=["v5e-1", "v6e-1"])
def compiled(request, monkeypatch):
    """`(function, *shapes) -> parsed program`, compiled for one chip."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    devices = aot.find_target(request.param).devices[:1]
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=devices)

    def compile_for(function, *shapes):
        def traced(*arrays):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arrays)

        place = NamedSharding(mesh, P())
        abstract = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
        return hlo.parse(jax.jit(traced).lower(*abstract).compile().as_text())

    return compile_for


def kernels(program) -> list[str]:
    calls = [each for _, _, _, each in program.walk() if each.op == "custom-call"]
    return [each.name for each in calls if "tpu_custom_call" in each.attributes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_abs_top_k_reads_and_writes_device_memory_once(compiled, dtype):
    shape, size = (64, 8, 2048), 64 * 8 * 2048 * jnp.dtype(dtype).itemsize
    forward = compiled(lambda x: top_k.abs_top_k(x, 512), (shape, dtype))
    assert len(kernels(forward)) == 1
    assert forward.hbm_bytes() == 2 * size

    def backward(kept, gradient):
        return top_k._keep_by_kernel(512, kept, gradient)

    program = compiled(backward, (shape, dtype), (shape, dtype))
    assert len(kernels(program)) == 1
    assert program.hbm_bytes() == 3 * size


def test_any_width_compiles(compiled):
    assert len(kernels(compiled(lambda x: top_k.abs_top_k(x, 25), ((3, 100), jnp.bfloat16)))) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_a_whole_matrix_is_read_once_and_its_mask_written_once(compiled, dtype):
    def project(w, k):
        (selection,) = top_k.select([(w, k, 1)], min_per_neuron=4, replicated=True)
        return selection

    shape = (4, 256, 512)
    program = compiled(project, (shape, dtype), ((4,), jnp.int32))
    assert len(kernels(program)) == 1
    assert not [each for _, _, searching, each in program.walk() if searching]
    entries = 4 * 256 * 512
    floor = entries * (jnp.dtype(dtype).itemsize + 1)
    # The counts of each matrix are a row of lanes; the mask becomes booleans outside.
    assert floor <= program.hbm_bytes() <= floor + 2 * entries + 16 * 1024


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_attention_reads_and_writes_device_memory_once_each_way(compiled, dtype):
    # Channels as the products around attention have them: heads are apart in the tracing alone.
    shape, size = (2, 256, 8 * 128), 2 * 256 * 8 * 128 * jnp.dtype(dtype).itemsize

    def run(q, k, v, sink):
        apart = (jnp.reshape(each, (2, 256, 64, 16)) for each in (q, k, v))
        return jnp.reshape(attention.attend(*apart, sink), shape)

    operands = *((shape, dtype),) * 3, ((64,), jnp.float32)
    forward = compiled(run, *operands)
    assert len(kernels(forward)) == 1
    scores = 2 * 64 * 256 * 256
    assert forward.matmul_flops() == 2 * 2 * scores * 16
    sinks = 4 * 1024
    assert 4 * size <= forward.hbm_bytes() <= 4 * size + 4 * sinks

    def both(dy, *operands):
        y, pull = jax.vjp(run, *operands)
        return y, pull(dy)

    program = compiled(both, (shape, dtype), *operands)
    assert len(kernels(program)) == 2
    assert program.matmul_flops() == (2 + 5) * 2 * scores * 16
    # The gradients of the sinks are a row for each sequence.
    assert 11 * size <= program.hbm_bytes() <= 11 * size + 16 * sinks


@pytest.mark.slow
def test_attention_of_long_sequences_compiles(compiled):
    heads = ((1, 8064, 8, 16), jnp.bfloat16)
    program = compiled(attention.attend, *[heads] * 3, ((8,), jnp.float32))
    assert len(kernels(program)) == 1


def test_attention_that_no_axis_of_the_mesh_divides_compiles(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("WSPARSE_TPU_KERNELS", "1")
    devices = aot.find_target("v5e-4").devices
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    heads = jax.ShapeDtypeStruct((3, 128, 8, 16), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

    @jax.jit
    def run(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention.attend(q, k, v, None)

    assert len(kernels(hlo.parse(run.lower(heads, heads, heads).compile().as_text()))) == 1
