"""The CPU kernel selects bit for bit what NumPy and the plain JAX select."""

import os
import pathlib
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse.kernels import cpu
from wsparse.sparsity import abs_top_k, magnitude

pytest.importorskip("numba")

REPO = pathlib.Path(__file__).parents[1]


def brute_force(x: np.ndarray, k: int) -> np.ndarray:
    """The k largest magnitudes of each row; a stable sort breaks ties by the lowest index."""
    size = np.where(np.isnan(x), np.inf, np.abs(x.astype(np.float64)))
    nan_first = np.stack([~np.isnan(x), np.zeros_like(x, bool)])[0]
    order = np.lexsort((np.broadcast_to(np.arange(x.shape[-1]), x.shape), nan_first, -size))
    kept = np.zeros(x.shape, bool)
    np.put_along_axis(kept, order[..., :k], True, axis=-1)
    return kept


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, np.inf, -np.inf, np.nan, 3e38]),
    st.floats(width=32),
)


@given(
    x=hnp.arrays(
        np.float32, st.tuples(st.just(5), st.sampled_from([1, 3, 16, 37])), elements=VALUES
    ),
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
    expected = magnitude.largest_along(magnitude.magnitude_keys(x) + 1, k, -1)
    np.testing.assert_array_equal(cpu.largest_per_row(x, k), expected)
    # Rounding to half precision makes ties, and rows of zeros are nothing but ties.
    zeros = jnp.zeros((2, width), dtype)
    np.testing.assert_array_equal(
        np.asarray(cpu.largest_per_row(zeros, k)), np.broadcast_to(np.arange(width) < k, (2, width))
    )


def test_the_kernel_works_under_vmap_jit_and_scan():
    x = jax.random.normal(jax.random.key(0), (3, 5, 7, 40))
    expected = brute_force(np.asarray(x), 10)
    np.testing.assert_array_equal(
        jax.vmap(jax.vmap(lambda y: cpu.largest_per_row(y, 10)))(x), expected
    )
    _, scanned = jax.lax.scan(lambda c, y: (c, cpu.largest_per_row(y, 10)), 0, x)
    np.testing.assert_array_equal(scanned, expected)


def test_a_process_with_one_device_uses_the_kernel_and_gets_the_same_numbers():
    program = (
        "import jax, jax.numpy as jnp, numpy as np\n"
        "from wsparse.kernels import cpu\n"
        "from wsparse.sparsity import abs_top_k\n"
        "x = jax.random.normal(jax.random.key(1), (6, 9, 64))\n"
        "f = jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(abs_top_k(x, 16)))))\n"
        "print(cpu.available(), 'wsparse_largest_per_row' in f.lower(x).as_text())\n"
        "value, gradient = f(x)\n"
        "print(float(value), np.asarray(gradient).tobytes().hex())\n"
    )
    outputs = []
    for switch in ("1", "0"):
        environment = os.environ | {
            "XLA_FLAGS": "",
            "WSPARSE_CPU_KERNELS": switch,
            "PYTHONPATH": str(REPO),
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout.splitlines())
    assert outputs[0][0] == "True True"
    assert outputs[1][0] == "False False"
    assert outputs[0][1].split()[1] == outputs[1][1].split()[1]


def test_several_devices_keep_to_the_plain_jax():
    assert jax.device_count() == 8
    assert not cpu.available()
    x = jax.random.normal(jax.random.key(1), (6, 64))
    assert "wsparse_largest_per_row" not in jax.jit(lambda x: abs_top_k(x, 16)).lower(x).as_text()
