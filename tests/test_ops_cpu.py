"""The CPU kernels: selections equal NumPy's bit for bit, the others a float64 reference within rounding."""

import os
import types

from absl import flags
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from scipy import special

from wsparse import doctor, tasks
from wsparse.config import TrainConfig
from wsparse.interop import parity, published_circuits
from wsparse.ops import attention, cpu, linear, selection, top_k
from wsparse.sparsity import abs_top_k


def brute_force(x: np.ndarray, k: int) -> np.ndarray:
    """The k largest magnitudes of each row; a stable sort breaks ties by the lowest index."""
    size = np.where(np.isnan(x), np.inf, np.abs(x.astype(np.float64)))
    nan_first = np.stack([~np.isnan(x), np.zeros_like(x, bool)])[0]
    order = np.lexsort((np.broadcast_to(np.arange(x.shape[-1]), x.shape), nan_first, -size))
    kept = np.zeros(x.shape, bool)
    np.put_along_axis(kept, order[..., :k], True, axis=-1)
    return kept


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, np.inf, -np.inf, np.nan, 3e38]),
    st.floats(width=32),
)


@given(
    x=hnp.arrays(np.float32, st.tuples(st.just(5), st.sampled_from([1, 3, 16, 37])), elements=VALUES),
    share=st.floats(0.01, 1),
)
def test_the_kernel_selects_what_a_stable_sort_selects(x, share):
    k = max(1, int(share * x.shape[1]))
    kept = np.asarray(jax.jit(cpu.largest_per_row, static_argnums=1)(x, k))
    np.testing.assert_array_equal(kept, brute_force(x, k))
    assert (kept.sum(-1) == k).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("width", "k"), [(128, 32), (512, 128), (200, 199), (64, 1), (96, 40)])
def test_the_kernel_equals_the_plain_jax_on_activations(dtype, width, k):
    x = jax.nn.gelu(jax.random.normal(jax.random.key(width), (4, 33, width)) * 3).astype(dtype)
    expected = selection.largest_along(selection.magnitude_keys(x) + 1, k, -1)
    np.testing.assert_array_equal(cpu.largest_per_row(x, k), expected)
    # Rounding to half precision makes ties, and rows of zeros are nothing but ties.
    zeros = jnp.zeros((2, width), dtype)
    np.testing.assert_array_equal(
        np.asarray(cpu.largest_per_row(zeros, k)), np.broadcast_to(np.arange(width) < k, (2, width))
    )


def test_the_kernel_works_under_vmap_jit_and_scan():
    x = jax.random.normal(jax.random.key(0), (3, 5, 7, 40))
    expected = brute_force(np.asarray(x), 10)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(lambda y: cpu.largest_per_row(y, 10)))(x), expected)
    _, scanned = jax.lax.scan(lambda c, y: (c, cpu.largest_per_row(y, 10)), 0, x)
    np.testing.assert_array_equal(scanned, expected)


def ablated(x, gate, mean, k):
    """Mean ablation of the k largest of each row, in the arithmetic of NumPy."""
    return gate * np.where(brute_force(x, k), x, 0) + (1 - gate) * mean


