"""How far shortcuts go in a task's prompts, measured without a model.

A logistic regression tells the two sides of a task's pairs apart by what can be seen without knowing
Python. It is fitted on one split and scored on another; only tokens that both contain are features, since
two splits share no names, words or numbers.

    shortcuts(search, report)  # {"presence": 0.53, "last three": 0.50, "length": 0.51, "counts": 0.98}

`presence` (of each token, anywhere in the prompt), `last three` (each of the last three tokens in its place)
and `length` (in tokens) are shortcuts: a task that one of them solves can be done without the computation
that the task is named for. `counts` (of each token) is no shortcut by itself. Opening less closing brackets
is a sum of counts, and so is the quote of which there is an odd number: where counting is the task, a high
value says that the probe does the task.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

from wsparse.circuits.pairs import PairArrays, TaskBatch

SHORTCUTS = ("presence", "last three", "length")

_LAST = 3
# Penalty on half the squared weights, beside a sum over rows: scikit-learn's default of C = 1.
_L2 = 1.0


def shortcuts(fitted: TaskBatch | PairArrays, scored: TaskBatch | PairArrays) -> dict[str, float]:
    """Returns the accuracy on the rows of `scored` by what the probe sees: `SHORTCUTS`, then `counts`.

    Chance is 0.5. With 256 pairs its standard error is about 0.02, and the greatest of three is above it.
    """
    n_tokens = 1 + max(int(np.max(rows.tokens)) for rows in (fitted, scored))
    seen = [_features(rows, n_tokens) for rows in (fitted, scored)]
    return {name: _accuracy(seen[0][name], seen[1][name]) for name in (*SHORTCUTS, "counts")}


def best(accuracies: dict[str, float]) -> tuple[str, float]:
    """Returns which of `SHORTCUTS` goes furthest, and how far."""
    name = max(SHORTCUTS, key=accuracies.__getitem__)
    return name, accuracies[name]


def _features(rows: TaskBatch | PairArrays, n_tokens: int) -> dict[str, np.ndarray]:
    """Returns what a probe sees of each row, `(B, F)` float64."""
    tokens_BT, position_B = np.asarray(rows.tokens), np.asarray(rows.position)
    row_B = np.arange(len(position_B))
    counts = np.zeros((len(row_B), n_tokens))
    row_N, time_N = np.nonzero(np.arange(tokens_BT.shape[1]) <= position_B[:, None])
    np.add.at(counts, (row_N, tokens_BT[row_N, time_N]), 1)
    last = np.zeros((len(row_B), _LAST, n_tokens))
    for place in range(_LAST):
        reached_N = row_B[position_B >= place]
        last[reached_N, place, tokens_BT[reached_N, position_B[reached_N] - place]] = 1
    return {
        "presence": np.minimum(counts, 1),
        "last three": last.reshape(len(row_B), -1),
        "length": position_B[:, None] + 1.0,
        "counts": counts,
    }


def _accuracy(fitted_BF: np.ndarray, scored_BF: np.ndarray) -> float:
    """Returns the accuracy on `scored_BF` of a regression fitted on `fitted_BF`."""
    shared_F = fitted_BF.any(0) & scored_BF.any(0)
    fitted_BF, scored_BF = fitted_BF[:, shared_F], scored_BF[:, shared_F]
    mean_F = fitted_BF.mean(0)
    weights_F, bias = _regression(fitted_BF - mean_F)
    return float(np.mean(((scored_BF - mean_F) @ weights_F + bias > 0) == _side(scored_BF)))


def _regression(x_BF: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the weights and the bias of the logistic regression of a row's side in its pair."""
    sign_B = np.where(_side(x_BF), 1.0, -1.0)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin_B = sign_B * (x_BF @ weights[:-1] + weights[-1])
        pull_B = sign_B * special.expit(-margin_B)
        value = np.logaddexp(0, -margin_B).sum() + _L2 / 2 * weights[:-1] @ weights[:-1]
        return value, np.append(_L2 * weights[:-1] - pull_B @ x_BF, -pull_B.sum())

    weights = optimize.minimize(objective, np.zeros(x_BF.shape[1] + 1), jac=True, method="L-BFGS-B").x
    return weights[:-1], weights[-1]


def _side(rows: np.ndarray) -> np.ndarray:
    """Returns `(B,)` which rows are the second of their pair."""
    return np.arange(len(rows)) % 2 == 1
