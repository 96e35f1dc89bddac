"""A checkpoint comes back bit for bit, on any mesh, or it is noticed that it does not."""

import dataclasses
import gc
import hashlib
import json
import logging
import os
import pathlib
import resource
import shutil

from conftest import log_lines
from helpers import assert_bitwise, assert_one_line
import jax
from jax.sharding import SingleDeviceSharding
import numpy as np
import pytest

from wsparse import checkpoint, sharding
from wsparse.config import MeshConfig, TrainConfig, from_dict
from wsparse.errors import UserError
from wsparse.step import init_state

CONFIG = from_dict(
    TrainConfig,
    {
        "model": {"vocab_size": 24, "context": 8, "n_layer": 2, "d_model": 16, "n_head": 2,
                  "d_head": 4, "d_mlp": 32},
        "sparsity": {"density": 0.5},
    },
)  # fmt: skip
SHAPES = jax.eval_shape(lambda: init_state(CONFIG))
METADATA = {"config": {"steps": 3, "rate": 0.1}, "data_digest": "ab12", "seconds": 1.5, "none": None}


def mesh_of(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def abstract(mesh, shapes=SHAPES):
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def make_state(seed, mesh):
    """A training state with every leaf random: nothing is equal by being zero."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == bool:
            return rng.integers(0, 2, leaf.shape).astype(bool)
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(1, 1000, leaf.shape).astype(leaf.dtype)
        return rng.standard_normal(leaf.shape).astype(leaf.dtype)

    return jax.device_put(jax.tree.map(fill, SHAPES), sharding.tree_shardings(SHAPES, mesh))


def tree_hash(folder: pathlib.Path) -> dict[str, str]:
    """Content, and the time of the last change, of everything below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = f"{content} {path.stat().st_mtime_ns}"
    return found


def flip_bit(path: pathlib.Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    bit = int(np.random.default_rng(seed).integers(len(content) * 8))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def restore(folder, mesh=None, **options):
    """What a `Checkpointer` restores from a folder, and the lines it logs."""
    with log_lines() as lines, checkpoint.Checkpointer(folder, **options) as checkpoints:
        return checkpoints.restore(abstract(mesh or mesh_of())), lines


@dataclasses.dataclass
class Saved:
    folder: pathlib.Path
    states: dict


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Steps 3, 7 and 10, saved from one device; not to be changed."""
    folder = tmp_path_factory.mktemp("original") / "checkpoints"
    states = {step: make_state(step, mesh_of()) for step in (3, 7, 10)}
    with checkpoint.Checkpointer(folder, keep=3) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {**METADATA, "step": step})
    return Saved(folder, states)


@pytest.fixture
def saved(original, tmp_path):
    """A copy of `original` to damage."""
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(original.folder, folder)
    return Saved(folder, original.states)


def data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size > 0]
    return [p for p in files if p.name != "digests.json"]


# Round trips ------------------------------------------------------------------------------------------


def test_the_newest_step_comes_back_bit_for_bit_with_its_metadata(saved):
    (step, state, metadata), lines = restore(saved.folder)
    assert step == 10
    assert lines == []
    assert_bitwise(state, saved.states[10])
    assert metadata == {**METADATA, "step": 10}
    with pytest.raises(AssertionError):  # Negative control: another step is another state.
        assert_bitwise(state, saved.states[7])


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore(tmp_path / "checkpoints") == (None, [])


@pytest.mark.parametrize(
    ("before", "after"),
    [({"data": 8}, {"fsdp": 8}), ({"fsdp": 2, "tensor": 4}, {}), ({}, {"data": 2, "fsdp": 2, "tensor": 2})],
)
def test_a_checkpoint_restores_bitwise_onto_another_mesh(tmp_path, before, after):
    state, target = make_state(0, mesh_of(**before)), mesh_of(**after)
    with checkpoint.Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, METADATA)
    (_, found, _), _ = restore(tmp_path / "checkpoints", target)
    assert_bitwise(found, state)
    want = sharding.tree_shardings(SHAPES, target)
    for leaf, each in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert leaf.sharding.is_equivalent_to(each, leaf.ndim)


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_checkpoints_stay(tmp_path, keep):
    state = {"w": np.arange(4.0, dtype=np.float32)}
    with checkpoint.Checkpointer(tmp_path / "checkpoints", keep=keep) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state, {})
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps == [1, 2, 3, 4][-keep:]
    for step in steps:
        assert (tmp_path / "checkpoints" / str(step) / "digests.json").exists()


def test_saving_does_not_change_what_was_given_later(tmp_path):
    """The save is asynchronous: what is written is the state as it was at the call."""
    state = {"w": np.arange(1 << 16, dtype=np.float32)}
    with checkpoint.Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
        state["w"][:] = -1
    device = SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((1 << 16,), np.float32, sharding=device)}
    _, found = checkpoint.read(tmp_path / "checkpoints", like)
    np.testing.assert_array_equal(found["w"], np.arange(1 << 16))


def test_the_latest_step_is_one_whose_saving_was_waited_for(tmp_path):
    """Asking while a save is under way must not take the unfinished step for a damaged one."""
    state = make_state(0, mesh_of())
    with log_lines() as lines, checkpoint.Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state, METADATA)
        checkpoints._manager.wait_until_finished()  # On disk, but nothing has hashed it yet.
        assert checkpoints.latest_step() == 1
    assert lines == []
    assert not (tmp_path / "damaged").exists()
    (step, found, _), _ = restore(tmp_path / "checkpoints")
    assert step == 1
    assert_bitwise(found, state)


# Damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["largest array", "metadata", "tree", "smallest"])
def test_one_flipped_bit_sets_the_step_aside_and_the_one_before_is_used(saved, kind):
    files = data_files(saved.folder / "10")
    by_size = sorted(files, key=lambda p: p.stat().st_size)
    path = {
        "largest array": by_size[-1],
        "smallest": by_size[0],
        "metadata": saved.folder / "10" / "metadata" / "metadata",
        "tree": saved.folder / "10" / "state" / "_METADATA",
    }[kind]
    flip_bit(path, seed=0)
    (step, state, metadata), lines = restore(saved.folder)
    assert step == 7
    assert metadata["step"] == 7
    assert_bitwise(state, saved.states[7])
    (line,) = lines
    assert "checkpoint 10" in line
    assert path.name in line
    assert "\n" not in line
    aside = saved.folder.parent / "damaged" / "checkpoints-10"
    assert str(aside) in line
    assert aside.is_dir()
    assert sorted(p.name for p in saved.folder.iterdir()) == ["3", "7"]
    # Training goes on from there and can save the step again.
    with checkpoint.Checkpointer(saved.folder) as checkpoints:
        checkpoints.save(10, saved.states[10], METADATA)
    (step, state, _), lines = restore(saved.folder)
    assert step == 10
    assert lines == []
    assert_bitwise(state, saved.states[10])


def test_a_flipped_bit_is_noticed_in_every_file(saved):
    like = {"params": abstract(mesh_of()).params}
    files = data_files(saved.folder / "10")
    assert len(files) >= 5
    for seed, path in enumerate(files):
        content = path.read_bytes()
        flip_bit(path, seed)
        step, state = checkpoint.read(saved.folder, like)
        assert step == 7, path
        assert_bitwise(state["params"], saved.states[7].params)
        path.write_bytes(content)
    # Negative control: with every bit back, the newest step is used.
    assert checkpoint.read(saved.folder, like)[0] == 10


DIGESTS = {
    "digests are no JSON": b'{"state": \xff',
    "digests are null": b"null",
    "digests are a list": b"[1]",
    "digests of files are null": b'{"step": 10, "files": null}',
    "digests are nested": b"[" * 200_000 + b"]" * 200_000,
}


@pytest.mark.parametrize("what", ["gone", "added", "cut", "no digests", *DIGESTS])
def test_a_step_with_other_damage_is_not_used(saved, what):
    folder = saved.folder / "10"
    path = max(data_files(folder), key=lambda p: p.stat().st_size)
    if what == "gone":
        path.unlink()
    elif what == "added":
        path.with_name("extra").write_text("?")
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "no digests":
        (folder / "digests.json").unlink()
    else:
        (folder / "digests.json").write_bytes(DIGESTS[what])
    (step, _, _), (line,) = restore(saved.folder)
    assert step == 7
    assert "checkpoint 10 is not used" in line


def test_steps_under_another_number_are_not_used(saved):
    """Swapped, or copied under a number that no step had."""
    os.rename(saved.folder / "10", saved.folder / "x")
    os.rename(saved.folder / "7", saved.folder / "10")
    os.rename(saved.folder / "x", saved.folder / "7")
    shutil.copytree(saved.folder / "3", saved.folder / "999")
    like = {"params": abstract(mesh_of()).params}
    with pytest.raises(UserError, match="step 999: its files are those of step 3"):
        checkpoint.read(saved.folder, like, step=999)
    assert checkpoint.read(saved.folder, like)[0] == 3
    (step, state, _), lines = restore(saved.folder)
    assert step == 3
    assert_bitwise(state, saved.states[3])
    assert len(lines) == 3


def test_digests_without_a_step_are_those_of_older_runs(saved):
    path = saved.folder / "10" / "digests.json"
    path.write_text(json.dumps(json.loads(path.read_text())["files"]))
    (step, state, _), lines = restore(saved.folder)
    assert (step, lines) == (10, [])
    assert_bitwise(state, saved.states[10])


@pytest.mark.parametrize("keep", [1, 2])
def test_the_old_step_stays_until_the_new_one_has_its_digests(tmp_path, monkeypatch, keep):
    """A process that is killed between writing a step and hashing it loses that step alone."""
    folder = tmp_path / "checkpoints"
    states = {step: make_state(step, mesh_of()) for step in (1, 2)}
    killed = checkpoint.Checkpointer(folder, keep=keep)
    killed.save(1, states[1], METADATA)
    killed.finish()
    killed.save(2, states[2], METADATA)
    killed._manager.wait_until_finished()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert not (folder / "2" / "digests.json").exists()
    killed._hasher.shutdown()
    killed._manager.close()

    with log_lines() as lines, checkpoint.Checkpointer(folder, keep=keep) as again:
        step, state, _ = again.restore(abstract(mesh_of()))
        assert step == 1
        assert_bitwise(state, states[1])
        assert "checkpoint 2 is not used: it was not finished" in lines[0]
        again.save(2, states[2], METADATA)
    # Control: with its digests the new step replaces the old one.
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"][-keep:]
    assert restore(folder)[0][0] == 2


def save_in_small_files(folder, state):
    """Save as if the disk were full: no file may be longer than 4 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with checkpoint.Checkpointer(folder, keep=1) as checkpoints:
            checkpoints.save(11, state, METADATA)
            checkpoints.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Orbax leaves unawaited writes behind when one of them fails; they complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_step_that_cannot_be_written_is_an_error_of_one_line_and_the_old_ones_stay(saved):
    with pytest.raises(UserError) as error:
        save_in_small_files(saved.folder, saved.states[10])
    assert_one_line(error)
    assert str(saved.folder) in str(error.value)
    assert "MB free" in str(error.value)
    del error
    gc.collect()
    (step, state, _), _ = restore(saved.folder)
    assert step == 10
    assert_bitwise(state, saved.states[10])


def test_with_every_step_damaged_training_begins_anew(saved):
    for step in (3, 7, 10):
        flip_bit(data_files(saved.folder / str(step))[0], seed=step)
    found, lines = restore(saved.folder)
    assert found is None
    assert len(lines) == 3


def test_a_checkpoint_that_was_never_committed_is_not_seen(saved):
    """What a crash in the middle of writing leaves behind."""
    shutil.copytree(saved.folder / "10", saved.folder / "12.orbax-checkpoint-tmp-1")
    (step, _, _), lines = restore(saved.folder)
    assert step == 10
    assert lines == []


# Orbax leaves unawaited reads behind when one of them fails; they complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "change", [{"d_mlp": 64}, {"logits_bias": True}, {"sink": False}, {"n_layer": 3}], ids=str
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line_that_names_a_parameter(saved, change):
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change))
    shapes = jax.eval_shape(lambda: init_state(other))
    changed = {"d_mlp": "mlp", "logits_bias": "logits_bias", "sink": "sink", "n_layer": "blocks"}
    with checkpoint.Checkpointer(saved.folder) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(abstract(mesh_of(), shapes))
    assert_one_line(error)
    message = str(error.value)
    del error
    gc.collect()
    assert changed[next(iter(change))] in message