@given(
    x=hnp.arrays(np.float32, st.tuples(st.just(5), st.sampled_from([1, 16, 37])), elements=VALUES),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_mean_ablation_of_the_largest_equals_numpy_exactly(x, share, seed):
    k = max(1, int(share * x.shape[1]))
    gate = np.random.default_rng(seed).integers(0, 2, x.shape[1]).astype(np.float32)
    mean = draw(seed, x.shape[1])
    got = jax.jit(top_k.ablate_on_cpu(k))(x, gate, mean)
    with np.errstate(invalid="ignore"):
        # Subnormal numbers become 0, as everywhere in XLA.
        np.testing.assert_allclose(got, ablated(x, gate, mean, k), rtol=0, atol=1.2e-38)


@pytest.mark.parametrize(("width", "k"), [(64, 16), (37, 9), (40, 40)])
def test_gradients_of_mean_ablation_equal_a_float64_reference(width, k):
    # Several pieces of rows, the last not whole, and rows with ties at the threshold.
    x, gate, mean = draw(0, 2, 65, width), draw(1, width), draw(2, width)
    x[1] = np.sign(x[1])
    dy = draw(3, *x.shape)
    y, pull = jax.vjp(lambda *each: top_k.ablate_on_cpu(k)(*each), x, gate, mean)
    np.testing.assert_allclose(y, ablated(x, gate, mean, k), rtol=1e-5, atol=1e-6)
    kept = brute_force(x, k)
    wide = np.float64(dy)
    expected = (
        np.where(kept, wide * gate, 0),
        (wide * (np.where(kept, x, 0) - mean)).sum((0, 1)),
        (wide * (1 - gate)).sum((0, 1)),
    )
    for got, wanted in zip(pull(dy), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)


def test_mean_ablation_under_vmap_gives_each_trial_what_it_gets_alone():
    x, gates, means = draw(0, 3, 2, 70, 24), draw(1, 3, 24), draw(2, 24)

    def gradients(x, gate):
        value = lambda x, gate, mean: jnp.sum(jnp.sin(top_k.ablate_on_cpu(6)(x, gate, mean)))
        return jax.grad(value, argnums=(0, 1, 2))(x, gate, means)

    together = jax.jit(jax.vmap(gradients))(x, gates)
    shared = jax.jit(jax.vmap(gradients, (None, 0)))(x[0], gates)
    _, scanned = jax.lax.scan(lambda c, xs: (c, gradients(*xs)), 0, (x, gates))
    for i in range(3):
        alone = jax.jit(gradients)(x[i], gates[i])
        for all_trials in (together, scanned):
            jax.tree.map(
                lambda many, one, i=i: np.testing.assert_allclose(many[i], one, rtol=1e-6, atol=1e-6),
                all_trials,
                alone,
            )
        jax.tree.map(
            lambda many, one, i=i: np.testing.assert_allclose(many[i], one, rtol=1e-6, atol=1e-6),
            shared,
            jax.jit(gradients)(x[0], gates[i]),
        )


@pytest.mark.parametrize(("time", "keys", "width"), [(19, 19, 16), (3, 21, 5), (1, 9, 8), (37, 38, 40)])
def test_attention_and_its_gradients_equal_a_float64_reference(time, keys, width):
    q, dy = draw(0, 2, time, 3, width), draw(1, 2, time, 3, width)
    k, v, sink = draw(2, 2, keys, 3, width), draw(3, 2, keys, 3, width), draw(4, 3)
    positions = np.arange(time)[None] + np.array([[0], [keys - time]])
    y, pull = jax.vjp(lambda *each: attention.attend_on_cpu(*each, jnp.asarray(positions)), q, k, v, sink)
    expected, gradients = reference.attention(q, k, v, sink, positions, dy)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    for got, wanted in zip(pull(dy), gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=5e-6)
    # One key more in sight is another result.
    shifted, _ = reference.attention(q, k, v, sink, positions - 1, dy)
    assert np.abs(shifted - expected).max() > 1e-2


def test_attention_without_a_sink_and_with_large_scores_stays_exact():
    q, k, v = 30 * draw(0, 2, 11, 2, 16), draw(1, 2, 11, 2, 16), draw(2, 2, 11, 2, 16)
    np.testing.assert_allclose(
        attention.attend_on_cpu(q, k, v, None), attention.attend_plainly(q, k, v, None), rtol=1e-4, atol=1e-5
    )
    q[1, 4, 0, 3] = np.nan
    spoilt = np.isnan(attention.attend_on_cpu(q, k, v, None))
    assert spoilt[1, 4, 0].all() and spoilt.sum() == 16


def test_a_key_out_of_sight_has_no_weight_at_all():
    q, k = draw(0, 2, 37, 2, 16), draw(1, 2, 37, 2, 16)
    v = np.zeros_like(q)
    v[:, 20] = 1e30
    y = attention.attend_on_cpu(q, k, v, None)
    assert not y[:, :20].any()
    assert y[:, 20:].all()


def test_attention_works_under_vmap_scan_and_checkpoint():
    q, k, v, sink = (draw(0, 3, 2, 7, 2, 4), draw(1, 2, 7, 2, 4), draw(2, 3, 2, 7, 2, 4), draw(3, 3, 2))

    def value(attend):
        each = jax.checkpoint(lambda q, v, sink: jnp.sum(jnp.sin(attend(q, k, v, sink))))
        return jax.value_and_grad(lambda *xs: jnp.sum(jax.vmap(each)(*xs)), argnums=(0, 1, 2))

    got, expected = (value(attention.attend_on_cpu)(q, v, sink), value(attention.attend_plainly)(q, v, sink))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
    _, scanned = jax.lax.scan(
        lambda c, xs: (c, attention.attend_on_cpu(xs[0], k, xs[1], xs[2])), 0, (q, v, sink)
    )
    np.testing.assert_array_equal(
        scanned, jax.vmap(lambda *xs: attention.attend_on_cpu(xs[0], k, *xs[1:]))(q, v, sink)
    )


def test_gelu_and_its_gradient_equal_a_float64_reference():
    x = np.concatenate([np.linspace(-14, 14, 40_001), [0.0, -0.0, 1e-30, -100, 100]])
    x = x.astype(np.float32)
    exact = x.astype(np.float64)
    share = special.ndtr(exact)
    slope = share + exact * np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    y, pull = jax.vjp(linear.gelu_on_cpu, x)
    np.testing.assert_allclose(y, exact * share, rtol=3e-6, atol=1e-7)
    np.testing.assert_allclose(pull(np.ones_like(x))[0], slope, rtol=3e-6, atol=3e-7)
    assert np.abs(np.asarray(jax.nn.gelu(x, approximate=True)) - exact * share).max() > 1e-4
    assert np.isnan(linear.gelu_on_cpu(jnp.array([jnp.nan]))).all()


def sparse_matrix(seed: int, rows: int, columns: int, density: float) -> np.ndarray:
    keep = np.random.default_rng(seed + 1).random((rows, columns)) < density
    return draw(seed, rows, columns) * keep


@pytest.mark.parametrize("rows", [1, 63, 130])
@pytest.mark.parametrize(
    ("shape", "density"),
    # The last two have more outputs, one of them in its gradient, than are found before they are written.
    [((40, 35), 0.0), ((40, 35), 0.03), ((40, 35), 1.0), ((20, 2067), 0.01), ((1050, 35), 0.01)],
)
def test_products_and_their_gradients_equal_a_float64_reference(rows, shape, density):
    x, w, dy = draw(0, rows, shape[0]), sparse_matrix(1, *shape, density), draw(2, rows, shape[1])
    y, pull = jax.vjp(linear.product, x, w)
    dx, dw = pull(dy)
    wide = [np.asarray(a, np.float64) for a in (x, w, dy)]
    np.testing.assert_allclose(y, wide[0] @ wide[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, wide[2] @ wide[1].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, wide[0].T @ wide[2], rtol=1e-5, atol=1e-5)


def test_products_too_large_for_the_caches_are_whole():
    x, w = draw(0, 8300, 16), sparse_matrix(1, 16, 1040, 0.1)
    assert x.shape[0] * w.shape[1] * 4 > 2**25
    np.testing.assert_allclose(cpu.sparse_product(x, w), x @ w, rtol=1e-5, atol=1e-5)


def test_a_matrix_with_few_nonzeros_is_multiplied_by_its_nonzeros_alone():
    # What meets only zeros is not looked at: infinity leaves no trace there.
    x = np.full((4, 32), np.inf, np.float32)
    x[:, 5] = 2.0
    w = np.zeros((32, 8), np.float32)
    w[5, 3] = 1.5
    product = jax.jit(linear.product)
    np.testing.assert_array_equal(product(x, w), 3.0 * (np.arange(8) == 3) * np.ones((4, 1)))
    w[6] = 1.0
    assert np.count_nonzero(w) < (32 * 8) * cpu.DENSITY_LIMIT
    w[7:15] = 1.0
    assert np.count_nonzero(w) > (32 * 8) * cpu.DENSITY_LIMIT
    assert np.isnan(product(x, w)).any()


@pytest.mark.parametrize("column", [0, 15, 16, 18])
@pytest.mark.parametrize("product", [cpu.sparse_product, cpu.sparse_product_transposed])
def test_a_zero_of_either_sign_is_passed_over_and_nothing_else_is(product, column):
    w = np.full((19, 19), -0.0, np.float32)
    w[::2] = 0.0
    x = np.ones((3, 19), np.float32)
    for value in (np.nan, -np.inf, 1e-30, -2.0):
        w[7, column] = value
        place = 7 if product is cpu.sparse_product_transposed else column
        wanted = np.where(np.arange(19) == place, np.float32(value), 0) * x
        np.testing.assert_array_equal(product(x, w), wanted)
    assert np.count_nonzero(w) == 1
    # Infinity times a zero would leave a trace.
    assert not np.isnan(product(np.full_like(x, np.inf), w)).any()


def test_products_work_under_vmap_of_either_side():
    x, w = draw(0, 3, 5, 40), np.stack([sparse_matrix(i, 40, 35, 0.03) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(linear.product, (0, None))(x, w[0]), x @ w[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(linear.product, (None, 0))(x[0], w), x[0] @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(linear.product)(x, w), x @ w, rtol=1e-5, atol=1e-5)
    gradient = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(linear.product(x, w[0])))))(x)
    np.testing.assert_allclose(gradient, np.cos(x @ w[0]) @ w[0].T, rtol=1e-4, atol=1e-5)


@given(
    keys=hnp.arrays(np.int32, (3, 4, 9), elements=st.integers(-1, 6) | st.integers(1, 0x7F800002)),
    k=hnp.arrays(np.int32, 3, elements=st.integers(-2, 40)),
)
def test_selections_of_matrices_equal_the_plain_jax(keys, k):
    (got,) = cpu.largest_per_matrix([jnp.asarray(keys)], [jnp.asarray(k)])
    order = np.argsort(-keys.reshape(3, -1).astype(np.int64), axis=1, kind="stable")
    rank = np.argsort(order, axis=1).reshape(keys.shape)
    np.testing.assert_array_equal(got, (rank < k[:, None, None]) & (keys > 0))


X, K = np.zeros((2, 5, 3, 8), np.float32), np.zeros((2, 7, 3, 8), np.float32)
POSITIONS, SINKS = np.zeros((2, 5), np.int32), np.zeros(3, np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: cpu.largest_per_row(X, 9),
        lambda: cpu.largest_per_row(X, 0),
        lambda: cpu.largest_per_row(X[0, 0, 0, 0], 1),
        lambda: cpu.largest_per_matrix([POSITIONS], [np.zeros(3, np.int32)]),
        lambda: cpu.ablate(X, X[0, 0, 0, :7], X[0, 0, 0, :7], k=2),
        lambda: cpu.ablate(X, X[0, 0, 0], X[0, 0, 0, :7], k=2),
        lambda: cpu.ablate(X, X[0, 0, 0], X[0, 0, 0], k=9),
        lambda: cpu.ablate_gradient((X, X[0, 0, 0], X[0, 0, 0]), (POSITIONS,), X),
        lambda: cpu.attend(X, K, K[:, :6], SINKS, POSITIONS),
        lambda: cpu.attend(X, K[:1], K[:1], SINKS, POSITIONS),
        lambda: cpu.attend(X, K, K, SINKS[:2], POSITIONS),
        lambda: cpu.attend(X, K, K, SINKS, POSITIONS[:, :4]),
        lambda: cpu.attend(X[..., 0, 0], K, K, SINKS, POSITIONS),
        lambda: cpu.attend_gradient((X, K, K, SINKS, POSITIONS), (X, X[..., :2, 0]), X),
        lambda: cpu.gelu_gradient((X,), (), K),
        lambda: cpu.sparse_product(X[0, 0], K[0, 0]),
        lambda: cpu.sparse_product_transposed(X[0, 0], K[0, 0, :, :7]),
    ],
)
def test_wrong_shapes_at_the_border_of_a_kernel_are_an_error(call):
    with pytest.raises(jax.errors.JaxRuntimeError, match="wsparse: expected"):
        jax.block_until_ready(call())


