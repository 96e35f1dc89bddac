"""Do the circuit's heads look where the model's do?

Shapes: B rows of pairs, T query time, S key time, H head, K channel of a head.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from wsparse import model
from wsparse.circuits import masks
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult
from wsparse.errors import UserError

# Largest mean distance that passes.
_MOST = 0.25


def attention_patterns(context: Context) -> TestResult:
    """Returns distances between the attention of circuit and model at the last token."""
    heads, constant = _used_heads(context)
    if not heads:
        raise UserError("the circuit keeps no value channel of any head: it uses no attention")
    rng = context.rng("attention_patterns")
    measurements, distances = [], []
    for layer, head in heads:
        circuit_BS, model_BS = (
            _pattern(acts, context, layer)[:, head] for acts in (context.acts, context.model_acts)
        )
        uniform_BS = _uniform(context)
        distance_B = _distance(circuit_BS, model_BS)
        distances.append(distance_B)
        note = ", no query or key kept" if (layer, head) in constant else ""
        measurements.append(
            context.mean(
                f"layer {layer}, head {head}{note}",
                distance_B,
                rng,
                control=float(_distance(uniform_BS, model_BS).mean()),
                unit="total variation",
            )
        )
    mean = context.mean("mean over heads", np.mean(distances, axis=0), rng, unit="total variation")
    fixed = Measurement(
        name="heads with values but without a query or key",
        value=len(constant) / len(heads),
        unit="share",
    )
    assert mean.value is not None
    return TestResult(
        question="Do the heads of the circuit look where they look in the model?",
        procedure=f"{context.n_pairs} pairs of the report split; total variation distance, between circuit "
        "and model, of the attention from the prompt's last token, the sink counted as a place, for every "
        "head of which the circuit keeps a value channel.",
        control="The distance of uniform attention from the model's.",
        criterion=f"The mean over heads is at most {_MOST:g}.",
        verdict="passed" if mean.value <= _MOST else "failed",
        measurements=[mean, fixed, *measurements],
    )


def _used_heads(context: Context) -> tuple[list[tuple[int, int]], set[tuple[int, int]]]:
    """Returns the heads with a kept value channel, and those of them without a kept query or key."""
    mask, config = masks.unflatten(context.nodes_U, context.config), context.config
    used, *looking = (masks.heads(mask[name], config) for name in ("attn.v", "attn.q", "attn.k"))
    return used, set(used).difference(*looking)


def _pattern(acts: dict[str, Any], context: Context, layer: int) -> np.ndarray:
    """Returns attention from the last tokens, `(B, H, S + 1)`; what is left for the sink comes last."""
    sink_LH = model.sinks(context.subject.params)
    pattern_BHTS = model.layer_attention(
        acts["attn.q"], acts["attn.k"], sink_LH, layer, config=context.config
    )
    position_B = jnp.asarray(context.pairs.report.position)[:, None, None, None]
    pattern_BHS = np.asarray(jnp.take_along_axis(pattern_BHTS, position_B, axis=2))[:, :, 0]
    return np.concatenate([pattern_BHS, 1 - pattern_BHS.sum(2, keepdims=True)], axis=2)


def _uniform(context: Context) -> np.ndarray:
    """Returns uniform attention over the tokens of prompts and the sink, `(B, S + 1)`."""
    report = context.pairs.report
    inside_BS = np.arange(report.tokens.shape[1] + 1)[None] <= np.asarray(report.position)[:, None]
    inside_BS[:, -1] = context.config.sink
    return inside_BS / inside_BS.sum(1, keepdims=True)


def _distance(a_BS: np.ndarray, b_BS: np.ndarray) -> np.ndarray:
    """Returns the total variation distance of each row's two distributions, `(B,)`."""
    return np.abs(a_BS - b_BS).sum(axis=1) / 2
