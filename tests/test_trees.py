"""Paths name every leaf, and rule tables answer for each with their first match."""

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest

from wsparse import trees
from wsparse.errors import UserError


class Pair(NamedTuple):
    left: int
    right: int


def test_a_path_is_the_keys_from_the_root():
    tree = {"b": [10, {"c": 20}], "a": Pair(left=1, right=2), "d": (3,)}
    assert trees.flatten(tree) == {"a/left": 1, "a/right": 2, "b/0": 10, "b/1/c": 20, "d/0": 3}
    assert trees.flatten(7) == {"": 7}


def test_moments_end_in_their_parameters_path():
    params = {"blocks": {"mlp": jnp.ones(2)}}
    paths = list(trees.flatten(optax.adam(0.1).init(params)))
    assert [path for path in paths if path.endswith("mu/blocks/mlp")]
    assert [path for path in paths if path.endswith("nu/blocks/mlp")]


nested = st.recursive(
    st.integers(),
    lambda inner: (
        st.dictionaries(st.text("abc", min_size=1), inner, max_size=3) | st.lists(inner, max_size=3)
    ),
)


@given(nested)
def test_flatten_has_every_leaf_once_in_tree_order(tree):
    flat = trees.flatten(tree)
    assert list(flat.values()) == jax.tree.leaves(tree)


@given(nested)
def test_map_with_path_gives_each_leaf_its_own_path(tree):
    flat = trees.flatten(tree)
    same = trees.map_with_path(lambda path, leaf, other: (path, leaf, other), tree, tree)
    leaves = jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, tuple))
    assert leaves == [(path, leaf, leaf) for path, leaf in flat.items()]


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = ((r"a/.*", 1), (r"a/b", 2), (r".*/b", 3), (r"b", 4))
    assert [trees.match(rules, path) for path in ("a/b", "c/b", "b", "a/c/b")] == [1, 3, 4, 1]


def test_a_part_of_a_path_is_no_match():
    for path in ("xa", "ax", "a/x", "x/a", "a\n"):
        with pytest.raises(UserError):
            trees.match(((r"a", 1),), path)


def test_a_path_without_a_rule_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"no rule matches parameter 'c': add one to the table \(2 rules were tried\)"
    ):
        trees.match(((r"a", 1), (r"b", 2)), "c")


def test_a_rule_may_give_none():
    assert trees.match(((r"a", None), (r".*", 1)), "a") is None
