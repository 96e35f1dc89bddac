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
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import files, hooks, model, runs, trees
from wsparse.circuits import circuit as circuit_file
from wsparse.circuits import masks
from wsparse.circuits.audits import record
from wsparse.circuits.audits.report import render
from wsparse.circuits.pairs import PairArrays, arrays
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.command import log_to_stdout
from wsparse.config import DataConfig, ModelConfig, TrainConfig, from_dict
from wsparse.data import sources
from wsparse.errors import MissingKeyError, UserError, closest, quoted

if TYPE_CHECKING:
    import networkx

    from wsparse.circuits.drawing import Drawing
    from wsparse.interop.hub import Push

# Difference between a circuit's loss and the same loss computed again that devices do not explain.
_SAME_LOSS = 0.01


def load(
    place: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    source: str | None = None,
) -> Run:
    """Returns a run with its newest undamaged checkpoint, or a model in the layout of the Hugging Face Hub.

    Args:
      place: A run's folder; or a folder of `save_pretrained`, or a repository id, "owner/name", whose
        circuits come with it.
      folder: Run folder to make for a model that is not a run; "runs/NAME" by default.
      revision: Branch, tag or commit of the repository.
      source: Source of the run's text where a model becomes a run, as `config.data.source` in training; by
        default the one that the model names. Where it names none, whatever needs text is refused.

    Raises:
      UserError: The place is not a run and not a model, or `folder` holds another model or other text.
    """
    path = found = pathlib.Path(place)
    if not path.is_dir() or (path / "model.safetensors").exists():
        from wsparse.interop import hub, pretrained

        path = pathlib.Path(folder or pathlib.Path("runs") / path.name)
        if not found.is_dir():
            here = found.parent.name == "runs" or found.parent.is_dir()
            if here and revision is None and pretrained.is_repository(str(place)):
                raise UserError(
                    f"there is no run {place}: train one with python -m wsparse.train --config=tiny "
                    f"--workdir={place}; a repository of the Hub of this name loads with revision='main'"
                )
            found = pretrained.download(str(place), revision, more=hub.LOADED)
        config, params, tokenizer = pretrained.from_pretrained(found)
        # As a run's are.
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        if path.exists():
            kept, given = runs.load(path), (config, tokenizer.digest, trees.digest(params))
            if (kept.config.model, kept.tokenizer.digest, trees.digest(kept.params)) != given:
                raise UserError(f"{path} holds another model than {place}: give load another folder=")
        else:
            data = pretrained.read_data(found) or DataConfig(source=runs.UNKNOWN_TEXT)
            if source:
                sources.parse_mix(source)
                data = dataclasses.replace(data, source=source)
            runs.create(path, TrainConfig(model=config, data=data), params, tokenizer, summary={})
        # Also where an earlier call was stopped between the model and its circuits.
        hub.copy_circuits(found, path)
    run = Run(**vars(runs.load(path)))
    if source and run.config.data.source != source:
        raise UserError(
            f"the text of {path} is of the source {run.config.data.source!r}: give load another folder=, or "
            f"change data.source in {path / 'config.json'}"
        )
    return run


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run(runs.Run):
    """A training run, see `wsparse.runs.Run`."""

    def tokens(self, text: str) -> jax.Array:
        """Returns the tokens of a text, `(1, T)`; T is at least 1 and at most the model's context."""
        tokens, context = self.tokenizer.encode(text), self.config.model.context
        if not 1 <= len(tokens) <= context:
            raise UserError(f"a text must have 1 to {context} tokens, this one has {len(tokens)}")
        return jnp.asarray([tokens], jnp.int32)

    def logits(self, text: str | Sequence[str]) -> jax.Array:
        """Returns the logits of the next token: after every token of a text, `(T, V)`.

        Of N texts in a list, they are those after the last token of each, `(N, V)`.
        """
        return _logits(self, text, self.params, self.config.model)

    def run_with_cache(
        self, text: str, *, names_filter: hooks.NamesFilter | None = None
    ) -> tuple[jax.Array, hooks.Activations]:
        """Returns logits and activations on a text, with a batch axis of 1; see `wsparse.hooks`."""
        config, tokens = self.config.model, self.tokens(text)
        logits_1TV, cache = hooks.run_with_cache(
            self.params, _padded(tokens, config), config, names_filter=names_filter
        )
        return logits_1TV[:, : tokens.shape[1]], cache.first(tokens.shape[1])

    def tasks(self, **options: Any) -> Tasks:
        """Returns the model's loss and accuracy on every task of its kind of text.

        Options: see `wsparse.tasks.report`.
        """
        from wsparse import tasks
        from wsparse.circuits.tasks import find, names_of

        return Tasks(tasks.report(self, map(find, names_of(self.config.data.domain)), **options))

    @property
    def circuits(self) -> Circuits:
        """The circuits that were found in this run, by task."""
        return Circuits(self)

    def push_to_hub(self, repository: str, *, private: bool = False, dry_run: bool = False) -> Push:
        """Publishes the run on the Hugging Face Hub, see `wsparse.interop.hub.push_to_hub`."""
        from wsparse.interop.hub import push_to_hub

        return push_to_hub(self, repository, private=private, dry_run=dry_run)

    def prune(self, task: str, *, name: str = "", **settings: Any) -> Circuit:
        """Finds the circuit of a task, or reads it where it was found before with the same settings.

        Args:
          task: Name of a task, or a .jsonl or .py file that defines one.
          name: Name of the circuit, where the task has several: `run.circuits["TASK@NAME"]`.
          **settings: Fields of `wsparse.circuits.settings.Settings` that differ from their defaults.

        Raises:
          UserError: A setting or the task is unknown, or the model or no circuit reaches the target.
        """
        from wsparse import prune
        from wsparse.circuits import evidence
        from wsparse.circuits.settings import Settings
        from wsparse.circuits.tasks import find_all

        of_task, named = circuit_file.split(task)
        if named:
            raise UserError(f"{task!r} names a circuit: run.prune({of_task!r}, name={named!r}) finds it")
        [chosen] = find_all([task])
        with log_to_stdout():
            options: dict[str, Any] = {"shown": evidence.Options(), "name": name}
            prune.run(self.folder, [chosen], from_dict(Settings, settings), **options)
        full_name = circuit_file.joined(chosen.name, name)
        status = circuit_file.Status.load(circuit_file.folder_of(self.folder, full_name))
        if not status.has_circuit:
            reason = status.hint or status.status
            raise UserError(f"no circuit of {full_name!r} in {self.folder}: {reason}")
        found = self.circuits[full_name]
        return dataclasses.replace(found, source=task) if task.endswith((".jsonl", ".py")) else found


