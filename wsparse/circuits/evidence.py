"""Measures what people look at in a circuit: ablations, prefixes, prompts, attention, excerpts of text.

`prune` measures it when a circuit is found, `python -m wsparse.prune --run=RUN --evidence` for circuits
that were found before; `wsparse.circuits.evidence_file` says what is stored, and the viewer shows it.

Shapes: U nodes of the model in one vector (see `circuits.masks`), R rows of pairs, T tokens, S key time,
H head, K channel of a head, N nodes shown, D channels of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, runs, taps, trees
from wsparse.circuits import excerpts, graph, masks, report, scoring, tasks
from wsparse.circuits.circuit import Circuit, CircuitNode
from wsparse.circuits.evidence_file import (
    HIGHEST,
    LOWEST,
    PATTERN_TOKENS,
    SAMPLED,
    TOP_TOKENS,
    Evidence,
    Head,
    NodeEvidence,
    Prefix,
    Prompt,
)
from wsparse.circuits.pairs import HasPairs, PairArrays, Task, TaskBatch, arrays, margins
from wsparse.circuits.settings import Settings
from wsparse.config import ModelConfig, from_dict, require, setting
from wsparse.errors import UserError, closest
from wsparse.nodes import NODES, Node
from wsparse.progress import progress

log = logging.getLogger(__name__)

# Pairs of the report split on which losses of ablations are measured; sizes of which the loss of the most
# important nodes alone is.
_ABLATION_PAIRS, _PREFIXES = 32, 128
# Tokens of text that excerpts are taken from.
_TEXT_TOKENS = 32768
# Ablations between two steps of the progress bar.
_CHUNK = 64

_patterns = jax.jit(model.attention_pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured; each field's help is in its metadata."""

    source: str = setting(
        "", "Text that excerpts are taken from, a mix as for training; empty is the run's own held-out text."
    )
    pairs: int = setting(6, "Pairs of each task that are recorded token by token.")
    max_nodes: int = setting(2000, "Nodes of a circuit to measure; the least important ones are left out.")

    def __post_init__(self):
        require(self.pairs >= 1, "pairs must be at least 1", self.pairs)
        require(self.max_nodes >= 1, "max_nodes must be at least 1", self.max_nodes)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Text that excerpts are taken from: its windows `(W, T)`, and what it is."""

    windows_WT: np.ndarray
    name: str


def read_text(run: runs.Run, source: str = "") -> Text:
    """Returns a run's held-out text, or windows of another source."""
    windows_WT = run.windows("validation", tokens=_TEXT_TOKENS, source=source)
    return Text(windows_WT, source or f"held-out part of {run.config.data.source}")


def measure(
    run: runs.Run,
    circuit: Circuit,
    pairs: HasPairs,
    text: Text,
    *,
    summary: str = "",
    options: Options | None = None,
) -> Evidence:
    """Returns the evidence of a circuit.

    Args:
      run: The model that the circuit is in.
      circuit: The circuit.
      pairs: Pairs of the task's report split, on which its loss was measured.
      text: Text for excerpts.
      summary: What the task asks, in a line.
      options: How much is measured.
    """
    options, config = options or Options(), run.config.model
    pairs = arrays(pairs)
    scorer = scoring.Scorer(run.params, config, jax.tree.map(jnp.asarray, circuit.means))
    ordered = sorted(circuit.nodes, key=lambda node: -node.importance)
    shown = ordered[: options.max_nodes]
    with progress(2 * len(shown) + 1 + min(len(ordered), _PREFIXES), "evidence") as bar:
        from_model, prefix = _ablations(scorer, circuit, ordered, shown, pairs, bar.advance)
        recorded = _on_prompts(scorer, circuit, shown, _first(pairs, options.pairs))
        places = [Node.parse(node.name) for node in shown]
        summaries = excerpts.summaries(run.params, config, text.windows_WT, places, bar.advance)
    answers = np.asarray(pairs.answer).reshape(-1, 2)
    shared = tuple(answers[0].tolist()) if np.all(answers == answers[:1]) else None
    nodes, top_tokens_NK, top_weights_NK = _nodes(run, circuit, places, from_model, summaries, shared)
    in_text = _excerpts(summaries)
    return Evidence(
        task=circuit.task,
        summary=summary,
        circuit=circuit.digest,
        step=run.step,
        text=text.name,
        ablation_pairs=len(_first(pairs, _ABLATION_PAIRS).answer) // 2,
        prefix=prefix,
        answers=shared,
        nodes=nodes,
        token_texts=_token_texts(run, text, recorded, in_text, top_tokens_NK, answers),
        windows_WT=text.windows_WT.astype(np.min_scalar_type(config.vocab_size - 1)),
        top_tokens_NK=top_tokens_NK,
        top_weights_NK=top_weights_NK,
        **recorded,
        **in_text,
    )


