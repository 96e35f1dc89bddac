"""For several tests: processes, errors, equality in every bit, parameters, documents, a user's own task."""

import ast
import collections
from collections.abc import Callable
import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from wsparse import model, trees
from wsparse.config import ModelConfig
from wsparse.data import sources
from wsparse.errors import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent

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


def start_python(*arguments: Any, cwd: Any = None, **environment: str) -> subprocess.Popen[str]:
    """Starts Python with this checkout's package and one device, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(
    *arguments: Any, cwd: Any = None, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end as `start_python` starts it."""
    with start_python(*arguments, cwd=cwd, **environment) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def assert_bitwise(found: Any, want: Any) -> None:
    """Two trees have the same paths, dtypes, shapes and bits: -0.0 is not 0.0, and a NaN is itself."""
    found, want = trees.flatten(found), trees.flatten(want)
    assert sorted(found) == sorted(want)
    for path, leaf in want.items():
        a, b = np.asarray(found[path]), np.asarray(leaf)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


def assert_one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    """An error has a text of one line, with these words."""
    text = str(error.value)
    assert "\n" not in text and len(text) > 10, text
    for word in words:
        assert word in text, text


def check(match: str, call: Callable[[], Any]) -> None:
    """`call` raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as error:
        call()
    assert_one_line(error)


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
