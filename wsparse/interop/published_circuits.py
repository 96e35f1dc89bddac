"""Published circuits: read into a run as circuit folders, and replayed on its model.

    python -m wsparse.interop.published_circuits --run=RUN --from=VIZ/MODEL/TASK/SWEEP \
        --answer='")' --answer="')"

RUN is the imported checkpoint of the circuits' model (`wsparse.interop.convert`), --from the folder of one
sweep, with a folder K/viz_data.pt for each size, or one of these. Each becomes a folder
`circuits/TASK@published-K/` of the run, with `comparison.json`: stored numbers beside those that this library
gets for the same prompts. The table of all is printed, and written as `circuits/TASK@published.md`.

Which answers the two classes of prompts have is not in the files: --answer says it, first for class 1. Closed
nodes are at the means of `mean_baseline_pretrain.pt`, found beside the files or given with --means; without
it, at means over the run's own text, which are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from wsparse import files, locks, markdown, model, runs, taps, trees
from wsparse.circuits import graph, masks, scoring
from wsparse.circuits.ablation import answer_logits
from wsparse.circuits.circuit import (
    Baseline,
    Calibration,
    Circuit,
    CircuitNode,
    Score,
    Scores,
    Status,
    check_name,
    folder_of,
    joined,
    split,
)
from wsparse.circuits.pairs import PairArrays, row_losses
from wsparse.command import run_command
from wsparse.config import ModelConfig
from wsparse.errors import UserError, quoted
from wsparse.interop import viz_data
from wsparse.interop.viz_data import FINAL, VizData
from wsparse.nodes import CONNECTIONS, NODES, Node
from wsparse.ops import cpu

# Task loss that the paper prunes to.
_TARGET = 0.15
# Prompts whose activations are held at once.
_ROWS = 8

Tree = dict[str, Any]


class Row(NamedTuple):
    """A line of the table: a stored quantity of one circuit beside the recomputed one.

    For several numbers, `stored` and `recomputed` are their means. `difference` is the largest.
    """

    circuit: str
    quantity: str
    stored: float
    recomputed: float
    difference: float
    numbers: int


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """A model with the prompts and the means of published circuits.

    Attributes:
      means: Location -> `(L, N)`, "final_resid" -> `(N,)`; locations without a mean are never ablated.
      pairs: The prompts; rows `2 i` and `2 i + 1` are partners.
      order_B: Row of the file that each row of `pairs` is.
    """

    params: model.Params
    config: ModelConfig
    means: Tree
    pairs: PairArrays
    order_B: np.ndarray

    def gates(self, kept: Mapping[str, np.ndarray]) -> Tree:
        """Returns 1 for kept nodes and 0 for others: location -> `(L, N)`, "final_resid" -> `(N,)`."""
        closable = {name for name in self.means if name in NODES or (name == FINAL and FINAL in kept)}
        gates = {name: np.zeros(self.means[name].shape, np.float32) for name in closable}
        for name, channels in kept.items():
            layer, location = _place(name)
            if location in gates:
                gates[location][channels if layer is None else (layer, channels)] = 1
        return gates

    def score(self, gates: Tree) -> Score:
        """Returns the loss and accuracy of the model with closed nodes at their means."""
        losses_B, right_B = _scores(self.params, self.pairs, gates, self.means, config=self.config)
        return Score(float(np.mean(losses_B)), float(np.mean(right_B)))

    def activations(self, gates: Tree) -> Iterator[tuple[np.ndarray, Tree]]:
        """Yields rows of the file, and what is recorded on them first: location -> `(L, B, T, N)`."""
        for start in range(0, len(self.order_B), _ROWS):
            rows = np.arange(start, start + _ROWS) % len(self.order_B)
            acts = _recorded(self.params, self.pairs.tokens[rows], gates, self.means, config=self.config)
            # The last batch is filled up with rows from the start.
            yield self.order_B[start : start + _ROWS], acts


def _place(name: str) -> tuple[int | None, str]:
    """Returns layer and location of "3.attn.q"; final_resid has no layer."""
    layer, _, location = name.partition(".")
    return (None, name) if name == FINAL else (int(layer), location)


@functools.partial(jax.jit, static_argnames="config")
def _scores(params, pairs: PairArrays, gates, means, *, config):
    losses_B = row_losses(answer_logits(params, config, pairs, taps.NodeAblation(gates, means)), pairs)
    return losses_B, losses_B < jnp.log(2.0)


@functools.partial(jax.jit, static_argnames="config")
def _recorded(params, tokens_BT, gates, means, *, config):
    _, acts = model.forward(params, tokens_BT, config, tap=taps.NodeAblation(gates, means))
    return {name: acts[name] for name in gates}


def make_replay(
    params: model.Params, config: ModelConfig, published: VizData, answers: Sequence[int], means: Tree
) -> Replay:
    """Returns the replay of a circuit's prompts in a model.

    Args:
      answers: Tokens that answer the prompts of class 1 and of class 2.
      means: As `Replay.means`.
    """
    order_B = np.arange(len(published.tokens_BT)).reshape(2, -1).T.ravel()
    answer_B = np.tile(np.asarray(answers, np.int32), len(order_B) // 2)
    pairs = PairArrays(
        jnp.asarray(published.tokens_BT[order_B]),
        jnp.asarray(published.length_B[order_B] - 1),
        jnp.asarray(answer_B),
        jnp.asarray(answer_B.reshape(-1, 2)[:, ::-1].ravel()),
    )
    return Replay(params, config, jax.tree.map(jnp.asarray, means), pairs, order_B)


def stacked(means: Mapping[str, np.ndarray], config: ModelConfig) -> Tree:
    """Returns means by "3.attn.q" as arrays over layers; "attn.y" is left out where it is not told."""
    locations = [*NODES, "attn.y"] if "0.attn.y" in means else list(NODES)
    tree = {name: np.stack([means[f"{i}.{name}"] for i in range(config.n_layer)]) for name in locations}
    return tree | ({FINAL: means[FINAL]} if FINAL in means else {})


def own_means(run: runs.Run) -> Tree:
    """Returns means over the run's own text, of `Replay`'s form, "attn.y" and "final_resid" included."""
    windows_WT = run.windows("train")
    means = scoring.mean_activations(run.params, run.config.model, windows_WT)
    total = sum(
        np.asarray(_final(run.params, windows_WT[i : i + _ROWS], config=run.config.model))
        for i in range(0, len(windows_WT), _ROWS)
    )
    return {**means, FINAL: total / windows_WT.size}


@functools.partial(jax.jit, static_argnames="config")
def _final(params, windows_WT, *, config):
    _, acts = model.forward(params, windows_WT, config)
    return jnp.sum(acts[FINAL], axis=(0, 1))


# ---- Stored and recomputed ----


def compare(name: str, published: VizData, replay: Replay, *, max_nodes: int) -> list[Row]:
    """Returns the lines of the table for one circuit.

    Args:
      name: Name of the circuit in the table.
      max_nodes: Nodes whose own loss is recomputed: as many of them as come first.
    """
    gates = replay.gates(published.kept)
    all_open = jax.tree.map(np.ones_like, gates)
    without_final = {location: gate for location, gate in gates.items() if location != FINAL}
    circuit = replay.score(gates).loss

    def row(quantity: str, stored: Any, recomputed: Any) -> Row:
        stored, recomputed = np.atleast_1d(stored), np.atleast_1d(recomputed)
        difference = float(np.max(np.abs(stored - recomputed)))
        return Row(name, quantity, float(stored.mean()), float(recomputed.mean()), difference, stored.size)

    rows = [
        row("loss of the model", published.loss, replay.score(all_open).loss),
        row("loss of the circuit", published.circuit_loss, circuit),
    ]
    if FINAL in gates:
        loss = replay.score(without_final).loss
        rows.append(row("the same, the final stream left alone", published.circuit_loss, loss))
    if published.search_loss is not None:
        rows.append(row("last loss of the search", published.search_loss, circuit))
    stored, recomputed = _node_losses(published, replay, gates, max_nodes)
    if stored:
        rows.append(row("losses without a node", stored, recomputed))
    if published.layer_losses:
        losses = {block: replay.score(_without_block(gates, block)).loss for block in published.layer_losses}
        stored = list(published.layer_losses.values())
        rows.append(row("losses without a block", stored, list(losses.values())))
    if published.activations:
        rows.append(_activation_row(name, published, replay, gates))
    if published.weights:
        both = [_weights_of(weights, replay) for weights in published.weights]
        stored, recomputed = (np.concatenate(arrays) for arrays in zip(*both, strict=True))
        rows.append(row("weights between nodes", stored, recomputed))
    if published.n_nodes is not None:
        nodes = sum(viz_data.location_widths(replay.config).values())
        rows.append(row("nodes of the model", published.n_nodes, nodes))
    return rows


def _node_losses(
    published: VizData, replay: Replay, gates: Tree, max_nodes: int
) -> tuple[list[float], list[float]]:
    """Returns stored and recomputed losses of a circuit without each of its first nodes."""
    stored, recomputed = [], []
    for name, losses in published.node_losses.items():
        layer, location = _place(name)
        if location not in gates:
            continue
        for channel, loss in zip(published.kept[name].tolist(), losses.tolist(), strict=True):
            if len(stored) == max_nodes:
                return stored, recomputed
            index = channel if layer is None else (layer, channel)
            gates[location][index] = 0
            recomputed.append(replay.score(gates).loss)
            gates[location][index] = 1
            stored.append(loss)
    return stored, recomputed


def _without_block(gates: Tree, block: str) -> Tree:
    """Returns gates with the nodes of a block, "3.attn", closed."""
    layer, _, part = block.partition(".")
    closed = {name: gate.copy() for name, gate in gates.items()}
    for name, gate in closed.items():
        if name.startswith(f"{part}."):
            gate[int(layer)] = 0
    return closed


def _activation_row(name: str, published: VizData, replay: Replay, gates: Tree) -> Row:
    """Returns the line of activations in the circuit, of the tokens inside prompts."""
    stored_sum = recomputed_sum = difference = 0.0
    numbers = 0
    for rows, acts in replay.activations(gates):
        acts = jax.device_get(acts)
        for i, row_of_file in enumerate(rows.tolist()):
            length = int(published.length_B[row_of_file])
            for place, channels in published.activations.items():
                layer, location = _place(place)
                if location not in acts:
                    continue
                values_BTN = acts[location] if layer is None else acts[location][layer]
                for channel, stored_BT in channels.items():
                    stored, got = stored_BT[row_of_file, :length], values_BTN[i, :length, channel]
                    difference = max(difference, float(np.max(np.abs(stored - got))))
                    stored_sum, recomputed_sum = stored_sum + stored.sum(), recomputed_sum + got.sum()
                    numbers += length
    count = max(numbers, 1)
    return Row(
        name, "activations", float(stored_sum / count), float(recomputed_sum / count), difference, numbers
    )


def _weights_of(weights: viz_data.Weights, replay: Replay) -> tuple[np.ndarray, np.ndarray]:
    """Returns stored weights between nodes, and the model's."""
    leaves = trees.flatten(replay.params)
    connection = next(c for c in CONNECTIONS if (c.source, c.target) == (weights.source, weights.target))
    kernel = np.asarray(leaves[connection.kernel][weights.layer])
    own = kernel[np.ix_(weights.sources, weights.targets)]
    if weights.has_bias:
        bias = leaves.get(connection.bias)
        width = kernel.shape[1]
        bias_N = np.zeros(width) if bias is None else np.asarray(bias[weights.layer])
        own = np.concatenate([own, bias_N[None, weights.targets]])
    return weights.values.ravel(), own.ravel()


