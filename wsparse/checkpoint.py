"""Checkpoints: orbax for the arrays, and a digest of every file so that damage is noticed.

A step is written asynchronously, then its files are hashed in a thread, then `digests.json` appears beside
them. Only a step whose files still have those digests is restored; another one is moved out of the way, and
the newest good one before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

from etils import epath
import jax
import orbax.checkpoint as ocp

from wsparse import files, processes, trees
from wsparse.errors import UserError

log = logging.getLogger(__name__)

_DIGESTS = "digests.json"
SET_ASIDE = "damaged"


class Checkpointer:
    """Saves and restores `(state, metadata)` in a folder; use as a context manager.

    Args:
      folder: where the steps are, made when missing.
      keep: how many of the newest steps stay.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
    ):
        self._folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._hasher = futures.ThreadPoolExecutor(1)
        self._hashing: list[futures.Future] = []
        self._unhashed: list[int] = []

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Begin to write `state` (a tree of arrays) as `step`; `finish` waits for it."""
        self.finish()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
        )
        self._manager.save(step, args=items)
        self._unhashed.append(step)

    def poll(self) -> None:
        """Hash what has been written meanwhile, in a thread; never waits."""
        if self._unhashed and not self._manager.is_saving_in_progress():
            self._start_hashing()

    def finish(self) -> None:
        """Wait until every saved step is on disk with its digests."""
        self._manager.wait_until_finished()
        self._start_hashing()
        for future in self._hashing:
            future.result()
        self._hashing.clear()

    def close(self) -> None:
        """Finish, and let go of the folder."""
        self.finish()
        self._hasher.shutdown()
        self._manager.close()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest undamaged checkpoint, or None when there is none; damaged ones are set aside.

        Args:
          like: tree of `jax.ShapeDtypeStruct` with shardings: what to restore, and where to put it.

        Returns:
          `(step, state, metadata)`.

        Raises:
          UserError: what is stored does not fit `like`.
        """
        step = self.latest_step()
        if step is None:
            return None
        _check_fit(self._folder / str(step), like, partial=False)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), metadata=ocp.args.JsonRestore()
        )
        restored = _restore(self._manager, step, items)
        return step, restored["state"], restored["metadata"]

    def latest_step(self) -> int | None:
        """The newest undamaged step on disk, once what is being written has arrived there."""
        self.finish()
        # One process looks, since it is the one that sets damaged steps aside; the others wait for it.
        mine = next(self._good_steps(), None) if jax.process_index() == 0 else None
        found = processes.gather(str(mine))[0]
        if jax.process_index() != 0:
            self._manager.reload()
        return None if found == "None" else int(found)

    def _good_steps(self) -> Iterator[int]:
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = _damage(self._folder / str(step))
            if reason is None:
                yield step
            else:
                self._set_aside(step, reason)

    def _set_aside(self, step: int, reason: str) -> None:
        target = self._folder.parent / SET_ASIDE / f"{self._folder.name}-{step}"
        log.warning("checkpoint %d is not used: %s; moved to %s", step, reason, target)
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self._folder / str(step), target)
        self._manager.reload()

    def _start_hashing(self) -> None:
        steps, self._unhashed = self._unhashed, []
        if jax.process_index() == 0:
            self._hashing += [self._hasher.submit(self._write_digests, step) for step in steps]

    def _write_digests(self, step: int) -> None:
        folder = self._folder / str(step)
        if folder.is_dir():
            files.write_json(folder / _DIGESTS, _digests(folder))


def read(folder: str | os.PathLike[str], like: Any, *, step: int | None = None) -> tuple[int, Any]:
    """Part of a checkpoint's state, without changing anything in the folder.

    Args:
      folder: a `Checkpointer`'s.
      like: tree of `jax.ShapeDtypeStruct` with shardings; it may leave out branches of the state.
      step: which one; None is the newest undamaged.

    Returns:
      `(step, state)` with the branches of `like`.

    Raises:
      UserError: there is no such step, or none that is whole; it is damaged; it does not fit `like`.
    """
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: let training reach a checkpoint first")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
        reasons = {each: _damage(folder / str(each)) for each in steps}
        good = next((each for each, reason in reasons.items() if reason is None), None)
        if good is None:
            why = "; ".join(f"step {each}: {reason}" for each, reason in reasons.items())
            raise UserError(f"{folder} has no usable checkpoint{f' ({why})' if why else ''}")
        _check_fit(folder / str(good), like, partial=True)
        arguments = ocp.args.PyTreeRestore(
            like,
            partial_restore=True,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        )
        return good, _restore(manager, good, ocp.args.Composite(state=arguments))["state"]


def _check_fit(folder: pathlib.Path, like: Any, *, partial: bool) -> None:
    """Refuse a step whose arrays are not those of `like`, by name; `partial` may leave some out."""
    stored = trees.flatten(
        ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / "state")).tree
    )
    there = {path: tuple(leaf.shape) for path, leaf in stored.items()}
    here = {path: tuple(leaf.shape) for path, leaf in trees.flatten(like).items()}
    for path in sorted(set(here) | (set() if partial else set(there))):
        if there.get(path) != here.get(path):
            raise UserError(
                f"checkpoint {folder} does not fit this configuration: {path} has shape "
                f"{there.get(path, 'none')} there and {here.get(path, 'none')} here"
            )


def _restore(manager: ocp.CheckpointManager, step: int, items: ocp.args.Composite) -> Any:
    try:
        return manager.restore(step, args=items)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {step} in {manager.directory} does not fit this configuration: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the files of a step, or None."""
    if not folder.is_dir():
        return "no such checkpoint"
    try:
        expected = json.loads((folder / _DIGESTS).read_text())
    except FileNotFoundError:
        return "it was not finished (it has no digests)"
    except ValueError:
        return "its digests cannot be read"
    found = _digests(folder)
    wrong = sorted(
        name for name in set(found) | set(expected) if found.get(name) != expected.get(name)
    )
    return f"{wrong[0]} is damaged ({len(wrong)} of {len(expected)} files)" if wrong else None


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """sha256 of every file below `folder` except the digests themselves, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _DIGESTS:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return found
