"""Pairs of prompts: a task's stream of them, their encoding for a tokenizer, and their loss.

A task is a stream of *pairs* of programs that differ only in what decides the next token. The text before
a program's cut is its prompt; the first token after it, in the tokenization of the whole program, is the
answer. Each prompt's wrong candidate is its partner's answer.

Which characters an answer has depends on the tokenizer (`]` and a line end are one token in most), so a
task lists its *forms*, and `build` uses the first one that the tokenizer cuts in the same way in every
context. A task without such a form is refused.

Shapes: B rows, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wsparse.data.tokenizer import Tokenizer
from wsparse.errors import UserError, closest
from wsparse.pytext.contrasts import Form
from wsparse.pytext.prompts import Pair
from wsparse.pytext.words import SPLITS, Split

# Pairs per split on which a form is tried. One of them must fit in each split, not more: where answers are
# names, a small tokenizer cuts most of them into several tokens, and those pairs are skipped.
_PROBES = 32
# Pairs of equal length are required where this fraction of each split's fitting ones have it.
_EQUAL = 0.2
# Draws in a row without a new pair after which a task counts as exhausted.
_PATIENCE = 2000


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A binary decision about the next token.

    Attributes:
      name: As in `wsparse.circuits.tasks.TASKS`.
      summary: What is decided, and by what.
      stream: `(seed, split) -> pairs`, always the same for the same arguments; may be endless.
      forms: The candidates' surface forms, best first.
      equal_lengths: Skip pairs whose prompts differ in length, where enough pairs do not.
      local: Why one token decides, in a task where it does by its nature; else "".
      has_knobs: Whether the stream takes `knobs=`, values of knobs that are not to be drawn.
      domain: The kind of text that its models read, as in `config.data.domain`; "" where that is not known.
      statements: `(side, seed, split) -> lines`, finished statements of a side, of none where that is None;
        by default they are made from the stream.
    """

    name: str
    summary: str
    stream: Callable[..., Iterator[Pair]]
    forms: tuple[Form, ...] = (Form(),)
    equal_lengths: bool = True
    local: str = ""
    has_knobs: bool = False
    domain: str = ""
    statements: Callable[[int | None, int, Split], Iterator[str]] | None = None


class TooFewPairs(UserError):
    """A task makes only `made` distinct pairs of a split, fewer than were asked for."""

    def __init__(self, message: str, split: Split, made: int):
        super().__init__(message)
        self.split: Split = split
        self.made = made

    def with_hint(self, flag: str) -> UserError:
        """Returns the error with what to give a flag that says how many pairs are asked for."""
        return UserError(f"{self}; {flag}={self.made} would do") if self.made else self


