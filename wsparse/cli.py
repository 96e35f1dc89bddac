"""The console command `wsparse NAME ...`, which is `python -m MODULE ...` of the table below."""

from __future__ import annotations

import runpy
import sys

from wsparse import __version__, signals
from wsparse.errors import closest

COMMANDS = {
    "train": ("wsparse.train", "Train a model from a recipe."),
    "sweep": ("wsparse.sweep", "Train a grid of models, and plot them."),
    "tasks": ("wsparse.tasks", "Measure how well a run does each task."),
    "prune": ("wsparse.prune", "Find the circuits of a run."),
    "audit": ("wsparse.audit", "Test a circuit, and write a report of it."),
    "attack": ("wsparse.attack", "Mislead a model by what its circuit says."),
    "results": ("wsparse.results", "Write the tables of the docs from runs."),
    "view": ("wsparse.view", "Write a run's circuits as one HTML page."),
    "compare": ("wsparse.circuits.compare", "Set the circuits of two runs side by side."),
    "sample": ("wsparse.sample", "Continue a prompt."),
    "prepare": ("wsparse.data.prepare", "Tokenize a large text once, into a folder."),
    "graph": ("wsparse.interop.neuronpedia", "Write a circuit as an attribution graph for Neuronpedia."),
    "push": ("wsparse.interop.hub", "Publish a run on the Hugging Face Hub."),
    "convert": ("wsparse.interop.convert", "Import published checkpoints, and export runs."),
    "doctor": ("wsparse.doctor", "Check a machine before it costs money."),
    "aot": ("wsparse.aot", "Compile a recipe for a TPU slice without having one."),
}


def main() -> None:
    """Runs the command that the first argument names."""
    signals.handle()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(f"wsparse {__version__}")
    elif name in COMMANDS:
        # The module parses `sys.argv`, as under `python -m`.
        sys.argv = [f"wsparse {name}", *arguments]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    else:
        near = closest(name, COMMANDS)
        print(f"error: there is no command {name[:80]!a}{near}; see wsparse --help", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """Returns the list of commands."""
    lines = [f"  {name:<9} {text}\n" for name, (_, text) in COMMANDS.items()]
    return (
        f"usage: wsparse COMMAND [--option=value ...]\n\n{''.join(lines)}\n"
        "wsparse COMMAND --help lists the command's options."
    )


if __name__ == "__main__":
    main()
