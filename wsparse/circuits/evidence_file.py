"""The evidence file: what was measured of a circuit for people to look at, beside its `circuit.json`.

`evidence.json` holds the numbers and names, `evidence.npz` the arrays. They are measured by
`wsparse.circuits.evidence`; reading them needs no jax.

Shapes: N nodes shown, P places whose values are recorded (the nodes shown, and the partners of queries and
keys), R prompts (rows `2 i` and `2 i + 1` are a pair), X tokens of all prompts one after the other, H heads
shown, Y entries of the lower triangles of all prompts one after the other, W windows of T tokens, E
excerpts, Z values of all excerpts one after the other, B bins, K tokens, J tokens of the task's contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import typing

import numpy as np

from wsparse import files
from wsparse.circuits.circuit import Circuit, read_arrays, write_arrays
from wsparse.config import from_dict
from wsparse.errors import UserError, located
from wsparse.nodes import Node

SCHEMA = 1
BINS, TOP_TOKENS, PATTERN_TOKENS = 41, 12, 96
HIGHEST, LOWEST, SAMPLED = range(3)
"""Kinds of excerpts."""

_JSON, _ARRAYS = "evidence.json", "evidence.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeEvidence:
    """A node of the circuit, in the model and on text.

    Attributes:
      from_model: Growth of the task loss when it alone is removed from the whole model, on the first
        `ablation_pairs` pairs of the report split.
      mean: Its value when it is removed.
      bias: Its entry of its matrix's bias.
      gain: Its entry of its norm's gain.
      n_tokens: Entries that the embedding, or the unembedding, has in its channel.
      answer_weights: Unembedding times final gain of its channel for the two answers.
      largest, zero, low, high: See `excerpts.Summary`.
    """

    name: str
    from_model: float
    mean: float
    bias: float | None
    gain: float | None
    n_tokens: int
    answer_weights: tuple[float, ...] | None
    largest: float
    zero: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of the report split; `model` and `circuit` are the margins of its answer's logit in either."""

    length: int
    answer: int
    model: float
    circuit: float


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Loss of the circuit's most important nodes alone, on the `ablation_pairs` pairs."""

    nodes: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Head:
    """An attention head."""

    layer: int
    head: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What was measured of a circuit for people to look at.

    Attributes:
      summary: What the task asks, in a line.
      circuit: `Circuit.digest` of the circuit it belongs to.
      step: Optimizer steps behind the model.
      text: Description of the text that excerpts are from.
      ablation_pairs: Pairs of the report split that losses of ablations are from.
      prefix: Losses of the most important nodes alone.
      answers: The two answers, if all pairs share them.
      nodes: The nodes shown, most important first.
      token_texts: Text of every token that can be shown.
      model_values_PX, circuit_values_PX: Values of `places` in the whole model, and in the circuit alone.
      model_patterns_HY, circuit_patterns_HY: Attention of `heads` over the last `PATTERN_TOKENS` tokens of
        each prompt: lower triangles, row by row.
      counts_NB: Histogram of each node's values in the text, zeros left out.
      excerpts_E6: Rank of the node, kind, window, first token, token after the last, token it is about.
      quantile_E: Quantile of the values that are not 0, for `SAMPLED` excerpts.
      excerpt_values_Z: The nodes' values in their excerpts.
      top_tokens_NK: Tokens with the largest entries in the node's channel of the embedding (of reads) or of
        the unembedding times the final gain (of writes); -1 fills up.
      top_weights_NK: The entries.
      contrast_tokens_J: The tokens that tell the task's two sides apart, see `contrast.Contrast`; none in
        older files, as in the two fields after it.
      contrast_counts_J4: In how many of the `ablation_pairs` pairs each does, and how.
      contrast_weights_NJ: Their entries in the node's channel, as in `top_weights_NK`.
      pair_tokens_RT: The first pairs of the report split, padded, at most `ablation_pairs`, for a page that
        runs the model; none in older files, as in the two fields after it.
      pair_positions_R: Index of each prompt's last token.
      pair_answers_R: Each prompt's answer.
    """

    task: str
    summary: str
    circuit: str
    step: int
    text: str
    ablation_pairs: int
    prefix: list[Prefix]
    answers: tuple[int, ...] | None
    nodes: list[NodeEvidence]
    places: list[str]
    heads: list[Head]
    prompts: list[Prompt]
    token_texts: dict[str, str]
    prompt_tokens_X: np.ndarray
    model_values_PX: np.ndarray
    circuit_values_PX: np.ndarray
    model_patterns_HY: np.ndarray
    circuit_patterns_HY: np.ndarray
    windows_WT: np.ndarray
    counts_NB: np.ndarray
    excerpts_E6: np.ndarray
    quantile_E: np.ndarray
    excerpt_values_Z: np.ndarray
    top_tokens_NK: np.ndarray
    top_weights_NK: np.ndarray
    contrast_tokens_J: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    contrast_counts_J4: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4), np.int32))
    contrast_weights_NJ: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))
    pair_tokens_RT: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int32))
    pair_positions_R: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    pair_answers_R: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a circuit's folder; `evidence.json` appears last."""
        folder = pathlib.Path(folder)
        values = dataclasses.asdict(self)
        write_arrays(folder / _ARRAYS, {name: values.pop(name) for name in ARRAYS})
        files.write_json(folder / _JSON, {"schema": SCHEMA, **values})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], circuit: Circuit) -> Evidence | None:
        """Returns the evidence beside a circuit; None where there is none, or it is another circuit's."""
        folder = pathlib.Path(folder)
        if not (folder / _JSON).exists():
            return None
        remedy = "; measure it again with python -m wsparse.prune --run=RUN --evidence"
        with located(f"the evidence in {folder} is damaged: ", remedy):
            values = files.read_json(folder / _JSON)
            if values.pop("schema", None) != SCHEMA or values.get("circuit") != circuit.digest:
                return None
            arrays = read_arrays(folder / _ARRAYS)
            evidence = from_dict(cls, values | {name: arrays[name] for name in ARRAYS if name in arrays})
            _check(evidence, circuit)
        return evidence


