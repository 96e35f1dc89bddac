"""Results of runs, kept as JSON, and the tables of the docs made of it: `python -m wsparse.results`.

python -m wsparse.results --add=runs/sweeps/recipes   takes in every complete run of a folder, too
python -m wsparse.results                             writes the tables

A run is known by its recipe, with what its config changes, by its seed, and by the recipe of the settings
that it was pruned with; it replaces an earlier one of the same. So runs of several machines come together in
one file, and their folders are not needed again. In the docs a table stands between
`<!-- results: KIND NAME ... -->` and `<!-- end of results -->`:

models NAME ...     held-out loss, tasks, nonzeros and minutes of recipes (all, where none is named)
tasks NAME ...      loss of every task on the report split
circuits NAME ...   size and loss of every task's circuit, and the ratio of edges between two recipes
confirmed NAME ...  how many circuits hold on the report split
ratios NAME ...     how many times as large the circuits of other recipes are as those of the first
audits NAME ...     how many audited circuits pass each test, by task

With `prune=RECIPE` among the names, a table is of circuits that were found with the settings of that recipe;
with `tasks=TASK,TASK`, of circuits of those tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import logging
import math
import pathlib
import re
import statistics
from typing import Any

from absl import flags

from wsparse import files, markdown, recipes, runs
from wsparse.circuits import report
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.circuits.circuit import FOUND, NOT_CONFIRMED, NOT_FOUND, Status, folder_of
from wsparse.circuits.settings import Settings
from wsparse.command import run_command
from wsparse.config import TrainConfig, differences, from_dict, to_dict
from wsparse.errors import UserError, closest
from wsparse.ops import cpu
from wsparse.sweeps import records
from wsparse.sweeps.records import spread

log = logging.getLogger(__name__)

# The stored form of a run: `records.read`, with "name", "seed", "config" and "prune".
Entry = dict[str, Any]

_MARKED = re.compile(r"(<!-- results: (\w+)([^\n]*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)
# Keys that change how a run is computed or logged, and not what comes out.
_IDLE = ("seed", "mesh", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
_IDLE_DATA = ("threads", "prefetch")
# What an argument of a marker begins with that is no name of a run.
_OPTIONS = ("prune=", "tasks=")
# Beside the name of a recipe that has changed since.
_CHANGED = "\\*"
# Loss below which a model surely does a task.
_EASY = 0.1


# Runs -------------------------------------------------------------------------------------------------


def entry(folder: pathlib.Path, *, pairs: int, circuits: str = "") -> Entry:
    """Returns the results of a run; its model is scored on `pairs` pairs of each task's report split.

    The circuits are those of a name, or those without one.
    """
    config = runs.read_config(folder)
    record = records.read(folder, pairs=pairs, name=circuits)
    return {
        "name": name(config),
        "seed": config.seed,
        "config": _telling(config),
        "prune": _prune_recipe(folder_of(folder), circuits),
        **record,
    }


def name(config: TrainConfig) -> str:
    """Returns the recipe of a config, with the keys that differ: "tiny", "tiny,steps=450"."""
    changes = {recipe: differences(_telling(_recipe(recipe)), _telling(config)) for recipe in recipes.names()}
    nearest = min(changes, key=lambda recipe: len(changes[recipe]))
    changed = (re.fullmatch(r"([\w.]+): .* -> (.*)", line, re.DOTALL) for line in changes[nearest])
    return ",".join([nearest, *(f"{found[1]}={_plain(found[2])}" for found in changed if found)])


def _plain(text: str) -> str:
    """Returns a value as it may stand in a marker, without quotes and spaces."""
    return re.sub(r"[\s'\"]", "", text)


def _recipe(recipe: str) -> TrainConfig:
    return from_dict(TrainConfig, recipes.load(recipe).to_dict())


def _telling(config: TrainConfig) -> dict[str, Any]:
    """Returns what a config says about the results."""
    values = {key: value for key, value in to_dict(config).items() if key not in _IDLE}
    values["data"] = {key: value for key, value in values["data"].items() if key not in _IDLE_DATA}
    return values


def _prune_recipe(folder: pathlib.Path, circuits: str) -> str:
    """Returns the name of the recipe by whose settings a run was pruned, "" for none or for others."""
    found = [Status.load(path.parent) for path in sorted(folder.glob("*/status.json"))]
    made = [status.settings for status in found if status.name == circuits]
    for recipe in recipes.names("prune"):
        settings = to_dict(from_dict(Settings, recipes.load(recipe, "prune").to_dict()))
        if made and all(used == settings for used in made):
            return recipe
    return ""


def read(path: pathlib.Path) -> list[Entry]:
    """Returns the stored runs, none where there is no file yet."""
    return files.read_json(path)["runs"] if path.exists() else []


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """Returns the runs of both by name, seed and recipe of pruning; an older model gives way to a newer one.

    A model that is scored anew keeps the circuits that were found in it before.
    """
    found = list(old)
    for run in new:
        before = [each for each in found if _key(each)[:2] == _key(run)[:2]]
        kept = [
            run | {"circuits": each["circuits"], "prune": each["prune"]}
            for each in before
            if each["digest"] == run["digest"] and each["circuits"] and each["prune"] != run["prune"]
        ]
        if run["circuits"] or not kept:
            kept.append(run)
        found = [each for each in found if each not in before] + kept
    return sorted(found, key=_key)


def _key(run: Entry) -> tuple[str, int, str]:
    return run["name"], run["seed"], run["prune"]


def write(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Writes runs, one in a line, so that a change of one is a change of its line."""
    lines = ",\n".join(json.dumps(run) for run in entries)
    files.write_text(path, f'{{"runs": [\n{lines}\n]}}\n')