class PairArrays(NamedTuple):
    """Pairs as masks and scores need them; rows `2 i` and `2 i + 1` are the two sides of pair `i`."""

    tokens: Any
    """int32 `(B, T)`."""
    position: Any
    """int32 `(B,)`, index of the prompt's last token, where the logits are read."""
    answer: Any
    """int32 `(B,)`, the right candidate."""
    other: Any
    """int32 `(B,)`, the wrong candidate: the answer of the row's partner."""
    certainty: Any = None
    """float32 `(B,)`, how probable the answer is of the two, in what a loss is against; None stands for 1."""
    reference: Any = None
    """float32 `(B, V)`, log-probabilities of every next token in what a loss is against; None leaves out all
    but the two candidates."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskBatch:
    """A task's encoded pairs and their texts.

    Attributes:
      tokens: As in `PairArrays`, padded on the right with `end_of_text`; T is the longest prompt's length.
      position: As in `PairArrays`, as are `answer` and `other`.
      prompts: Text of each row.
      answers: Text of each row's answer.
      continuations: `prompts[i] + answers[i] + continuations[i]` is the program behind row i.
      templates: What each pair was made from.
      knobs: What each pair was drawn with, by the names of `wsparse.pytext.draw`.
      form: Form of the candidates.
    """

    tokens: np.ndarray
    position: np.ndarray
    answer: np.ndarray
    other: np.ndarray
    prompts: list[str]
    answers: list[str]
    continuations: list[str]
    templates: list[str]
    knobs: list[Mapping[str, int]]
    task: str
    form: str
    split: Split
    seed: int
    end_of_text: int

    @property
    def n_pairs(self) -> int:
        return len(self.position) // 2


def arrays(batch: TaskBatch | PairArrays) -> PairArrays:
    """Returns the arrays of a batch of pairs, on the device."""
    if isinstance(batch, PairArrays):
        return jax.tree.map(jnp.asarray, batch)
    return PairArrays(*map(jnp.asarray, (batch.tokens, batch.position, batch.answer, batch.other)))


# ---- Building batches ----


def build(
    task: Task,
    tokenizer: Tokenizer,
    n_pairs: int,
    seed: int,
    *,
    split: Split = "search",
    max_tokens: int | None = None,
    knobs: Mapping[str, int] | None = None,
) -> TaskBatch:
    """Encodes the first `n_pairs` distinct pairs of a task that fit the tokenizer.

    The pairs depend on nothing but the arguments, and a larger batch begins with the smaller one.

    Args:
      tokenizer: Decides the form of the candidates, which all splits and seeds share.
      n_pairs: Number of pairs; the batch has twice as many rows.
      max_tokens: Longest prompt to use, the model's context for instance.
      knobs: Knobs that are not drawn, of a built-in task.

    Raises:
      UserError: The split does not exist, the task has no such knob or none with this value, or the tokenizer
        fits none of the task's forms.
      TooFewPairs: The task cannot make that many distinct pairs.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}{closest(split, SPLITS)}")
    if n_pairs < 1:
        raise UserError(f"n_pairs must be at least 1, got {n_pairs}")
    form, equal = _choose_form(task, tokenizer)
    encode = functools.partial(_encode, tokenizer, form=form, equal=equal, max_tokens=max_tokens)
    if knobs and not task.has_knobs:
        raise UserError(f"task {task.name!r} has no knobs; those of the built-in tasks have")
    stream = task.stream(seed, split, knobs=knobs) if knobs else task.stream(seed, split)
    sides, drawn, skipped = _distinct(stream, encode, n_pairs)
    if (made := len(drawn)) < n_pairs:
        raise TooFewPairs(
            f"task {task.name!r} makes only {made} distinct pairs for split {split!r} and seed {seed} with "
            f"this tokenizer, {n_pairs} were asked for{skipped}",
            split,
            made,
        )
    position = np.array([len(side.ids) - 1 for side in sides], np.int32)
    tokens = np.full((len(sides), position.max() + 1), tokenizer.end_of_text, np.int32)
    for tokens_T, side in zip(tokens, sides, strict=True):
        tokens_T[: len(side.ids)] = side.ids
    answer = np.array([side.answer for side in sides], np.int32)
    return TaskBatch(
        tokens=tokens,
        position=position,
        answer=answer,
        other=answer.reshape(-1, 2)[:, ::-1].reshape(-1),
        prompts=[side.prompt for side in sides],
        answers=[side.text for side in sides],
        continuations=[side.continuation for side in sides],
        templates=[pair.template for pair in drawn],
        knobs=[pair.knobs for pair in drawn],
        task=task.name,
        form=str(form),
        split=split,
        seed=seed,
        end_of_text=tokenizer.end_of_text,
    )


def padded(batch: TaskBatch, length: int) -> TaskBatch:
    """Returns the batch with rows of `length` tokens, so that batches of several tasks have one shape."""
    short = length - batch.tokens.shape[1]
    if short < 0:
        raise UserError(
            f"the prompts of task {batch.task!r} have up to {batch.tokens.shape[1]} tokens and "
            f"cannot be padded to {length}"
        )
    tokens = np.pad(batch.tokens, ((0, 0), (0, short)), constant_values=batch.end_of_text)
    return dataclasses.replace(batch, tokens=tokens)


class _Side(NamedTuple):
    """One encoded side of a pair."""

    prompt: str
    ids: list[int]
    text: str
    answer: int
    continuation: str


