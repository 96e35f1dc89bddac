"""For tests of audits: an audit made by hand, and a run folder with a model whose circuit is known."""

import dataclasses
import json
import pathlib

import circuits_case
import jax
import jax.numpy as jnp
import numpy as np

from wsparse import model, runs, trees
from wsparse.circuits import Circuit, graph, masks, pairs, tasks
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.circuits.audits.record import Audit, Curve, Measurement, TestResult
from wsparse.circuits.circuit import (
    FOUND,
    NOT_CONFIRMED,
    Baseline,
    Calibration,
    CircuitNode,
    Counts,
    Score,
    Scores,
    Status,
)
from wsparse.circuits.subject import N_WINDOWS, Subject
from wsparse.config import DataConfig, TrainConfig
from wsparse.data import tokenizer as tokenizer_lib

TASK = "closing"
CONFIG = dataclasses.replace(circuits_case.PLANTED, vocab_size=257)
# Nodes of the planted model that its task does not need.
OTHER_NODES = {"0.attn.act_in.1", "0.attn.v.6", "0.attn.resid_delta.2", "1.mlp.post_act.3"}


def result(name: str, verdict: str = "passed", **changes) -> TestResult:
    """One test, with a measurement and a curve of plain numbers."""
    values = {
        "name": name,
        "title": CLAIMS[name].title,
        "question": f"Is it {verdict}?",
        "procedure": "24 pairs of the report split.",
        "verdict": verdict,
        "measurements": [Measurement(name="loss", value=0.125, low=0.1, high=0.15, control=0.6875)],
        "curves": [Curve(x_label="steps", y_label="loss", x=[5, 40], y=[0.125, 0.5], control=[0.1, 0.25])],
        "control": "A random node set.",
        "criterion": "At most 0.15.",
        "seconds": 1.5,
    }
    return TestResult(**(values | changes))


def audit(*tests: TestResult, **changes) -> Audit:
    """An audit with these tests; all of them passed where none is given."""
    values = {
        "task": TASK,
        "form": "') or \")",
        "run": "tiny",
        "step": 1200,
        "model": "a" * 64,
        "data": "b" * 64,
        "circuit": "c" * 64,
        "wsparse": "1.2.3",
        "status": FOUND,
        "objective": "robust",
        "loss": 0.125,
        "target": 0.15,
        "nodes": 12,
        "edges": 9,
        "pairs": 48,
        "options": {"pairs": 48, "seed": 7},
        "tests": list(tests) or [result(name) for name in CLAIMS],
        "seconds": 61.5,
        "command": "python -m wsparse.audit --run=runs/tiny",
    }
    return Audit(**(values | changes))


def write_task(folder: pathlib.Path) -> pathlib.Path:
    """Close the bracket that the prompt begins with; the letters between say nothing."""
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "xyz"]
    lines = [
        json.dumps({"prompt_a": f"({w}", "prompt_b": f"[{w}", "answer_a": ")", "answer_b": "]"})
        for w in words
    ]
    path = folder / f"{TASK}.jsonl"
    path.write_text("\n".join(lines))
    return path


def _params(tokenizer: tokenizer_lib.Tokenizer) -> model.Params:
    """The planted model of `circuits_case` for tokens that are bytes."""
    flat = {path: np.array(leaf) for path, leaf in trees.flatten(circuits_case.planted_params()).items()}
    left, right, close_left, close_right = (tokenizer.encode(text)[0] for text in "([)]")
    embedding = np.random.default_rng(0).normal(0, 0.3, (CONFIG.vocab_size, CONFIG.d_model))
    embedding[:, [5, 9, 11]] = 0
    embedding[[left, right], 5] = 4, -4
    unembedding = np.zeros((CONFIG.d_model, CONFIG.vocab_size))
    unembedding[11, [close_left, close_right]] = 0.3, -0.3
    flat |= {"embed/tokens": embedding, "head/unembed": unembedding}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trees.unflatten(flat))


def write_run(folder: pathlib.Path, context: int = CONFIG.context) -> pathlib.Path:
    """A run of the planted model with its task's circuit; returns the task's file, which is beside it."""
    tokenizer = tokenizer_lib.train(["no merges"], CONFIG.vocab_size)
    config = TrainConfig(
        model=dataclasses.replace(CONFIG, context=context), data=DataConfig(source="idioms", megabytes=0.2)
    )
    runs.create(folder, config, _params(tokenizer), tokenizer, summary={})
    path = write_task(folder.parent)
    write_circuit(folder, tasks.find(str(path)), circuits_case.PLANTED_NODES)
    return path


def write_circuit(folder: pathlib.Path, task: pairs.Task, names: set[str], target: float = 0.2) -> None:
    """Writes nodes, and all weights between them, as the circuit of a task."""
    run = runs.load(folder)
    config = run.config.model
    scorer = Subject(run.params, config, run.windows("train", n=N_WINDOWS)).scorer
    nodes_U = masks.from_names(sorted(names), config)
    edges = graph.between(nodes_U, scorer.weights, config)
    batch = tasks.build(task, run.tokenizer, 8, 0, split="report")
    score = scorer.mask(pairs.arrays(batch), nodes_U)
    circuit = Circuit(
        task=task.name,
        form=") or ]",
        model_digest=trees.digest(run.params),
        config=config,
        target=target,
        nodes=[CircuitNode(name, 0.5, 0.1) for name in sorted(names)],
        edges=graph.edge_list(edges, run.params),
        loss=score.loss,
        scores=Scores(
            model=Score(0.1, 1.0),
            sufficiency=score,
            calibrated=Calibration(scale=1.0, shift=0.0, loss=score.loss),
            necessity=Score(0.7, 0.5),
            attribution_baseline=Baseline(reached=False, least_loss=0.5),
            edges_before_clean_up=9,
            seconds_to_find=3.0,
            seconds=4.0,
        ),
        counts=Counts(
            nodes=len(names),
            edges=graph.count(edges),
            edges_between_nodes=graph.count(edges),
            embedding_edges=2,
            unembedding_edges=2,
            biases=0,
        ),
        controls={},
        curve=[],
        hyperparameters={"settings": {"search_pairs": 16, "discretize_pairs": 8, "report_pairs": 8}},
        means={name: np.asarray(mean) for name, mean in scorer.means.items()},
        tau={},
        removed={path: np.zeros_like(kept) for path, kept in edges.items()},
    )
    circuit.save(folder / "circuits" / task.name)
    status = FOUND if score.loss <= target else NOT_CONFIRMED
    Status(task=task.name, status=status, model=Score(0.1, 1.0)).save(folder / "circuits" / task.name)
