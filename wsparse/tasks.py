"""The command that shows how well a run's model does the tasks, and how far shortcuts go in their prompts.

python -m wsparse.tasks --run=runs/tiny [--task=for_while,my_task.jsonl] [--pairs=64]
python -m wsparse.tasks --run=runs/tiny --task=for_while --examples=2
python -m wsparse.tasks --run=runs/tiny --by=distractors --pairs=512
python -m wsparse.tasks --tokenizer=runs/tiny/tokenizer.json --task=my_task.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import functools
import sys

from absl import flags
import numpy as np

from wsparse import model, runs
from wsparse.circuits import pairs, probe, tasks
from wsparse.circuits.ablation import answer_margins
from wsparse.command import run_command
from wsparse.config import ModelConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError, closest, quoted
from wsparse.ops import cpu
from wsparse.progress import progress

# Rows scored at once. The last group is padded, so that all tasks share one compiled function.
_ROWS = 128
_MOST_PAIRS = 100_000
_SCORE = "{:8.4f}{:10.3f}"
# Pairs of each split that probes are fitted and scored on; --pairs where a file has fewer.
_PROBE_PAIRS = 256
# A probe of a user's task above this accuracy is worth a warning.
_GIVEN_AWAY = 0.9
_KEYS = {
    "presence": "a single token, wherever it stands,",
    "last three": "one of the last three tokens",
    "length": "the length of the prompt",
}


def report(
    judged: runs.Run | Tokenizer,
    chosen: Iterable[pairs.Task],
    *,
    n_pairs: int = 64,
    seed: int = 0,
    split: pairs.Split = "report",
    by: str = "",
    n_examples: int = 0,
) -> str:
    """Returns a table of how well a run's model does tasks, beside probes that need no model.

    A tokenizer alone has no scores of a model. Tasks that the tokenizer or the model's context rules out are
    named after the table, with the reason. Then come the model's scores by the values of the knob `by` of the
    pairs, and `n_examples` pairs of each task.

    Raises:
      UserError: No pair has the knob, or there is no model to score by it.
    """
    run, tokenizer = (None, judged) if isinstance(judged, Tokenizer) else (judged, judged.tokenizer)
    context = run.config.model.context if run else sys.maxsize
    chosen = list(chosen)
    built, refused = tasks.build_all(chosen, tokenizer, {split: n_pairs}, seed, max_tokens=context)
    batches = [batches[split] for batches in built]
    _check_knob(by, batches, run)
    margins = [_batch_margins(run.params, run.config.model, batch) for batch in batches] if run else []
    scores = [_SCORE.format(*_means(margin_B)) for margin_B in margins] or [""] * len(batches)
    header = f"{'loss':>8}{'accuracy':>10}" if run else ""
    lines = [f"{'task':<28}{header}{'probe':>8}  {'by':<10}{'counts':>8}{'tokens':>9}  candidates"]
    notes = [
        f"refused: {error.with_hint('--pairs') if isinstance(error, pairs.TooFewPairs) else error}"
        for error in refused.values()
    ]
    kept = [task for task in chosen if task.name not in refused]
    # Where few prompts fit into a short context, pairs for the probes take minutes.
    for task, batch, scored in progress(list(zip(kept, batches, scores, strict=True)), "probing"):
        probed, note = _probed(task, tokenizer, n_pairs, seed, context)
        n_tokens = f"{batch.position.min() + 1}-{batch.position.max() + 1}"
        lines.append(f"{batch.task:<28}{scored}{probed}{n_tokens:>9}  {batch.form}")
        notes += note
    lines = [*(lines if batches else ()), *notes]
    if by:
        lines += _by_knob(by, batches, margins)
    for batch in batches if n_examples else ():
        lines.append(f"\n==== {batch.task}")
        rows = range(2 * min(n_examples, batch.n_pairs))
        lines += [f"{batch.prompts[row]}  -> {batch.answers[row]!r}\n" for row in rows]
    return "\n".join(lines)


def _check_knob(by: str, batches: Sequence[pairs.TaskBatch], run: runs.Run | None) -> None:
    if by and run is None:
        raise UserError(f"--by={by} shows the scores of a model: it needs --run")
    knobs = sorted({knob for batch in batches for drawn in batch.knobs for knob in drawn})
    if by and by not in knobs:
        known = ", ".join(knobs) or "none"
        raise UserError(f"no task has a knob {quoted(by)}{closest(by, knobs)}; knobs are {known}")


def _by_knob(by: str, batches: Sequence[pairs.TaskBatch], margins: Sequence[np.ndarray]) -> Iterator[str]:
    """Yields the lines of a table of a model's scores by the values of a knob."""
    yield f"\n{'task':<28}{'loss':>8}{'accuracy':>10}{'pairs':>8}  {by}"
    for batch, margin_B in zip(batches, margins, strict=True):
        drawn = [knobs.get(by) for knobs in batch.knobs]
        for value in sorted({value for value in drawn if value is not None}):
            rows_P = np.array([other == value for other in drawn])
            scored = _SCORE.format(*_means(margin_B.reshape(-1, 2)[rows_P]))
            yield f"{batch.task:<28}{scored}{rows_P.sum():8}  {value}"


