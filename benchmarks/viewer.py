"""Sizes and opening times of the viewer's page: `python benchmarks/viewer.py --run=runs/tiny`.

Two pages are written as `python -m wsparse.view` does and opened in a headless Chromium, nothing kept from
one time to the next: the run's own, and one of a circuit of `--nodes` nodes, drawn at random from the run's
model, with every nonzero weight between them. Timed from the start of navigation until the overview, a
circuit as it opens, or all of its nodes are painted and the browser is ready for the next event; a node that
is clicked then must be shown.
Needs the extra `test` and a Chromium on the path.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import statistics
import tempfile
from typing import Any

from absl import flags
import numpy as np
from playwright import sync_api

from wsparse import runs
from wsparse.circuits import evidence, graph, masks, report, tasks
from wsparse.circuits.circuit import Circuit, CircuitNode
from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.viewer import contents, page

# Milliseconds since the start of navigation, when what was drawn by then is on the screen.
PAINTED = "new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"


def grown(circuit: Circuit, run: runs.Run, n_nodes: int) -> Circuit:
    """A circuit of random nodes of the model and all edges between them; importances fall with the rank."""
    config = run.config.model
    everything = masks.names(config)
    if n_nodes > len(everything):
        raise UserError(f"--nodes={n_nodes}: the model of {run.folder} has {len(everything)}")
    chosen = np.random.default_rng(0).permutation(len(everything))[:n_nodes]
    kept_U = np.zeros(len(everything), bool)
    kept_U[chosen] = True
    edges = graph.between(kept_U, graph.nonzero(run.params), config)
    return dataclasses.replace(
        circuit,
        nodes=[CircuitNode(everything[i], 0.0, 1 / (1 + rank)) for rank, i in enumerate(chosen)],
        edges=graph.edge_list(edges, run.params),
        removed={path: np.zeros_like(each) for path, each in edges.items()},
    )


def measure(run: runs.Run, circuit: Circuit, text: evidence.Text) -> evidence.Evidence:
    """Returns the evidence of a circuit, on fresh pairs of its task."""
    task = tasks.TASKS[circuit.task]
    pairs = tasks.build(task, run.tokenizer, 96, 0, split="report", max_tokens=run.config.model.context)
    return evidence.measure(run, circuit, pairs, text, summary=task.summary)


def opened(browser: sync_api.Browser, url: str) -> float:
    """Milliseconds that opening a page takes; where it shows a graph, a node is clicked then.

    Raises:
      UserError: the page logs or raises something, or does not show the node.
    """
    trouble = []
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("pageerror", lambda error: trouble.append(str(error)))
    tab.goto(url)
    milliseconds = tab.evaluate(PAINTED)
    for node in tab.locator(".node:not(.gone)").all()[:1]:
        node.evaluate("n => n.dispatchEvent(new MouseEvent('click', {bubbles: true}))")
        if tab.locator("#panel h2").inner_text() != node.get_attribute("data-name"):
            trouble.append("a clicked node was not shown")
    tab.close()
    if trouble:
        raise UserError(f"{url}: {trouble[0]}")
    return milliseconds


def times(
    browser: sync_api.Browser, path: pathlib.Path, circuit: Circuit, rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds to open a page at its overview, at a circuit, and at all nodes of it; best and median."""
    task = f"#task={circuit.task}"
    views = {"overview": "", "circuit": task, "all nodes": f"{task}&keep={len(circuit.nodes)}"}
    found = {
        view: [opened(browser, f"{path.as_uri()}{fragment}") for _ in range(rounds)]
        for view, fragment in views.items()
    }
    return {view: {"best": min(t), "median": statistics.median(t)} for view, t in found.items()}


def main(argv) -> None:
    """Write and open both pages, and print a table and one JSON line."""
    del argv
    options: Any = flags.FLAGS
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if chromium is None:
        raise UserError("there is no Chromium on the path: apt-get install chromium")
    run = runs.load(options.run)
    found_tasks = report.read(run.folder / "circuits")
    rows = [row for row, _ in found_tasks]
    circuits = [circuit for _, circuit in found_tasks if circuit is not None and circuit.nodes]
    if not circuits:
        raise UserError(f"{run.folder} has no circuits: python -m wsparse.prune --run={run.folder}")
    text = evidence.read_text(run)
    pages = {
        f"{run.folder.resolve().name}, circuits: {len(circuits)}": circuits,
        f"{options.nodes} nodes": [grown(circuits[0], run, options.nodes)],
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, shown in pages.items():
            measured = [contents.Shown(circuit, measure(run, circuit, text)) for circuit in shown]
            names = {circuit.task for circuit in shown}
            data = contents.contents(
                name,
                [row for row in rows if row["task"] in names],
                measured,
                {},
                contents.Options(),
                run.folder / "circuits",
            )
            path = pathlib.Path(folder) / "report.html"
            path.write_text(page.render(data, title=name), encoding="utf-8")
            found = times(browser, path, shown[0], options.rounds)
            results[name] = {"megabytes": path.stat().st_size / 1e6} | found
            columns = [f"{t['best']:.0f} ms, {t['median']:.0f} ms" for t in found.values()]
            print(f"| {name} | {results[name]['megabytes']:.2f} MB | {' | '.join(columns)} |", flush=True)
        browser.close()
    print(json.dumps(results))


if __name__ == "__main__":
    flags.DEFINE_string("run", "runs/tiny", "The folder of a training run with circuits.")
    flags.DEFINE_integer("nodes", 2000, "Nodes of the large circuit.")
    flags.DEFINE_integer("rounds", 5, "Times that each page is opened.")
    run_command(main)
