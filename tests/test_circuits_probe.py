"""Probes: a planted shortcut is seen by the probes that can see it, and by no others."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse.circuits import probe, tasks
from wsparse.circuits.pairs import PairArrays

N_PAIRS, VOCAB = 256, 40
KINDS = (*probe.SHORTCUTS, "counts")


def batch(
    seed: int,
    plant: Callable[[list[int], int, np.random.Generator], list[int]],
    *,
    words: range = range(20, 40),
) -> PairArrays:
    """Pairs of prompts of 8 to 16 random words; `plant(prompt, side, generator)` makes a prompt's sides."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(N_PAIRS):
        for side in range(2):
            prompt = generator.choice(words, generator.integers(8, 17)).tolist()
            rows.append(plant(prompt, side, generator))
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return PairArrays(tokens, np.array([len(ids) - 1 for ids in rows]), answer=None, other=None)


def nothing(prompt, side, generator):
    return prompt


def token(prompt, side, generator):
    """One of two tokens before the last three."""
    return [*prompt[: (place := generator.integers(len(prompt) - 3))], 1 + side, *prompt[place:]]


def place(prompt, side, generator):
    """Two tokens whose order decides, as the last three show it."""
    return [*prompt[:-1], 1 + side, 2 - side, prompt[-1]]


def length(prompt, side, generator):
    return prompt * (1 + 2 * side)


def balance(prompt, side, generator):
    """As many opening tokens as closing ones, and one more of either."""
    n = generator.integers(2, 6)
    return [*generator.permutation([*prompt, *[1] * (n + side), *[2] * (n + 1 - side)]), *prompt[:3]]


def accuracies(plant, **words):
    return probe.shortcuts(batch(0, plant), batch(1, plant, **words))


@pytest.mark.parametrize(
    ("plant", "seen_by"),
    [
        (nothing, set()),
        (token, {"presence", "counts"}),
        (place, {"last three"}),
        (length, {"length", "counts"}),
        (balance, {"counts"}),
    ],
)
def test_a_planted_shortcut_is_seen_by_the_probes_that_can_see_it(plant, seen_by):
    found = accuracies(plant)
    assert tuple(found) == KINDS
    for name, accuracy in found.items():
        if name in seen_by:
            assert accuracy >= 0.97
        else:
            assert abs(accuracy - 0.5) < 0.07
    assert probe.best({**dict.fromkeys(KINDS, 0.5), "last three": 0.6, "counts": 1.0}) == ("last three", 0.6)


@pytest.mark.parametrize("plant", [token, place, length])
def test_on_shuffled_sides_a_probe_is_at_chance(plant):
    def shuffled(prompt, side, generator):
        return plant(prompt, int(generator.integers(2)), generator)

    for accuracy in accuracies(shuffled).values():
        assert abs(accuracy - 0.5) < 0.07


def test_tokens_of_one_split_are_no_features():
    """Words that tell the sides apart in the split that is fitted, and do not occur in the other."""

    def told(prompt, side, generator):
        return [20 + (word - 20) // 2 * 2 + side for word in prompt]

    fitted, same = batch(0, told, words=range(20, 30)), batch(1, told, words=range(20, 30))
    others = batch(1, told, words=range(30, 40))
    assert probe.shortcuts(fitted, same)["presence"] == 1
    assert probe.shortcuts(fitted, others)["presence"] == 0.5


def test_padding_is_not_seen():
    fitted, scored = batch(0, token), batch(1, token)
    longer = fitted._replace(tokens=np.pad(fitted.tokens, ((0, 0), (0, 9)), constant_values=7))
    assert probe.shortcuts(longer, scored) == probe.shortcuts(fitted, scored)


def test_the_regression_is_the_minimum_that_newtons_method_finds():
    x_BF = np.random.default_rng(0).integers(0, 3, (60, 7)).astype(float)
    x_BF[1::2, 0] += 1

    def objective(weights):
        logit_B = jnp.asarray(x_BF) @ weights[:-1] + weights[-1]
        wrong_B = jnp.where(jnp.arange(60) % 2 == 1, -logit_B, logit_B)
        return jax.nn.softplus(wrong_B).sum() + weights[:-1] @ weights[:-1] / 2

    @jax.jit
    def step(weights):
        return weights - jnp.linalg.solve(jax.hessian(objective)(weights), jax.grad(objective)(weights))

    expected = jnp.zeros(8)
    for _ in range(10):
        expected = step(expected)
    weights, bias = probe._regression(x_BF)
    np.testing.assert_allclose([*weights, bias], expected, atol=2e-3)
    assert abs(weights[0]) > 0.5


@pytest.mark.slow
def test_shortcuts_do_not_solve_the_built_in_tasks(tokenizers):
    """At most 0.65 on the report split, but where the task's row says that one token decides.

    Where answers are each pair's own names, the token that decides is in one split alone, and none sees it.
    """
    for name, task in tasks.TASKS.items():
        fitted, scored = (
            tasks.build(task, tokenizers[1024], N_PAIRS, 0, split=split, max_tokens=128)
            for split in ("search", "report")
        )
        by, accuracy = probe.best(probe.shortcuts(fitted, scored))
        if task.local and task.forms[0].first:
            assert accuracy > 0.65, (name, by, "decided by one token, and yet not seen")
        else:
            assert accuracy <= 0.65, (name, by, accuracy)
    assert sum(bool(task.local) for task in tasks.TASKS.values()) <= 4
