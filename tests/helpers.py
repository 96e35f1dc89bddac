"""For several tests: parameters of any config, what is refused, documents of a source, a user's own task."""

import ast
import collections
from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np
import pytest

from wsparse import model
from wsparse.config import ModelConfig
from wsparse.data import sources
from wsparse.errors import UserError

# A file with a task of a user's own.
OWN_TASK = """
from wsparse.circuits.tasks import Form, Pair, Program, Task


def stream(seed, split):
    for i in range(20):
        lead = f"{split} = {seed + i}\\n"
        yield Pair(
            first=Program(prompt=f"{lead}for item", rest=" in items:\\n    pass\\n"),
            second=Program(prompt=f"{lead}while item", rest=":\\n    pass\\n"),
        )


TASK = Task(name="mine", summary="loops", stream=stream, forms=(Form(" in", ":\\n"),))
"""


def check(match: str, call: Callable[[], Any]) -> None:
    """`call` raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def read(name: str, **options) -> tuple[list[str], sources.SourceReport]:
    """Returns the documents of a source, and what is reported of it."""
    counts: collections.Counter[str] = collections.Counter()
    documents = list(sources.documents(sources.open_source(name), counts, **options))
    return documents, sources.SourceReport(name, **counts)


@functools.cache
def shapes(config: ModelConfig):
    """Shapes and dtypes of the parameters, without computing any."""
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def random_params(config: ModelConfig, *, seed: int = 0, dtype=np.float32, scale: float = 1.0):
    """Parameters of normal random numbers: nothing is at a special value, so nothing is lost unseen."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        return (scale * random.normal(size=leaf.shape)).astype(dtype)

    return jax.tree.map(draw, shapes(config))


def parses(text: str) -> bool:
    """Returns whether a text is a Python program."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
