"""Runs published on the Hugging Face Hub: the model, its circuits, and a card with the table of them.

    python -m wsparse.interop.hub --run=RUN --to=owner/name [--private] [--dry_run]

`wsparse.load("owner/name")` reads what is there as a run with its circuits. Everything is one commit: the
repository has all of it or is as it was.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import logging
import pathlib
import shutil
import tempfile
from typing import Any

from absl import flags

from wsparse import files, markdown, runs
from wsparse.circuits import report
from wsparse.circuits.audits.record import Audit
from wsparse.circuits.circuit import FOLDER, Circuit, folder_of
from wsparse.command import run_command
from wsparse.errors import UserError, optional, quoted, reason
from wsparse.interop import pretrained

log = logging.getLogger(__name__)

_CARD, _PAGE = "README.md", "report.html"
_OF_A_TASK = (
    "circuit.json", "circuit.npz", "circuit.txt", "status.json", "evidence.json", "evidence.npz",
    "audit.json", "audit.html", "notes.json", "attack.json", "attack.png", "comparison.json",
)  # fmt: skip
_OF_ALL_TASKS = ("table.txt", "results.json", "curves.png", "model.npz")
# What a run reads of them; pages are for people, who open them on the Hub.
LOADED = (f"{FOLDER}/*.json", f"{FOLDER}/*.npz")


@dataclasses.dataclass(frozen=True)
class Push:
    """What was published, or would be.

    Attributes:
      repository: Repository id.
      sizes: Path in the repository -> bytes.
      removed: Paths of an earlier push that are gone with this one.
      url: Address of the repository; empty for a dry run.
    """

    repository: str
    sizes: Mapping[str, int]
    removed: tuple[str, ...] = ()
    url: str = ""

    def __str__(self) -> str:
        lines = [f"{size / 1e6:9.3f} MB  {path}" for path, size in self.sizes.items()]
        total = sum(self.sizes.values()) / 1e6
        verb = f"published at {self.url}" if self.url else f"would be published as {self.repository}"
        removed = [f"  removed     {path}" for path in self.removed]
        return "\n".join([*lines, *removed, f"{len(self.sizes)} files, {total:.3f} MB: {verb}"])


def push_to_hub(run: runs.Run, repository: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Publishes a run: its model, its circuits, the page where there is one, and a card.

    Args:
      run: The run.
      repository: Repository id, "owner/name"; made where there is none.
      private: Whether a repository that is made is private.
      dry_run: Only return what would be published; needs neither the network nor a token.

    Raises:
      UserError: There is no token or no network, the token may not write, or the repository holds something
        that no earlier push of a run has left.
    """
    if not pretrained.is_repository(repository):
        raise UserError(f"--to={repository} must be a repository id of the Hugging Face Hub, owner/name")
    with tempfile.TemporaryDirectory() as folder:
        stage = pathlib.Path(folder)
        _write_stage(run, repository, stage)
        paths = sorted(path for path in stage.rglob("*") if path.is_file())
        sizes = {path.relative_to(stage).as_posix(): path.stat().st_size for path in paths}
        if dry_run:
            return Push(repository, sizes)
        return _upload(stage, Push(repository, sizes), private=private)


def _write_stage(run: runs.Run, repository: str, stage: pathlib.Path) -> None:
    """Writes the files of a repository into an empty folder."""
    loss = report.training_summary(run.folder).get("val_loss")
    pretrained.save_pretrained(
        stage,
        run.config.model,
        run.params,
        run.tokenizer,
        data=run.config.data,
        name=repository.split("/")[1],
        val_loss=loss if isinstance(loss, float) else None,
        repository=repository,
        about=_about(run.folder),
    )
    circuits = folder_of(run.folder)
    chosen = [circuits / name for name in _OF_ALL_TASKS]
    chosen += [path.parent / name for path in sorted(circuits.glob("*/status.json")) for name in _OF_A_TASK]
    for path in [run.folder / _PAGE, *chosen]:
        if path.is_file():
            target = stage / path.relative_to(run.folder)
            files.make_folder(target.parent)
            shutil.copyfile(path, target)


def _about(folder: pathlib.Path) -> str:
    """Returns the card's section on circuits; empty where there are none."""
    found = report.read(folder_of(folder))
    if not found:
        return ""
    header = ("task", "status", "nodes", "edges", "loss of the circuit", "of the model", "audit")
    rows = []
    for row, circuit in found:
        loss = f"{row['sufficiency']:.3f}" if "sufficiency" in row else ""
        cells = [
            row["task"], row["status"], row.get("nodes", ""), row.get("edges", ""), loss,
            f"{row['model_loss']:.3f}", _verdicts(folder, circuit),
        ]  # fmt: skip
        rows.append([str(cell).replace("|", "/") for cell in cells])
    text = f"""## Circuits

Losses are on held-out pairs of prompts, in nats; chance is ln 2 = 0.693. The circuit's is that of
the circuit alone, everything else at its mean.

{markdown.table(header, rows)}"""
    if (folder / _PAGE).is_file():
        text += f"\n`{_PAGE}` shows each circuit and what its nodes do: download it and open it in a browser."
    return text.rstrip("\n")


