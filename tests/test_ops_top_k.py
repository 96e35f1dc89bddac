"""Selection is exact: compared bit by bit with a stable sort in NumPy, whatever the dtype and layout."""

import functools

from helpers import assert_bitwise
from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import reference

from wsparse.errors import UserError
from wsparse.ops import selection
from wsparse.sparsity import abs_top_k, keep_top_k

DTYPES = ("float32", "bfloat16", "float16", "float64")


def bits(array) -> np.ndarray:
    """The array's bytes as integers: equal only for equal bit patterns, -0.0 and subnormals included."""
    array = np.asarray(array)
    return array.view(f"uint{8 * array.dtype.itemsize}")


@functools.cache
def compiled_keep(floor: int, axis: int | None):
    """`keep_top_k` with k traced: one compilation for each shape and dtype."""
    return jax.jit(functools.partial(keep_top_k, min_per_neuron=floor, neuron_axis=axis))


def run_keep(w: np.ndarray, k: int, floor: int = 0, axis: int | None = None) -> np.ndarray:
    with jax.enable_x64(w.dtype == np.float64):
        return np.asarray(compiled_keep(floor, axis)(w, np.int32(k)))


def dtype_of(name: str) -> np.dtype:
    return np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name)


@st.composite
def finite(draw, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Finite numbers of every kind, by bit pattern, with plenty of ties, zeros and subnormals."""
    kind = dtype_of(dtype)
    width, info = 8 * kind.itemsize, jnp.finfo(kind)
    size = int(np.prod(shape))
    common = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, float(info.tiny), float(info.max)]
    special = np.array(common, np.float64).astype(kind)
    patterns = [*(int(v) for v in bits(special)), 1, 2, (1 << (width - 1)) + 1]
    pool = draw(st.lists(st.sampled_from(patterns), min_size=1, max_size=4))
    one = st.sampled_from(pool) if draw(st.booleans()) else st.integers(0, 2**width - 1)
    drawn = np.array(draw(st.lists(one, min_size=size, max_size=size)), f"uint{width}")
    # By bits: a signalling NaN in bfloat16 makes NumPy's isfinite warn.
    infinity, one_bits = bits(np.array([np.inf, 1.0], np.float64).astype(kind))
    is_finite = (drawn & infinity) != infinity
    return np.where(is_finite, drawn, one_bits).astype(drawn.dtype).view(kind).reshape(shape)


def seeded(shape, seed=0, *, levels: int = 7, dtype="float32") -> np.ndarray:
    """Few distinct magnitudes, both signs, some zeros: ties everywhere."""
    random = np.random.default_rng(seed)
    values = random.integers(0, levels, shape) * random.choice([-1.0, 1.0], shape)
    return values.astype(dtype_of(dtype))


# keep_top_k -----------------------------------------------------------------------------------------


FLOORS = ((0, None), (1, 0), (3, 1), (9, -1))


@given(finite((4, 6)), st.integers(-1, 27), st.sampled_from(FLOORS))
@example(np.zeros((4, 6), np.float32), 5, (3, 1))
@example(np.full((4, 6), -0.0, np.float32), 24, (9, -1))
@example(np.full((4, 6), 3.0, np.float32), 7, (1, 0))
@example(np.full((4, 6), 1e-45, np.float32), 7, (9, -1))
@settings(max_examples=60)
def test_a_matrix_keeps_what_a_stable_sort_keeps(w, k, floor):
    assert_bitwise(run_keep(w, k, *floor), reference.keep_top_k(w, k, *floor))


@given(finite((9,)), st.integers(0, 10), st.sampled_from([(0, None), (1, 0)]))
def test_a_vector_keeps_what_a_stable_sort_keeps(w, k, floor_and_axis):
    assert_bitwise(run_keep(w, k, *floor_and_axis), reference.keep_top_k(w, k, *floor_and_axis))


@given(finite((2, 3, 4)), st.integers(0, 25), st.sampled_from([None, 0, 1, 2]))
def test_three_axes_keep_what_a_stable_sort_keeps(w, k, axis):
    assert_bitwise(run_keep(w, k, 2, axis), reference.keep_top_k(w, k, 2, axis))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@given(data=st.data(), k=st.integers(0, 16), floored=st.booleans())
def test_other_dtypes_keep_what_a_stable_sort_keeps(dtype, data, k, floored):
    w = data.draw(finite((3, 5), dtype))
    floor = (2, 1) if floored else (0, None)
    assert_bitwise(run_keep(w, k, *floor), reference.keep_top_k(w, k, *floor))


@given(finite((4, 6)), st.integers(0, 25), st.sampled_from([(0, None), (3, 1)]))
def test_the_count_is_the_budget_or_the_floor(w, k, floor):
    kept = np.count_nonzero(run_keep(w, k, *floor))
    available = np.count_nonzero(w)
    protected = np.minimum(np.count_nonzero(w, axis=0), floor[0]).sum()
    assert kept == max(min(k, available), protected)


def test_subnormals_are_selected_by_their_bits():
    w = np.array([3, 0, -5, 1, 4], np.int32) * np.float32(1.4e-45)
    got = run_keep(w, 2)
    assert_bitwise(got, np.where([False, False, True, False, True], w, np.float32(0)))
    assert np.count_nonzero(got) == 2


def test_dropped_and_negative_zeros_become_positive_zero():
    assert_bitwise(run_keep(np.array([-0.0, -1.0, -2.0], np.float32), 1), np.array([0, 0, -2], np.float32))


def test_k_may_be_static():
    w = seeded((5, 8))
    static = jax.jit(lambda w: keep_top_k(w, 9, min_per_neuron=1, neuron_axis=0))
    assert_bitwise(static(w), reference.keep_top_k(w, 9, 1, 0))


def test_one_compilation_serves_every_k(compilations):
    w, budgets = jnp.array(seeded((6, 7))), [np.int32(k) for k in range(0, 43, 6)]
    keep = jax.jit(keep_top_k)
    with compilations() as names:
        results = [keep(w, k) for k in budgets]
    assert len(names) == 1, names
    assert [int(np.count_nonzero(r)) for r in results] == [min(int(k), np.count_nonzero(w)) for k in budgets]


@pytest.mark.parametrize("axis", [0, 1])
def test_more_protected_entries_than_budget_keeps_exactly_the_protected(axis):
    w = seeded((6, 8), 3, levels=50)
    w[w == 0] = 1
    got = run_keep(w, 2, 2, axis)
    assert_bitwise(got, reference.keep_top_k(w, 2, 2, axis))
    assert (np.count_nonzero(got, axis=1 - axis) == 2).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_neuron_with_few_nonzeros_keeps_them_and_gains_none(axis):
    w = seeded((6, 8), 4, levels=50)
    w[w == 0] = 1
    poor = (2, slice(None)) if axis == 0 else (slice(None), 2)
    w[poor] = 0
    w[2, 2] = 1e-3  # the smallest entry of the matrix, and all its neuron has
    for k in (0, 20, 40):
        got = run_keep(w, k, 3, axis)
        assert_bitwise(got, reference.keep_top_k(w, k, 3, axis))
        assert got[2, 2] == w[2, 2]
        assert np.count_nonzero(got[poor]) == 1


def test_the_neuron_axis_matters():
    """Negative control: the two axes, and no floor at all, protect different entries."""
    w = seeded((6, 8), 5, levels=1000)
    kept = [run_keep(w, 20, floor, axis) for floor, axis in [(3, 0), (3, 1), (0, None)]]
    assert len({array.tobytes() for array in kept}) == 3


def test_thresholding_would_keep_too_many():
    """Negative control: the data of these tests separates an exact selection from a threshold."""
    w = seeded((6, 8), 6)
    threshold = np.sort(np.abs(w).ravel())[-11]
    assert np.count_nonzero(np.where(np.abs(w) >= threshold, w, 0)) > 11
    assert np.count_nonzero(run_keep(w, 11)) == 11


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_with_nan_or_infinity_comes_back_as_all_nan(bad, dtype):
    w = seeded((4, 6), 7, dtype=dtype)
    assert np.isfinite(run_keep(w, 3, 2, 1).astype(np.float64)).all()
    w[1, 2] = bad
    for k in (0, 3, 24):
        assert np.isnan(run_keep(w, k, 2, 1).astype(np.float64)).all()


def test_under_vmap_every_matrix_has_its_own_budget():
    w = np.stack([seeded((5, 7), seed) for seed in range(4)])
    w[3, 1, 1] = np.nan
    budgets = np.array([0, 3, 40, 8], np.int32)
    both = jax.jit(jax.vmap(functools.partial(keep_top_k, min_per_neuron=1, neuron_axis=1)))
    got = np.asarray(both(w, budgets))
    for i in range(3):
        assert_bitwise(got[i], reference.keep_top_k(w[i], int(budgets[i]), 1, 1))
    assert np.isnan(got[3]).all()
    one_matrix = jax.jit(jax.vmap(keep_top_k, in_axes=(None, 0)))(w[0], budgets)
    for i, k in enumerate(budgets):
        assert_bitwise(np.asarray(one_matrix)[i], reference.keep_top_k(w[0], int(k)))


@functools.cache
def mesh(*shape: int) -> jax.sharding.Mesh:
    names = ("x", "y")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize(
    ("shape", "spec", "floor"),
    [
        ((8,), P("x", None), (2, 1)),
        ((8,), P(None, "x"), (2, 1)),
        ((2, 4), P("x", "y"), (0, None)),
        ((2, 4), P("x", "y"), (2, 0)),
        ((4, 2), P("y", "x"), (2, 1)),
        ((2, 4), P(("x", "y"), None), (2, 0)),
        ((2, 4), P(None, ("x", "y")), (2, 0)),
        ((2, 4), P("y", None), (2, 1)),
    ],
    ids=str,
)
def test_a_sharded_matrix_keeps_the_same_bits_as_on_one_device(shape, spec, floor):
    w = seeded((16, 24), 8)
    sharding = NamedSharding(mesh(*shape), spec)
    placed = jax.device_put(w, sharding)
    for k in (0, 5, 100):
        got = compiled_keep(*floor)(placed, np.int32(k))
        assert len(got.sharding.device_set) == 8
        assert_bitwise(np.asarray(got), reference.keep_top_k(w, k, *floor))


def test_nan_on_one_device_poisons_the_matrix_on_all():
    w = seeded((16, 24), 9)
    w[15, 23] = np.nan
    placed = jax.device_put(w, NamedSharding(mesh(2, 4), P("x", "y")))
    assert np.isnan(np.asarray(compiled_keep(0, None)(placed, np.int32(5)))).all()


@pytest.mark.parametrize("axis", [2, -3])
def test_a_neuron_axis_that_is_not_there_is_refused(axis):
    with pytest.raises(UserError, match=rf"axis of an array of shape \(3, 4\), got {axis}"):
        keep_top_k(jnp.ones((3, 4)), 2, min_per_neuron=1, neuron_axis=axis)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="got dtype int32"):
        keep_top_k(jnp.ones((3, 4), jnp.int32), 2)


# abs_top_k ------------------------------------------------------------------------------------------


def reference_mask(x: np.ndarray, k: int) -> np.ndarray:
    """Exactly k of each row, zeros included."""
    rows = np.abs(x.astype(np.float64)).reshape(-1, x.shape[-1])
    return np.array([reference.largest(row, k) for row in rows], bool).reshape(x.shape)


@functools.cache
def compiled_abs(k: int):
    """Values and the gradient of the sum: which entries are kept, kept zeros included."""

    def run(x):
        y, pull = jax.vjp(lambda x: abs_top_k(x, k), x)
        return y, pull(jnp.ones_like(y))[0]

    return jax.jit(run)


def check_abs(x: np.ndarray, k: int) -> None:
    with jax.enable_x64(x.dtype == np.float64):
        values, gradient = map(np.asarray, compiled_abs(k)(x))
    mask = reference_mask(x, k)
    assert_bitwise(values, np.where(mask, x, np.zeros((), x.dtype)))
    np.testing.assert_array_equal(gradient.astype(np.float64), mask)
    assert (gradient != 0).sum(-1).tolist() == np.full(x.shape[:-1], k).tolist()


@given(finite((3, 7)), st.sampled_from([0, 1, 3, 6, 7]))
@example(np.zeros((3, 7), np.float32), 3)
@example(np.full((3, 7), -2.0, np.float32), 3)
@example(np.full((3, 7), -1e-45, np.float32), 6)
def test_exactly_k_channels_stay_and_only_they_have_gradient(x, k):
    check_abs(x, k)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@given(data=st.data())
def test_other_dtypes_keep_exactly_k_channels(dtype, data):
    check_abs(data.draw(finite((3, 5), dtype)), 2)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@given(data=st.data())
def test_the_way_of_gpus_keeps_the_same_channels(dtype, data):
    x = data.draw(finite((3, 7), dtype))
    for k in (1, 3, 7):
        np.testing.assert_array_equal(selection.largest_per_row_sorted(x, k), reference_mask(x, k))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 2, 6)])
def test_the_last_axis_is_selected_from_whatever_comes_before(shape):
    check_abs(seeded(shape, 1, levels=3), 2)


def test_zeros_are_kept_lowest_index_first_so_that_they_can_wake():
    _, gradient = compiled_abs(3)(np.array([0.0, 5.0, -0.0, 0.0, 0.0], np.float32))
    assert gradient.tolist() == [1, 1, 1, 0, 0]


def test_abs_top_k_under_vmap_is_abs_top_k_of_each_row():
    x = seeded((4, 5, 6), 2)
    got = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda row: abs_top_k(row, 2))))(x))
    assert_bitwise(got, np.where(reference_mask(x, 2), x, np.float32(0)))


def test_gradient_through_a_scan_of_abs_top_k():
    """Against the chain rule by hand in float64, with the masks of the stable sort."""
    random = np.random.default_rng(0)
    w_LNN, x0 = random.normal(size=(4, 6, 6)), random.normal(size=(3, 6))

    def loss(w_LNN, x):
        y, _ = lax.scan(lambda x, w: (abs_top_k(x @ w, 2), None), x, w_LNN)
        return jnp.sum(jnp.square(y))

    with jax.enable_x64(True):
        grad_w, grad_x = map(np.asarray, jax.jit(jax.grad(loss, argnums=(0, 1)))(w_LNN, x0))

    xs, masks = [x0], []
    for w in w_LNN:
        y = xs[-1] @ w
        masks.append(reference_mask(y, 2))
        xs.append(np.where(masks[-1], y, 0))
    back, want = 2 * xs[-1], []
    for w, mask, x in zip(w_LNN[::-1], masks[::-1], xs[-2::-1], strict=True):
        back = np.where(mask, back, 0)
        want.append(x.T @ back)
        back = back @ w.T
    np.testing.assert_allclose(grad_w, want[::-1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad_x, back, rtol=1e-12, atol=1e-12)
    assert np.abs(back).max() > 0


def test_abs_top_k_on_sharded_channels_is_bitwise_that_of_one_device():
    x = seeded((8, 16), 3)
    for spec in (P("x", "y"), P(None, ("x", "y"))):
        values, _ = compiled_abs(5)(jax.device_put(x, NamedSharding(mesh(2, 4), spec)))
        assert_bitwise(np.asarray(values), np.where(reference_mask(x, 5), x, np.float32(0)))


@pytest.mark.parametrize("k", [-1, 5])
def test_abs_top_k_refuses_a_k_out_of_range(k):
    with pytest.raises(UserError, match=f"between 0 and 4 of 4 channels, got k={k}"):
        abs_top_k(jnp.ones((2, 4)), k)