def table(rows: Sequence[Row]) -> str:
    """Returns the table in Markdown."""
    header = ("circuit", "quantity", "stored", "recomputed", "largest difference", "numbers")
    forms = ("", "", ".6g", ".6g", ".1e", "")
    return markdown.table(header, [map(format, row, forms) for row in rows])


# ---- Circuit folders ----


def as_circuit(task: str, answers: Sequence[str], published: VizData, replay: Replay) -> Circuit:
    """Returns a published circuit as ours, which leaves the final stream alone and cuts no weight."""
    config, params = replay.config, replay.params
    gates = {name: gate for name, gate in replay.gates(published.kept).items() if name in NODES}
    means = {name: np.asarray(mean) for name, mean in replay.means.items() if name != FINAL}
    nodes_U = np.asarray(masks.flatten(gates)) > 0
    edges = graph.between(nodes_U, graph.nonzero(params), config)
    scorer_means = {"attn.y": jnp.zeros_like(replay.means["attn.q"]), **replay.means}
    scorer = scoring.Scorer(params, config, {k: v for k, v in scorer_means.items() if k != FINAL})
    sufficiency = scorer.mask(replay.pairs, nodes_U)
    n_edges = graph.count(edges)
    losses = {
        f"{place}.{channel}": float(loss) - published.circuit_loss
        for place, of_nodes in published.node_losses.items()
        for channel, loss in zip(published.kept[place].tolist(), of_nodes, strict=True)
    }
    kept_names = [name for name, kept in zip(masks.names(config), nodes_U.tolist(), strict=True) if kept]
    return Circuit(
        task=task,
        form=" or ".join(answers),
        loss=sufficiency.loss,
        target=_TARGET,
        counts=graph.count_all(nodes_U, edges, params, config, pairs=replay.pairs),
        scores=Scores(
            model=scorer.mask(replay.pairs, np.ones_like(nodes_U)),
            sufficiency=sufficiency,
            calibrated=Calibration(scale=1.0, shift=0.0, loss=sufficiency.loss),
            necessity=scorer.mask(replay.pairs, ~nodes_U),
            attribution_baseline=Baseline(reached=False),
            edges_before_clean_up=n_edges,
            seconds_to_find=0.0,
            seconds=0.0,
            strict=scorer.mask(replay.pairs, nodes_U, edges) if "attn.y" in replay.means else None,
        ),
        controls={},
        nodes=[CircuitNode(name, 1.0, losses.get(name, 0.0)) for name in sorted(kept_names, key=_order)],
        edges=graph.edge_list(edges, params),
        curve=[],
        hyperparameters={"published": published.prune_config},
        model_digest=trees.digest(params),
        config=config,
        means=means,
        tau={name: np.where(gate > 0, 1, -1).astype(np.float32) for name, gate in gates.items()},
        removed={path: np.zeros(array.shape, bool) for path, array in edges.items()},
    )


