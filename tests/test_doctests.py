"""Examples in docstrings give what they say."""

import doctest
import importlib

from helpers import REPO
import pytest

MODULES = [
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((REPO / "wsparse").rglob("*.py"))
    if ">>>" in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def test_there_are_examples():
    assert "wsparse.ops.top_k" in MODULES
