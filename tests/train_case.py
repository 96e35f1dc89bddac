"""Small training runs, for the tests of training."""

import dataclasses
import functools
import itertools
import pathlib
import signal

from conftest import collect_compilations, log_lines
import jax
import pytest

from wsparse import checkpoint, metrics, runs, sharding, train
from wsparse.config import TrainConfig, from_dict
from wsparse.step import init_state

REPO = pathlib.Path(__file__).resolve().parent.parent
STEPS = 40


def write_corpus(folder: pathlib.Path) -> str:
    """Repetitive documents; returns the source that reads them."""
    names = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        lines = [f"def {name}(x, y):", f"    return x + {i % 7}", f"print({name}(1, y=2))", ""]
        (folder / f"{name}.py").write_text("\n".join(lines * 6))
    return f"files:{folder}/*.py"


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The corpus, the same one for all modules."""
    folder = tmp_path_factory.getbasetemp() / "train_corpus"
    return f"files:{folder}/*.py" if folder.exists() else write_corpus(folder)


def make_config(source: str, **changes) -> TrainConfig:
    settings: dict = {
        "model": {"vocab_size": 300, "context": 16, "n_layer": 2, "d_model": 32, "n_head": 2,
                  "d_head": 8, "d_mlp": 64},
        "sparsity": {"density": 0.25, "anneal_end": 0.5},  # no floor of 4 a neuron binds
        "optimizer": {"learning_rate": 0.02},
        "data": {"source": source, "megabytes": 1.0, "validation_fraction": 0.1},
        "steps": STEPS, "batch_size": 8, "log_every": 5, "eval_every": 20, "eval_batches": 2,
        "checkpoint_every": 15,
    }  # fmt: skip
    for key, value in changes.items():
        if isinstance(value, dict):
            settings.setdefault(key, {}).update(value)
        else:
            settings[key] = value
    return from_dict(TrainConfig, settings)


@functools.cache
def _compiled(config: TrainConfig, mesh) -> train.Program:
    return train_make_program(config, mesh)


train_make_program = train.make_program


def shared_program(config: TrainConfig, mesh) -> train.Program:
    """`train.make_program`, compiled once for all runs whose steps are the same function."""
    same = dataclasses.replace(
        config, log_every=1, eval_every=0, eval_batches=1, checkpoint_every=0, keep_checkpoints=1,
        data=train.TrainConfig().data,
    )  # fmt: skip
    return _compiled(same, mesh)


@pytest.fixture
def one_device(monkeypatch):
    """Runs use one device and share their compiled functions."""
    patch_for_speed(monkeypatch)


def patch_for_speed(monkeypatch):
    alone = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(train.sharding, "make_mesh", alone)
    monkeypatch.setattr(train, "make_program", shared_program)


def before_step(monkeypatch, number: int, act) -> None:
    """Have `act(state) -> state` called before the step that makes step `number`, once."""
    make = train.make_program

    def make_program(config, mesh):
        program = make(config, mesh)

        def step(state, batch):
            if int(state.step) + 1 == number and not done:
                done.append(True)
                state = act(state)
            return program.step(state, batch)

        return dataclasses.replace(program, step=step)

    done: list[bool] = []
    monkeypatch.setattr(train, "make_program", make_program)


def stop_at(monkeypatch, number: int, which: signal.Signals) -> None:
    """The process gets a signal while step `number` runs."""

    def act(state):
        signal.raise_signal(which)
        return state

    before_step(monkeypatch, number, act)


def final_state(workdir: pathlib.Path, step: int | None = None):
    config = runs.read_config(workdir)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(lambda: init_state(config)),
    )
    found, state = checkpoint.read(workdir / "checkpoints", like, step=step)
    return found, jax.device_get(state)


def steps_on_disk(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def train_records(workdir):
    return [record for record in metrics.read(workdir) if "loss" in record]


@dataclasses.dataclass
class Finished:
    workdir: pathlib.Path
    config: TrainConfig
    compiled: list[str]
    printed: str


@pytest.fixture(scope="session")
def finished(source, tmp_path_factory):
    """A complete run of the config above on one device; not to be changed."""
    return _finished(source, tmp_path_factory.getbasetemp() / "finished")


@functools.cache
def _finished(source, folder):
    # As conftest.py sets it for the modules that compare runs with this one.
    jax.config.update("jax_disable_most_optimizations", True)
    workdir = folder / "deeper" / "full"
    config = make_config(source)
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_for_speed(monkeypatch)
        with log_lines() as lines, collect_compilations() as names:
            assert train.run(config, workdir) == 0
    return Finished(workdir, config, names, "\n".join(lines))


def compiled_for(config):
    return shared_program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
