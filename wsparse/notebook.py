"""Runs and circuits as objects, for notebooks.

    run = wsparse.load("runs/tiny")
    circuit = run.prune("single_double_quote")
    circuit.show()

Both are the dataclasses of `wsparse.runs` and `wsparse.circuits.circuit` with methods that call the pure
functions and the commands. What they compute is stored in the run's folder, as the commands store it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from wsparse.command import log_to_stdout
from wsparse.config import ModelConfig, TrainConfig, from_dict
from wsparse.errors import UserError, closest


def load(source: str | os.PathLike[str], *, folder: str | os.PathLike[str] | None = None) -> Run:
    """Loads a training run, or a model in the layout of the Hugging Face Hub.

    Args:
      source: A run's folder; or a folder of `save_pretrained`, or a repository id, "owner/name".
      folder: Run folder to make for a model that is not a run; "runs/NAME" by default. Its circuits are
        stored there.

    Returns:
      The run with its newest undamaged checkpoint.

    Raises:
      UserError: The source is not a run and not a model, or `folder` holds another model.
    """
    path = pathlib.Path(source)
    is_run = path.is_dir() and not (path / "model.safetensors").exists()
    if not is_run:
        path = _import(source, pathlib.Path(folder or pathlib.Path("runs") / path.name))
    return Run(**_fields(runs.load(path)))


def _import(source: str | os.PathLike[str], folder: pathlib.Path) -> pathlib.Path:
    """Makes a run folder for a pretrained model, or finds the one made before; returns the folder."""
    from wsparse.interop.pretrained import from_pretrained

    config, params, tokenizer = from_pretrained(source)
    if not folder.exists():
        runs.create(folder, TrainConfig(model=config), params, tokenizer, summary={})
    elif trees.digest(runs.load(folder).params) != trees.digest(params):
        raise UserError(f"{folder} holds another model than {source}: give load another folder=")
    return folder


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run(runs.Run):
    """A training run, see `wsparse.runs.Run`."""

    def __repr__(self) -> str:
        shape = self.config.model
        return (
            f"Run({str(self.folder)!r}, step={self.step}, n_layer={shape.n_layer}, "
            f"d_model={shape.d_model}, density={self.config.sparsity.density:.3g}, "
            f"circuits={len(self.circuits)})"
        )

    def tokens(self, text: str) -> jax.Array:
        """Returns the tokens of a text, `(1, T)`.

        Raises:
          UserError: The text is empty, or longer than the model's context.
        """
        tokens = self.tokenizer.encode(text)
        context = self.config.model.context
        if not 1 <= len(tokens) <= context:
            raise UserError(f"a text must have 1 to {context} tokens, this one has {len(tokens)}")
        return jnp.asarray([tokens], jnp.int32)

    def logits(self, text: str) -> jax.Array:
        """Returns the logits of the next token after every token of a text, `(T, V)`."""
        return _logits(self.params, self.tokens(text), self.config.model, None)

    def run_with_cache(
        self, text: str, *, names_filter: hooks.NamesFilter | None = None
    ) -> tuple[jax.Array, hooks.Activations]:
        """Returns logits and activations on a text, with a batch axis of 1; see `wsparse.hooks`."""
        return hooks.run_with_cache(
            self.params, self.tokens(text), self.config.model, names_filter=names_filter
        )

    def tasks(self, **options: Any) -> Tasks:
        """Returns the model's loss and accuracy on every task.

        Args:
          **options: Arguments of `wsparse.tasks.report`: n_pairs, seed, split, n_examples.
        """
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
          UserError: A setting or the task is unknown, or there is no circuit: the model does not do the
            task, or none of the search's circuits reaches the target.
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


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The table of `Run.tasks`."""

    text: str

    def __repr__(self) -> str:
        return self.text


class Circuits(Mapping[str, "Circuit"]):
    """The circuits of a run by task; each is read when it is asked for."""

    def __init__(self, run: Run):
        self._run, self._folder = run, run.folder / "circuits"

    def __getitem__(self, task: str) -> Circuit:
        if task not in self:
            raise UserError(
                f"{self._folder} has no circuit of {task!r}{closest(task, self)}: "
                f"run.prune({task!r}) looks for one"
            )
        found = circuit_file.Circuit.load(self._folder / task)
        found.check(self._run.params)
        return Circuit(**_fields(found), run=self._run)

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
      run: Run that the circuit belongs to.
    """

    run: Run

    def logits(self, text: str) -> jax.Array:
        """Returns the circuit's logits after every token of a text, `(T, V)`.

        Every other node has its mean as its value, and the weights between nodes of the circuit that are not
        its edges are zero.
        """
        kernels = trees.flatten(self.run.params)
        for path, removed in self.removed.items():
            kernels[path] = jnp.where(removed, 0.0, kernels[path])
        gates = {name: jnp.asarray(kept, jnp.float32) for name, kept in self.mask().items()}
        arrays = gates, jax.tree.map(jnp.asarray, self.means)
        tokens = self.run.tokens(text)
        return _logits(trees.unflatten(kernels), tokens, self.config, arrays)

    def show(self) -> Page:
        """Returns the page of this circuit, which a notebook shows inline.

        Raises:
          UserError: The circuit has no nodes, or no evidence is stored beside it.
        """
        from wsparse.viewer import contents

        return Page(contents.circuit_page(self.run.folder / "circuits" / self.task))

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()


@dataclasses.dataclass(frozen=True)
class Page:
    """A self-contained HTML page."""

    text: str

    def __repr__(self) -> str:
        return f"Page({len(self.text) / 1e6:.1f} MB)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.text)}" width="100%" height="700" style="border: 0"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to a file."""
        pathlib.Path(path).write_text(self.text, encoding="utf-8")


def _fields(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _logits(params, tokens_1T, config: ModelConfig, ablation) -> jax.Array:
    """Returns `(T, V)`; padded to the context, so that texts of all lengths share a compiled function."""
    padded = np.zeros((1, config.context), np.int32)
    padded[:, : tokens_1T.shape[1]] = tokens_1T
    return _forward(params, padded, ablation, config=config)[0, : tokens_1T.shape[1]]


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, tokens_BT, ablation, *, config: ModelConfig) -> jax.Array:
    tap = None if ablation is None else taps.mask(*ablation)
    return model.forward(params, tokens_BT, config, tap=tap)[0]
