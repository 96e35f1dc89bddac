"""The tokens that tell a task's two sides apart."""

import numpy as np

from wsparse.circuits.contrast import contrast


def found(rows, answers):
    """Token -> counts, of unpadded prompts."""
    length = max(map(len, rows))
    tokens_RT = np.array([[*row, *[0] * (length - len(row))] for row in rows])
    result = contrast(tokens_RT, np.array([len(row) - 1 for row in rows]), np.array(answers))
    return dict(zip(result.tokens_J.tolist(), result.counts_J4.tolist(), strict=True))


def test_tokens_that_differ_and_answers_are_counted_by_side():
    rows = [[5, 1, 6], [5, 2, 6], [7, 1, 8], [7, 2, 8]]
    assert found(rows, [3, 4, 3, 4]) == {1: [2, 0, 0, 0], 2: [0, 2, 0, 0], 3: [0, 0, 2, 0], 4: [0, 0, 0, 2]}


def test_a_token_more_in_one_prompt_does_not_make_all_that_follows_differ():
    assert found([[5, 9, 6, 7, 8], [5, 6, 7, 8]], [3, 3]) == {9: [1, 0, 0, 0], 3: [0, 0, 1, 1]}


def test_tokens_that_have_changed_places_differ_although_both_prompts_have_them():
    assert set(found([[1, 5, 6, 7, 2], [2, 5, 6, 7, 1]], [1, 2])) == {1, 2}


def test_padding_counts_for_nothing():
    assert 0 not in found([[5, 1], [5, 2, 5]], [3, 4])


def test_tokens_of_the_most_pairs_come_first_and_rare_ones_are_left_out():
    rows = [row for i in range(40) for row in ([1, 100 + i], [2, 100 + i + 50])]
    result = contrast(np.array(rows), np.ones(80, int), np.array([3, 4] * 40))
    assert result.tokens_J[:4].tolist() == [1, 2, 3, 4] and len(result.tokens_J) == 16
    assert result.counts_J4[:, :2].sum() == 40 + 40 + 12


def test_prompts_that_do_not_differ_have_only_their_answers():
    assert found([[5, 1], [5, 1]], [3, 4]) == {3: [0, 0, 1, 0], 4: [0, 0, 0, 1]}