def run_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folder, if it is a run, or the complete runs in it."""
    if (folder / "config.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("**/summary.json"))
    if not found:
        raise UserError(f"{folder} is not a run, and holds no complete one")
    return found


# Tables -----------------------------------------------------------------------------------------------


def rewritten(text: str, entries: Sequence[Entry], where: str = "") -> str:
    """Returns a document with the tables between its markers made anew.

    Raises:
      UserError: A marker names an unknown kind of table, or a run that is neither stored nor a recipe.
    """

    def table(match: re.Match[str]) -> str:
        begin, kind, arguments, end = match.groups()
        if kind not in _TABLES:
            near = closest(kind, _TABLES)
            raise UserError(f"{where}: no table {kind!r}{near}; known are {', '.join(_TABLES)}")
        groups = _groups(arguments.split(), entries, where)
        return f"{begin}{_TABLES[kind](groups)}{_made_by(kind, groups)}{end}"

    return _MARKED.sub(table, text)


# Name -> its runs, in order of seeds.
_Groups = Mapping[str, Sequence[Entry]]
# Whether a circuit of a task, as it is stored, is to be kept.
_Keep = Callable[[str, Mapping[str, Any]], bool]


def _groups(given: Sequence[str], entries: Sequence[Entry], where: str) -> _Groups:
    """Returns the runs that the arguments of a marker name, one for each seed."""
    prunes, lists = (
        [argument.removeprefix(key) for argument in given if argument.startswith(key)] for key in _OPTIONS
    )
    stored = list(dict.fromkeys(run["name"] for run in entries))
    names = [argument for argument in given if not argument.startswith(_OPTIONS)] or stored
    chosen = [run for run in entries if not prunes or run["prune"] in prunes]
    tasks = [task for names_of_tasks in lists for task in names_of_tasks.split(",")]
    for what, wanted, known in (
        ("run or recipe", names, [*stored, *recipes.names()]),
        ("circuit of", tasks, _task_names({"": chosen}, "circuits")),
    ):
        for name in wanted:
            if name not in known:
                raise UserError(f"{where}: no {what} {name!r}{closest(name, known)}")
    if tasks:
        chosen = _with_circuits(chosen, lambda task, _: task in tasks)
    # Whatever it was pruned with.
    return {
        wanted: list({run["seed"]: run for run in chosen if run["name"] == wanted}.values())
        for wanted in names
    }


def _models(groups: _Groups) -> str:
    header = ("recipe", "model", "held-out loss", f"tasks below {records.BAR}", "nonzero weights", "minutes")
    rows = []
    for wanted, entries in groups.items():
        if not entries:
            rows.append([f"`{wanted}`", _shape(_telling(_recipe(wanted))), "not measured", "", "", "", ""])
            continue
        metrics = [records.metrics(run) for run in entries]
        n_tasks = max(len(run["task_losses"]) for run in entries)
        columns = [
            spread([m[key] for m in metrics], form)
            for key, form in (("val_loss", ".3f"), ("tasks", "g"), ("nonzeros", ",.0f"), ("minutes", ".1f"))
        ]
        columns[1] += f" of {n_tasks}"
        rows.append([_shown(wanted, entries), _shape(entries[0]["config"]), *columns, str(len(entries))])
    return markdown.table([*header, "seeds"], rows)


def _shown(wanted: str, entries: Sequence[Entry]) -> str:
    """Returns a name as tables show it; a star where its recipe has changed since."""
    if wanted not in recipes.names() or all(_made_of(run) == _telling(_recipe(wanted)) for run in entries):
        return f"`{wanted}`"
    return f"`{wanted}`{_CHANGED}"


def _made_of(run: Entry) -> dict[str, Any] | None:
    """Returns what the config of a stored run says today; None where it is not one any more."""
    try:
        return _telling(from_dict(TrainConfig, run["config"]))
    except UserError:
        return None


def _shape(config: Mapping[str, Any]) -> str:
    model, density = config["model"], config["sparsity"]["density"]
    sparse = "every weight" if density == 1 else f"1 weight in {1 / density:.4g}"
    layers = f"{model['n_layer']} layer{'s' * (model['n_layer'] != 1)}"
    return f"d_model {model['d_model']}, {layers}, {sparse}, {config['steps']:,} steps"


def _task_names(groups: _Groups, key: str) -> list[str]:
    return sorted({task for entries in groups.values() for run in entries for task in run[key]})


def _tasks(groups: _Groups) -> str:
    rows = []
    for task in _task_names(groups, "task_losses"):
        losses = [
            [run["task_losses"][task] for run in entries if task in run["task_losses"]]
            for entries in groups.values()
        ]
        rows.append([f"`{task}`", *(spread(values, ".3f") for values in losses)])
    return markdown.table(["task", *(_shown(*group) for group in groups.items())], rows)


def _circuits(groups: _Groups) -> str:
    header = ["task"]
    for wanted, entries in groups.items():
        header += [f"{_shown(wanted, entries)}: seeds", "nodes", "edges", "loss", "the model's", "attacked"]
    rows, edges = [], {}
    for task in _task_names(groups, "circuits"):
        row, medians = [f"`{task}`"], []
        for entries in groups.values():
            tried = [run for run in entries if task in run["circuits"]]
            held = [records.found(run)[task] for run in tried if task in records.found(run)]
            columns = (spread([c[key] for c in held], f) for key, f in (("nodes", ",.0f"), ("edges", ",.0f")))
            keys = ("loss", "model_loss", "attacked")
            losses = ([c[key] for c in held if c.get(key) is not None] for key in keys)
            row += [f"{len(held)} of {len(tried)}", *columns, *(spread(values, ".3f") for values in losses)]
            medians += [statistics.median(c["edges"] for c in held)] if held else []
        if len(medians) == len(groups):
            edges[task] = medians
        rows.append([*row, *_ratio(medians, groups)])
    if edges:
        means = [report.geometric_mean(list(column)) for column in zip(*edges.values(), strict=True)]
        n_tasks = f"{len(edges)} task{'s' * (len(edges) != 1)}"
        row = [f"**geometric mean** of the medians of {n_tasks} that all have"]
        for mean in means:
            row += ["", "", f"**{mean:,.1f}**", "", "", ""]
        rows.append([*row, *_ratio(means, groups)])
    return markdown.table([*header, *(["ratio of edges"] if len(groups) == 2 else [])], rows)


def _confirmed(groups: _Groups) -> str:
    rows = []
    for wanted, entries in groups.items():
        circuits = [c for run in entries for c in run["circuits"].values()]
        tried = [c for c in circuits if c["status"] in (FOUND, NOT_CONFIRMED, NOT_FOUND)]
        easy = [c for c in tried if c["model_loss"] < _EASY]
        controlled = [c for c in tried if c.get("controls")]
        by_control = f"{sum(map(_by_control, controlled))} of {len(controlled)}" if controlled else "not made"
        cells = [str(len(circuits)), _share(tried, FOUND), _share(easy, FOUND), by_control]
        rows.append([_shown(wanted, entries), *cells, str(len(entries))])
    header = ["recipe", "tasks x seeds", "confirmed of those tried", f"where the model is below {_EASY}"]
    return markdown.table([*header, "a control reaches the target", "seeds"], rows)


def _by_control(circuit: Mapping[str, Any]) -> bool:
    """Returns whether a control of a circuit reaches the circuit's target."""
    return min(circuit.get("controls", {}).values(), default=math.inf) <= circuit.get("target", -math.inf)


