"""Measures what people look at in a circuit: ablations, prefixes, prompts, attention, excerpts of text.

`prune` measures it when a circuit is found, `python -m wsparse.prune --run=RUN --evidence` for circuits
that were found before; `wsparse.circuits.evidence_file` says what is stored, and the viewer shows it.

Shapes: U nodes of the model in one vector (see `circuits.masks`), R rows of pairs, T tokens, S key time,
H head, K channel of a head, N nodes shown, D channels of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from wsparse import files, model, runs, trees
from wsparse.circuits import (
    contrast,
    evidence_file,
    excerpts,
    graph,
    masks,
    model_file,
    report,
    tasks,
)
from wsparse.circuits.circuit import Circuit, folder_of, split
from wsparse.circuits.evidence_file import PATTERN_TOKENS, TOP_TOKENS, Evidence
from wsparse.circuits.pairs import PairArrays, Task, TaskBatch, arrays, first, margins
from wsparse.circuits.subnetwork import Subnetwork
from wsparse.config import ModelConfig, check, setting
from wsparse.errors import UserError
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured; each field's help is in its metadata."""

    source: str = setting(
        "", "Text that excerpts are taken from, a mix as for training; empty is the run's own held-out text."
    )
    pairs: int = setting(6, "Pairs of each task that are recorded token by token.", "at least 1")
    max_nodes: int = setting(
        2000, "Nodes of a circuit to measure; the least important ones are left out.", "at least 1"
    )

    def __post_init__(self):
        check(self)


class Text(NamedTuple):
    """Text that excerpts are taken from: its windows `(W, T)`, and what it is."""

    windows_WT: np.ndarray
    name: str


