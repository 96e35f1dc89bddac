"""Runs and circuits as objects, for notebooks.

    run = wsparse.load("runs/tiny")
    circuit = run.prune("fstring_brace")
    circuit.show()

Both are the dataclasses of `wsparse.runs` and `wsparse.circuits.circuit` with methods that call the pure
functions and the commands, and store results in the run's folder as the commands do.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import html
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import hooks, model, runs, taps, trees
from wsparse.circuits import circuit as circuit_file
from wsparse.circuits.audits import record
from wsparse.circuits.audits.report import render
from wsparse.command import log_to_stdout
from wsparse.config import ModelConfig, TrainConfig, from_dict
from wsparse.errors import UserError, closest


def load(source: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> Run:
    """Returns a run with its newest undamaged checkpoint, or a model in the layout of the Hugging Face Hub.

    Args:
      source: A run's folder; or a folder of `save_pretrained`, or a repository id, "owner/name".
      folder: Run folder to make for a model that is not a run; "runs/NAME" by default.

    Raises:
      UserError: The source is not a run and not a model, or `folder` holds another model.
    """
    path = pathlib.Path(source)
    if not path.is_dir() or (path / "model.safetensors").exists():
        from wsparse.interop.pretrained import from_pretrained

        path = pathlib.Path(folder or pathlib.Path("runs") / path.name)
        config, params, tokenizer = from_pretrained(source)
        if not path.exists():
            runs.create(path, TrainConfig(model=config), params, tokenizer, summary={})
        elif trees.digest(runs.load(path).params) != trees.digest(params):
            raise UserError(f"{path} holds another model than {source}: give load another folder=")
    return Run(**vars(runs.load(path)))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run(runs.Run):
    """A training run, see `wsparse.runs.Run`."""

    def tokens(self, text: str) -> jax.Array:
        """Returns the tokens of a text, `(1, T)`; T is at least 1 and at most the model's context."""
        tokens, context = self.tokenizer.encode(text), self.config.model.context
        if not 1 <= len(tokens) <= context:
            raise UserError(f"a text must have 1 to {context} tokens, this one has {len(tokens)}")
        return jnp.asarray([tokens], jnp.int32)

    def logits(self, text: str) -> jax.Array:
        """Returns the logits of the next token after every token of a text, `(T, V)`."""
        return _logits(self.params, self.tokens(text), self.config.model)

    def run_with_cache(
        self, text: str, *, names_filter: hooks.NamesFilter | None = None
    ) -> tuple[jax.Array, hooks.Activations]:
        """Returns logits and activations on a text, with a batch axis of 1; see `wsparse.hooks`."""
        tokens = self.tokens(text)
        return hooks.run_with_cache(self.params, tokens, self.config.model, names_filter=names_filter)

    def tasks(self, **options: Any) -> Tasks:
        """Returns the model's loss and accuracy on every task; options: see `wsparse.tasks.report`."""
        from wsparse import tasks
        from wsparse.circuits.tasks import TASKS

        return Tasks(tasks.report(self, TASKS.values(), **options))

    @property
    def circuits(self) -> Circuits:
        """The circuits that were found in this run, by task."""
        return Circuits(self)

    def prune(self, task: str, **settings: Any) -> Circuit:
        """Finds the circuit of a task, or reads it where it was found before with the same settings.

        Args:
          task: Name of a task, or a .jsonl or .py file that defines one.
          **settings: Fields of `wsparse.circuits.settings.Settings` that differ from their defaults.

        Raises:
          UserError: A setting or the task is unknown, or the model or no circuit reaches the target.
        """
        from wsparse import prune
        from wsparse.circuits import evidence
        from wsparse.circuits.settings import Settings
        from wsparse.circuits.tasks import find

        chosen = find(task)
        with log_to_stdout():
            prune.run(self.folder, [chosen], from_dict(Settings, settings), shown=evidence.Options())
        status = circuit_file.Status.load(self.folder / "circuits" / chosen.name)
        if not status.has_circuit:
            raise UserError(f"no circuit of {chosen.name!r} in {self.folder}: {status.status}")
        return self.circuits[chosen.name]


class Tasks(str):
    """The table of `Run.tasks`."""

    def __repr__(self) -> str:
        return str(self)