def _with_circuits(entries: Iterable[Entry], keep: _Keep) -> list[Entry]:
    """Returns runs with those of their circuits, by task, that are to be kept."""
    return [
        run | {"circuits": {task: c for task, c in run["circuits"].items() if keep(task, c)}}
        for run in entries
    ]


def _share(circuits: Sequence[Mapping[str, Any]], *statuses: str) -> str:
    """Returns how many circuits have one of some statuses, such as "19 of 20 (95%)"."""
    if not circuits:
        return "-"
    count = sum(c["status"] in statuses for c in circuits)
    return f"{count} of {len(circuits)} ({count / len(circuits):.0%})"


def _ratio(edges: Sequence[float], groups: _Groups) -> list[str]:
    """Returns the column of ratios between two recipes: nothing for other numbers of them."""
    if len(groups) != 2:
        return []
    return [f"{max(edges[1], 1) / max(edges[0], 1):.1f}" if len(edges) == 2 else "-"]


def _ratios(groups: _Groups) -> str:
    (first, small), *others = groups.items()
    counts = {"nodes": "nodes", "edges": "edges", "edges_between_nodes": "weights between nodes"}
    held = [f"held-out loss of {_shown(first, small)}", "of the other"]
    rows = []
    for wanted, large in others:
        title = f"{_shown(wanted, large)} to {_shown(first, small)}"
        losses = [spread([run["val_loss"] for run in group], ".3f") for group in (small, large)]
        seeds = f"{len(small)} and {len(large)}"
        for condition, keep in _conditions([*small, *large]).items():
            kept_small, kept_large = (_with_circuits(group, keep) for group in (small, large))
            ratios = [records.ratio(kept_small, kept_large, key) for key in counts]
            n_tasks = next((str(ratio.tasks) for ratio in ratios if ratio), "0")
            cells = [f"{r.value:.1f} ({r.low:.1f} to {r.high:.1f})" if r else "-" for r in ratios]
            rows.append([title + condition, *cells, n_tasks, seeds, *losses])
    return markdown.table(["ratio of", *counts.values(), "tasks", "seeds", *held], rows)