def read_text(run: runs.Run, source: str = "") -> Text:
    """Returns a run's held-out text, or windows of another source."""
    n = max(1, _TEXT_TOKENS // run.config.model.context)
    windows_WT = run.windows("validation", n=n, source=source)
    return Text(windows_WT, source or f"held-out part of {run.config.data.source}")


def measure(
    run: runs.Run,
    circuit: Circuit,
    pairs: PairArrays | TaskBatch,
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
    found = Subnetwork.of(run.params, config, circuit)
    ranked = [node.name for node in sorted(circuit.nodes, key=lambda node: -node.importance)]
    places = [Node.parse(name) for name in ranked[: options.max_nodes]]
    with progress(2 * len(places) + 1 + min(len(ranked), _PREFIXES), "evidence") as bar:
        ablation_pairs = first(pairs, _ABLATION_PAIRS)
        from_model, prefix = _ablations(found, ablation_pairs, ranked, len(places), bar.advance)
        recorded = _on_prompts(found, first(pairs, options.pairs), places)
        summaries = excerpts.summaries(run.params, config, text.windows_WT, places, bar.advance)
    answers = np.asarray(pairs.answer).reshape(-1, 2)
    shared = tuple(answers[0].tolist()) if np.all(answers == answers[:1]) else None
    sides = contrast.contrast(*map(np.asarray, ablation_pairs[:3]))
    nodes, of_tokens = _nodes(run, circuit, places, from_model, summaries, shared, sides.tokens_J)
    top_tokens_NK = of_tokens["top_tokens_NK"]
    in_text = _in_text(summaries)
    spans = in_text["excerpts_E6"][:, 2:5]
    excerpted = [text.windows_WT[window, start:stop] for window, start, stop in spans]
    used = [recorded["prompt_tokens_X"], answers.ravel(), sides.tokens_J, *excerpted]
    used.append(top_tokens_NK[top_tokens_NK >= 0])
    token_texts = {str(i): run.tokenizer.decode([i]) for i in np.unique(np.concatenate(used)).tolist()}
    return Evidence(
        task=circuit.task,
        summary=summary,
        circuit=circuit.digest,
        step=run.step,
        text=text.name,
        ablation_pairs=len(ablation_pairs.answer) // 2,
        prefix=prefix,
        answers=shared,
        nodes=nodes,
        token_texts=token_texts,
        windows_WT=text.windows_WT.astype(np.min_scalar_type(config.vocab_size - 1)),
        contrast_tokens_J=sides.tokens_J,
        contrast_counts_J4=sides.counts_J4,
        pair_tokens_RT=np.asarray(ablation_pairs.tokens),
        pair_positions_R=np.asarray(ablation_pairs.position),
        pair_answers_R=np.asarray(ablation_pairs.answer),
        **of_tokens,
        **recorded,
        **in_text,
    )


def store_model(run: runs.Run) -> None:
    """Write what a page needs to run the model beside the circuits of a run."""
    parameters = trees.flatten(jax.device_get(run.params))
    digest = trees.digest(run.params)
    found = model_file.stored(parameters, run.config.model, tokenizer=run.tokenizer.to_json(), digest=digest)
    folder = folder_of(run.folder)
    if found is None:
        # That of an earlier, smaller model would only be refused.
        (folder / model_file.FILE).unlink(missing_ok=True)
        log.info("  the model is too large for a page to run it")
    else:
        found.save(folder)


def measure_run(folder: pathlib.Path, names: Sequence[str], options: Options) -> int:
    """Measure the evidence of circuits of a run that were found before, and return how many.

    The tasks are given by name, or as "all" that have a circuit; those of the user's own by file as well.
    """
    run, chosen = opened(folder, names, "the evidence")
    text = read_text(run, options.source)
    store_model(run)
    for number, (circuit, task) in enumerate(chosen, start=1):
        log.info("[%d/%d] %s: measuring evidence", number, len(chosen), circuit.full_name)
        pairs = report_pairs(run, circuit, task)
        evidence = measure(run, circuit, pairs, text, summary=task.summary, options=options)
        evidence.save(folder_of(folder, circuit.full_name))
    return len(chosen)


def opened(
    folder: pathlib.Path, names: Sequence[str], what: str, *, run: runs.Run | None = None
) -> tuple[runs.Run, list[tuple[Circuit, Task]]]:
    """Returns a run, and circuits of it with their tasks, ready for work that takes minutes.

    Args:
      folder: Folder of the run.
      names: Names of tasks, files of tasks, or "all" that have a circuit.
      what: What will be written into the circuits' folders, for messages.
      run: The run, if it is loaded.

    Raises:
      UserError: A task or circuit does not exist, a circuit belongs to other parameters, or its folder cannot
        be written to.
    """
    circuits = report.select(folder, names)[1]
    known = known_tasks(names, circuits)
    run = run or runs.load(folder)
    for circuit in circuits:
        circuit.check(run.params)
        files.check_writable(folder_of(folder, circuit.full_name), what)
    return run, [(circuit, known[circuit.task]) for circuit in circuits]


def report_pairs(
    run: runs.Run, circuit: Circuit, task: Task, *, n_pairs: int | None = None, longest: int | None = None
) -> TaskBatch:
    """Returns the pairs that a circuit's numbers were reported on: `n_pairs`, of `longest` tokens at most."""
    settings, context = circuit.settings, run.config.model.context
    return tasks.build(
        task,
        run.tokenizer,
        n_pairs or settings.report_pairs,
        settings.seed,
        split="report",
        max_tokens=min(settings.max_tokens, context, longest or context),
    )


def known_tasks(names: Sequence[str], circuits: Sequence[Circuit]) -> dict[str, Task]:
    """Returns tasks by name: the built-in ones, and those of the files among `names`.

    Raises:
      UserError: The task of a circuit is not among them.
    """
    sources = [split(name)[0] for name in names]
    of_files = [tasks.find(source) for source in sources if source.endswith((".jsonl", ".py"))]
    known = tasks.built_in() | {task.name: task for task in of_files}
    for circuit in circuits:
        if circuit.task not in known:
            raise UserError(
                f"the pairs of task {circuit.task!r} come from a file of yours: name it too, "
                f"--task=all,{circuit.task}.jsonl"
            )
    return known


def _ablations(
    found: Subnetwork, pairs: PairArrays, ranked: list[str], n_shown: int, advance: Callable[[int], Any]
) -> tuple[np.ndarray, list[evidence_file.Prefix]]:
    """Returns the growth of the model's loss without each node shown, and losses of the first nodes alone."""
    scorer = found.scorer
    index = {name: i for i, name in enumerate(masks.names(scorer.config))}
    order = np.array([index[name] for name in ranked])

    def losses(nodes_U, edges, spans):
        parts = []
        for start in range(0, len(spans), _CHUNK):
            part = spans[start : start + _CHUNK]
            parts.append(scorer.without(pairs, nodes_U, edges, order, part).loss)
            advance(len(part))
        return np.concatenate(parts)

    without = losses(np.ones_like(found.nodes_U), None, [[0, 0], *([i, i + 1] for i in range(n_shown))])
    sizes = np.linspace(1, len(order), min(len(order), _PREFIXES)).round().astype(int).tolist()
    prefix = losses(found.nodes_U, found.remaining, [[size, len(order)] for size in sizes])
    return without[1:] - without[0], list(map(evidence_file.Prefix, sizes, prefix.tolist()))


def _on_prompts(found: Subnetwork, pairs: PairArrays, places: list[Node]) -> dict[str, Any]:
    """Returns what `Evidence` records of prompts, in the whole model and in the circuit alone."""
    config = found.scorer.config
    sides = {
        "model": (found.scorer.params, found.ablation(np.ones_like(found.nodes_U))),
        "circuit": (found.params, found.ablation()),
    }
    places = evidence_file.with_partners(places)
    heads = sorted(
        {(p.layer, p.channel // config.d_head) for p in places if NODES[p.location].channels == "heads"}
    )
    lengths = (np.asarray(pairs.position) + 1).tolist()
    recorded: dict[str, Any] = {
        "places": list(map(str, places)),
        "heads": [evidence_file.Head(layer, head) for layer, head in heads],
        "prompt_tokens_X": _joined(np.asarray(pairs.tokens), lengths).astype(np.int32),
    }
    leads = {}
    for side, (params, ablation) in sides.items():
        logits_RV, acts = excerpts.recorded(params, pairs.tokens, pairs.position, ablation, config=config)
        leads[side] = np.asarray(margins(logits_RV, pairs.answer, pairs.other)).tolist()
        values_PRT = excerpts.values_at(acts, places)
        recorded[f"{side}_values_PX"] = np.stack([_joined(v, lengths) for v in values_PRT])
        recorded[f"{side}_patterns_HY"] = _triangles(params, acts, heads, lengths, config)
    answers = np.asarray(pairs.answer).tolist()
    recorded["prompts"] = [
        evidence_file.Prompt(length=length, answer=answer, model=in_model, circuit=in_circuit)
        for length, answer, in_model, in_circuit in zip(lengths, answers, *leads.values(), strict=True)
    ]
    return recorded


def _joined(values_RT: np.ndarray, lengths: list[int]) -> np.ndarray:
    return np.concatenate([row[:length] for row, length in zip(values_RT, lengths, strict=True)])


def _triangles(
    params: model.Params,
    acts: dict[str, Any],
    heads: list[tuple[int, int]],
    lengths: list[int],
    config: ModelConfig,
) -> np.ndarray:
    """Returns attention over the last tokens of prompts: `(H, Y)`, see `Evidence`."""
    q, k, sink_LH = acts["attn.q"], acts["attn.k"], model.sinks(params)
    patterns = {
        layer: np.asarray(model.layer_attention(q, k, sink_LH, layer, config=config))
        for layer in sorted({layer for layer, _ in heads})
    }
    patterns_HY = np.zeros((len(heads), sum(map(evidence_file.triangle, lengths))), np.float32)
    for pattern_Y, (layer, head) in zip(patterns_HY, heads, strict=True):
        parts = []
        for square_TS, length in zip(patterns[layer][:, head], lengths, strict=True):
            start = max(0, length - PATTERN_TOKENS)
            parts.append(square_TS[start:length, start:length][np.tril_indices(length - start)])
        pattern_Y[:] = np.concatenate(parts)
    return patterns_HY


def _nodes(
    run: runs.Run,
    circuit: Circuit,
    places: list[Node],
    from_model: np.ndarray,
    summaries: list[excerpts.Summary],
    answers: tuple[int, ...] | None,
    contrast_J: np.ndarray,
) -> tuple[list[evidence_file.NodeEvidence], dict[str, Any]]:
    """Returns the nodes, and as `Evidence` has them the weights of tokens in their channels."""
    config, flat = run.config.model, trees.flatten(run.params)
    embedding_VD = np.asarray(flat["embed/tokens"])
    unembed_DV = embedding_VD.T if config.tied_embeddings else np.asarray(flat["head/unembed"])
    unembed_DV = np.asarray(flat["head/norm/gain"])[:, None] * unembed_DV
    bias_of = {connection.target: connection.bias for connection in graph.CONNECTIONS}
    top_tokens_NK = np.full((len(places), TOP_TOKENS), -1, np.int32)
    top_weights_NK = np.zeros((len(places), TOP_TOKENS), np.float32)
    contrast_weights_NJ = np.zeros((len(places), len(contrast_J)), np.float32)
    described = []
    for i, ((layer, location, channel), summary) in enumerate(zip(places, summaries, strict=True)):
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
        if weights_V.size:
            contrast_weights_NJ[i] = weights_V[contrast_J]
        described.append(
            evidence_file.NodeEvidence(
                name=str(places[i]),
                from_model=float(from_model[i]),
                mean=float(circuit.means[location][layer, channel]),
                bias=None if bias is None else float(bias[layer, channel]),
                gain=None if gain is None else float(gain),
                n_tokens=int(np.count_nonzero(weights_V)),
                answer_weights=(tuple(weights_V[list(answers)].tolist()) if answers and written else None),
                **{key: getattr(summary, key) for key in ("largest", "zero", "low", "high")},
            )
        )
    return described, {
        "top_tokens_NK": top_tokens_NK,
        "top_weights_NK": top_weights_NK,
        "contrast_weights_NJ": contrast_weights_NJ,
    }


def _in_text(summaries: list[excerpts.Summary]) -> dict[str, Any]:
    """Returns histograms and excerpts as `Evidence` has them."""
    found = [(i, excerpt) for i, summary in enumerate(summaries) for excerpt in summary.excerpts]
    return {
        "counts_NB": np.array([summary.counts for summary in summaries], np.int32),
        "excerpts_E6": np.array([(i, *excerpt[:5]) for i, excerpt in found], np.int32).reshape(-1, 6),
        "quantile_E": np.array([excerpt.quantile for _, excerpt in found], np.float32),
        "excerpt_values_Z": np.concatenate([np.zeros(0, np.float32), *(e.values for _, e in found)]),
    }
