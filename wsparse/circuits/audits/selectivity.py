"""Does the circuit matter for its own task more than for others?"""

from __future__ import annotations

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, taps
from wsparse.circuits import masks, tasks
from wsparse.circuits.audits import random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult
from wsparse.errors import UserError

# Other tasks that are tried, pairs of each, windows of text, and the loss below which the model does a task.
_TASKS, _PAIRS, _WINDOWS, _DOES = 6, 24, 16, 0.3
# Random sets.
_SETS = 4


def selectivity(context: Context) -> TestResult:
    """Returns what other tasks, and text, lose without the circuit."""
    rng = context.rng("selectivity")
    sets = [random_sets.matched(context.nodes_U, context.activity, context.config, rng) for _ in range(_SETS)]
    own = _growth(context.losses(context.model_logits), context.losses(context.logits(~context.nodes_U)))
    measurements, growths = [], []
    for name, of_task in _others(context, rng):
        before_B = of_task.losses(of_task.model_logits)
        if before_B.mean() > _DOES:
            continue
        growths.append(_growth(before_B, of_task.losses(of_task.logits(~context.nodes_U))))
        control = [_growth(before_B, of_task.losses(of_task.logits(~set_U))) for set_U in sets]
        measurements.append(
            Measurement(name=f"growth on {name}", value=growths[-1], control=float(np.mean(control)))
        )
        if len(growths) == _TASKS:
            break
    everything_U = np.ones_like(context.nodes_U)
    text = _text_losses(context, [everything_U, ~context.nodes_U, *(~set_U for set_U in sets)])
    measurements.append(
        Measurement(
            name="growth on pretraining text",
            value=float(text[1] - text[0]),
            control=float(text[2:].mean() - text[0]),
        )
    )
    others = float(np.mean(growths)) if growths else float("nan")
    return TestResult(
        question="Is what the circuit's nodes do needed by this task alone?",
        procedure=f"The growth of the loss when the circuit's nodes are at their means: on {len(growths)} "
        f"other tasks that the model does, {_PAIRS} pairs of the report split each, and on {_WINDOWS} "
        "windows of held-out text.",
        control=f"{_SETS} random sets of as many nodes of each location and layer, matched by activation.",
        criterion="The task's own loss grows by more than twice the mean growth of the other tasks'.",
        verdict=("passed" if _is_selective(own, others) else "failed") if growths else "reported",
        measurements=[Measurement(name=f"growth on {context.circuit.task}", value=own), *measurements],
    )


def _is_selective(own: float, others: float) -> bool:
    # Where other tasks gain, the task's own loss must grow all the same.
    return own > 2 * max(others, 0.0)


def _growth(before_B: np.ndarray, after_B: np.ndarray) -> float:
    return float(after_B.mean() - before_B.mean())


def _others(context: Context, rng: np.random.Generator) -> Iterator[tuple[str, Context]]:
    """Yields other tasks, with the context on their pairs: of one shape, so that one function serves all."""
    names = [name for name in tasks.names_of(context.run.config.data.domain) if name != context.circuit.task]
    for name in rng.permutation(names).tolist():
        try:
            batch = tasks.build(
                name, context.run.tokenizer, _PAIRS, context.options.seed, split="report",
                max_tokens=context.pairs.report.tokens.shape[1],
            )  # fmt: skip
        except UserError:
            continue
        yield name, context.on(batch)


def _text_losses(context: Context, sets: list[np.ndarray]) -> np.ndarray:
    """Returns the loss per token of held-out text with each set of nodes alone."""
    windows_WT = jnp.asarray(context.run.windows("validation", n=_WINDOWS), jnp.int32)
    means = context.subject.node_means
    losses = [
        _text_loss(
            context.subject.params,
            windows_WT,
            masks.unflatten(jnp.asarray(set_U, jnp.float32), context.config),
            means,
            config=context.subject.config,
        )
        for set_U in sets
    ]
    return np.array(losses)


@functools.partial(jax.jit, static_argnames="config")
def _text_loss(params, windows_WT, gates, means, *, config) -> jax.Array:
    logits_WTV, _ = model.forward(
        params, windows_WT[:, :-1], config, tap=taps.mask(gates, means), record=False
    )
    log_p_WTV = jax.nn.log_softmax(logits_WTV)
    return -jnp.mean(jnp.take_along_axis(log_p_WTV, windows_WT[:, 1:, None], axis=2))
