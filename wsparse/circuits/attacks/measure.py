"""Measure what a circuit predicts and what becomes of it.

Shapes: X texts, B rows of pairs (`2 i` and `2 i + 1` are the two sides of a pair), L layer, H head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from wsparse import runs
from wsparse.circuits import evidence, masks
from wsparse.circuits.ablation import answer_margins
from wsparse.circuits.attacks import dilution
from wsparse.circuits.attacks.record import KINDS, Agreement, Attack, Head, Kind, Point
from wsparse.circuits.attacks.texts import Text, make_texts
from wsparse.circuits.circuit import Circuit
from wsparse.circuits.pairs import PairArrays, Task, TaskBatch, TooFewPairs, arrays
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.config import ModelConfig, check, setting
from wsparse.progress import progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an attack; each field's help is in its metadata."""

    pairs: int = setting(24, "Pairs of the report split.", "at least 1")
    draws: int = setting(6, "Texts of each kind and length.", "at least 1")
    max_tokens: int = setting(48, "Longest prompt; texts have the rest of the context.", "at least 1")
    statements: int = setting(16, "Most statements of a text; lengths are powers of two.", "at least 1")
    resamples: int = setting(1000, "Bootstrap resamples of pairs behind every interval.", "at least 1")
    seed: int = setting(0, "Seed of the texts.", "at least 0")

    def __post_init__(self):
        check(self)


class _Margins(NamedTuple):
    """Margins of every text and row, `(X, B)`, and without a text, `(B,)`.

    `moved_XB` are predictions for prompts that stand as far back as with the text, which no head reads.
    """

    moved_XB: np.ndarray
    predicted_XB: np.ndarray
    circuit_XB: np.ndarray
    model_XB: np.ndarray
    circuit_B: np.ndarray
    model_B: np.ndarray


def attack(run: runs.Run, circuit: Circuit, task: Task, options: Options) -> Attack:
    """Returns the predictions of a circuit and what becomes of them.

    Raises:
      UserError: The circuit is of other parameters, the task makes too few pairs, or no text fits before its
        prompts.
    """
    circuit.check(run.params)
    try:
        batch = evidence.report_pairs(run, circuit, task, n_pairs=options.pairs, longest=options.max_tokens)
    except TooFewPairs as error:
        raise error.with_hint("--pairs") from error
    texts = make_texts(
        task,
        run.tokenizer,
        batch,
        context=run.config.model.context,
        most_statements=options.statements,
        draws=options.draws,
        seed=options.seed,
        domain=run.config.data.domain,
    )
    subject = _Circuit(run, circuit)
    margins = _measure(subject, batch, texts)
    points = list(_points(margins, texts))
    rng = np.random.default_rng(options.seed)
    return Attack(
        task=circuit.full_name,
        circuit=circuit.digest,
        model=circuit.model_digest,
        n_texts=len(texts),
        pairs=batch.n_pairs,
        alone=(_loss(margins.circuit_B), _loss(margins.model_B)),
        points=points,
        agreements=[_agreement(margins, of, rng, options.resamples) for of in ("circuit", "model")],
        heads=_heads(subject, batch, texts, margins),
        texts={text.kind(0): text.text for text in texts if text.statements <= 2},
        options=dataclasses.asdict(options),
    )


class _Circuit:
    """A circuit and its model, ready to run."""

    def __init__(self, run: runs.Run, circuit: Circuit):
        found = Subnetwork.of(run.params, run.config.model, circuit)
        self.config: ModelConfig = found.scorer.config
        self.model_params, self.params = found.scorer.params, found.params
        self.ablation = found.ablation()

    def predicted(
        self, prompts: PairArrays, text: Text, room: int, reading_LH: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the margins `(B,)` with a text before the prompts, and its shares `(L, B, H)`."""
        if reading_LH is None:
            reading_LH = np.ones((self.config.n_layer, self.config.n_head))
        margins_B, shares_LBH = dilution.predicted_margins(
            self.params,
            prompts,
            jnp.asarray(_padded([text.ids], room)[0]),
            jnp.int32(len(text.ids)),
            jnp.asarray(reading_LH, jnp.float32),
            self.ablation,
            config=self.config,
        )
        return np.asarray(margins_B), np.asarray(shares_LBH)

    def measured(self, pairs: PairArrays) -> tuple[np.ndarray, np.ndarray]:
        """Returns the margins `(B,)` of the circuit and of the model."""
        circuit_B = answer_margins(self.params, pairs, self.ablation, config=self.config)
        model_B = answer_margins(self.model_params, pairs, config=self.config)
        return np.asarray(circuit_B), np.asarray(model_B)


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Returns int32 `(rows, length)`; what the padding is does not matter, since nothing reads it."""
    tokens = np.zeros((len(rows), length), np.int32)
    for tokens_T, ids in zip(tokens, rows, strict=True):
        tokens_T[: len(ids)] = ids
    return tokens


def _measure(subject: _Circuit, batch: TaskBatch, texts: Sequence[Text]) -> _Margins:
    prompts, room = arrays(batch), max(len(text.ids) for text in texts)
    ends = np.asarray(batch.position) + 1
    alone = [row[:end].tolist() for row, end in zip(batch.tokens, ends, strict=True)]
    length = batch.tokens.shape[1] + room

    def with_text(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        tokens = jnp.asarray(_padded([[*ids, *row] for row in alone], length))
        position = jnp.asarray(batch.position + len(ids))
        return subject.measured(prompts._replace(tokens=tokens, position=position))

    unread_LH = np.zeros((subject.config.n_layer, subject.config.n_head))
    moved, predicted, measured = [], [], []
    with progress(len(texts) + 1, "attack") as bar:
        circuit_B, model_B = with_text([])
        bar.advance()
        for text in texts:
            moved.append(subject.predicted(prompts, text, room, unread_LH)[0])
            predicted.append(subject.predicted(prompts, text, room)[0])
            measured.append(with_text(text.ids))
            bar.advance()
    circuits, models = zip(*measured, strict=True)
    return _Margins(
        moved_XB=np.stack(moved),
        predicted_XB=np.stack(predicted),
        circuit_XB=np.stack(circuits),
        model_XB=np.stack(models),
        circuit_B=circuit_B,
        model_B=model_B,
    )


def _loss(margins: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0.0, -margins)))


