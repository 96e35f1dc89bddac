"""The command that shows how well a run's model does the tasks.

python -m wsparse.tasks --run=runs/tiny [--task=for_while,my_task.jsonl] [--pairs=64]
python -m wsparse.tasks --run=runs/tiny --task=for_while --examples=2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import functools

from absl import flags
import jax
import numpy as np

from wsparse import model, runs
from wsparse.circuits import pairs, tasks
from wsparse.circuits.mask_learning import answer_logits
from wsparse.command import run_command
from wsparse.config import ModelConfig

# Rows scored at once. The last group is padded, so that all tasks share one compiled function.
_ROWS = 128
_MOST_PAIRS = 100_000


def report(
    run: runs.Run,
    chosen: Iterable[pairs.Task],
    *,
    n_pairs: int = 64,
    seed: int = 0,
    split: pairs.Split = "search",
    n_examples: int = 0,
) -> str:
    """Returns a table of how well a run's model does tasks, and `n_examples` pairs of each of them.

    Tasks that the run's tokenizer or its context rules out are named after the table, with the reason.
    """
    config = run.config.model
    built, refused = tasks.build_all(chosen, run.tokenizer, {split: n_pairs}, seed, max_tokens=config.context)
    batches = [batches[split] for batches in built]
    lines = [f"{'task':<28}{'loss':>8}{'accuracy':>10}{'tokens':>9}  candidates"] if batches else []
    for batch in batches:
        loss, accuracy = _score(run.params, config, batch)
        n_tokens = f"{batch.position.min() + 1}-{batch.position.max() + 1}"
        lines.append(f"{batch.task:<28}{loss:8.4f}{accuracy:10.3f}{n_tokens:>9}  {batch.form}")
    lines += [f"refused: {reason}" for reason in refused.values()]
    for batch in batches if n_examples else ():
        lines.append(f"\n==== {batch.task}")
        rows = range(2 * min(n_examples, batch.n_pairs))
        lines += [f"{batch.prompts[row]}  -> {batch.answers[row]!r}\n" for row in rows]
    return "\n".join(lines)


def _score(params: model.Params, config: ModelConfig, batch: pairs.TaskBatch) -> tuple[float, float]:
    """Returns the model's loss and accuracy on a batch."""
    columns = (batch.tokens, batch.position, batch.answer, batch.other)
    n_rows, margins = len(batch.position), []
    for start in range(0, n_rows, _ROWS):
        rows = np.arange(start, start + _ROWS) % n_rows
        group_B = _margins(params, pairs.PairArrays(*(column[rows] for column in columns)), config=config)
        margins.append(np.asarray(group_B)[: n_rows - start])
    margin_B = np.concatenate(margins)
    return float(np.mean(jax.nn.softplus(-margin_B))), float(np.mean(margin_B > 0))


@functools.partial(jax.jit, static_argnames="config")
def _margins(params, rows: pairs.PairArrays, *, config: ModelConfig) -> jax.Array:
    return pairs.margins(answer_logits(params, config, rows), rows.answer, rows.other)


def main(argv: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    del argv
    options = flags.FLAGS
    chosen = [tasks.find(name) for name in options.task or tasks.TASKS]
    which = {"n_pairs": options.pairs, "seed": options.seed, "split": options.split}
    print(report(runs.load(options.run), chosen, n_examples=options.examples, **which))


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "Folder of a training run.", required=True)
    flags.DEFINE_list("task", None, "Names, or .jsonl and .py files (default: all 20).")
    flags.DEFINE_integer("pairs", 64, "Pairs of each task.", lower_bound=1, upper_bound=_MOST_PAIRS)
    flags.DEFINE_integer("seed", 0, "Seed of the pairs.")
    flags.DEFINE_enum("split", "search", pairs.SPLITS, "Which templates and fillers to use.")
    flags.DEFINE_integer("examples", 0, "Pairs of each task to print after the table.", lower_bound=0)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