class Circuits(Mapping[str, "Circuit"]):
    """The circuits of a run by task; each is read when it is asked for."""

    def __init__(self, run: Run):
        self._run, self._folder = run, run.folder / "circuits"

    def __getitem__(self, task: str) -> Circuit:
        if task not in self:
            near = closest(task, self)
            raise UserError(
                f"{self._folder} has no circuit of {task!r}{near}: run.prune({task!r}) looks for one"
            )
        found = circuit_file.Circuit.load(self._folder / task)
        found.check(self._run.params)
        return Circuit(**vars(found), run=self._run)

    def __contains__(self, task: object) -> bool:
        return task in list(self)

    def __iter__(self) -> Iterator[str]:
        return (path.parent.name for path in sorted(self._folder.glob("*/circuit.json")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Circuits({', '.join(self)})"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Circuit(circuit_file.Circuit):
    """A circuit in its run, see `wsparse.circuits.circuit.Circuit`."""

    run: Run

    def logits(self, text: str) -> jax.Array:
        """Returns the circuit's logits after every token of a text, `(T, V)`.

        Other nodes have their means as values, and weights that were cut are zero.
        """
        params = trees.flatten(self.run.params)
        for path, removed in self.removed.items():
            params[path] = jnp.where(removed, 0.0, params[path])
        gates = {name: kept.astype(np.float32) for name, kept in self.mask().items()}
        tokens = self.run.tokens(text)
        return _logits(trees.unflatten(params), tokens, self.config, (gates, self.means))

    def show(self) -> Page:
        """Returns the page of this circuit, which a notebook shows inline."""
        from wsparse.viewer import contents

        return Page(contents.circuit_page(self.run.folder / "circuits" / self.task))

    def audit(self, *, tests: Sequence[str] | None = None, task: str = "", **options: Any) -> Audit:
        """Tests this circuit, as `python -m wsparse.audit` does, and returns the audit.

        Args:
          tests: Names of tests to run, instead of all.
          task: The .jsonl or .py file of the circuit's task, if it is not a built-in one.
          **options: Fields of `wsparse.circuits.audits.context.Options` that differ from their defaults.

        Raises:
          UserError: An option or a test is unknown, the circuit in the run's folder is another one now, or
            its task comes from a file that is not given.
        """
        from wsparse import audit
        from wsparse.circuits.audits.context import Options
        from wsparse.circuits.audits.tests import TESTS

        known, names = from_dict(Options, options), list(TESTS) if tests is None else list(tests)
        if task and pathlib.Path(task).stem != self.task:
            raise UserError(f"task must be the file of {self.task!r}, got {task!r}")
        if circuit_file.Circuit.load(self.run.folder / "circuits" / self.task).digest != self.digest:
            raise UserError(f"another circuit of {self.task!r} was found since: run.circuits[...] reads it")
        with log_to_stdout():
            (done,) = audit.audit_run(self.run.folder, [task or self.task], known, names, run=self.run)
        return Audit(**vars(done))

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Audit(record.Audit):
    """The tests of a circuit, see `wsparse.circuits.audits.record.Audit`."""

    def __repr__(self) -> str:
        counts = collections.Counter(test.verdict for test in self.tests)
        return f"Audit({self.task!r}, {', '.join(f'{n} {verdict}' for verdict, n in counts.items())})"

    def show(self) -> Page:
        """Returns the report, which a notebook shows inline."""
        return Page(render(self))

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


@dataclasses.dataclass(frozen=True)
class Page:
    """A self-contained HTML page."""

    text: str

    def __repr__(self) -> str:
        return f"Page({len(self.text) / 1e6:.1f} MB)"

    def _repr_html_(self) -> str:
        text = html.escape(self.text)
        return f'<iframe srcdoc="{text}" width="100%" height="700" style="border: 0"></iframe>'

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file."""
        pathlib.Path(path).write_text(self.text, encoding="utf-8")


def _logits(params, tokens_1T, config: ModelConfig, ablation=None) -> jax.Array:
    """Returns `(T, V)`; padded to the context, so that texts of all lengths share a compiled function."""
    padded = np.zeros((1, config.context), np.int32)
    padded[:, : tokens_1T.shape[1]] = tokens_1T
    return _forward(params, padded, ablation, config=config)[0, : tokens_1T.shape[1]]


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens_BT, ablation, *, config: ModelConfig) -> jax.Array:
    tap = None if ablation is None else taps.mask(*ablation)
    return model.forward(params, tokens_BT, config, tap=tap)[0]