_PAIRS = ("pair_tokens_RT", "pair_positions_R", "pair_answers_R")
_INTEGERS = (
    "prompt_tokens_X", "windows_WT", "counts_NB", "excerpts_E6", "top_tokens_NK", "contrast_tokens_J",
    "contrast_counts_J4", *_PAIRS,
)  # fmt: skip
ARRAYS = tuple(name for name, hint in typing.get_type_hints(Evidence).items() if hint is np.ndarray)


def triangle(length: int) -> int:
    """Returns the entries of the pattern of a prompt."""
    size = min(length, PATTERN_TOKENS)
    return size * (size + 1) // 2


def with_partners(places: Sequence[Node]) -> list[Node]:
    """Returns nodes, and the keys of their queries and the other way round: a score needs both."""
    partner = {"attn.q": "attn.k", "attn.k": "attn.q"}
    partners = [p._replace(location=partner[p.location]) for p in places if p.location in partner]
    return list(dict.fromkeys([*places, *partners]))


def _check(evidence: Evidence, circuit: Circuit) -> None:
    """Refuse arrays that do not fit the numbers beside them."""
    n_nodes, excerpts_E6 = len(evidence.nodes), evidence.excerpts_E6
    lengths = [prompt.length for prompt in evidence.prompts]
    values = (len(evidence.places), sum(lengths))
    patterns = (len(evidence.heads), sum(map(triangle, lengths)))
    n_contrast = evidence.contrast_tokens_J.size
    pairs, time = evidence.pair_positions_R.shape[:1], evidence.pair_tokens_RT.shape[1:2] or (0,)
    shapes = {
        "prompt_tokens_X": values[1:],
        "model_values_PX": values,
        "circuit_values_PX": values,
        "model_patterns_HY": patterns,
        "circuit_patterns_HY": patterns,
        "windows_WT": evidence.windows_WT.shape[:2] if evidence.windows_WT.ndim >= 2 else (0, 0),
        "counts_NB": (n_nodes, BINS),
        "excerpts_E6": (*excerpts_E6.shape[:1], 6),
        "quantile_E": excerpts_E6.shape[:1],
        "excerpt_values_Z": (evidence.excerpt_values_Z.size,),
        "top_tokens_NK": (n_nodes, TOP_TOKENS),
        "top_weights_NK": (n_nodes, TOP_TOKENS),
        "contrast_tokens_J": (n_contrast,),
        "contrast_counts_J4": (n_contrast, 4),
        "contrast_weights_NJ": (n_nodes if n_contrast else 0, n_contrast),
        "pair_tokens_RT": pairs + time,
        "pair_positions_R": pairs,
        "pair_answers_R": pairs,
    }
    for name, shape in shapes.items():
        array = getattr(evidence, name)
        if array.shape != shape or array.dtype.kind not in ("iu" if name in _INTEGERS else "iuf"):
            raise UserError(f"{name} must be numbers of shape {shape}, got {array.shape} {array.dtype}")
    positions_R = evidence.pair_positions_R
    if len(positions_R) % 2 or np.any(positions_R < 0) or np.any(positions_R >= time[0]):
        raise UserError("its pairs do not fit their positions")
    kept = {node.name for node in circuit.nodes}
    if len(lengths) % 2 or not lengths or not {node.name for node in evidence.nodes} <= kept:
        raise UserError("its prompts are not pairs, or its nodes not the circuit's")
    node, kind, window, start, stop, token = excerpts_E6.T
    n_windows, n_time = evidence.windows_WT.shape
    inside = (node >= 0) & (node < n_nodes) & (kind >= 0) & (kind <= SAMPLED)
    inside &= (window >= 0) & (window < n_windows) & (start >= 0) & (stop <= n_time)
    inside &= (start <= token) & (token < stop) & (np.diff(node, prepend=0) >= 0)
    if not inside.all() or evidence.excerpt_values_Z.size != int((stop - start).sum()):
        raise UserError("its excerpts do not fit its windows")