class Tasks(str):
    """The table of `Run.tasks`."""

    def __repr__(self) -> str:
        return str(self)


class Circuits(Mapping[str, "Circuit"]):
    """The circuits of a run by "TASK" or "TASK@NAME"; each is read when it is asked for."""

    def __init__(self, run: Run):
        self._run, self._folder = run, circuit_file.folder_of(run.folder)

    def __getitem__(self, task: str) -> Circuit:
        if task not in self:
            of_task, name = circuit_file.split(task)
            call = f"run.prune({of_task!r}, name={name!r})" if name else f"run.prune({task!r})"
            raise MissingKeyError(
                f"{self._folder} has no circuit of {task!r}{closest(task, self)}: {call} looks for one"
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
    """A circuit in its run, see `wsparse.circuits.circuit.Circuit`.

    Attributes:
      run: The run.
      source: The .jsonl or .py file of its task, where it is not a built-in one and the file is known.
    """

    run: Run
    source: str = ""

    def logits(self, text: str | Sequence[str]) -> jax.Array:
        """Returns the logits of the next token of the circuit alone: after every token of a text, `(T, V)`.

        Of N texts in a list, they are those after the last token of each, `(N, V)`. Other nodes have their
        means as values, and so have weights that were cut as inputs, as where the circuit's loss is measured.
        """
        return self.ablate().logits(text)

    def ablate(self, *nodes: str | circuit_file.CircuitNode, task: str = "") -> Ablated:
        """Returns the circuit without some of its nodes, which have their means as values.

        Args:
          *nodes: Nodes of the circuit, or their names, such as "0.attn.v.21"; none leaves the circuit as it
            is.
          task: The .jsonl or .py file of the circuit's task, if it is not a built-in one: the losses are on
            its pairs.

        Raises:
          UserError: A node is not in the circuit, or the file is of another task.
        """
        known = [node.name for node in self.nodes]
        names = [str(getattr(node, "name", node)) for node in nodes]
        for name in names:
            if name not in known:
                raise UserError(
                    f"no node {quoted(name)} in the circuit of {self.full_name!r}{closest(name, known)}"
                )
        return Ablated(self, tuple(names), self._file(task))

    def _file(self, task: str) -> str:
        if task and pathlib.Path(task).stem != self.task:
            raise UserError(f"task must be the file of {self.task!r}, got {task!r}")
        return task or self.source

    @functools.cached_property
    def _in_model(self) -> Subnetwork:
        return Subnetwork.of(self.run.params, self.config, self)

    def _without(self, names: Sequence[str]) -> np.ndarray:
        """Returns the nodes that are left, bool `(U,)`."""
        left = [node.name for node in self.nodes if node.name not in names]
        return masks.from_names(left, self.config)

    def _score(self, names: Sequence[str], task: str) -> circuit_file.Score:
        """Returns the score on the report split without some nodes."""
        pairs = self._pairs(task)
        return self._in_model.scorer.mask(pairs, self._without(names), self._in_model.remaining)

    @functools.cached_property
    def _pairs_of(self) -> dict[str, PairArrays]:
        return {}

    def _pairs(self, task: str) -> PairArrays:
        """Returns the pairs that the circuit's loss is from, made again."""
        from wsparse.circuits import evidence
        from wsparse.circuits.tasks import built_in, find

        if task not in self._pairs_of:
            if not task and self.task not in built_in():
                raise UserError(
                    f"the pairs of task {self.task!r} come from a file of yours: name it, "
                    f"task='{self.task}.jsonl'"
                )
            pairs = arrays(evidence.report_pairs(self.run, self, find(task or self.task)))
            loss = self._in_model.scorer.mask(pairs, self._without(()), self._in_model.remaining).loss
            if abs(loss - self.loss) > _SAME_LOSS:
                raise UserError(
                    f"the pairs of {task or self.task} are others than the circuit was measured on: "
                    f"its loss is {loss:.3f} on these, and was {self.loss:.3f}"
                )
            self._pairs_of[task] = pairs
        return self._pairs_of[task]

    def to_networkx(self, *, residual: bool = False) -> networkx.DiGraph:
        """Returns the circuit as a graph of networkx, see `wsparse.circuits.network.to_networkx`."""
        from wsparse.circuits.network import to_networkx

        return to_networkx(self, residual=residual)

    def plot(self) -> Drawing:
        """Returns a figure of the circuit by layer, see `wsparse.circuits.drawing.draw`."""
        from wsparse.circuits.drawing import draw

        return draw(self)

    def show(self) -> Page:
        """Returns the page of this circuit, which a notebook shows inline."""
        from wsparse.viewer import contents

        return Page(contents.circuit_page(circuit_file.folder_of(self.run.folder, self.full_name)))

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
        file = self._file(task)
        name = self.full_name
        if circuit_file.Circuit.load(circuit_file.folder_of(self.run.folder, name)).digest != self.digest:
            raise UserError(f"another circuit of {name!r} was found since: run.circuits[...] reads it")
        with log_to_stdout():
            given = circuit_file.joined(file or self.task, self.name)
            (done,) = audit.audit_run(self.run.folder, [given], known, names, run=self.run)
        return Audit(**vars(done))

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ablated:
    """A circuit without some of its nodes, from `Circuit.ablate`.

    Attributes:
      circuit: The whole circuit.
      names: Nodes that it is without.
      source: The file of its task; empty for a built-in one.
    """

    circuit: Circuit
    names: tuple[str, ...]
    source: str = ""

    def __repr__(self) -> str:
        shown = self.names if len(self.names) <= 4 else (*self.names[:3], f"{len(self.names) - 3} more")
        return f"Ablated({self.circuit.full_name!r} without {', '.join(shown) or 'nothing'})"

    @property
    def loss(self) -> float:
        """Task loss on the pairs of the report split, in nats; without names, the circuit's own."""
        return self._score.loss

    @property
    def accuracy(self) -> float:
        """Fraction of the report split's prompts whose answer is preferred."""
        return self._score.accuracy

    @functools.cached_property
    def _score(self) -> circuit_file.Score:
        return self.circuit._score(self.names, self.source)

    def logits(self, text: str | Sequence[str]) -> jax.Array:
        """Returns logits of the next token, `(T, V)` or `(N, V)`; see `Circuit.logits`."""
        circuit, found = self.circuit, self.circuit._in_model
        tap = found.ablation(circuit._without(self.names))
        return _logits(circuit.run, text, found.params, found.scorer.config, tap)


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
        files.write_text(path, self.text)


def _logits(run: Run, text: str | Sequence[str], params, config: ModelConfig, tap=None) -> jax.Array:
    """Returns `(T, V)` of a text, or `(N, V)` of N."""
    if isinstance(text, str):
        tokens_1T = run.tokens(text)
        return _forward(params, _padded(tokens_1T, config), tap, config=config)[0, : tokens_1T.shape[1]]
    if not text:
        raise UserError("logits needs at least one text")
    # One after the other: a batch of any size would be a shape to compile for.
    last = []
    for tokens_1T in map(run.tokens, text):
        logits_1TV = _forward(params, _padded(tokens_1T, config), tap, config=config)
        last.append(logits_1TV[0, tokens_1T.shape[1] - 1])
    return jnp.stack(last)


def _padded(tokens_1T: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns tokens padded to the context, so that texts of all lengths share a compiled function."""
    padded = np.zeros((1, config.context), np.int32)
    padded[:, : tokens_1T.shape[1]] = tokens_1T
    return jnp.asarray(padded)


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens_BT, tap, *, config: ModelConfig) -> jax.Array:
    return model.forward(params, tokens_BT, config, tap=tap)[0]