def _conditions(entries: Sequence[Entry]) -> dict[str, _Keep]:
    """Returns which circuits of two kinds of models are compared: all, and stricter choices that differ."""
    compared = [(task, c) for run in entries for task, c in records.found(run).items()]
    conditions: dict[str, _Keep] = {"": lambda task, c: True}
    if any(c["target"] != records.BAR for _, c in compared):
        conditions[f", all at the target {records.BAR}"] = lambda task, c: c.get("target") == records.BAR
    if easy := sorted({task for task, c in compared if _by_control(c)}):
        names = ", ".join(f"`{task}`" for task in easy)
        conditions[f", without {names}, which a control does"] = lambda task, c: task not in easy
    return conditions


def _audits(groups: _Groups) -> str:
    # By the table's column: the verdicts on the circuits of a task, one for each seed.
    columns: dict[str, list[Mapping[str, str]]] = {}
    for task in _task_names(groups, "circuits"):
        for wanted, entries in groups.items():
            circuits = [run["circuits"].get(task, {}) for run in entries]
            if audits := [circuit["audit"] for circuit in circuits if "audit" in circuit]:
                columns[f"{_shown(wanted, entries)}: `{task}`"] = audits
    rows = []
    for test, claim in CLAIMS.items():
        judged = [
            [audit[test] for audit in audits if audit.get(test) in ("passed", "failed")]
            for audits in columns.values()
        ]
        if any(judged):
            cells = [f"{found.count('passed')} of {len(found)}" if found else "-" for found in judged]
            rows.append([claim.title, *cells])
    return markdown.table(["test", *columns], rows)


_TABLES: dict[str, Callable[[_Groups], str]] = {
    "models": _models,
    "tasks": _tasks,
    "circuits": _circuits,
    "confirmed": _confirmed,
    "ratios": _ratios,
    "audits": _audits,
}