def measure_run(folder: pathlib.Path, names: Sequence[str], options: Options) -> int:
    """Measure the evidence of circuits that were found before, and return how many.

    Args:
      folder: A run's folder.
      names: Tasks, or "all": every task that has a circuit. Tasks of the user's own are .jsonl or .py files.
      options: What is measured.

    Raises:
      UserError: The folder has no circuits or no checkpoint, a circuit belongs to other parameters, or a
        task of the user's own is not given with its file.
    """
    files = [tasks.find(name) for name in names if name.endswith((".jsonl", ".py"))]
    known = tasks.TASKS | {task.name: task for task in files}
    rows = report.collect(folder / "circuits")
    stems = {pathlib.Path(name).stem for name in names}
    with_circuit = [row["task"] for row in rows if row.get("nodes")]
    if "all" not in stems and (missing := sorted(stems - set(with_circuit))):
        near = closest(missing[0], with_circuit)
        raise UserError(f"{folder} has no circuit of {missing[0]!r}{near}")
    circuits = [
        Circuit.load(folder / "circuits" / name) for name in with_circuit if "all" in stems or name in stems
    ]
    if not circuits:
        raise UserError(f"{folder} has no circuits: python -m wsparse.prune --run={folder} --task=all")
    for circuit in circuits:
        if circuit.task not in known:
            raise UserError(
                f"the pairs of task {circuit.task!r} come from a file of yours: name it too, "
                f"--task=all,{circuit.task}.jsonl"
            )
    run = runs.load(folder)
    for circuit in circuits:
        circuit.check(run.params)
    text = read_text(run, options.source)
    for number, circuit in enumerate(circuits, start=1):
        log.info("[%d/%d] %s: measuring evidence", number, len(circuits), circuit.task)
        task = known[circuit.task]
        pairs = _pairs(run, circuit, task)
        evidence = measure(run, circuit, pairs, text, summary=task.summary, options=options)
        evidence.save(folder / "circuits" / circuit.task)
    return len(circuits)


def _pairs(run: runs.Run, circuit: Circuit, task: Task) -> TaskBatch:
    """Returns the pairs that a circuit's numbers were reported on."""
    settings = from_dict(Settings, circuit.hyperparameters.get("settings", {}))
    return tasks.build(
        task,
        run.tokenizer,
        settings.report_pairs,
        settings.seed,
        split="report",
        max_tokens=min(settings.max_tokens, run.config.model.context),
    )


def _first(pairs: PairArrays, count: int) -> PairArrays:
    return PairArrays(*(array[: 2 * count] for array in pairs))


def _stays(scorer: scoring.Scorer, circuit: Circuit) -> graph.EdgeMask:
    return {path: scorer.weights[path] & ~circuit.removed[path] for path in scorer.weights}


def _ablations(
    scorer: scoring.Scorer,
    circuit: Circuit,
    ordered: list[CircuitNode],
    shown: list[CircuitNode],
    pairs: PairArrays,
    advance: Callable[[int], Any],
) -> tuple[np.ndarray, list[Prefix]]:
    """Returns the growth of the loss without each node, and the losses of the first nodes alone."""
    pairs = _first(pairs, _ABLATION_PAIRS)
    index = {name: i for i, name in enumerate(masks.names(scorer.config))}
    kept_U = masks.from_names([node.name for node in ordered], scorer.config)

    def losses(nodes_U, edges, nodes, spans):
        order = np.array([index[node.name] for node in nodes])
        parts = []
        for start in range(0, len(spans), _CHUNK):
            part = spans[start : start + _CHUNK]
            parts.append(scorer.without_nodes(pairs, nodes_U, edges, order, part).loss)
            advance(len(part))
        return np.concatenate(parts)

    singles = [[0, 0], *([i, i + 1] for i in range(len(shown)))]
    without = losses(np.ones_like(kept_U), None, shown, singles)
    sizes = np.linspace(1, len(ordered), min(len(ordered), _PREFIXES)).round().astype(int).tolist()
    spans = [[size, len(ordered)] for size in sizes]
    prefix = losses(kept_U, _stays(scorer, circuit), ordered, spans)
    return without[1:] - without[0], list(map(Prefix, sizes, prefix.tolist()))