# Digests of what every kernel gives, on rows enough for several threads.
DIGESTS = """
import hashlib
import jax, numpy as np
from wsparse.ops import cpu
draw = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
x, gate, q = draw(700, 256), draw(256), draw(4, 64, 4, 16)
attention = (q, q, q, draw(4), np.tile(np.arange(64, dtype=np.int32), (4, 1)))
ablated, cuts = cpu.ablate(x, gate, gate, k=64)
y, residuals = cpu.attend(*attention)
w = np.where(draw(256, 300) > 1.5, draw(256, 300), 0)
results = (
    ablated, cpu.ablate_gradient((x, gate, gate), cuts, x), cpu.largest_per_row(x, 64), cpu.gelu(x),
    y, cpu.attend_gradient(attention, residuals, q), cpu.sparse_product(x, w),
)
data = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results))
print(hashlib.sha256(data).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors cannot be chosen")
def test_results_do_not_depend_on_the_number_of_threads():
    digests = []
    for processors in (1, 2):
        # XLA makes a thread for every processor that it may use.
        choice = f"import os\nos.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{processors}])\n"
        done = run_python("-c", choice + DIGESTS)
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout)
    assert digests[0] == digests[1]


# The loss and the gradient's norms of a model whose weights are sparse enough for every kernel.
MODEL_GRADIENT = """
from wsparse import model, sparsity, trees
from wsparse.config import ModelConfig
from wsparse.step import loss
config = ModelConfig(vocab_size=64, context=17, n_layer=3, d_model=32, n_head=2)
params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
params = jax.jit(lambda params: trees.map_with_path(
    lambda path, p: jnp.where(jax.random.uniform(jax.random.key(p.size), p.shape) < 0.05, 8 * p, 0)
    if path.endswith("kernel") else p, params))(params)