# Reading ----------------------------------------------------------------------------------------------


def test_reading_changes_nothing_in_the_folder_even_when_a_step_is_damaged(saved):
    like = {"params": abstract(mesh_of()).params}
    for damaged, want in ((False, 10), (True, 7)):
        if damaged:
            flip_bit(data_files(saved.folder / "10")[0], seed=1)
        before = tree_hash(saved.folder.parent)
        assert checkpoint.read(saved.folder, like)[0] == want
        assert tree_hash(saved.folder.parent) == before
    # Negative control: training's restore does change the folder here.
    restore(saved.folder)
    assert tree_hash(saved.folder.parent) != before


def test_reading_hashes_no_step_older_than_the_one_that_is_used(saved, monkeypatch):
    like, hashed, digests = {"params": abstract(mesh_of()).params}, [], checkpoint._digests

    def noting(folder):
        hashed.append(folder.name)
        return digests(folder)

    monkeypatch.setattr(checkpoint, "_digests", noting)
    assert checkpoint.read(saved.folder, like)[0] == 10
    assert hashed == ["10"]
    flip_bit(data_files(saved.folder / "10")[0], seed=1)
    assert checkpoint.read(saved.folder, like)[0] == 7
    assert hashed == ["10", "10", "7"]


def test_a_step_that_is_deleted_while_it_is_read_counts_as_gone(saved, monkeypatch):
    """Training deletes steps that newer ones replace."""
    like, sha256 = {"params": abstract(mesh_of()).params}, checkpoint.files.sha256

    def deleting(path):
        shutil.rmtree(saved.folder / "10", ignore_errors=True)
        return sha256(path)

    monkeypatch.setattr(checkpoint.files, "sha256", deleting)
    assert checkpoint.read(saved.folder, like)[0] == 7


