"""The command fails in one line, and survives being killed."""

import json
import signal
import time

from helpers import assert_bitwise, run_python, start_python
import pytest
import train_case as case

source = case.source


# The command ------------------------------------------------------------------------------------------

RECIPE = """
from wsparse.config import recipe


def get_config():
    return recipe(
        model={{"vocab_size": 300, "context": 16, "n_layer": 2, "d_model": 32, "n_head": 2,
               "d_head": 8, "d_mlp": 64}},
        sparsity={{"density": 0.25}},
        data={{"source": {source!r}, "megabytes": 1.0, "validation_fraction": 0.1}},
        steps={steps}, batch_size=8, log_every=5, checkpoint_every=20,
    )
"""


# As in conftest.py, in another process.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


# Importing takes seconds, a mistake none: every command is a fork of a process that has imported.
MANY_COMMANDS = """
import json, os, runpy, sys

import wsparse.checkpoint, wsparse.circuits, wsparse.data.batches, wsparse.metrics, wsparse.sharding

statuses = []
for number, arguments in enumerate(json.loads(sys.argv[2])):
    if (child := os.fork()) == 0:
        output = os.open(f"{sys.argv[1]}/{number}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train", *arguments]
        runpy.run_module("wsparse.train", run_name="__main__")
    statuses.append(os.waitpid(child, 0)[1])
print(json.dumps(statuses))
"""


@pytest.fixture
def recipe(tmp_path, source):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(source=source, steps=100))
    return f"--config={path}"


def test_mistakes_on_the_command_line_are_errors_of_one_line(recipe, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    workdir = f"--workdir={tmp_path / 'run'}"
    cases = {
        "group": ([recipe, workdir, "--config.modle.x=1"], ["modle", "model"]),
        "key": ([recipe, workdir, "--config.model.n_layr=1"], ["n_layr", "n_layer"]),
        "type": ([recipe, workdir, "--config.steps=abc"], ["steps", "abc"]),
        "value": ([recipe, workdir, "--config.model.n_layer=0"], ["model.n_layer", "at least 1", "0"]),
        "override": (
            [recipe, workdir, "--config.sparsity.overrides=embed/token=1/8"],
            ["embed/token", "did you mean 'embed/tokens'"],
        ),
        "top": ([recipe, workdir, "--config.zzzz=1"], ["unknown config key 'zzzz'"]),
        "nothing": ([workdir], ["--config"]),
        "file": ([f"--config={tmp_path}/none.py", workdir], ["none.py"]),
        "workdir": ([recipe, f"--workdir={blocked}/run"], ["--workdir", str(blocked)]),
    }

    recipes = {
        "no function": ("x = 1", ["get_config"]),
        "no config": ("def get_config(): return 1", ["ConfigDict", "int"]),
        "raises": ("def get_config():\n    return 1 / 0", [".py:2: ZeroDivisionError"]),
        "syntax": ("def get_config(:", [".py:1: invalid syntax"]),
    }
    for number, (name, (code, words)) in enumerate(recipes.items()):
        path = tmp_path / f"bad{number}.py"
        path.write_text(code)
        cases[name] = ([f"--config={path}", workdir], words)

    outputs = tmp_path / "outputs"
    outputs.mkdir()
    commands = json.dumps([arguments for arguments, _ in cases.values()])
    process = run_python("-c", MANY_COMMANDS, outputs, commands)
    assert process.returncode == 0, process.stderr
    statuses = dict(zip(cases, json.loads(process.stdout), strict=True))
    for number, (name, (_, words)) in enumerate(cases.items()):
        printed = (outputs / f"{number}.txt").read_text()
        assert statuses[name] != 0, name
        assert "Traceback" not in printed, (name, printed)
        assert len(printed.strip().splitlines()) == 1, (name, printed)
        for word in words:
            assert word in printed, (name, printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_process_loses_only_what_came_after_its_last_checkpoint(source, tmp_path):
    """SIGKILL after a checkpoint, then the same command: bitwise the run that nothing happened to."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(source=source, steps=300))
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **QUICK,
    }

    def go(workdir):
        return start_python("-m", "wsparse.train", f"--config={path}", f"--workdir={workdir}", **cache)

    whole = go(tmp_path / "whole")
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err

    killed = go(tmp_path / "killed")
    limit = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoints" / "40" / "digests.json").exists():
        assert killed.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it finished before it was killed"
    assert not (tmp_path / "killed" / "summary.json").exists()

    again = go(tmp_path / "killed")
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "resuming at step" in out
    assert_bitwise(case.final_state(tmp_path / "killed")[1], case.final_state(tmp_path / "whole")[1])
    steps = [record["step"] for record in case.train_records(tmp_path / "killed")]
    assert steps == list(range(5, 301, 5))


@pytest.mark.slow
def test_a_learning_rate_that_explodes_stops_with_a_name(recipe, tmp_path):
    arguments = [recipe, f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rate=1e30"]
    process = start_python("-m", "wsparse.train", *arguments, **QUICK)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    (line,) = err.strip().splitlines()
    assert "NaN or infinity at step" in line
    assert "learning_rate" in line
    assert any(part in line for part in ("blocks/", "embed/", "head/"))
    assert not (tmp_path / "run" / "summary.json").exists()