def _order(name: str) -> tuple[int, int, int]:
    return Node.parse(name).order()


def import_circuits(
    run_folder: pathlib.Path,
    source: pathlib.Path,
    *,
    answers: Sequence[str],
    task: str = "",
    means: pathlib.Path | None = None,
    max_nodes: int = 256,
) -> list[Row]:
    """Reads published circuits into a run; see the module's docstring.

    Args:
      run_folder: The run of the circuits' model.
      source: Folder of one sweep, or of one circuit.
      answers: Texts that answer the prompts of class 1 and of class 2.
      task: Name of the task; by default that of the folder that the sweep is in.
      means: File of mean activations; by default one that lies in a folder above `source`, if any.
      max_nodes: See `compare`.

    Returns:
      The lines of the table.

    Raises:
      UserError: A file is damaged or of another model, there is none, an answer is not one token, a name
        cannot be that of a folder of a circuit, or another command writes to the run's circuits.
    """
    paths = _circuit_files(source)
    run = runs.load(run_folder)
    sweep = source.parent if (source / viz_data.FILE).exists() else source
    task = task or sweep.resolve().parent.name
    if pathlib.Path(task).name != task or split(task)[1]:
        raise UserError(f"--task={quoted(task)} must be the name of a task, and of a folder")
    names = {path.parent.name: f"published-{path.parent.name}" for path in paths}
    for name in names.values():
        check_name(name)
    tokens = [_token(run, answer) for answer in answers]
    if len(tokens) != 2 or tokens[0] == tokens[1]:
        got = quoted(" ".join(answers))
        raise UserError(f"--answer must be given twice, with two different tokens, got {got}")
    # All are read before anything is computed or written.
    published = {path.parent.name: viz_data.read(path, run.config.model) for path in paths}
    means = means or _means_file(source)
    if means is None:
        tree = own_means(run)
    else:
        tree = stacked(viz_data.read_means(means, run.config.model), run.config.model)
    rows, folder = [], folder_of(run.folder)
    files.make_folder(folder)
    with locks.hold(folder, "importing circuits"):
        for name, circuit in published.items():
            replay = make_replay(run.params, run.config.model, circuit, tokens, tree)
            own = compare(name, circuit, replay, max_nodes=max_nodes)
            _store(folder / joined(task, names[name]), as_circuit(task, answers, circuit, replay), own)
            rows += own
        files.write_text(folder / f"{task}@published.md", table(rows))
    return rows


