"""Every recipe in configs/ builds, says what to expect of it, and differs from its twin only as said."""

import ast
import importlib.util
import math
import pathlib
import re

import jax
import pytest

from wsparse import trees
from wsparse.config import TrainConfig, differences, from_dict, to_dict
from wsparse.step import init_state

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
# Gao et al. 2025, in millions; whether the paper counts the bigram table is not said.
GAO_SIZES = (7.4, 29.7, 118.8, 475.0, 1900.0)


def load(name: str) -> TrainConfig:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_dict(TrainConfig, module.get_config().to_dict())


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""


def millions(name: str) -> tuple[float, float]:
    """Parameters in all, and without the bigram table."""
    shapes = trees.flatten(jax.eval_shape(lambda: init_state(load(name))).params)
    sizes = {path: math.prod(leaf.shape) / 1e6 for path, leaf in shapes.items()}
    return sum(sizes.values()), sum(n for path, n in sizes.items() if not path.endswith("bigram"))


def test_there_are_recipes():
    assert "tiny" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_builds_and_so_does_its_state(name):
    config = load(name)
    assert from_dict(TrainConfig, to_dict(config)) == config
    state = jax.eval_shape(lambda: init_state(config))
    shapes = trees.flatten(state.params)
    assert shapes["embed/tokens"].shape == (config.model.vocab_size, config.model.d_model)
    assert shapes["blocks/mlp/fc/kernel"].shape[0] == config.model.n_layer


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_what_to_expect_and_how_to_run_it(name):
    text = docstring(name)
    for what, pattern in {
        "what it reproduces": r"(?i)reproduces?:? \S",
        "hardware": r"(?i)hardware:? .*(cpu|gpu|tpu|v\de?|h100|a100)",
        "minutes": r"(?i)minutes",
        "expected loss": r"(?i)loss:? .*(\d|not measured)",
        "expected L0": r"L0:? \S",
    }.items():
        assert re.search(pattern, text, re.DOTALL), f"configs/{name}.py does not say: {what}"
    commands = re.findall(r"python -m wsparse\.train --config=(\S+)", text)
    assert commands, "no command"
    for path in commands:
        assert path == f"configs/{name}.py"
    placeholder = re.search(r"(?i)placeholder|todo|tbd|xxx", text)
    assert placeholder is None, placeholder


@pytest.mark.parametrize(
    ("sparse", "dense", "also"),
    # The twins of small have its held-out loss: one by fewer steps, one by fewer channels.
    [
        ("tiny", "tiny_dense", ()),
        ("small", "small_dense", ("steps",)),
        ("small", "small_dense_narrow", ("model.d_model", "model.n_head")),
    ],
)
def test_a_dense_twin_differs_only_as_said(sparse, dense, also):
    changed = differences(to_dict(load(sparse)), to_dict(load(dense)))
    print(f"{sparse} -> {dense}:", *changed, sep="\n  ")
    assert changed, "the twins are the same"
    allowed = ("sparsity.", "model.abs_top_k_", *also)
    beyond = [line for line in changed if not line.startswith(allowed)]
    assert not beyond, beyond
    assert load(dense).sparsity.density == 1
    assert load(sparse).sparsity.density < 1


@pytest.mark.parametrize("size", GAO_SIZES)
def test_a_paper_size_is_there_within_fifteen_percent(size):
    found = {name: millions(name) for name in NAMES if name.startswith("gao_")}
    near = [
        name for name, counts in found.items() if any(abs(n / size - 1) <= 0.15 for n in counts)
    ]
    assert len(near) == 1, f"{size}M: {found}"
