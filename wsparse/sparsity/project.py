"""The projection as an optax transform: after every update, each matrix keeps its top-k entries."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from wsparse import trees
from wsparse.config import SparsityConfig
from wsparse.errors import UserError, closest
from wsparse.nodes import CONNECTIONS
from wsparse.ops import selection
from wsparse.ops.top_k import Job, Selection, select


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A parameter that is projected.

    Attributes:
      neuron_axis: Axis of one matrix that indexes MLP neurons or attention channels (the side that is
        not the residual stream's); None for no floor per neuron.
      stacked: Whether the leading axis stacks layers, each a matrix of its own.
    """

    neuron_axis: int | None = None
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Dense:
    """A parameter that is never projected."""


# The embeddings, every matrix and every bias share one density; gains, sinks, the fixed tables and the
# bigram table stay dense (Gao et al. 2025). Strict: a parameter that is not mentioned is an error.
MODEL_RULES: trees.Rules[Sparse | Dense] = (
    (r"(.*/)?(gain|sink|bigram|logits_bias|sinusoids)", Dense()),
    (r"(.*/)?(\w+_)?norm/bias", Dense()),
    *((c.kernel, Sparse(neuron_axis=c.neuron_axis, stacked=True)) for c in CONNECTIONS),
    *((c.bias, Sparse(stacked=True)) for c in CONNECTIONS),
    (r"embed/(tokens|positions)|head/unembed", Sparse()),
)

# The same for models of this library; other trees are projected leaf by leaf, without a floor.
DEFAULT_RULES = (*MODEL_RULES, (r"blocks/.*", Sparse(stacked=True)), (r".*", Sparse()))


class ProjectTopKState(NamedTuple):
    """State of `project_top_k`.

    Attributes:
      count: Number of updates so far, int32.
      nonzeros: Path -> int32 `(G,)`, the nonzeros of each matrix of the parameter.
      finite: Path -> bool `(G,)`, false for a matrix that holds NaN or infinity.
    """

    count: jax.Array
    nonzeros: dict[str, jax.Array]
    finite: dict[str, jax.Array]


def budget(density: jax.Array | float, size: int) -> jax.Array:
    """Returns `round(density * size)`, half to even, as int32; `density` may be traced."""
    if isinstance(density, float):
        return jnp.int32(round(density * size))
    return jnp.round(density * size).astype(jnp.int32)


class FinalBudget(NamedTuple):
    """What the final density leaves of each matrix of a parameter.

    Attributes:
      shape: Shape of one matrix.
      density: Its final density.
      k: Nonzeros by the density alone.
      floor: Nonzeros of a matrix in which each neuron has its least number; 0 without a floor.
    """

    shape: tuple[int, ...]
    density: float
    k: int
    floor: int


def final_budgets(config: SparsityConfig, params: Any) -> dict[str, FinalBudget]:
    """Returns the budgets of the projected parameters of a model at the end of their schedules, by path.

    Args:
      config: Densities and floor.
      params: Parameters of a model, or their shapes.
    """
    targets, found = (*config.targets, (".*", config.density)), {}
    for path, leaf in trees.flatten(params).items():
        rule, density = trees.match(MODEL_RULES, path), trees.match(targets, path)
        if not isinstance(rule, Sparse):
            continue
        shape = tuple(leaf.shape[rule.stacked :])
        # Schedules are float32, and so is `budget` of their values.
        k = int(np.round(np.float32(density) * np.float32(math.prod(shape))))
        floor = 0 if rule.neuron_axis is None else config.min_per_neuron * shape[rule.neuron_axis]
        found[path] = FinalBudget(shape, density, k, floor)
    return found


