"""A small run with one circuit, made in memory, that the tests of the viewer share."""

import copy
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import files, model, runs, trees
from wsparse.circuits import Circuit, evidence, graph, masks, pairs, procedure, scoring, tasks
from wsparse.circuits.circuit import (
    FOUND,
    Baseline,
    Calibration,
    CircuitNode,
    Control,
    Counts,
    CurvePoint,
    Score,
    Scores,
    Status,
)
from wsparse.config import DataConfig, ModelConfig, TrainConfig, to_dict
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.nodes import NODES
from wsparse.viewer import contents, page

# Small programs to compile: neurons are 0 where the ReLU makes them so, and AbsTopK is off.
CONFIG = ModelConfig(
    vocab_size=257,
    context=24,
    n_layer=2,
    d_model=16,
    n_head=2,
    d_head=4,
    d_mlp=24,
    activation="relu",
    abs_top_k_fraction=None,
)
TASK = "closing"
# Nodes of a layer's location in the circuit, and in all of it.
EACH = 2
N_NODES = EACH * CONFIG.n_layer * len(NODES)
OPTIONS = evidence.Options(pairs=2)


@functools.cache
def run() -> runs.Run:
    """A model of large random sparse weights, whose tokens are bytes."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(CONFIG, jax.random.key(0)))

    def fill(path, leaf):
        kept = rng.random(leaf.shape) < (0.3 if path.endswith("kernel") else 0.9)
        return jnp.asarray(0.7 * rng.standard_normal(leaf.shape) * kept, jnp.float32)

    config = TrainConfig(model=CONFIG, data=DataConfig(source="idioms", megabytes=0.2))
    tokenizer = tokenizer_lib.train(["no merges"], CONFIG.vocab_size)
    folder = pathlib.Path("runs/case")
    return runs.Run(folder, config, 7, trees.map_with_path(fill, shapes), tokenizer)


def write_task(folder: pathlib.Path) -> pathlib.Path:
    """Close a string with the quote that opened it, as a user's own task file."""
    words = [f"{a}{b}" for a in "abcdefghijklmnop" for b in "xyzuvw"]
    pairs = [{"prompt_a": f"f('{w}", "prompt_b": f'f("{w}', "answer_a": "'", "answer_b": '"'} for w in words]
    path = folder / f"{TASK}.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def windows() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 257, (10, CONFIG.context)).astype(np.int32)


def circuit(task: pairs.Task) -> Circuit:
    """Random nodes and the edges between them but one, with what `find` says of each node."""
    given = run()
    rng = np.random.default_rng(1)
    scorer = scoring.Scorer(given.params, CONFIG, scoring.mean_activations(given.params, CONFIG, windows()))
    mask = {name: np.zeros(shape, bool) for name, shape in masks.shapes(CONFIG).items()}
    for kept_LN in mask.values():
        for kept_N in kept_LN:
            kept_N[rng.choice(kept_N.size, EACH, replace=False)] = True
    nodes_U = np.asarray(masks.flatten(mask))
    edges = graph.between(nodes_U, scorer.weights, CONFIG)
    removed = {path: np.zeros_like(each) for path, each in edges.items()}
    path = next(path for path, each in edges.items() if each.any())
    at = tuple(np.argwhere(edges[path])[0])
    removed[path][at], edges[path][at] = True, False
    settings = procedure.Settings(report_pairs=4)
    batch = tasks.build(task, given.tokenizer, 4, settings.seed, split="report")
    stays = {path: scorer.weights[path] & ~removed[path] for path in removed}
    scores = scorer.mask(pairs.arrays(batch), nodes_U, stays)
    names = np.array(masks.names(CONFIG))[nodes_U]
    return Circuit(
        task=task.name,
        form="' or \"",
        model_digest=trees.digest(given.params),
        config=CONFIG,
        target=0.15,
        nodes=[CircuitNode(str(n), 0.5, float(i)) for n, i in zip(names, rng.random(N_NODES), strict=True)],
        edges=graph.edge_list(edges, given.params),
        loss=scores.loss,
        scores=Scores(
            model=Score(0.1, 1.0),
            sufficiency=scores,
            calibrated=Calibration(scale=1.0, shift=0.0, loss=0.2),
            necessity=Score(2.0, 0.1),
            attribution_baseline=Baseline(reached=False, least_loss=0.5),
            edges_before_clean_up=99,
            seconds_to_find=3.0,
            seconds=4.0,
        ),
        counts=Counts(
            nodes=N_NODES,
            edges=graph.count(edges),
            edges_between_nodes=9,
            embedding_edges=9,
            unembedding_edges=9,
            biases=9,
        ),
        controls={"shuffled_labels": Control(reached=False, least_loss=0.7)},
        curve=[CurvePoint(t, 10, e, t) for t, e in ((0.15, 50), (0.3, 20))],
        hyperparameters={"settings": {"report_pairs": 4, "seed": settings.seed}},
        means={name: np.asarray(each) for name, each in scorer.means.items()},
        tau={},
        removed=removed,
    )


