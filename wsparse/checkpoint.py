"""Checkpoints: orbax for the arrays, and a digest of every file so that damage is noticed.

A step is written asynchronously, then its files are hashed in a thread, then `digests.json` appears beside
them with the step's number. Only a step whose files have those digests is restored; another one is moved out
of the way, and the newest good one before it is used. Older steps are deleted once a newer one is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from wsparse import errors, files, processes, trees
from wsparse.errors import UserError

log = logging.getLogger(__name__)

_DIGESTS = "digests.json"
_NAMES = ocp.path.step.standard_name_format()
SET_ASIDE = "damaged"


class Checkpointer:
    """Saves and restores `(state, metadata)` in a folder; use as a context manager.

    Args:
      folder: Folder of the steps, made when missing.
      keep: Number of the newest steps that stay.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3):
        self.folder, self._keep = pathlib.Path(folder).absolute(), keep
        # Orbax would delete old steps before the new one has its digests.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, create=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        with _explained(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder, item_names=tuple(handlers), item_handlers=handlers, options=options
            )
        self._hasher = futures.ThreadPoolExecutor(1)
        self._hashing: list[futures.Future] = []
        self._unhashed: list[int] = []
        self._replaced = False

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # An error on the way here says more than the ones it causes.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Begin to write `state` (a tree of arrays) as `step`; `finish` waits for it.

        Raises:
          UserError: This step, or the one before, cannot be written.
        """
        self.finish()
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata))
        with _explained(self._path(step)):
            self._manager.save(step, args=items)
        self._unhashed.append(step)
        self._replaced = True

    def poll(self) -> None:
        """Hash what has been written meanwhile, in a thread; never waits.

        Raises:
          UserError: A step could not be written.
        """
        if self._unhashed and not self._manager.is_saving_in_progress():
            self._start_hashing()
        for future in self._hashing:
            if future.done():
                future.result()

    def finish(self) -> None:
        """Wait until every saved step is on disk with its digests, and delete the steps it replaces.

        Raises:
          UserError: A step could not be written.
        """
        self._start_hashing()
        hashing, self._hashing = self._hashing, []
        for future in hashing:
            future.result()
        if self._replaced:
            # Only now: until a newer step is complete, the older ones are all there is.
            for step in sorted(self._manager.all_steps())[: -self._keep]:
                self._manager.delete(step)
            self._replaced = False

    def close(self) -> None:
        """Finish, and let go of the folder."""
        try:
            self.finish()
        finally:
            self._hasher.shutdown()
            self._manager.close()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restore the newest undamaged checkpoint, and set damaged ones aside.

        Args:
          like: Tree of `jax.ShapeDtypeStruct` with shardings: what to restore, and where to put it.

        Returns:
          `(step, state, metadata)`, or None when there is no checkpoint.

        Raises:
          UserError: The checkpoint does not fit `like`.
        """
        step = self.latest_step()
        if step is None:
            return None
        path = self._path(step)
        _check_fit(path, self._manager.item_metadata(step)["state"], like, partial=False)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), metadata=ocp.args.JsonRestore())
        with _misfit(path):
            restored = self._manager.restore(step, args=items)
        return step, restored["state"], restored["metadata"]

    def latest_step(self) -> int | None:
        """Returns the newest undamaged step, once what is being written has arrived on disk."""
        self.finish()
        # One process looks, since it is the one that sets damaged steps aside; the others wait for it.
        newest = None
        if jax.process_index() == 0:
            paths = {step: self._path(step) for step in self._manager.all_steps()}
            newest = next(_good_steps(paths, self._set_aside), None)
        agreed = processes.gather(str(newest))[0]
        if jax.process_index() != 0:
            self._manager.reload()
        return None if agreed == "None" else int(agreed)

    def _set_aside(self, step: int, reason: str) -> None:
        target = self.folder.parent / SET_ASIDE / f"{self.folder.name}-{step}"
        log.warning("checkpoint %d is not used: %s; moved to %s", step, reason, target)
        files.make_folder(target.parent)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self._path(step), target)
        self._manager.reload()

    def _start_hashing(self) -> None:
        steps, self._unhashed = self._unhashed, []
        for step in steps:
            with _explained(self._path(step)):
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            if jax.process_index() == 0:
                self._hashing.append(self._hasher.submit(self._write_digests, step))

    def _write_digests(self, step: int) -> None:
        with _explained(self._path(step)):
            digests = {"step": step, "files": _digests(self._path(step))}
            files.write_json(self._path(step) / _DIGESTS, digests, durable=True)

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / _NAMES.build_name(step)