class _Unfit(Exception):
    """Why a pair does not fit the form and the tokenizer."""


def _distinct(
    stream: Iterator[Pair], encode: Callable[[Pair], list[_Side]], n_pairs: int
) -> tuple[list[_Side], list[Pair], str]:
    """Returns the sides of up to `n_pairs` pairs, the pairs, and in words how many were skipped."""
    sides: list[_Side] = []
    drawn: list[Pair] = []
    prompts: set[str] = set()
    n_skipped, in_vain, skipped = 0, 0, ""
    for pair in stream:
        try:
            encoded = encode(pair)
            if prompts & {side.prompt for side in encoded}:
                raise _Unfit("a prompt repeats an earlier one")
        except _Unfit as reason:
            n_skipped, in_vain = n_skipped + 1, in_vain + 1
            skipped = f" ({n_skipped} were skipped, the last because {reason})"
            if in_vain == _PATIENCE:
                break
            continue
        in_vain = 0
        prompts |= {side.prompt for side in encoded}
        sides += encoded
        drawn.append(pair)
        if len(drawn) == n_pairs:
            break
    return sides, drawn, skipped


def _encode(
    tokenizer: Tokenizer, pair: Pair, form: Form, *, equal: bool = False, max_tokens: int | None = None
) -> list[_Side]:
    """Encodes both sides of a pair.

    They fit when each answer is the first token after its prompt *in the tokenization of the program*, and
    when either candidate can be appended to either prompt without changing the prompt's own tokens. With
    `equal` the prompts must also have the same number of tokens.

    Raises:
      _Unfit: They do not fit.
    """
    programs = (pair.first, pair.second)
    prompts = [program.prompt + form.given for program in programs]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    lengths = [len(ids) for ids in encoded]
    if min(lengths) == 0:
        raise _Unfit("a prompt is empty")
    if max_tokens is not None and max(lengths) > max_tokens:
        raise _Unfit(f"a prompt has {max(lengths)} tokens, more than max_tokens={max_tokens}")
    if equal and lengths[0] != lengths[1]:
        raise _Unfit(f"the prompts have {lengths[0]} and {lengths[1]} tokens")
    texts = (form.first or pair.first.answer, form.second or pair.second.answer)
    sides = []
    for program, prompt, ids, text in zip(programs, prompts, encoded, texts, strict=True):
        if not program.rest.startswith(form.given + text):
            raise _Unfit(f"{program.prompt[-20:]!r} is followed by {program.rest[:12]!r}, not by {text!r}")
        after = program.rest[len(form.given) :]
        program_ids = tokenizer.encode(prompt + after)
        if program_ids[: len(ids)] != ids:
            raise _Unfit(f"the end of the prompt {prompt[-20:]!r} merges with {after[:12]!r}")
        tokens = [tokenizer.decode([i]) for i in program_ids[len(ids) : len(ids) + 2]]
        if form.beginning and tokens and text.startswith(tokens[0]):
            text = tokens[0]
        # A tokenizer that loses white space decodes " he" as "he", which is the same token.
        if tokens[:1] != [text] and program_ids[len(ids) : len(ids) + 1] != [tokenizer.token_id(text)]:
            raise _Unfit(f"{after[:12]!r} is cut as {', '.join(map(repr, tokens))}, not as {text!r}")
        sides.append(_Side(prompt, ids, text, program_ids[len(ids)], after[len(text) :]))
    if sides[0].answer == sides[1].answer:
        raise _Unfit(f"both answers are the token {sides[0].text!r}")
    for side, candidate in itertools.product(sides, sides):
        if tokenizer.encode(side.prompt + candidate.text) != [*side.ids, candidate.answer]:
            raise _Unfit(f"{candidate.text!r} is not one token after {side.prompt[-20:]!r}")
    return sides