def _probed(
    task: pairs.Task, tokenizer: Tokenizer, n_pairs: int, seed: int, context: int
) -> tuple[str, list[str]]:
    """Returns the probes' columns, fitted on the search split and scored on the report split, and notes."""

    def shortcuts(n_pairs: int) -> dict[str, float]:
        build = functools.partial(tasks.build, task, tokenizer, n_pairs, seed, max_tokens=context)
        return probe.shortcuts(build(split="search"), build(split="report"))

    try:
        try:
            accuracies = shortcuts(_PROBE_PAIRS)
        except UserError:
            accuracies = shortcuts(n_pairs)
    except UserError as error:
        return f"{'-':>8}  {'-':<10}{'-':>8}", [f"no probe: {error}"]
    by, accuracy = probe.best(accuracies)
    note = ""
    if task.local:
        note = f"local: {task.name}: {task.local}"
    elif accuracy > _GIVEN_AWAY:
        note = (
            f"warning: {task.name}: {_KEYS[by]} gives this task away ({accuracy:.1%} right without a model)"
        )
    return f"{accuracy:8.3f}  {by:<10}{accuracies['counts']:8.3f}", [note] if note else []


def score(params: model.Params, config: ModelConfig, batch: pairs.TaskBatch) -> tuple[float, float]:
    """Returns the model's loss and accuracy on a batch."""
    return _means(_batch_margins(params, config, batch))


def _batch_margins(params: model.Params, config: ModelConfig, batch: pairs.TaskBatch) -> np.ndarray:
    """Returns the margins of a batch's rows, `(B,)`."""
    columns = (batch.tokens, batch.position, batch.answer, batch.other)
    n_rows, margins = len(batch.position), []
    for start in range(0, n_rows, _ROWS):
        rows = np.arange(start, start + _ROWS) % n_rows
        group = pairs.PairArrays(*(column[rows] for column in columns))
        group_B = answer_margins(params, group, config=config)
        margins.append(np.asarray(group_B)[: n_rows - start])
    return np.concatenate(margins)


def _means(margins: np.ndarray) -> tuple[float, float]:
    """Returns the loss and the accuracy of rows with these margins."""
    return float(np.logaddexp(0, -margins).mean()), float((margins > 0).mean())


def main(argv: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    del argv
    options = flags.FLAGS
    if options.run:
        cpu.enable()
    which = {"n_pairs": options.pairs, "seed": options.seed, "split": options.split}
    judged = runs.load(options.run) if options.run else tokenizer_lib.load(options.tokenizer)
    every = tasks.names_of(judged.config.data.domain) if isinstance(judged, runs.Run) else tasks.built_in()
    chosen = tasks.find_all(options.task or every)
    print(report(judged, chosen, n_examples=options.examples, by=options.by, **which))


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "Folder of a training run.")
    flags.DEFINE_string("tokenizer", None, "A tokenizer.json: the prompts and the probes, without a run.")
    flags.mark_flags_as_mutual_exclusive(["run", "tokenizer"], required=True)
    flags.DEFINE_list(
        "task", None, "Names, or .jsonl and .py files (default: all for the run's kind of text)."
    )
    flags.DEFINE_integer("pairs", 64, "Pairs of each task.", lower_bound=1, upper_bound=_MOST_PAIRS)
    flags.DEFINE_integer("seed", 0, "Seed of the pairs.")
    flags.DEFINE_enum("split", "report", pairs.SPLITS, "Templates and words to score a model on.")
    flags.DEFINE_string("by", "", "A knob of the pairs: the model's scores by its values, in a second table.")
    flags.DEFINE_integer("examples", 0, "Pairs of each task to print after the table.", lower_bound=0)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
