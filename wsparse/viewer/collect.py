"""Everything that the page shows, measured in one run: circuits, ablations, activations, attention.

Shapes: U nodes of the model in one vector (see `circuits.masks`), R rows of pairs, T tokens, S key time,
H head, K channel of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from wsparse import files, model, runs, taps, trees
from wsparse.circuits import graph, masks, report, scoring, tasks
from wsparse.circuits.circuit import Circuit, CircuitNode
from wsparse.circuits.pairs import PairArrays, arrays
from wsparse.config import ModelConfig, require, to_dict
from wsparse.data import streams
from wsparse.errors import UserError, closest
from wsparse.viewer import activations, held_out
from wsparse.viewer.activations import Excerpt, place
from wsparse.viewer.page import packed, raw

SCHEMA = 1
_TEXT_TOKENS = 32768
# Of the pairs that a circuit's own numbers are from, those on which the page's ablations are measured, and
# the sizes at which the loss of the most important nodes alone is.
_ABLATION_PAIRS, _PREFIXES = 32, 32
# Ablations between two ticks of the progress bar.
_CHUNK = 64
# Query and key time of an attention pattern: the last tokens of a prompt.
_PATTERN = 96
_TOP_TOKENS = 12
# A circuit's loss that differs by more from its file's was measured on other pairs.
_SAME_LOSS = 2e-3

_ATTENTION = ("attn.q", "attn.k", "attn.v")

_patterns = jax.jit(model.attention_pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to show.

    Attributes:
      task: names of tasks, or all: every task that has a circuit. Tasks of your own need their .jsonl or .py
        file beside them, as in all,mine.jsonl.
      source: text to take examples from, a mix as for training; empty is the run's own held-out text.
      pairs: pairs of each task that are shown token by token.
      max_nodes: nodes of a circuit to show; the least important ones are left out.
    """

    task: tuple[str, ...] = ("all",)
    source: str = ""
    pairs: int = 6
    max_nodes: int = 2000

    def __post_init__(self):
        require(bool(self.task), "task must name at least one task", self.task)
        require(self.pairs >= 1, "pairs must be at least 1", self.pairs)
        require(self.max_nodes >= 1, "max_nodes must be at least 1", self.max_nodes)


def collect(
    folder: pathlib.Path, options: Options, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """The data of a run's page, as JSON values and arrays.

    Raises:
      UserError: the folder has no circuits or no checkpoint, a circuit belongs to other parameters, or a
        task of the user's own is not given with its file.
    """
    given = [tasks.find(name) for name in options.task if name.endswith((".jsonl", ".py"))]
    known = tasks.TASKS | {task.name: task for task in given}
    rows, circuits = read_circuits(folder, options.task)
    for circuit in circuits:
        if circuit.task not in known:
            raise UserError(
                f"the pairs of task {circuit.task!r} come from a file of yours: name it too, "
                f"--task=all,{circuit.task}.jsonl"
            )
    run = runs.load(folder)
    for circuit in circuits:
        circuit.check(run.params)
    say(f"{folder}: step {run.step}; {len(circuits)} circuits of {len(rows)} tasks")
    say("reading held-out text")
    windows_WT = held_out.windows(run, tokens=_TEXT_TOKENS, source=options.source)
    return measured(run, rows, [(c, known[c.task]) for c in circuits], windows_WT, options, say)


def read_circuits(
    folder: pathlib.Path, wanted: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Circuit]]:
    """The table's rows of a run, and the circuits among them.

    Raises:
      UserError: there is none, or none of a name.
    """
    rows = report.collect(folder / "circuits")
    if "all" not in wanted:
        names = [row["task"] for row in rows]
        stems = [pathlib.Path(name).stem for name in wanted]
        for name in stems:
            if name not in names:
                raise UserError(
                    f"{folder} has no circuit of {name!r}{closest(name, names)}: "
                    f"python -m wsparse.prune --run={folder} --task={name}"
                )
        rows = [row for row in rows if row["task"] in stems]
    # A circuit without nodes says that a constant reaches the target: there is nothing to draw.
    found = [Circuit.load(folder / "circuits" / row["task"]) for row in rows if row.get("nodes")]
    if not found:
        tried = f" ({len(rows)} tasks were tried, and none was found)" if rows else ""
        raise UserError(
            f"{folder} has no circuits{tried}: python -m wsparse.prune --run={folder} --task=all"
        )
    return rows, found