@functools.lru_cache(maxsize=256)
def _choose_form(task: Task, tokenizer: Tokenizer) -> tuple[Form, bool]:
    """Returns the first form that fits the tokenizer, and whether to require pairs of equal length."""
    probes = [list(itertools.islice(task.stream(0, split), _PROBES)) for split in SPLITS]
    failures = []
    for form in task.forms:
        fits, enough, reasons = True, True, []
        for pairs in probes:
            sides = []
            for pair in pairs:
                try:
                    sides.append(_encode(tokenizer, pair, form))
                except _Unfit as reason:
                    reasons.append(str(reason))
            fits &= bool(sides or not pairs)
            enough &= sum(len(a.ids) == len(b.ids) for a, b in sides) >= _EQUAL * len(sides)
        if fits:
            return form, task.equal_lengths and enough
        total = sum(map(len, probes))
        failures.append(f"{form}: {reasons[0]} ({len(reasons)} of {total} pairs do not fit)")
    raise UserError(
        f"task {task.name!r} fits no form to this tokenizer of {tokenizer.vocab_size} tokens; "
        f"use a larger vocabulary or leave the task out. Forms tried: {'; '.join(failures)}"
    )


# ---- Scores ----


def task_loss(logits_BV: jax.Array, answer_B: jax.Array, other_B: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy restricted to the two candidates, float32; ln 2 is chance."""
    return jnp.mean(jax.nn.softplus(-margins(logits_BV, answer_B, other_B)))


def row_losses(logits_BV: jax.Array, pairs: PairArrays) -> jax.Array:
    """Returns the cross-entropy of every row restricted to the two candidates, float32 `(B,)`.

    Where the answer is not certain, the cross-entropy is that against both candidates' probabilities, which
    is least, and the entropy of those, where the logits give the same. With a reference it is that entropy
    and the divergence from the reference over the whole vocabulary.
    """
    if pairs.reference is not None:
        own_B = margins(pairs.reference, pairs.answer, pairs.other)
        log_p_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
        divergence_B = optax.losses.kl_divergence_with_log_targets(log_p_BV, pairs.reference)
        return _cross_entropy(own_B, jax.nn.sigmoid(own_B)) + divergence_B
    margins_B = margins(logits_BV, pairs.answer, pairs.other)
    if pairs.certainty is not None:
        return _cross_entropy(margins_B, pairs.certainty)
    return jax.nn.softplus(-margins_B)


def _cross_entropy(margins_B: jax.Array, certainty_B: jax.Array) -> jax.Array:
    """Returns the cross-entropy of margins against the probability of the answer, `(B,)`."""
    return jax.nn.softplus(-margins_B) + (1 - certainty_B) * margins_B


def pairs_loss(logits_BV: jax.Array, pairs: PairArrays) -> jax.Array:
    """Returns the mean of `row_losses`."""
    return jnp.mean(row_losses(logits_BV, pairs))


def task_accuracy(logits_BV: jax.Array, answer_B: jax.Array, other_B: jax.Array) -> jax.Array:
    """Returns the fraction of rows whose answer has a larger logit than the other candidate, float32."""
    return jnp.mean(margins(logits_BV, answer_B, other_B) > 0, dtype=jnp.float32)


def first(pairs: PairArrays, n_pairs: int) -> PairArrays:
    """Returns the first pairs."""
    return jax.tree.map(lambda array: array[: 2 * n_pairs], pairs)


def inside(pairs: PairArrays) -> jax.Array:
    """Returns which tokens are of a prompt, not of the padding, bool `(B, T)`."""
    return jnp.arange(pairs.tokens.shape[1])[None] <= jnp.asarray(pairs.position)[:, None]


def margins(logits_BV: jax.Array, answer_B: jax.Array, other_B: jax.Array) -> jax.Array:
    """Returns `(B,)` the logit of the answer less that of the other candidate, float32."""
    candidates_B2 = jnp.stack([jnp.asarray(answer_B), jnp.asarray(other_B)], axis=1)
    chosen_B2 = jnp.take_along_axis(logits_BV.astype(jnp.float32), candidates_B2, axis=1)
    return chosen_B2[:, 0] - chosen_B2[:, 1]
