"""Derivatives of what kernels compute: forward mode and second derivatives equal those of plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse.ops import attention, linear, top_k


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain_product(x, w):
    return x @ w


def sparse(seed, *shape):
    return jnp.where(draw(seed, *shape) > 1.9, draw(seed + 1, *shape), 0)


# Kernel, the same in plain JAX, operands.
CASES = {
    "gelu": (linear.gelu_on_cpu, functools.partial(jax.nn.gelu, approximate=False), (3 * draw(0, 4, 5),)),
    "sparse product": (linear.product, plain_product, (draw(0, 6, 40), sparse(1, 40, 30))),
    "dense product": (linear.product, plain_product, (draw(0, 6, 7), draw(1, 7, 5))),
    "ablation": (
        top_k.ablate_on_cpu(3),
        functools.partial(top_k.ablate_largest, k=3),
        (draw(0, 2, 3, 8), draw(1, 8), draw(2, 8)),
    ),
    "attention": (
        attention.attend_on_cpu,
        attention.attend_plainly,
        (draw(0, 2, 5, 2, 4), draw(1, 2, 5, 2, 4), draw(2, 2, 5, 2, 4), draw(3, 2)),
    ),
}


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.fixture(params=CASES)
def case(request):
    kernel, plain, operands = CASES[request.param]
    tangents = tuple(draw(10 + i, *x.shape) for i, x in enumerate(operands))
    return kernel, plain, operands, tangents


def test_forward_mode_equals_plain_jax(case):
    kernel, plain, operands, tangents = case
    close(jax.jit(lambda *xs: jax.jvp(kernel, xs, tangents))(*operands), jax.jvp(plain, operands, tangents))
    # A direction in one operand alone is another derivative.
    value, linear_part = jax.linearize(lambda x: kernel(x, *operands[1:]), operands[0])
    expected = jax.jvp(lambda x: plain(x, *operands[1:]), operands[:1], tangents[:1])
    close((value, linear_part(tangents[0])), expected)


def scalar(function):
    return lambda *xs: jnp.sum(jnp.sin(function(*xs)))


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_equal_plain_jax(case, order):
    kernel, plain, operands, tangents = case
    every = tuple(range(len(operands)))

    def second(function, xs):
        gradient = jax.grad(scalar(function), argnums=every)
        if order == "forward over reverse":
            return jax.jvp(gradient, xs, tangents)
        along = lambda *xs: sum(map(jnp.vdot, gradient(*xs), tangents))
        return jax.grad(along, argnums=every)(*xs)

    close(jax.jit(lambda *xs: second(kernel, xs))(*operands), second(plain, operands))


def test_gradients_are_the_kernels_under_vmap_scan_and_checkpoint(case):
    kernel, plain, operands, _ = case
    first = jnp.stack([operands[0], 2 * operands[0], -operands[0]])

    def gradients(function):
        value = jax.checkpoint(lambda x: scalar(function)(x, *operands[1:]))
        mapped = lambda xs: jnp.sum(jax.vmap(value)(xs))
        scanned = lambda xs: jax.lax.scan(lambda c, x: (c + value(x), None), 0.0, xs)[0]
        # Trials, each with its own gradients of everything.
        inside = jax.vmap(
            jax.grad(scalar(function), argnums=tuple(range(len(operands)))),
            (0, *(None,) * (len(operands) - 1)),
        )
        return lambda xs: (jax.grad(mapped)(xs), jax.grad(scanned)(xs), inside(xs, *operands[1:]))

    close(jax.jit(gradients(kernel))(first), gradients(plain)(first))


def test_reverse_mode_calls_the_kernel_of_the_gradient():
    for name, kernel in (("attend", "attention"), ("gelu", "gelu"), ("ablate", "ablation")):
        function, _, operands = CASES[kernel][0], *CASES[kernel][1:]
        text = jax.jit(jax.grad(scalar(function))).lower(*operands).as_text()
        assert f"wsparse_{name}_gradient" in text
        # The plain form's gradient is not beside it.
        assert "dot_general" not in text
