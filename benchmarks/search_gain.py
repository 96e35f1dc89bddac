"""What the search gains over random hyperparameters: `python benchmarks/search_gain.py --run=runs/tiny`.

Both samplers get the same budget on the same tasks, with several seeds. The table gives the geometric mean,
over tasks and seeds, of the edges of the best circuit after so many trials, cut but not yet cleaned up (the
clean-up would blur what the search does). A task in which no trial has reached the target yet counts as every
weight of the model.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, get_args

from absl import flags
import numpy as np

from wsparse import runs
from wsparse.circuits import discretize, graph, procedure, tasks
from wsparse.circuits.search import Pruner, log_size, search
from wsparse.circuits.settings import Sampler
from wsparse.command import run_command


def best_so_far(
    subject: procedure.Subject, pairs: procedure.Pairs, pruner: Pruner, sampler: Sampler, seed: int
) -> np.ndarray:
    """Edges of the smallest circuit after every trial, `(trials,)`."""
    options: Any = flags.FLAGS

    def objective(tau_U):
        cut = discretize.discretize(subject.scorer, pairs.discretize, tau_U, options.target)
        edges = cut.subgraph.n_edges if cut.subgraph else None
        return log_size(edges, cut.least_loss), edges

    trials = search(
        pruner,
        subject.params,
        pairs.search,
        subject.node_means,
        objective,
        trials=options.trials,
        sampler=sampler,
        seed=seed,
    )
    everything = graph.count(subject.scorer.weights)
    edges = [everything if trial.result() is None else max(trial.result(), 1) for trial in trials]
    return np.minimum.accumulate(edges)


def main(argv) -> None:
    """Run both samplers and print a table and one JSON line."""
    del argv
    options: Any = flags.FLAGS
    trained = runs.load(pathlib.Path(options.run))
    config, settings = trained.config.model, procedure.Settings(target=options.target)
    windows = trained.windows("train", n=512)
    subject = procedure.Subject(trained.params, config, windows)
    pairs, refused = procedure.build_pairs(
        [tasks.find(name) for name in options.task], trained.tokenizer, settings, context=config.context
    )
    for name, reason in refused.items():
        print(f"{name}: refused: {reason}")
    pruner = Pruner(config, settings, parallel=options.parallel)
    edges: dict[str, list[np.ndarray]] = {sampler: [] for sampler in get_args(Sampler)}
    for of_task in pairs:
        for seed in range(options.seeds):
            for sampler, results in edges.items():
                results.append(best_so_far(subject, of_task, pruner, sampler, seed))
                print(f"{of_task.task}, seed {seed}, {sampler}: {results[-1].tolist()}", flush=True)
    means = {sampler: np.exp(np.mean(np.log(runs), axis=0)) for sampler, runs in edges.items()}
    print(f"{'trials':>8}" + "".join(f"{sampler:>10}" for sampler in means))
    for budget in sorted({2**i for i in range(10) if 2**i < options.trials} | {options.trials}):
        print(f"{budget:>8}" + "".join(f"{mean[budget - 1]:>10.1f}" for mean in means.values()))
    print(json.dumps({sampler: mean.tolist() for sampler, mean in means.items()}))


if __name__ == "__main__":
    flags.DEFINE_string("run", None, "The folder of a training run.", required=True)
    flags.DEFINE_list("task", list(tasks.TASKS), "Names of tasks that the model can do.")
    flags.DEFINE_float("target", 0.15, "Task loss that a circuit must reach.")
    flags.DEFINE_integer("trials", 32, "Budget of each search.")
    flags.DEFINE_integer("parallel", 4, "Trials in one call.")
    flags.DEFINE_integer("seeds", 2, "Searches for each task and sampler.")
    run_command(main)