def batch(task: pairs.Task) -> pairs.TaskBatch:
    """The pairs that the circuit's numbers are from."""
    return tasks.build(task, run().tokenizer, 4, 0, split="report")


def write_run(folder: pathlib.Path) -> pairs.Task:
    """What `view` reads, but for evidence: a circuit, and a task without one."""
    folder.mkdir(exist_ok=True)
    files.write_json(folder / "config.json", to_dict(run().config))
    task = tasks.find(str(write_task(folder)))
    found = circuit(task)
    found.save(folder / "circuits" / TASK)
    for name, status in ((TASK, FOUND), ("hard", "not found")):
        Status(task=name, status=status, model=Score(0.1, 1.0)).save(folder / "circuits" / name)
    return task


@functools.cache
def write_live_run(folder: pathlib.Path) -> None:
    """A run with a circuit, its evidence and its model."""
    data_text(folder)
    evidence.store_model(dataclasses.replace(run(), folder=folder))


def live_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A fixture: the folder of `write_live_run`."""
    folder = tmp_path_factory.mktemp("viewer")
    write_live_run(folder)
    return folder


def live_circuit(folder: pathlib.Path) -> Circuit:
    """A fixture: the circuit of the fixture `folder`."""
    return Circuit.load(folder / "circuits" / TASK)


def data_text(folder: pathlib.Path) -> str:
    """The page's data of the run that `write_run` makes in `folder`, as JSON."""
    task = write_run(folder)
    where = folder / "circuits" / TASK
    text = evidence.Text(windows(), "random tokens")
    evidence.measure(
        run(), Circuit.load(where), batch(task), text, summary=task.summary, options=OPTIONS
    ).save(where)
    return page.embedded(contents.read_run(folder, contents.Options()))


def dense(data: dict, n_reads: int = 14) -> dict:
    """A circuit whose first head reads at nearly all channels, and whose second reads at few."""
    random = np.random.default_rng(0)
    grown = copy.deepcopy(data)
    shown = grown["circuits"][TASK]
    like = {node["name"].split(".", 1)[1].rsplit(".", 1)[0]: node for node in shown["nodes"]}
    about = grown["texts"][shown["text"]]["nodes"]
    nodes = []

    def add(location, channel):
        model, name = like[location], f"0.{location}.{channel}"
        nodes.append(model | {"name": name, "importance": 1 / (1 + len(nodes)), "constant": False})
        for table in (shown["values"], about, shown["contrast"]["weights"]):
            if model["name"] in table:
                table[name] = table[model["name"]]
        return len(nodes) - 1

    reads = [add("attn.act_in", i) for i in range(n_reads)]
    heads = [[add(f"attn.{kind}", 4 * head + i) for kind in "qkv" for i in range(4)] for head in range(2)]
    edges = [
        [read, node, float(random.normal())]
        for head, share in zip(heads, (0.9, 0.3), strict=True)
        for read in reads
        for node in head
        if random.random() < share
    ]
    pattern = next(iter(shown["patterns"].values()))
    shown |= {
        "nodes": nodes,
        "edges": sorted(edges, key=lambda edge: -abs(edge[2])),
        "total_nodes": len(nodes),
        "prefix": [[1, 0.6], [len(nodes), 0.1]],
        "patterns": {"0.0": pattern, "0.1": pattern},
    }
    return grown