def _store(folder: pathlib.Path, circuit: Circuit, rows: Sequence[Row]) -> None:
    circuit.save(folder)
    files.write_json(folder / "comparison.json", {"rows": [row._asdict() for row in rows]})
    model, digest = circuit.scores.model, circuit.model_digest
    Status(task=circuit.task, status=circuit.status, model=model, digest=digest).save(folder)


def _circuit_files(source: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of a folder, smallest size first, named ones last."""
    one = source / viz_data.FILE
    paths = [one] if one.exists() else source.glob(f"*/{viz_data.FILE}")
    found = sorted(paths, key=lambda path: (len(path.parent.name), path.parent.name))
    if not found:
        raise UserError(f"{source} has no K/{viz_data.FILE}: give a sweep's folder, VIZ/MODEL/TASK/SWEEP")
    return found


def _means_file(source: pathlib.Path) -> pathlib.Path | None:
    """Returns the file of mean activations in a folder or up to four above it."""
    folders = [source, *source.resolve().parents[:4]]
    return next((f / viz_data.MEANS_FILE for f in folders if (f / viz_data.MEANS_FILE).exists()), None)


def _token(run: runs.Run, answer: str) -> int:
    tokens = run.tokenizer.encode(answer)
    if len(tokens) != 1:
        raise UserError(f"--answer={quoted(answer)} is {len(tokens)} tokens of the run's tokenizer, not one")
    return tokens[0]


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    cpu.enable()
    options: Any = flags.FLAGS
    rows = import_circuits(
        pathlib.Path(options.run),
        # `from` is a keyword, so the flag cannot be read as an attribute.
        pathlib.Path(options["from"].value),
        answers=options.answer,
        task=options.task,
        means=pathlib.Path(options.means) if options.means else None,
        max_nodes=options.max_nodes,
    )
    print(table(rows), end="")


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The run of the circuits' model.", required=True)
    flags.DEFINE_string("from", None, "The folder of one sweep, or of one circuit.", required=True)
    flags.DEFINE_multi_string("answer", [], "Answer of class 1, then of class 2: give it twice.")
    flags.DEFINE_string("task", "", "Name of the task; by default that of the folder above the sweep's.")
    flags.DEFINE_string("means", "", "File of mean activations, where it is not above --from.")
    flags.DEFINE_integer("max_nodes", 256, "Nodes of a circuit whose own loss is recomputed.")


if __name__ == "__main__":
    _define_flags()
    run_command(main)
