"""The projection as an optax transform: after every update, each matrix keeps its top-k entries."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wsparse import trees
from wsparse.errors import UserError
from wsparse.ops import selection
from wsparse.ops.top_k import select


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A parameter that is projected.

    Attributes:
      neuron_axis: axis of one matrix that indexes MLP neurons or attention channels (the side that is
        not the residual stream's); None where no floor per neuron applies.
      stacked: the leading axis stacks layers; each layer is a matrix of its own.
    """

    neuron_axis: int | None = None
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Dense:
    """A parameter that is never projected."""


# The embeddings, every matrix and every bias share one density; gains, sinks, the fixed tables and the
# bigram table stay dense (method of Gao et al. 2025). Any other tree of matrices and vectors is projected
# entry by entry of the tree, without a floor.
DEFAULT_RULES: trees.Rules[Sparse | Dense] = (
    (r"(.*/)?(gain|sink|bigram|logits_bias|sinusoids)", Dense()),
    (r"(.*/)?(\w+_)?norm/bias", Dense()),
    (r"blocks/attn/[qkv]/kernel|blocks/mlp/fc/kernel", Sparse(neuron_axis=1, stacked=True)),
    (r"blocks/attn/out/kernel|blocks/mlp/proj/kernel", Sparse(neuron_axis=0, stacked=True)),
    (r"blocks/.*", Sparse(stacked=True)),
    (r".*", Sparse()),
)


class ProjectTopKState(NamedTuple):
    """State of `project_top_k`.

    Attributes:
      count: int32, updates so far.
      nonzeros: path -> int32 `(G,)`, nonzeros that each matrix of the parameter has now.
      finite: path -> bool `(G,)`, false for a matrix that holds NaN or infinity.
    """

    count: jax.Array
    nonzeros: dict[str, jax.Array]
    finite: dict[str, jax.Array]


def budget(density: jax.Array | float, size: int) -> jax.Array:
    """`round(density * size)`, half to even, as int32; `density` may be traced."""
    if isinstance(density, float):
        return jnp.int32(round(density * size))
    return jnp.round(density * size).astype(jnp.int32)


def project_top_k(
    density: float | optax.Schedule,
    *,
    min_per_neuron: int = 4,
    rules: trees.Rules[Sparse | Dense] = DEFAULT_RULES,
    whole: bool = False,
) -> optax.GradientTransformation:
    r"""Change the updates so that `params + updates` is projected to the top-k entries of each matrix.

    With :math:`k = \mathrm{round}(\text{density} \cdot \text{size})` every matrix becomes

    .. math:: W \leftarrow \mathrm{keep\_top\_k}(W + U, k)

    see :func:`wsparse.sparsity.keep_top_k`. Entries that go become exactly 0, and the others are updated
    by exactly what came in. Put it last in the chain: anything after it breaks the count.

    Args:
      density: fraction of entries that stay, or an optax schedule of it by the number of updates so far.
      min_per_neuron: nonzeros that every neuron keeps in each of its matrices.
      rules: which parameters are projected, and along which axis their neurons lie.
      whole: every device holds all parameters, so that a TPU's kernels may work on whole matrices.

    Returns:
      A transform whose `update` needs `params`. It works inside `optax.chain`, `masked`,
      `multi_transform` and `MultiSteps`, under jit, and on sharded arrays.

    Raises:
      UserError: a fixed density outside (0, 1]; a parameter that no rule matches.

    >>> import optax
    >>> optimizer = optax.chain(optax.sgd(1.0), project_top_k(0.5))
    >>> params = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": jnp.array([-3.0, 1.0, 0.0, 0.0])}, state, params)
    >>> optax.apply_updates(params, updates)
    {'w': Array([4., 0., 0., 4.], dtype=float32)}
    """
    if not callable(density) and not 0 < density <= 1:
        raise UserError(f"density must be in (0, 1], got {density}")

    def init(params):
        sparse = _matrices(params, rules)
        return ProjectTopKState(
            count=jnp.zeros((), jnp.int32),
            nonzeros={path: _count_nonzero(stack) for path, (stack, _) in sparse.items()},
            finite={path: jnp.ones(stack.shape[:1], bool) for path, (stack, _) in sparse.items()},
        )

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise UserError(
                "project_top_k needs the parameters: call update(updates, state, params)"
            )
        # What optax.apply_updates will store, in the dtype it will be stored in.
        after = jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), params, updates)
        sparse = _matrices(after, rules)
        now: Any = density(state.count) if callable(density) else float(density)
        selections = select(
            [stack for stack, _ in sparse.values()],
            [
                jnp.broadcast_to(budget(now, stack[0].size), stack.shape[:1])
                for stack, _ in sparse.values()
            ],
            neuron_axes=[rule.neuron_axis for _, rule in sparse.values()],
            min_per_neuron=min_per_neuron,
            whole=whole,
        )
        selected = dict(zip(sparse, selections, strict=True))

        def project(path, p, u):
            if path not in selected:
                return u
            kept = jnp.reshape(selected[path].kept, p.shape)
            # In the wider of the two dtypes, so that -p cancels p to the last bit.
            return jnp.where(kept, u, -p)

        return trees.map_with_path(project, params, updates), ProjectTopKState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            nonzeros={path: selection.nonzeros for path, selection in selected.items()},
            finite={path: selection.finite for path, selection in selected.items()},
        )

    return optax.GradientTransformation(init, update)


def l0(
    params: Any, rules: trees.Rules[Sparse | Dense] = DEFAULT_RULES
) -> dict[str, tuple[int, int]]:
    """`(nonzeros, size)` of every projected matrix, by its path.

    The matrices of a stacked parameter are told apart by the layer's index after the path's first part:
    "blocks/3/mlp/fc/kernel".
    """
    counts = {}
    for path, (stack, rule) in _matrices(params, rules).items():
        for layer, nonzeros in enumerate(np.asarray(_count_nonzero(stack))):
            counts[matrix_path(path, layer, rule)] = (int(nonzeros), int(stack[0].size))
    return counts


def matrix_path(path: str, layer: int, rule: Sparse) -> str:
    """The name of one matrix of a parameter."""
    if not rule.stacked:
        return path
    first, _, rest = path.partition("/")
    return f"{first}/{layer}/{rest}"


def nonfinite_matrices(
    finite: dict[str, Any], rules: trees.Rules[Sparse | Dense] = DEFAULT_RULES
) -> list[str]:
    """Names of the matrices whose flag in `ProjectTopKState.finite` is false."""
    names = []
    for path, flags in finite.items():
        rule = trees.match(rules, path)
        assert isinstance(rule, Sparse)  # only projected parameters have flags
        names += [matrix_path(path, int(i), rule) for i in np.flatnonzero(~np.asarray(flags))]
    return names


def find_state(optimizer_state: Any) -> ProjectTopKState:
    """The projection's state inside the state of a chain."""
    is_ours: Callable[[Any], bool] = lambda node: isinstance(node, ProjectTopKState)
    found = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise UserError(f"the optimizer's state must hold one projection, got {len(found)}")
    return found[0]


def _matrices(tree: Any, rules: trees.Rules[Sparse | Dense]) -> dict[str, tuple[jax.Array, Sparse]]:
    """Projected leaves as stacks `(G, ...)` by path, with their rules."""
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