def _verdicts(folder: pathlib.Path, circuit: Circuit | None) -> str:
    """Returns how many tests of a circuit's audit came out how; empty where it has none."""
    if circuit is None:
        return ""
    audit = Audit.load(folder_of(folder, circuit.full_name), circuit=circuit.digest)
    counts = collections.Counter(test.verdict for test in audit.tests) if audit else {}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _upload(stage: pathlib.Path, push: Push, *, private: bool) -> Push:
    repository = push.repository
    huggingface_hub = optional("huggingface_hub", "hub", f"publishing {repository}")
    with _told(repository):
        if huggingface_hub.get_token() is None:
            raise UserError(
                f"publishing {repository} needs a token of the Hugging Face Hub that may write: run "
                "`hf auth login`, or set HF_TOKEN"
            )
        api = huggingface_hub.HfApi(library_name="wsparse")
        try:
            info = api.model_info(repository)
        except huggingface_hub.errors.RepositoryNotFoundError:
            api.create_repo(repository, private=private)
            info = api.model_info(repository)
        present = [sibling.rfilename for sibling in info.siblings or ()]
        _refuse_foreign(repository, present, info.sha)
        removed = tuple(sorted(path for path in present if _is_ours(path) and path not in push.sizes))
        operations: list[Any] = [
            huggingface_hub.CommitOperationAdd(path, stage / path) for path in push.sizes
        ]
        operations += [huggingface_hub.CommitOperationDelete(path) for path in removed]
        # Whatever was committed since the files were listed makes the Hub refuse this commit.
        api.create_commit(
            repository, operations, commit_message="Publish a run of wsparse", parent_commit=info.sha
        )
        return dataclasses.replace(push, removed=removed, url=f"{api.endpoint}/{repository}")


def copy_circuits(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the circuits beside a model into the folder of a run, where there are any.

    A run that has circuits keeps them; a warning says which of the others it lacks, or has otherwise.
    """
    circuits, kept = folder_of(source), folder_of(folder)
    chosen = [
        path
        for pattern in LOADED
        for path in sorted(circuits.rglob(pathlib.PurePath(pattern).name))
        if _is_ours(path.relative_to(source).as_posix())
    ]
    if kept.exists():
        others = [
            path.parent.name
            for path in chosen
            if path.name == "circuit.json" and not _same(path, kept / path.relative_to(circuits))
        ]
        if others:
            log.warning(
                "%s keeps its own circuits, others than those beside the model that is loaded: %s. To have "
                "the latter, load it into another folder=",
                folder, ", ".join(map(quoted, others)),
            )  # fmt: skip
        return
    if not chosen:
        return
    with files.new_folder(kept) as part:
        for path in chosen:
            target = part / path.relative_to(circuits)
            files.make_folder(target.parent)
            shutil.copyfile(path, target)


def _same(path: pathlib.Path, other: pathlib.Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()


def _is_ours(path: str) -> bool:
    """Returns whether a push writes files of this name."""
    names = [*pretrained.MODEL_FILES, _CARD, _PAGE, *(f"{FOLDER}/{name}" for name in _OF_ALL_TASKS)]
    parts = path.split("/")
    return path in names or (len(parts) == 3 and parts[0] == FOLDER and parts[2] in _OF_A_TASK)


def _refuse_foreign(repository: str, present: Iterable[str], revision: str | None) -> None:
    """Refuse a repository with files that no push has written."""
    present = [path for path in present if path != ".gitattributes"]
    foreign = [path for path in present if not _is_ours(path)]
    # Other libraries' models have files of the same names.
    if not foreign and pretrained.MODEL_FILES[0] in present:
        theirs = _read_config(repository, revision).get("model_type")
        foreign = [] if theirs == pretrained.MODEL_TYPE else present
    elif not foreign and any(path != _CARD for path in present):
        foreign = present
    if foreign:
        shown = ", ".join(map(quoted, foreign[:3])) + (" ..." if len(foreign) > 3 else "")
        raise UserError(
            f"{repository} exists and holds {shown}, which is not from here: choose another name with --to"
        )


def _read_config(repository: str, revision: str | None) -> dict[str, Any]:
    import huggingface_hub

    return files.read_json(
        huggingface_hub.hf_hub_download(repository, pretrained.MODEL_FILES[0], revision=revision)
    )


@contextlib.contextmanager
def _told(repository: str) -> Iterator[None]:
    """Turns whatever the Hub's client raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # HTTP, name resolution, storage and cache errors of several libraries.
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = reason(error)
        if status in (401, 403):
            why = "the token may not write to it: use one that may, `hf auth login`"
        elif status == 412:
            why = "it was changed meanwhile: run the same command again"
        elif status is None and any(word in type(error).__name__ for word in ("Connect", "Timeout")):
            why = f"the Hugging Face Hub does not answer: is there a network? ({why})"
        raise UserError(f"{repository} could not be published: {why}") from error


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    run = runs.load(options.run)
    push = push_to_hub(run, options.to, private=options.private, dry_run=options.dry_run)
    log.info("%s", push)


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The run's folder.")
    flags.DEFINE_string("to", None, "Repository id, owner/name; the repository is made where there is none.")
    flags.DEFINE_bool("private", False, "Make a private repository, where there is none yet.")
    flags.DEFINE_bool("dry_run", False, "List what would be published, and publish nothing.")
    flags.mark_flags_as_required(["run", "to"])


if __name__ == "__main__":
    _define_flags()
    run_command(main)