window = jax.random.randint(jax.random.key(1), (2, 17), 0, 64)
step = jax.jit(jax.grad(lambda p: loss(p, window, config)[0]))
text = step.lower(params).as_text()
print(*(f"wsparse_{name}" in text for name in ("attend", "attend_gradient", "gelu", "product")))
gradient = trees.flatten(step(params))
print(*(float(jnp.linalg.norm(gradient[path])) for path in sorted(gradient)))
"""

# The same of the gates of a masked model.
MASK_GRADIENT = """
from wsparse import taps
from wsparse.circuits import masks
gates = {n: jnp.full(s, 0.5) for n, s in masks.shapes(config).items()}
means = {n: jnp.full(s, 0.1) for n, s in masks.shapes(config).items()}
masked = lambda g: model.forward(params, window, config, tap=taps.mask(g, means))[0]
step = jax.jit(jax.grad(lambda g: jnp.sum(jnp.sin(masked(g)))))
text = step.lower(gates).as_text()
print(*(f"wsparse_{name}" in text for name in ("ablate", "ablate_gradient")))
gradient = step(gates)
print(*(float(jnp.linalg.norm(gradient[name])) for name in sorted(gradient)))
"""


def test_a_process_with_one_device_uses_the_kernel_and_gets_the_same_numbers():
    program = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from wsparse.ops import cpu\ncpu.enable()\n"
        "from wsparse.sparsity import abs_top_k\n"
        "x = jax.random.normal(jax.random.key(1), (6, 9, 64))\n"
        "f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(abs_top_k(x, 16)))))\n"
        "print(cpu.enabled(), 'wsparse_top_k' in f.lower(x).as_text())\n"
        "value, gradient = f(x)\n"
        "print(float(value), np.asarray(gradient).tobytes().hex())\n" + MODEL_GRADIENT + MASK_GRADIENT
    )
    outputs = []
    for switch in ("1", "0"):
        done = run_python("-c", program, WSPARSE_CPU_KERNELS=switch, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    assert outputs[0][0] == "True True"
    assert outputs[1][0] == "False False"
    assert outputs[0][1].split()[1] == outputs[1][1].split()[1]
    assert (outputs[0][2], outputs[1][2]) == ("True " * 3 + "True", "False " * 3 + "False")
    assert (outputs[0][4], outputs[1][4]) == ("True True", "False False")
    for line in (3, 5):
        norms = [[float(each) for each in lines[line].split()] for lines in outputs]
        np.testing.assert_allclose(*norms, rtol=1e-4)
        assert min(norms[0]) > 1e-6


@pytest.mark.parametrize(
    "run",
    [
        lambda: parity.main([]),
        lambda: published_circuits.main([]),
        lambda: tasks.main([]),
        lambda: doctor.step(TrainConfig()),
    ],
    ids=["parity", "published_circuits", "tasks", "doctor"],
)
def test_commands_that_run_a_model_switch_the_kernels_on_first(run, monkeypatch):
    def enable():
        raise InterruptedError

    monkeypatch.setattr(cpu, "enable", enable)
    monkeypatch.setattr(flags, "FLAGS", types.SimpleNamespace(run="runs/tiny"))
    with pytest.raises(InterruptedError):
        run()


def test_several_devices_keep_to_the_plain_jax():
    assert jax.device_count() == 8
    assert not cpu.enable()
    x = jax.random.normal(jax.random.key(1), (6, 64))
    assert "wsparse_top_k" not in jax.jit(lambda x: abs_top_k(x, 16)).lower(x).as_text()