def test_reading_logs_nothing_of_the_libraries(saved, caplog):
    with caplog.at_level(logging.WARNING):
        checkpoint.read(saved.folder, {"params": abstract(mesh_of()).params})
    assert caplog.records == []


def test_reading_gives_only_the_branch_that_was_named(saved):
    like = {"params": {"head": abstract(mesh_of()).params["head"]}}
    step, state = checkpoint.read(saved.folder, like)
    assert step == 10
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert_bitwise(state["params"]["head"], saved.states[10].params["head"])


def test_reading_places_arrays_where_it_is_told(saved):
    device = SingleDeviceSharding(jax.devices()[5])
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), {"params": SHAPES.params}
    )
    _, state = checkpoint.read(saved.folder, like, step=3)
    assert_bitwise(state["params"], saved.states[3].params)
    assert {d for leaf in jax.tree.leaves(state) for d in leaf.devices()} == {jax.devices()[5]}


def test_reading_what_is_not_there_is_an_error_of_one_line(saved, tmp_path):
    like = {"params": abstract(mesh_of()).params}
    empty = tmp_path / "empty"
    empty.mkdir()
    flip_bit(data_files(saved.folder / "3")[0], seed=2)
    for folder, arguments, words in (
        (tmp_path / "missing", {}, ["missing", "does not exist"]),
        (empty, {}, [str(empty), "no usable checkpoint"]),
        (saved.folder, {"step": 5}, ["step 5", "no such checkpoint"]),
        (saved.folder, {"step": 3}, ["step 3", "damaged"]),
    ):
        with pytest.raises(UserError) as error:
            checkpoint.read(folder, like, **arguments)
        assert_one_line(error)
        for word in words:
            assert word in str(error.value)
    assert os.listdir(empty) == []
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "path", [("params", "head", "logits_bias"), ("params", "nonsense"), ("other",)], ids="/".join
)
def test_reading_a_branch_that_is_not_stored_is_an_error_that_names_it(saved, path):
    """It must not come back as the placeholder that was asked with."""
    like: object = abstract(mesh_of()).params["head"]["norm"]["gain"]
    for name in reversed(path):
        like = {name: like}
    with pytest.raises(UserError, match=path[-1]) as error:
        checkpoint.read(saved.folder, like)
    assert_one_line(error)
