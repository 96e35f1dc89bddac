"""Every recipe in configs/ builds, says what to expect of it, and differs from its twin only as said."""

import ast
import math
import pathlib
import re

import jax
import pytest

from wsparse import recipes, trees
from wsparse.config import TrainConfig, differences, from_dict, to_dict
from wsparse.errors import UserError
from wsparse.step import init_state

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
NAMES = list(recipes.names())
# Gao et al. 2025, in millions; whether the paper counts the bigram table is not said.
GAO_SIZES = (7.4, 29.7, 118.8, 475.0, 1900.0)


def load(name: str) -> TrainConfig:
    return from_dict(TrainConfig, recipes.load(name))


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""


def millions(name: str) -> tuple[float, float]:
    """Parameters in all, and without the bigram table."""
    shapes = trees.flatten(jax.eval_shape(lambda: init_state(load(name))).params)
    sizes = {path: math.prod(leaf.shape) / 1e6 for path, leaf in shapes.items()}
    return sum(sizes.values()), sum(n for path, n in sizes.items() if not path.endswith("bigram"))


def test_there_are_recipes():
    assert {"tiny", "tiny:dense", "gao:475m"} <= set(NAMES)
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split(":")[0] for name in NAMES}


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
    file, _, variant = name.partition(":")
    text = docstring(file)
    for what, pattern in {
        "what it reproduces": r"(?i)reproduces?:? \S",
        "hardware": r"(?i)hardware:? .*(cpu|gpu|tpu|v\de?|h100|a100)",
        "minutes": r"(?i)minutes",
        "expected loss": r"(?i)loss:? .*(\d|not measured)",
        "expected L0": r"L0:? \S",
    }.items():
        assert re.search(pattern, text, re.DOTALL), f"configs/{file}.py does not say: {what}"
    commands = re.findall(r"python -m wsparse\.train --config=(\S+)", text)
    assert commands, "no command"
    for command in commands:
        path, _, named = command.partition(":")
        assert path == f"configs/{file}.py"
        assert recipes.find(command).endswith(f"{file}.py:{named}" if named else f"{file}.py")
    assert not variant or re.search(rf"\b{variant}\b", text), f"variant {variant} is not explained"
    placeholder = re.search(r"(?i)placeholder|todo|tbd|xxx", text)
    assert placeholder is None, placeholder


@pytest.mark.parametrize(
    ("sparse", "dense", "also"),
    # The twins of small have its held-out loss: one by fewer steps, one by fewer channels.
    [
        ("tiny", "tiny:dense", ()),
        ("small", "small:dense", ("steps",)),
        ("small", "small:dense_narrow", ("model.d_model", "model.n_head")),
        ("small", "small:dense_plain", ("model.d_model", "model.n_head")),
        ("small", "small:dense_equal", ("model.d_model", "model.n_head")),
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
    found = {name: millions(name) for name in NAMES if name.startswith("gao:")}
    near = [name for name, counts in found.items() if any(abs(n / size - 1) <= 0.15 for n in counts)]
    assert len(near) == 1, f"{size}M: {found}"


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "configs/tiny.py", str(FOLDER / "tiny.py")])
def test_a_recipe_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pathlib.Path(recipes.find(name)).samefile(FOLDER / "tiny.py")
    assert load(name) == load(str(FOLDER / "tiny.py"))
    assert load(f"{name}:dense") == load("tiny:dense")


def test_a_file_of_the_users_own_is_used_before_a_recipe_of_that_path(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    text = "from wsparse.config import recipe\n\n\ndef get_config():\n    return recipe(steps=7)\n"
    (tmp_path / "configs" / "tiny.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load("configs/tiny.py").steps == 7
    assert load("tiny").steps == 1250


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("configs/gao_475m.py", "gao:475m"),
        ("configs/tiny_dense.py", "tiny:dense"),
        ("small_dense_narrow", "small:dense_narrow"),
    ],
)
def test_the_older_name_of_a_variant_is_read_with_a_notice(old, new, logged):
    assert load(old) == load(new)
    assert logged == [f"--config={old} is --config={new} now"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "did you mean 'tiny'?"),
        ("none/at/all.py", "recipes are gao:7m"),
        ("gao", "gao:VARIANT with one of 7m"),
        ("gao:476m", "did you mean '475m'?"),
        ("tiny:densee", "did you mean 'dense'?"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        recipes.load(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "does not define get_config()"),
        ("def get_config(): return 1", "must return a ConfigDict"),
        ("def get_config():\n    return 1 / 0", ".py:2: ZeroDivisionError: division by zero"),
        ("def get_config(:", ".py:1: invalid syntax"),
        ("import none_of_these", "ModuleNotFoundError"),
        (
            "from wsparse.config import recipe\ndef get_config():\n    return recipe(stepz=1)",
            ".py:3: unknown config key 'stepz'",
        ),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused_with_its_line(tmp_path, code, message):
    path = tmp_path / "bad.py"
    path.write_text(code)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        recipes.load(str(path))
    assert str(path) in str(error.value)


def test_a_recipe_with_a_variant_of_the_libraries_own_kind_is_read(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from wsparse.config import recipe\n\ndef get_config(steps):\n    return recipe(steps=int(steps))\n"
    )
    assert load(f"{path}:12").steps == 12