def measured(
    run: runs.Run,
    rows: list[dict[str, Any]],
    circuits: Sequence[tuple[Circuit, tasks.Task]],
    windows_WT: np.ndarray,
    options: Options,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The data of the page for circuits that belong to the run, each with its task."""
    batches = _batches(run, circuits)
    shown = [_most_important(circuit, options.max_nodes) for circuit, _ in circuits]
    texts = list(dict.fromkeys(node.name for kept in shown for node in kept))
    say(f"measuring {sum(map(len, shown))} nodes of {len(circuits)} circuits")
    with tqdm.tqdm(
        total=len(texts) + sum(len(kept) + 1 for kept in shown), unit=" nodes", delay=1, leave=False
    ) as bar:
        found = {}
        for (circuit, _), kept, batch in zip(circuits, shown, batches, strict=True):
            found[circuit.task] = _circuit(run, circuit, kept, batch, options.pairs, bar.update)
        summaries = activations.summaries(
            run.params, run.config.model, windows_WT, texts, bar.update
        )
    notes = [note for each in found.values() for note in each["notes"]]
    for note in notes:
        say(f"note: {note}")
    described = _nodes(run, summaries)
    used = set(np.unique(windows_WT).tolist())
    for each in found.values():
        used.update(token for row in each["rows"] for token in (*row["tokens"], row["answer"]))
    for each in described.values():
        used.update(token for token, _ in each["tokens"])
    found_rows = [row for row in rows if "edges" in row]
    about = {circuit.task: task.summary for circuit, task in circuits}
    summary_path = run.folder / "summary.json"
    return {
        "schema": SCHEMA,
        "run": {
            "name": run.folder.resolve().name,
            "step": run.step,
            "model": to_dict(run.config.model),
            "mlp_width": run.config.model.mlp_width,
            "digest": circuits[0][0].model_digest,
            "source": run.config.data.source,
            "text": options.source or f"held-out part of {run.config.data.source}",
            "summary": files.read_json(summary_path) if summary_path.exists() else {},
        },
        "mean_edges": report.geometric_mean([row["edges"] for row in found_rows]),
        "tasks": [row | {"summary": about.get(row["task"], "")} for row in rows],
        "circuits": found,
        "nodes": described,
        "windows": {
            "length": windows_WT.shape[1],
            "dtype": (dtype := streams.token_dtype(run.config.model.vocab_size).name),
            "data": raw(windows_WT, dtype),
        },
        "tokens": {str(token): run.tokenizer.decode([token]) for token in sorted(used)},
    }


def _batches(
    run: runs.Run, circuits: Sequence[tuple[Circuit, tasks.Task]]
) -> list[tasks.TaskBatch]:
    """The pairs that each circuit's numbers were reported on, all of one length."""
    context = run.config.model.context
    built = []
    for circuit, task in circuits:
        settings = circuit.hyperparameters["settings"]
        pairs, seed = settings["report_pairs"], settings["seed"]
        built.append(
            tasks.build(task, run.tokenizer, pairs, seed, split="report", max_tokens=context)
        )
    length = max(batch.tokens.shape[1] for batch in built)
    return [tasks.padded(batch, length) for batch in built]


def _most_important(circuit: Circuit, count: int) -> list[CircuitNode]:
    return sorted(circuit.nodes, key=lambda node: -node.importance)[:count]


def _circuit(
    run: runs.Run,
    circuit: Circuit,
    shown: list[CircuitNode],
    batch: tasks.TaskBatch,
    n_pairs: int,
    tick: Callable[[int], Any],
) -> dict[str, Any]:
    """What the page says about one circuit."""
    config = run.config.model
    means = jax.tree.map(jnp.asarray, circuit.means)
    scorer = scoring.Scorer(run.params, config, means)
    pairs = arrays(batch)
    fewer = _first(pairs, _ABLATION_PAIRS)
    kept_U = masks.from_names([node.name for node in circuit.nodes], config)
    stays = {path: scorer.weights[path] & ~circuit.removed[path] for path in scorer.weights}
    index = {name: i for i, name in enumerate(masks.names(config))}

    everything_U = np.ones_like(kept_U)
    whole = scorer.ranks(everything_U)
    whole.nodes[[index[node.name] for node in shown]] = np.arange(len(shown))
    singles = [[0, 0], *([i, i + 1] for i in range(len(shown)))]
    from_model = _losses(scorer, fewer, whole, singles, tick)

    ordered = _most_important(circuit, len(circuit.nodes))
    alone = scorer.ranks(kept_U, stays)
    alone.nodes[[index[node.name] for node in ordered]] = np.arange(len(ordered))
    sizes = np.linspace(1, len(ordered), min(len(ordered), _PREFIXES)).round().astype(int).tolist()
    prefix = _losses(scorer, fewer, alone, [[size, len(ordered)] for size in sizes])

    notes = []
    if len(shown) < len(ordered):
        notes.append(
            f"{circuit.task}: {len(shown)} of {len(ordered)} nodes are shown, the most important ones"
        )
    now = scorer.mask(pairs, kept_U, stays).loss
    if abs(now - circuit.loss) > _SAME_LOSS:
        notes.append(
            f"{circuit.task}: the circuit's file says loss {circuit.loss:.3f}, the pairs made here give "
            f"{now:.3f}: the task or --max_tokens has changed since pruning"
        )

    names = {node.name: i for i, node in enumerate(shown)}
    first = _first(pairs, n_pairs)
    lengths = np.asarray(first.position) + 1
    margins, on_rows = _on_rows(scorer, kept_U, stays, first, shown)
    return {
        "form": circuit.form,
        "target": circuit.target,
        "loss": circuit.loss,
        "scores": to_dict(circuit.scores),
        "counts": to_dict(circuit.counts),
        "controls": {name: to_dict(control) for name, control in circuit.controls.items()},
        "notes": notes,
        "total_nodes": len(ordered),
        "nodes": [
            {
                **to_dict(node),
                "from_model": loss - from_model[0],
                "mean": circuit.means[p.location][p.layer, p.channel],
            }
            for node, loss in zip(shown, from_model[1:], strict=True)
            for p in [place(node.name)]
        ],
        "edges": [
            [names[edge.source], names[edge.target], edge.weight]
            for edge in sorted(circuit.edges, key=lambda edge: -abs(edge.weight))
            if edge.source in names and edge.target in names
        ],
        "ablation_pairs": len(fewer.answer) // 2,
        "prefix": list(zip(sizes, prefix.tolist(), strict=True)),
        "answer_weights": _answer_weights(run.params, config, batch, shown),
        "rows": [
            {
                "tokens": batch.tokens[i, : lengths[i]].tolist(),
                "answer": int(batch.answer[i]),
                "model": margins["model"][i],
                "circuit": margins["circuit"][i],
            }
            for i in range(len(lengths))
        ],
        **on_rows,
    }


def _first(pairs: PairArrays, count: int) -> PairArrays:
    return PairArrays(*(each[: 2 * count] for each in pairs))


def _losses(
    scorer: scoring.Scorer,
    pairs: PairArrays,
    ranks: scoring.Ranks,
    spans: list[list[int]],
    tick: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    parts = []
    for start in range(0, len(spans), _CHUNK):
        part = spans[start : start + _CHUNK]
        parts.append(scorer.spans(pairs, ranks, part).loss)
        tick(len(part))
    return np.concatenate(parts)


def _on_rows(
    scorer: scoring.Scorer,
    kept_U: np.ndarray,
    stays: graph.EdgeMask,
    pairs: PairArrays,
    shown: list[CircuitNode],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Margins, activations and attention patterns on prompts, in the whole model and in the circuit alone."""
    config = scorer.config
    cut = graph.cut(scorer.params, jax.tree.map(jnp.asarray, stays), scorer.means)
    sides = {
        "model": (scorer.params, np.ones(kept_U.shape, np.float32)),
        "circuit": (cut, kept_U.astype(np.float32)),
    }
    places = [place(node.name) for node in shown]
    # A score needs both of a query and a key.
    partner = {"attn.q": "attn.k", "attn.k": "attn.q"}
    places += [p._replace(location=partner[p.location]) for p in places if p.location in partner]
    places = list(dict.fromkeys(places))
    heads = sorted(
        {(p.layer, p.channel // config.d_head) for p in places if p.location in _ATTENTION}
    )
    values: dict[str, Any] = {p.name: {} for p in places}
    patterns: dict[str, Any] = {f"{layer}.{head}": {} for layer, head in heads}
    margins, lengths_R = {}, np.asarray(pairs.position) + 1
    for side, (params, gates_U) in sides.items():
        gates = masks.unflatten(gates_U, config)
        logits_RV, acts = _masked(
            params, pairs.tokens, pairs.position, gates, scorer.means, config=config
        )
        margins[side] = np.asarray(tasks.margins(logits_RV, pairs.answer, pairs.other))
        for p, values_RT in zip(places, activations.chosen(acts, places), strict=True):
            used = [row[:length] for row, length in zip(values_RT, lengths_R, strict=True)]
            values[p.name][side] = packed(np.concatenate(used), "int16")
        for layer in sorted({layer for layer, _ in heads}):
            pattern_RHTS = _pattern(params, acts, layer, config)
            for head in (head for at, head in heads if at == layer):
                used = [
                    square[start:length, start:length][np.tril_indices(length - start)]
                    for square, length in zip(pattern_RHTS[:, head], lengths_R, strict=True)
                    for start in [max(0, int(length) - _PATTERN)]
                ]
                patterns[f"{layer}.{head}"][side] = packed(np.concatenate(used), "uint8")
    return margins, {"values": values, "patterns": patterns, "pattern_tokens": _PATTERN}


@functools.partial(jax.jit, static_argnames="config")
def _masked(params, tokens_RT, position_R, gates, means, *, config):
    tap = taps.mask(gates, means)
    return activations.recorded(params, tokens_RT, position_R, tap, config=config)


def _pattern(
    params: model.Params, acts: dict[str, Any], layer: int, config: ModelConfig
) -> np.ndarray:
    """`(R, H, T, S)` attention of one layer."""
    q_RTHK, k_RSHK = (
        jnp.reshape(acts[name][layer], (*acts[name].shape[1:3], config.n_head, config.d_head))
        for name in ("attn.q", "attn.k")
    )
    sink_LH = trees.flatten(params).get("blocks/attn/sink")
    return np.asarray(_patterns(q_RTHK, k_RSHK, None if sink_LH is None else sink_LH[layer]))


def _answer_weights(
    params: model.Params, config: ModelConfig, batch: tasks.TaskBatch, shown: list[CircuitNode]
) -> dict[str, Any] | None:
    """The final gain times unembedding of written channels for the two answers, if all pairs share them."""
    answers = batch.answer.reshape(-1, 2)
    if np.any(answers != answers[:1]):
        return None
    table_DV = _unembedding(params, config)
    return {
        "tokens": answers[0].tolist(),
        "weights": {
            node.name: table_DV[place(node.name).channel, answers[0]]
            for node in shown
            if node.name.split(".")[2] == "resid_delta"
        },
    }


def _unembedding(params: model.Params, config: ModelConfig) -> np.ndarray:
    """`(D, V)`: what a channel of the final residual adds to each logit, up to the norm's scale."""
    flat = trees.flatten(params)
    table = flat["embed/tokens"].T if config.tied_embeddings else flat["head/unembed"]
    return np.asarray(flat["head/norm/gain"])[:, None] * np.asarray(table)


def _nodes(run: runs.Run, summaries: dict[str, activations.Summary]) -> dict[str, Any]:
    """What the page says about nodes, whatever the circuit."""
    config, flat = run.config.model, trees.flatten(run.params)
    embedding_VD = np.asarray(flat["embed/tokens"])
    unembedding_DV = _unembedding(run.params, config)
    bias_of = {c.target: c.bias for c in graph.CONNECTIONS}
    found = {}
    for name, summary in summaries.items():
        layer, location, channel = place(name)
        part, kind = location.split(".")
        bias = flat.get(bias_of.get(location, ""))
        gain, weights_V = None, np.zeros(0)
        if kind == "act_in":
            norm, at = (
                (f"{part}_norm", channel)
                if channel < config.d_model
                else (f"{part}_pos_norm", channel - config.d_model)
            )
            gain = flat[f"blocks/{norm}/gain"][layer, at]
            if channel < config.d_model:
                weights_V = embedding_VD[:, channel]
        elif kind == "resid_delta":
            weights_V = unembedding_DV[channel]
        largest = np.argsort(-np.abs(weights_V), kind="stable")[:_TOP_TOKENS]
        excerpts = [*summary.highest, *summary.lowest, *(each for _, each in summary.sampled)]
        found[name] = {
            "bias": None if bias is None else float(bias[layer, channel]),
            "gain": None if gain is None else float(gain),
            "tokens": [[int(t), float(weights_V[t])] for t in largest if weights_V[t] != 0],
            "n_tokens": int(np.count_nonzero(weights_V)),
            "largest": summary.largest,
            "zero": summary.zero,
            "low": summary.low,
            "high": summary.high,
            "counts": summary.counts,
            "highest": list(map(_span, summary.highest)),
            "lowest": list(map(_span, summary.lowest)),
            "sampled": [[*_span(each), quantile] for quantile, each in summary.sampled],
            "values": packed(
                np.concatenate([each.values for each in excerpts] or [np.zeros(0)]), "int8"
            ),
        }
    return found


def _span(excerpt: Excerpt) -> list[int]:
    return [excerpt.window, excerpt.start, excerpt.stop, excerpt.token]
