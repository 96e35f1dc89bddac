"""Derivatives of functions that a kernel computes: backwards by another kernel, forwards by plain JAX.

A function with `jax.custom_vjp` has no forward-mode derivatives, and `jax.custom_derivatives.linear_call`
cannot be vmapped. Here the tangent of a kernel's result is a primitive that knows its own transpose, so that
`jax.grad`, `jax.jvp`, `jax.linearize` and their compositions work, under `vmap`, `scan` and `checkpoint` too.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import jax.numpy as jnp
import numpy as np

Function = Callable[..., Any]


def differentiable(plain: Function, forward: Function, backward: Function) -> Function:
    """Returns a function computed by `forward` whose reverse-mode derivative is `backward`.

    Args:
      plain: The function in plain JAX, `(*operands) -> result`. Forward-mode and second derivatives are its.
      forward: `(*operands) -> (result, residuals)`, with residuals in a tuple.
      backward: `(operands, residuals, cotangent) -> gradients`, one for each operand of floats, in a tuple.
    """

    def pull(operands, residuals, cotangent):
        return tuple(backward(operands, residuals, cotangent))

    pull = jax.custom_jvp(pull)

    @pull.defjvp
    def _(primals, tangents):
        # Residuals are functions of the operands; the derivative of the plain form accounts for them.
        def gradients(operands, cotangent):
            places = _floats(operands)
            chosen = lambda *floats: plain(*_replace(operands, places, floats))
            return jax.vjp(chosen, *(operands[i] for i in places))[1](cotangent)

        (operands, residuals, cotangent), (d_operands, _, d_cotangent) = primals, tangents
        d_gradients = jax.jvp(gradients, (operands, cotangent), (d_operands, d_cotangent))[1]
        return pull(operands, residuals, cotangent), d_gradients

    @jax.custom_jvp
    def call(*operands):
        return forward(*operands)

    def rule(operands, tangents):
        result, residuals = call(*operands)
        varied = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))

        def push(saved, *directions):
            operands, _ = saved
            chosen = lambda *floats: plain(*_replace(operands, varied, floats))
            return (jax.jvp(chosen, tuple(operands[i] for i in varied), directions)[1],)

        def transpose(saved, cotangent):
            operands, residuals = saved
            gradients = dict(zip(_floats(operands), pull(operands, residuals, cotangent), strict=True))
            return tuple(gradients[i] for i in varied)

        directions = [tangents[i] for i in varied]
        (tangent,) = linear_map(push, transpose, (operands, residuals), *directions)
        return (result, residuals), (tangent, jax.tree.map(_zero_tangent, residuals))

    call.defjvp(rule, symbolic_zeros=True)
    return lambda *operands: call(*operands)[0]


def _floats(operands: tuple[jax.Array, ...]) -> list[int]:
    """Returns the places of the operands of floats."""
    return [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]


def _replace(operands, places, values):
    replaced = dict(zip(places, values, strict=True))
    return tuple(replaced.get(i, x) for i, x in enumerate(operands))


def linear_map(
    function: Function, transpose: Function, residuals: Any, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns `function(residuals, *operands)`, a tuple, linear in the operands.

    Args:
      function: The map.
      transpose: `(residuals, *cotangents)` -> a tuple of cotangents of the operands.
      residuals: Arrays in any structure, in which both need not be linear.
      *operands: Arrays of floats.
    """
    leaves, tree = jax.tree.flatten(residuals)
    flat = {"function": _Flat(function, tree), "transpose": _Flat(transpose, tree)}
    return tuple(_linear_map.bind(*leaves, *operands, **flat, n_residuals=len(leaves)))


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A function of residuals and operands as one of flat arguments."""

    function: Function
    tree: Any

    def __call__(self, *arguments):
        n = self.tree.num_leaves
        return self.function(jax.tree.unflatten(self.tree, arguments[:n]), *arguments[n:])


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A flat function over a leading axis: of the residuals that have one, and of all operands."""

    function: Function
    axes: tuple[int | None, ...]

    def __call__(self, *arguments):
        operands = len(arguments) - len(self.axes)
        return jax.vmap(self.function, (*self.axes, *(0,) * operands))(*arguments)


_linear_map = Primitive("wsparse_linear_map")
_linear_map.multiple_results = True


def _apply(*arguments, function, transpose, n_residuals):
    del transpose, n_residuals
    return list(function(*arguments))


def _abstract(*arguments, function, transpose, n_residuals):
    del transpose, n_residuals
    return jax.make_jaxpr(function)(*arguments).out_avals


def _jvp(primals, tangents, *, function, transpose, n_residuals):
    options = {"function": function, "transpose": transpose, "n_residuals": n_residuals}
    results = _linear_map.bind(*primals, **options)
    if all(type(t) is ad.Zero for t in tangents[:n_residuals]):
        operands = [ad.instantiate_zeros(t) for t in tangents[n_residuals:]]
        return results, _linear_map.bind(*primals[:n_residuals], *operands, **options)
    tangents = tuple(
        _zero_tangent(x) if type(t) is ad.Zero else t for x, t in zip(primals, tangents, strict=True)
    )
    return results, list(jax.jvp(function, tuple(primals), tangents)[1])


def _zero_tangent(x):
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros_like(x) if floats else np.zeros(x.shape, jax.dtypes.float0)


def _transpose(cotangents, *arguments, function, transpose, n_residuals):
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    residuals, operands = arguments[:n_residuals], arguments[n_residuals:]
    gradients = _linear_map.bind(
        *residuals, *cotangents, function=transpose, transpose=function, n_residuals=n_residuals
    )
    linear = map(ad.is_undefined_primal, operands)
    return [None] * n_residuals + [
        gradient if undefined else None for gradient, undefined in zip(gradients, linear, strict=True)
    ]


def _batch(arguments, axes, *, function, transpose, n_residuals):
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    moved = []
    for i, (x, axis) in enumerate(zip(arguments, axes, strict=True)):
        if axis is not None:
            x = jnp.moveaxis(x, axis, 0)
        elif i >= n_residuals:
            x = jnp.broadcast_to(x[None], (size, *x.shape))
        moved.append(x)
    of_residuals = tuple(None if axis is None else 0 for axis in axes[:n_residuals])
    results = _linear_map.bind(
        *moved,
        function=_Batched(function, of_residuals),
        transpose=_Batched(transpose, of_residuals),
        n_residuals=n_residuals,
    )
    return results, [0] * len(results)


_linear_map.def_impl(_apply)
_linear_map.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_map] = _jvp
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
mlir.register_lowering(_linear_map, mlir.lower_fun(_apply, multiple_results=True))
