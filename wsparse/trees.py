"""Parameter paths and ordered rule tables over them.

A path is the keys from the root joined with "/", e.g. "blocks/mlp/fc/kernel". A rule table is a sequence
of `(regular expression, value)`; the first expression that matches the whole path gives its value. The
tables of the model itself have no catch-all: a parameter that none of them mentions is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import hashlib
import re
from typing import Any, TypeVar

import jax
import numpy as np

from wsparse.errors import UserError

V = TypeVar("V")
Rules = Sequence[tuple[str, V]]


def path_string(key_path: Sequence[Any]) -> str:
    """Returns the path of a leaf as jax.tree_util names it, joined with "/"."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in tree order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of leaves by path; undoes `flatten` for trees that are nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def digest(tree: Any) -> str:
    """Returns the hex sha256 of a tree of arrays: paths, dtypes, shapes and contents."""
    content = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(leaf)
        content.update(f"{path} {array.dtype} {array.shape}\0".encode())
        content.update(array.tobytes())
    return content.hexdigest()


def map_with_path(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`jax.tree.map` whose function takes the path first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_string(path), *leaves), tree, *others
    )


def match(rules: Rules[V], path: str) -> V:
    """Returns the value of the first rule whose expression matches the whole path; one must."""
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise UserError(
        f"no rule matches parameter '{path}': add one to the table ({len(rules)} rules were tried)"
    )
