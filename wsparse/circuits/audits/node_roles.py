"""Do nodes do in the model what they do in the circuit?

Shapes: U nodes of the model in one vector, M nodes of the circuit, X tokens of all prompts.
"""

from __future__ import annotations

import jax
import numpy as np

from wsparse.circuits import masks
from wsparse.circuits.audits import random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult

# Correlations above which a role counts as kept, share of nodes that must have them, nodes that are named.
_KEPT, _SHARE, _NAMED = 0.5, 0.9, 5


def node_roles(context: Context) -> TestResult:
    """Returns correlations of nodes' values between circuit and model, over the tokens of prompts."""
    rng = context.rng("node_roles")
    chosen, correlation_M = _correlations(context, context.nodes_U, context.acts)
    random_U = random_sets.same_sizes(context.nodes_U, context.config, rng)
    random_acts = context.record(random_U, context.subject.scorer.weights)
    _, random_M = _correlations(context, random_U, random_acts)
    names = masks.names(context.config)
    share = float(np.mean(correlation_M > _KEPT)) if correlation_M.size else 1.0
    measurements = [
        Measurement(
            name=f"share of nodes with a correlation above {bound:g}",
            value=float(np.mean(correlation_M > bound)) if correlation_M.size else None,
            control=float(np.mean(random_M > bound)) if random_M.size else None,
            unit="share",
        )
        for bound in (_KEPT, 0.9)
    ]
    measurements += [
        Measurement(name=f"least: {names[chosen[i]]}", value=float(correlation_M[i]), unit="correlation")
        for i in np.argsort(correlation_M)[:_NAMED]
    ]
    return TestResult(
        question="Does a node of the circuit vary in the model as it does in the circuit?",
        procedure=f"{context.n_pairs} pairs of the report split, all tokens of all prompts; the "
        f"correlation of each node's values in the circuit and in the model, for the {correlation_M.size} of "
        f"{int(context.nodes_U.sum())} nodes that vary in the circuit.",
        control="A random node set of the same size at every location and layer, run as a circuit.",
        criterion=f"At least {_SHARE:.0%} of the nodes have a correlation above {_KEPT:g}.",
        verdict="passed" if share >= _SHARE else "failed",
        measurements=measurements,
    )


def _correlations(
    context: Context, nodes_U: np.ndarray, acts: dict[str, jax.Array]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nodes of a set that vary while it runs as a circuit, and the correlation of each."""
    alone_XM, model_XM = (context.of_tokens(values)[:, nodes_U] for values in (acts, context.model_acts))
    varies_M = alone_XM.std(axis=0) > 1e-6 * np.maximum(np.abs(alone_XM).max(axis=0), 1e-6)
    a_XM, b_XM = (
        values_XM[:, varies_M] - values_XM[:, varies_M].mean(0) for values_XM in (alone_XM, model_XM)
    )
    norms_M = np.linalg.norm(a_XM, axis=0) * np.linalg.norm(b_XM, axis=0)
    return np.flatnonzero(nodes_U)[varies_M], np.sum(a_XM * b_XM, axis=0) / np.maximum(norms_M, 1e-12)