# What the numbers of a table of circuits are.
_ABOUT = {
    "circuits": "Medians, with the range over seeds with a confirmed circuit. Losses are of the report "
    "split, the model's on the same prompts; attacked: the largest that 20 steps of an adversary find. In "
    "the geometric mean a circuit without edges counts as one edge.",
    "confirmed": "Every task that was searched, in every seed; one that the model cannot do is not tried. "
    "Confirmed: the circuit's loss on the report split is within the target, and under attack within the "
    "target for that where it was searched against an adversary. Controls: the same search with shuffled "
    "labels, and in the model with shuffled weights.",
    "ratios": "Geometric means over tasks, and over seeds with a confirmed circuit; 95% bootstrap intervals "
    "over tasks and models. With three models of each kind the intervals are rough, and probably too narrow. "
    "Targets are above 0.15 where a model's own loss is near it. Weights between nodes: all nonzero ones, "
    "the count of Gao et al. 2025; edges: those that the clean-up left.",
    "audits": "How many circuits, one of each seed, pass a test of `python -m wsparse.audit --run=RUN "
    "--task=TASK`, of those that it could be made of; tests without a criterion are left out.",
}


def _made_by(kind: str, groups: _Groups) -> str:
    """Returns what stands below a table: what its numbers are, the commands, and the machines."""
    entries = [run for group in groups.values() for run in group]
    if not entries:
        return "\n"
    machines: dict[str, list[str]] = {}
    for run in entries:
        machines.setdefault(run["machine"], []).append(run["name"])
    on = "; ".join(
        where if len(machines) == 1 else f"{where} ({', '.join(dict.fromkeys(names))})"
        for where, names in machines.items()
    )
    pairs = " or ".join(map(str, sorted({run["pairs"] for run in entries})))
    lines = [
        f"Medians, with the range over seeds; tasks on {pairs} pairs each of the report split.",
        "`python -m wsparse.train --config=NAME --config.seed=SEED`",
    ]
    if any("," in run["name"] for run in entries):
        lines[-1] += ", where `KEY=VALUE` in a name is `--config.KEY=VALUE`"
    if kind in _ABOUT:
        lines[0] = _ABOUT[kind]
        used = sorted({run["prune"] or "other settings" for run in entries if run["circuits"]})
        searched = _task_names(groups, "circuits")
        if all(run["circuits"].keys() >= run["task_losses"].keys() for run in entries):
            searched = ["all"]
        command = (
            f"python -m wsparse.prune --run=RUN --task={','.join(searched)} --config={' or '.join(used)}"
        )
        lines[-1] += f", then `{command}`"
    lines[-1] += f"; trained on {on}."
    if any(_shown(*group).endswith(_CHANGED) for group in groups.items()):
        lines.append(f"{_CHANGED}: the recipe has changed since.")
    return "\n" + "\n".join(lines) + "\n"


# The command ------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run the command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    path = pathlib.Path(options.json)
    entries = read(path)
    new = []
    cpu.enable()
    for folder in (found for given in options.add for found in run_folders(pathlib.Path(given))):
        new.append(entry(folder, pairs=options.pairs, circuits=options.circuits))
        log.info("%s: %s, seed %d", folder, new[-1]["name"], new[-1]["seed"])
    entries = merged(entries, new)
    texts = {}
    for document in map(pathlib.Path, options.docs):
        before = document.read_text(encoding="utf-8")
        texts[document] = before, rewritten(before, entries, str(document))
    if new:
        write(path, entries)
    for document, (before, after) in texts.items():
        if before != after:
            files.write_text(document, after)
            log.info("%s: written", document)
    return 0


def define_flags() -> None:
    """Define the flags of the command."""
    flags.DEFINE_list("add", [], "Run folders, or folders with runs in them, whose results are taken in.")
    flags.DEFINE_string("circuits", "", "Which circuits of added runs: those of this name, see prune --name.")
    flags.DEFINE_integer("pairs", 256, "Pairs of the report split to score added models on.", lower_bound=1)
    flags.DEFINE_string("json", "docs/results.json", "Where results are kept.")
    flags.DEFINE_list("docs", ["README.md", "docs/results.md"], "Documents whose tables are written.")


if __name__ == "__main__":
    define_flags()
    run_command(main)