def read(folder: str | os.PathLike[str], like: Any, *, step: int | None = None) -> tuple[int, Any]:
    """Read part of a checkpoint's state, without changing anything in the folder.

    Args:
      folder: Folder of a `Checkpointer`.
      like: Tree of `jax.ShapeDtypeStruct` with shardings; it may leave out branches of the state.
      step: Step to read; by default the newest undamaged one.

    Returns:
      `(step, state)` with the branches of `like`.

    Raises:
      UserError: There is no such step, or none that is undamaged; it does not fit `like`.
    """
    step = find_step(folder, step)
    return step, read_step(folder, like, step)


def find_step(folder: str | os.PathLike[str], step: int | None = None) -> int:
    """Returns the newest undamaged step of a `Checkpointer`'s folder, or `step` if that is undamaged.

    Raises:
      UserError: There is none.
    """
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: let training reach a checkpoint first")
    paths = {found.step: pathlib.Path(found.path) for found in _NAMES.find_all(folder)}
    chosen = paths if step is None else {step: paths.get(step)}
    reasons: dict[int, str] = {}
    good = next(_good_steps(chosen, reasons.__setitem__), None)
    if good is None:
        why = "; ".join(f"step {number}: {reason}" for number, reason in reasons.items())
        raise UserError(f"{folder} has no usable checkpoint{f' ({why})' if why else ''}")
    return good


def read_step(folder: str | os.PathLike[str], like: Any, step: int) -> Any:
    """Returns what `read` does of a step that `find_step` has found; its files are not hashed again."""
    path = pathlib.Path(folder).absolute() / _NAMES.build_name(step)
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(), metadata=ocp.JsonCheckpointHandler()
    )
    with ocp.Checkpointer(handler) as reader:
        _check_fit(path, reader.metadata(path).item_metadata["state"], like, partial=True)
        arguments = ocp.args.PyTreeRestore(
            like, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
        )
        with _misfit(path):
            return reader.restore(path, ocp.args.Composite(state=arguments))["state"]


def read_metadata(folder: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """Returns the metadata of a checkpoint; empty where there is none that can be read."""
    for found in _NAMES.find_all(pathlib.Path(folder).absolute()):
        if found.step == step:
            with contextlib.suppress(UserError):
                return files.read_json(pathlib.Path(found.path) / "metadata" / "metadata")
    return {}


def has_steps(workdir: pathlib.Path) -> bool:
    """Returns whether a run has a checkpoint, good or set aside."""
    return any(any(workdir.glob(f"{name}/*")) for name in ("checkpoints", SET_ASIDE))


def _check_fit(path: pathlib.Path, stored: Any, like: Any, *, partial: bool) -> None:
    """Refuse a step whose arrays are not those of `like`, by name; `partial` may leave some out."""
    there, here = _shapes(getattr(stored, "tree", stored)), _shapes(like)
    for name in sorted(here if partial else here | there):
        if there.get(name) != here.get(name):
            raise UserError(
                f"checkpoint {path} does not fit this configuration: {name} has shape "
                f"{there.get(name, 'none')} there and {here.get(name, 'none')} here"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in trees.flatten(tree).items()}


@contextlib.contextmanager
def _misfit(path: pathlib.Path) -> Iterator[None]:
    """Turn orbax's errors about a structure into one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} does not fit this configuration: {errors.reason(error)}"
        ) from error


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Turn the errors of writing into one line; orbax's and tensorstore's have no common type."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Tensorstore gives the system's error as a number at the end of a long text.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        reason = os.strerror(int(code[1])) if code else error
        raise files.cannot_write(path, reason) from error


def _good_steps(
    paths: Mapping[int, pathlib.Path | None], refuse: Callable[[int, str], None]
) -> Iterator[int]:
    """Yields the undamaged steps, newest first; `refuse` is told of others that are met, with the reason."""
    for step in sorted(paths, reverse=True):
        reason = _damage(paths[step], step)
        if reason is None:
            yield step
        else:
            refuse(step, reason)


def _damage(path: pathlib.Path | None, step: int) -> str | None:
    """Returns what is wrong with the files of a step, or None."""
    if path is None or not path.is_dir():
        return "no such checkpoint"
    if not (path / _DIGESTS).exists():
        return "it was not finished (it has no digests)"
    try:
        stored = files.read_json(path / _DIGESTS)
    except UserError:
        return "its digests cannot be read"
    # Before steps were part of them, digests were the whole file.
    expected = stored.get("files", stored)
    if stored.get("step", step) != step:
        return f"its files are those of step {stored['step']}"
    if not isinstance(expected, dict):
        return "its digests cannot be read"
    try:
        found = _digests(path)
    except FileNotFoundError:
        return "it was deleted meanwhile"
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    return f"{wrong[0]} is damaged ({len(wrong)} of {len(expected)} files)" if wrong else None


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns the sha256 of every file below `folder` except the digests themselves, by relative path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _DIGESTS)
    return {path.relative_to(folder).as_posix(): files.sha256(path) for path in paths}
