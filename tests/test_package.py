"""The installed package has all its parts, and its command and its names load only what they need."""

import importlib
import os
import pathlib
import subprocess
import sys
import tomllib

from absl import app, flags
from helpers import REPO, run_python
import pytest

import wsparse
from wsparse import cli, command

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def wsparse_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", "from wsparse import cli; cli.main()", *arguments, **environment)


@pytest.mark.parametrize("name", wsparse.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(wsparse, name) is not None
    assert name in dir(wsparse)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune_all'"):
        wsparse.prune_all  # noqa: B018


def test_the_package_and_its_list_of_commands_load_no_jax():
    program = (
        "import sys, wsparse.cli; print(wsparse.cli.usage()); "
        "assert not {'jax', 'numpy', 'flax', 'absl'} & set(sys.modules)"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_a_module_that_runs_as_a_program(name):
    spec = importlib.util.find_spec(cli.COMMANDS[name][0])
    assert spec is not None
    assert 'if __name__ == "__main__":' in pathlib.Path(spec.origin or "").read_text()


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_shows_its_options_and_leaves_with_status_0(name, flag, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    define = getattr(module, "define_flags", None) or module._define_flags
    app.define_help_flags()
    before = set(flags.FLAGS)
    define()
    try:
        with pytest.raises(SystemExit) as end:
            command._parse([name, flag])
        assert end.value.code == 0
        assert capsys.readouterr().out.strip()
    finally:
        for defined in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, defined)


def test_the_console_command_runs_modules_and_refuses_names_it_does_not_know():
    assert wsparse_command("--version").stdout == f"wsparse {wsparse.__version__}\n"
    unknown = wsparse_command("trian")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == (
        "error: there is no command 'trian' (did you mean 'train'?); see wsparse --help\n"
    )
    sampled = wsparse_command("sample", "--run=/none", "--prompt=x", JAX_PLATFORMS="cpu")
    assert sampled.returncode == 2
    assert sampled.stderr.startswith("error: /none")


def test_the_module_of_the_console_command_is_the_command():
    done = run_python("-m", "wsparse.cli", "--version")
    assert done.stdout == f"wsparse {wsparse.__version__}\n"


def test_every_folder_of_the_package_is_installed():
    folders = {path.parent for path in [*(REPO / "wsparse").rglob("*.py")]}
    packages = {".".join(folder.relative_to(REPO).parts) for folder in folders}
    recipes = {path.parent.relative_to(REPO).parts for path in (REPO / "configs").rglob("*.py")}
    packages |= {".".join(("wsparse", *parts)) for parts in recipes}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.slow
def test_a_wheel_installs_the_command_and_everything_it_reads(tmp_path):
    """Built from the files of the repository, installed where no checkout is near."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, check=True
    )
    shipped = {}
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPO / name).is_file():
            content = (REPO / name).read_bytes()
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes(content)
            if name.startswith(("wsparse/", "configs/")):
                shipped[name.removeprefix("wsparse/")] = content
    target = tmp_path / "site"
    # With the setuptools that is installed, so that no network is needed.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, f"--target={target}", str(tmp_path / "source")], check=True)
    installed = [path for path in (target / "wsparse").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    found = {path.relative_to(target / "wsparse").as_posix(): path.read_bytes() for path in installed}
    assert sorted(found) == sorted(shipped)
    assert found == shipped
    program = "import wsparse.recipes; print(wsparse.__file__, wsparse.recipes.find('tiny'))"
    done = run_python("-c", program, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(target / "wsparse/__init__.py"),
        str(target / "wsparse/configs/tiny.py"),
    ]
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [target / "bin" / "wsparse", "--version"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"wsparse {wsparse.__version__}\n"