def project_top_k(
    density: float | optax.Schedule,
    *,
    min_per_neuron: int = 4,
    overrides: trees.Rules[float | optax.Schedule] = (),
    rules: trees.Rules[Sparse | Dense] = DEFAULT_RULES,
    replicated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Change updates so that `params + updates` is projected to the top-k entries of each matrix.

    With :math:`k = \mathrm{round}(\text{density} \cdot \text{size})` every matrix becomes

    .. math:: W \leftarrow \mathrm{keep\_top\_k}(W + U, k)

    see :func:`wsparse.sparsity.keep_top_k`. Entries that are removed become exactly 0, and the others get
    exactly the incoming update. Put it last in the chain: anything after it breaks the count.

    Args:
      density: Fraction of entries that stay, or an optax schedule of it by the number of updates so far.
      min_per_neuron: Nonzeros that every neuron keeps in each of its matrices.
      overrides: Table of the parameters that have a density of their own.
      rules: Table of the parameters that are projected, and the axes along which their neurons lie; the
        default fits models of this library and any other tree. `MODEL_RULES` refuses unknown parameters.
      replicated: Whether every device holds all parameters, so that a TPU's kernels may work on whole
        matrices.

    Returns:
      A transform whose `update` needs `params`. It works inside `optax.chain`, `masked`,
      `multi_transform` and `MultiSteps`, under jit, and on sharded arrays. Inside `support_phases` it
      searches in exploration steps only; between them the support stays, whatever the density.

    Raises:
      UserError: A fixed density is outside (0, 1], a parameter has no rule, or an override no parameter.

    >>> import optax
    >>> optimizer = optax.chain(optax.sgd(1.0), project_top_k(0.5))
    >>> params = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": jnp.array([-3.0, 1.0, 0.0, 0.0])}, state, params)
    >>> optax.apply_updates(params, updates)
    {'w': Array([4., 0., 0., 4.], dtype=float32)}
    """
    densities = _checked((*overrides, (r".*", density)))

    def init(params):
        sparse = _matrices(params, rules)
        _check_overrides(overrides, sparse)
        return ProjectTopKState(
            count=jnp.zeros((), jnp.int32),
            nonzeros={path: _count_nonzero(stack) for path, (stack, _) in sparse.items()},
            finite={path: jnp.ones(stack.shape[:1], bool) for path, (stack, _) in sparse.items()},
        )

    def update(updates: Any, state: Any, params: Any = None, *, explore: Any = None, **extra: Any):
        del extra
        if params is None:
            raise UserError("project_top_k needs the parameters: call update(updates, state, params)")
        # What optax.apply_updates will store, in the dtype it will be stored in.
        after = jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), params, updates)
        sparse = _matrices(after, rules)

        def search():
            jobs = _jobs(sparse, densities, state.count)
            return select(jobs, min_per_neuron=min_per_neuron, replicated=replicated)

        freeze = functools.partial(_freeze, sparse, _matrices(params, rules))
        selections = search() if explore is None else _either(explore, search, freeze)
        selected = dict(zip(sparse, selections, strict=True))
        projected = trees.map_with_path(functools.partial(_project, selected), params, updates)
        return projected, ProjectTopKState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            nonzeros={path: selection.nonzeros for path, selection in selected.items()},
            finite={path: selection.finite for path, selection in selected.items()},
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(densities: trees.Rules[float | optax.Schedule]) -> trees.Rules[float | optax.Schedule]:
    for _, density in densities:
        if not callable(density) and not 0 < density <= 1:
            raise UserError(f"density must be in (0, 1], got {density}")
    return densities


def _check_overrides(overrides: trees.Rules[Any], sparse: Iterable[str]) -> None:
    for pattern, _ in overrides:
        if not any(re.fullmatch(pattern, path) for path in sparse):
            raise UserError(
                f"overrides: {pattern!r} matches no projected parameter{closest(pattern, sparse)}; "
                f"they are {', '.join(sparse)}"
            )


def _project(selected: dict[str, Selection], path: str, p: jax.Array, u: jax.Array) -> jax.Array:
    if path not in selected:
        return u
    kept = jnp.reshape(selected[path].kept, p.shape)
    # In the wider of the two dtypes, so that -p cancels p to the last bit.
    return jnp.where(kept, u, -p)


def _jobs(
    sparse: dict[str, tuple[jax.Array, Sparse]],
    densities: trees.Rules[float | optax.Schedule],
    count: jax.Array,
) -> list[Job]:
    """Returns stacks of matrices as `select` takes them, with the budgets of this update."""
    now: Any = [(pattern, value(count) if callable(value) else float(value)) for pattern, value in densities]
    jobs = []
    for path, (stack, rule) in sparse.items():
        k = jnp.broadcast_to(budget(trees.match(now, path), stack[0].size), stack.shape[:1])
        jobs.append((stack, k, rule.neuron_axis))
    return jobs


def _either(explore: jax.Array | bool, search: Any, freeze: Any) -> list[Selection]:
    """Returns the selections of one of both: only that is traced where it is known which."""
    if isinstance(explore, bool):
        return search() if explore else freeze()
    return lax.cond(explore, search, freeze)


def _freeze(
    sparse: dict[str, tuple[jax.Array, Sparse]], before: dict[str, tuple[jax.Array, Sparse]]
) -> list[Selection]:
    return [_frozen(stack, before[path][0]) for path, (stack, _) in sparse.items()]


def _frozen(stack: jax.Array, before: jax.Array) -> Selection:
    """Returns the selection of the entries of `(G, ...)` that were nonzero before, without a search."""
    kept = (before != 0) & (selection.magnitude_keys(stack) > 0)
    finite = jnp.all(jnp.isfinite(stack), range(1, stack.ndim))
    return Selection(kept, jnp.sum(kept, range(1, stack.ndim), dtype=jnp.int32), finite)


def l0(params: Any, rules: trees.Rules[Sparse | Dense] = DEFAULT_RULES) -> dict[str, tuple[int, int]]:
    """Returns `(nonzeros, size)` of every projected matrix, by its path.

    The matrices of a stacked parameter have the layer's index after the path's first part:
    "blocks/3/mlp/fc/kernel".
    """
    return {
        _matrix_path(path, layer, rule): (int(nonzeros), int(stack[0].size))
        for path, (stack, rule) in _matrices(params, rules).items()
        for layer, nonzeros in enumerate(np.asarray(_count_nonzero(stack)))
    }


def _matrix_path(path: str, layer: int, rule: Any) -> str:
    if not rule.stacked:
        return path
    root, _, name = path.partition("/")
    return f"{root}/{layer}/{name}"


def nonfinite_matrices(finite: dict[str, Any]) -> list[str]:
    """Returns the names of the matrices whose flag in `ProjectTopKState.finite` is false."""
    return [
        _matrix_path(path, int(i), trees.match(DEFAULT_RULES, path))
        for path, flags in finite.items()
        for i in np.flatnonzero(~np.asarray(flags))
    ]


def find_state(optimizer_state: Any) -> ProjectTopKState:
    """Returns the projection's state inside the state of a chain, which must hold exactly one."""
    states = optax.tree_utils.tree_get_all_with_path(optimizer_state, ProjectTopKState.__name__)
    if len(states) != 1:
        raise UserError(f"the optimizer's state must hold one projection, got {len(states)}")
    return states[0][1]


def _matrices(tree: Any, rules: trees.Rules[Sparse | Dense]) -> dict[str, tuple[jax.Array, Sparse]]:
    """Returns the projected leaves as stacks `(G, ...)` by path, with their rules."""
    matched = {path: (leaf, trees.match(rules, path)) for path, leaf in trees.flatten(tree).items()}
    return {
        path: (leaf if rule.stacked else leaf[None], rule)
        for path, (leaf, rule) in matched.items()
        if isinstance(rule, Sparse)
    }


def _count_nonzero(stack: jax.Array) -> jax.Array:
    # By bits: a comparison with 0 would miss subnormals where the hardware flushes them.
    nonzero = selection.magnitude_keys(stack) > 0
    return jnp.sum(nonzero, range(1, stack.ndim), dtype=jnp.int32)
