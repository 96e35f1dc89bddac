"""The tokens of a task by which its two sides can be told apart: those that differ, and the answers.

Shapes: R rows of pairs, T tokens, J tokens of the contrast, N nodes shown, V vocabulary.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import difflib
from typing import NamedTuple

import numpy as np

# Columns of `Contrast.counts_J4`.
IN_FIRST, IN_SECOND, ANSWER_FIRST, ANSWER_SECOND = range(4)
_MOST = 16


class Contrast(NamedTuple):
    """Tokens of a task, those of the most pairs first.

    Attributes:
      tokens_J: Tokens that stand in one prompt of a pair and not at their place in the other, and answers.
      counts_J4: Of how many pairs each is so: in the first prompt, in the second, as the answer of the
        first, and of the second.
    """

    tokens_J: np.ndarray
    counts_J4: np.ndarray


def contrast(tokens_RT: np.ndarray, position_R: np.ndarray, answer_R: np.ndarray) -> Contrast:
    """Returns the contrast of pairs; rows `2 i` and `2 i + 1` are one.

    Args:
      tokens_RT: Prompts, padded on the right.
      position_R: Index of each prompt's last token.
      answer_R: Each prompt's answer.
    """
    counts = collections.defaultdict(lambda: [0] * 4)
    rows = [row[: last + 1].tolist() for row, last in zip(tokens_RT, position_R, strict=True)]
    for first, second, answers in zip(rows[::2], rows[1::2], answer_R.reshape(-1, 2).tolist(), strict=True):
        for column, tokens in ((IN_FIRST, _others(first, second)), (IN_SECOND, _others(second, first))):
            for token in tokens:
                counts[token][column] += 1
        for column, token in zip((ANSWER_FIRST, ANSWER_SECOND), answers, strict=True):
            counts[token][column] += 1
    ordered = sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0]))[:_MOST]
    return Contrast(
        np.array([token for token, _ in ordered], np.int32),
        np.array([each for _, each in ordered], np.int32).reshape(-1, 4),
    )


def _others(tokens: Sequence[int], partner: Sequence[int]) -> set[int]:
    """Returns the tokens of a prompt that its partner does not have where the two are aligned."""
    blocks = difflib.SequenceMatcher(None, tokens, partner, autojunk=False).get_opcodes()
    return {token for kind, start, stop, *_ in blocks if kind != "equal" for token in tokens[start:stop]}