def _on_prompts(
    scorer: scoring.Scorer, circuit: Circuit, shown: list[CircuitNode], pairs: PairArrays
) -> dict[str, Any]:
    """Returns what `Evidence` records of prompts, in the whole model and in the circuit alone."""
    config, stays = scorer.config, _stays(scorer, circuit)
    kept_U = masks.from_names([node.name for node in circuit.nodes], config)
    cut = graph.cut(scorer.params, jax.tree.map(jnp.asarray, stays), scorer.means)
    sides = {
        "model": (scorer.params, np.ones(kept_U.shape, np.float32)),
        "circuit": (cut, kept_U.astype(np.float32)),
    }
    places = [Node.parse(node.name) for node in shown]
    # A score needs both of a query and a key.
    partner = {"attn.q": "attn.k", "attn.k": "attn.q"}
    places += [p._replace(location=partner[p.location]) for p in places if p.location in partner]
    places = list(dict.fromkeys(places))
    heads = sorted(
        {(p.layer, p.channel // config.d_head) for p in places if NODES[p.location].channels == "heads"}
    )
    lengths = (np.asarray(pairs.position) + 1).tolist()
    recorded: dict[str, Any] = {
        "places": list(map(str, places)),
        "heads": [Head(layer, head) for layer, head in heads],
        "prompt_tokens_X": _joined(np.asarray(pairs.tokens), lengths).astype(np.int32),
    }
    leads = {}
    for side, (params, gates_U) in sides.items():
        logits_RV, acts = _masked(
            params,
            pairs.tokens,
            pairs.position,
            masks.unflatten(gates_U, config),
            scorer.means,
            config=config,
        )
        leads[side] = np.asarray(margins(logits_RV, pairs.answer, pairs.other)).tolist()
        values_PRT = excerpts.values_at(acts, places)
        recorded[f"{side}_values_PX"] = np.stack([_joined(v, lengths) for v in values_PRT])
        recorded[f"{side}_patterns_HY"] = _triangles(params, acts, heads, lengths, config)
    recorded["prompts"] = [
        Prompt(length=length, answer=answer, model=in_model, circuit=in_circuit)
        for length, answer, in_model, in_circuit in zip(
            lengths, np.asarray(pairs.answer).tolist(), *leads.values(), strict=True
        )
    ]
    return recorded


def _joined(values_RT: np.ndarray, lengths: list[int]) -> np.ndarray:
    return np.concatenate([row[:length] for row, length in zip(values_RT, lengths, strict=True)])


@functools.partial(jax.jit, static_argnames="config")
def _masked(params, tokens_RT, position_R, gates, means, *, config):
    tap = taps.mask(gates, means)
    return excerpts.recorded(params, tokens_RT, position_R, tap, config=config)


def _triangles(
    params: model.Params,
    acts: dict[str, Any],
    heads: list[tuple[int, int]],
    lengths: list[int],
    config: ModelConfig,
) -> np.ndarray:
    """Returns attention over the last tokens of prompts: `(H, Y)`, see `Evidence`."""
    joined_HY = []
    patterns = {layer: _pattern(params, acts, layer, config) for layer, _ in heads}
    for layer, head in heads:
        parts = []
        for square_TS, length in zip(patterns[layer][:, head], lengths, strict=True):
            start = max(0, length - PATTERN_TOKENS)
            parts.append(square_TS[start:length, start:length][np.tril_indices(length - start)])
        joined_HY.append(np.concatenate(parts))
    entries = sum(s * (s + 1) // 2 for s in (min(n, PATTERN_TOKENS) for n in lengths))
    return np.asarray(joined_HY, np.float32).reshape(len(heads), entries)


def _pattern(params: model.Params, acts: dict[str, Any], layer: int, config: ModelConfig) -> np.ndarray:
    """Returns the `(R, H, T, S)` attention of one layer."""
    q_RTHK, k_RSHK = (
        jnp.reshape(acts[name][layer], (*acts[name].shape[1:3], config.n_head, config.d_head))
        for name in ("attn.q", "attn.k")
    )
    sink_LH = trees.flatten(params).get("blocks/attn/sink")
    return np.asarray(_patterns(q_RTHK, k_RSHK, None if sink_LH is None else sink_LH[layer]))


def _nodes(
    run: runs.Run,
    circuit: Circuit,
    places: list[Node],
    from_model: np.ndarray,
    summaries: list[excerpts.Summary],
    answers: tuple[int, ...] | None,
) -> tuple[list[NodeEvidence], np.ndarray, np.ndarray]:
    """Returns the nodes, and the tokens with the largest weights in their channels with these."""
    config, flat = run.config.model, trees.flatten(run.params)
    embedding_VD = np.asarray(flat["embed/tokens"])
    unembed_DV = embedding_VD.T if config.tied_embeddings else np.asarray(flat["head/unembed"])
    unembed_DV = np.asarray(flat["head/norm/gain"])[:, None] * unembed_DV
    bias_of = {connection.target: connection.bias for connection in graph.CONNECTIONS}
    top_tokens_NK = np.full((len(places), TOP_TOKENS), -1, np.int32)
    top_weights_NK = np.zeros((len(places), TOP_TOKENS), np.float32)
    described = []
    for i, (place, summary) in enumerate(zip(places, summaries, strict=True)):
        layer, location, channel = place
        bias, gain, weights_V = flat.get(bias_of.get(location, "")), None, np.zeros(0)
        written = location.endswith("resid_delta")
        if location.endswith("act_in"):
            part, in_stream = location.split(".")[0], channel < config.d_model
            norm = f"{part}_norm" if in_stream else f"{part}_pos_norm"
            gain = flat[f"blocks/{norm}/gain"][layer, channel - (0 if in_stream else config.d_model)]
            weights_V = embedding_VD[:, channel] if in_stream else weights_V
        elif written:
            weights_V = unembed_DV[channel]
        largest = np.argsort(-np.abs(weights_V), kind="stable")[:TOP_TOKENS]
        largest = largest[weights_V[largest] != 0]
        top_tokens_NK[i, : len(largest)] = largest
        top_weights_NK[i, : len(largest)] = weights_V[largest]
        described.append(
            NodeEvidence(
                name=str(place),
                from_model=float(from_model[i]),
                mean=float(circuit.means[location][layer, channel]),
                bias=None if bias is None else float(bias[layer, channel]),
                gain=None if gain is None else float(gain),
                n_tokens=int(np.count_nonzero(weights_V)),
                answer_weights=(tuple(weights_V[list(answers)].tolist()) if answers and written else None),
                largest=summary.largest,
                zero=summary.zero,
                low=summary.low,
                high=summary.high,
            )
        )
    return described, top_tokens_NK, top_weights_NK


def _excerpts(summaries: list[excerpts.Summary]) -> dict[str, Any]:
    """Returns histograms and excerpts as `Evidence` has them."""
    spans, quantiles, values = [], [], []
    for i, summary in enumerate(summaries):
        kinds = [(HIGHEST, 0.0, excerpt) for excerpt in summary.highest]
        kinds += [(LOWEST, 0.0, excerpt) for excerpt in summary.lowest]
        kinds += [(SAMPLED, quantile, excerpt) for quantile, excerpt in summary.sampled]
        for kind, quantile, excerpt in kinds:
            spans.append((i, kind, *excerpt[:4]))
            quantiles.append(quantile)
            values.append(excerpt.values)
    return {
        "counts_NB": np.array([summary.counts for summary in summaries], np.int32),
        "excerpts_E6": np.array(spans, np.int32).reshape(-1, 6),
        "quantile_E": np.array(quantiles, np.float32),
        "excerpt_values_Z": np.concatenate([np.zeros(0, np.float32), *values]),
    }


def _token_texts(
    run: runs.Run,
    text: Text,
    recorded: dict[str, Any],
    in_text: dict[str, np.ndarray],
    top_tokens_NK: np.ndarray,
    answers: np.ndarray,
) -> dict[str, str]:
    """Returns the text of every token that can be shown."""
    used = {*recorded["prompt_tokens_X"].tolist(), *answers.ravel().tolist()}
    used.update(top_tokens_NK[top_tokens_NK >= 0].tolist())
    for _, _, window, start, stop, _ in in_text["excerpts_E6"].tolist():
        used.update(text.windows_WT[window, start:stop].tolist())
    return {str(token): run.tokenizer.decode([token]) for token in sorted(used)}
