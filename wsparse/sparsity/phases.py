"""Support phases: between exploration steps only the weights that are not zero are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wsparse import trees
from wsparse.sparsity.project import DEFAULT_RULES, Dense, Sparse


class SupportPhasesState(NamedTuple):
    """State of `support_phases`.

    Attributes:
      count: Number of updates so far, int32.
      inner: State of the transform.
    """

    count: jax.Array
    inner: Any


def support_phases(
    transform: optax.GradientTransformationExtraArgs,
    every: int | Callable[[jax.Array], jax.Array],
    *,
    rules: trees.Rules[Sparse | Dense] = DEFAULT_RULES,
) -> optax.GradientTransformationExtraArgs:
    """Freeze the support of projected parameters between exploration steps.

    In an exploration step, the first of which is the first update, the transform sees all gradients, and
    weights can enter and leave. In between, an entry that is zero has no gradient and stays zero. The parts
    of the transform learn of it by two keyword arguments of `update`:

    - `explore`: a bool scalar, whether this is an exploration step;
    - `support`: bools like the parameters, true for the entries that are trained in this step.

    `scale_by_gradient_rms` keeps the scale of the last exploration step, `resting_moments` the moments of
    absent entries, and `project_top_k` the support. Adam's moments of an entry that enters are set to zero:
    they are those of exploration steps alone, some of them long past.

    `update` takes `frozen=True` where the caller knows that this is not an exploration step; parameters,
    updates and moments may then be packed (`wsparse.sparsity.frozen`).

    Args:
      transform: Chain of transforms to wrap.
      every: Updates from one exploration step to the next, where 1 means that every step explores; or whether
        an update explores, as a function of the number of those before it.
      rules: Table of the projected parameters; all entries of the others are trained in every step.
    """

    def init(params):
        return SupportPhasesState(jnp.zeros((), jnp.int32), transform.init(params))

    def update(updates, state, params=None, *, frozen: bool = False, **extra: Any):
        explores = every(state.count) if callable(every) else state.count % every == 0
        explore = False if frozen else explores

        def trained(path, param):
            if isinstance(trees.match(rules, path), Dense):
                return jnp.ones(param.shape, bool)
            return explore | (param != 0)

        support = trees.map_with_path(trained, params)
        gradients = jax.tree.map(lambda u, s: jnp.where(s, u, 0), updates, support)
        new, inner = transform.update(
            gradients, state.inner, params, explore=explore, support=support, **extra
        )

        def enters(path, param, update):
            if isinstance(trees.match(rules, path), Dense):
                return jnp.zeros(param.shape, bool)
            return explore & (param == 0) & (update != 0)

        if every != 1 and not frozen:
            inner = _without_moments(inner, trees.map_with_path(enters, params, new))
        return new, SupportPhasesState(jnp.asarray(optax.safe_increment(state.count)), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _without_moments(state: Any, entering: Any) -> Any:
    """Returns the state of a chain with the moments of Adam, where it has any, zero where `entering`."""
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state, name)
        if moments is not None:
            fresh = jax.tree.map(lambda m, e: jnp.where(e, 0, m).astype(m.dtype), moments, entering)
            state = optax.tree_utils.tree_set(state, **{name: fresh})
    return state


def resting_moments(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let the moments of `optax.scale_by_adam` rest where `support` is false, see `support_phases`."""

    def update(updates, state, params=None, *, support=None, **extra: Any):
        del extra
        new_updates, new_state = adam.update(updates, state, params)
        if support is not None:
            moments = {
                name: jax.tree.map(jnp.where, support, getattr(new_state, name), getattr(state, name))
                for name in ("mu", "nu")
            }
            new_state = new_state._replace(**moments)  # pyrefly: ignore
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(adam.init, update)