def _rows(text: Text, kind: Kind, n_rows: int) -> np.ndarray:
    """Returns the rows for which a text is of a kind; rows `2 i` and `2 i + 1` are the sides of a pair."""
    return np.array([row for row in range(n_rows) if text.kind(row % 2) == kind], int)


def _points(margins: _Margins, texts: Sequence[Text]) -> Iterator[Point]:
    """Yields the mean losses of every kind and length."""
    measures = (margins.predicted_XB, margins.circuit_XB, margins.model_XB, margins.moved_XB)
    for kind, n in itertools.product(KINDS, sorted({text.statements for text in texts})):
        rows = {i: _rows(text, kind, len(margins.model_B)) for i, text in enumerate(texts)}
        of_kind = [i for i, text in enumerate(texts) if text.statements == n and rows[i].size]
        if not of_kind:
            continue
        losses = np.array([[_loss(array_XB[i, rows[i]]) for array_XB in measures] for i in of_kind])
        predicted, circuit, model, moved = losses.mean(0).tolist()
        yield Point(
            kind=kind,
            statements=n,
            tokens=float(np.mean([len(texts[i].ids) for i in of_kind])),
            predicted=predicted,
            circuit=circuit,
            model=model,
            moved=moved,
            worst=tuple(losses[np.argmax(losses[:, 0]), :3].tolist()),
        )


def _agreement(margins: _Margins, of: str, rng: np.random.Generator, resamples: int) -> Agreement:
    """Returns how predicted and measured margins agree."""
    measured_XB, alone_B = (
        (margins.circuit_XB, margins.circuit_B) if of == "circuit" else (margins.model_XB, margins.model_B)
    )
    predicted_XB = margins.predicted_XB - margins.circuit_B
    changes_XB = measured_XB - alone_B
    # The two rows of a pair are resampled together.
    chosen = rng.integers(0, len(alone_B) // 2, (resamples, len(alone_B) // 2))
    rows = np.stack([2 * chosen, 2 * chosen + 1], axis=2).reshape(resamples, -1)
    drawn = [_correlation(predicted_XB[:, r], changes_XB[:, r]) for r in rows]
    low, high = np.quantile(drawn, [0.025, 0.975])
    is_predicted, is_wrong = margins.predicted_XB < 0, measured_XB < 0
    left = float(np.sum((changes_XB - predicted_XB) ** 2))
    return Agreement(
        of=of,
        correlation=_correlation(predicted_XB, changes_XB),
        low=float(low),
        high=float(high),
        explained=1 - left / max(float(np.sum(changes_XB**2)), 1e-12),
        wrong_where_predicted=_share(is_wrong[is_predicted]),
        wrong_elsewhere=_share(is_wrong[~is_predicted]),
        n_predicted_wrong=int(is_predicted.sum()),
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Pearson's correlation, 0 where one does not vary."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    size = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / size if size > 0 else 0.0


def _share(chosen: np.ndarray) -> float | None:
    return float(chosen.mean()) if chosen.size else None


def _heads(subject: _Circuit, batch: TaskBatch, texts: Sequence[Text], margins: _Margins) -> list[Head]:
    """Returns what each head of the circuit does with the longest text of each side."""
    prompts, room = arrays(batch), max(len(text.ids) for text in texts)
    longest = {text.side: i for i, text in sorted(enumerate(texts), key=lambda item: item[1].statements)}
    measured = []
    heads = masks.heads(subject.ablation.gates["attn.v"], subject.config)
    for (layer, head), index in itertools.product(heads, longest.values()):
        reading_LH = np.zeros((subject.config.n_layer, subject.config.n_head))
        reading_LH[layer, head] = 1
        margins_B, shares_LBH = subject.predicted(prompts, texts[index], room, reading_LH)
        for kind in KINDS:
            rows = _rows(texts[index], kind, len(margins_B))
            if rows.size:
                change = _loss(margins_B[rows]) - _loss(margins.moved_XB[index, rows])
                share = float(shares_LBH[layer, rows, head].mean())
                measured.append((kind, layer, head, share, change))
    effects = []
    for (kind, layer, head), group in itertools.groupby(sorted(measured), key=lambda row: row[:3]):
        share, change = np.mean([row[3:] for row in group], axis=0).tolist()
        effects.append(Head(kind=kind, layer=layer, head=head, share=share, change=change))
    return effects
