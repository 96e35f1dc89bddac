"""The audit command tests the circuit that it says, all or nothing, and tells its status."""

import dataclasses
import html
import pathlib
import shlex
import shutil

from absl import flags
import audit_case as case
import circuits_case
import jax
import numpy as np
import pytest

import wsparse
from wsparse import audit, cli, files, runs, trees
from wsparse.circuits import Circuit, pairs, tasks
from wsparse.circuits.audits import context as contexts
from wsparse.circuits.audits import tests
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.circuits.audits.context import Options
from wsparse.circuits.audits.record import Audit
from wsparse.circuits.circuit import NOT_CONFIRMED
from wsparse.errors import UserError
from wsparse.sweeps import records

OPTIONS = Options(pairs=8, draws=8, resamples=50)
NAMES = ("sufficiency", "shift", "stability")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> pathlib.Path:
    """A run of the planted model with the circuit that was put there."""
    folder = tmp_path_factory.mktemp("audit") / "planted"
    case.write_run(folder)
    # Read once, into the folder.
    assert runs.load(folder).data.digest
    return folder


@pytest.fixture
def folder(original, tmp_path) -> pathlib.Path:
    """A copy to write into, with the task's file beside it."""
    shutil.copytree(original, tmp_path / "planted")
    shutil.copy(original.parent / f"{case.TASK}.jsonl", tmp_path)
    return tmp_path / "planted"


@pytest.fixture
def path(folder) -> str:
    return str(folder.parent / f"{case.TASK}.jsonl")


@pytest.fixture
def command(folder, path):
    """Runs the command line on the run's circuit, and returns the exit status of `main`."""
    defined = set(flags.FLAGS)
    audit._define_flags()

    def run(*arguments: str) -> int:
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["audit", f"--run={folder}", f"--task={path}", "--pairs=8", *arguments])
        return audit.main([])

    yield run
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)


@pytest.fixture
def fakes(monkeypatch):
    """Replaces all tests by ones that say what they are told: name -> verdict, or an error to raise."""

    def replace(**verdicts) -> None:
        def test(name):
            def run(context):
                if isinstance(verdicts[name], BaseException):
                    raise verdicts[name]
                return case.result(name, verdicts[name])

            return run

        monkeypatch.setattr(tests, "TESTS", {name: test(name) for name in verdicts})

    return replace


def circuit_folder(folder: pathlib.Path) -> pathlib.Path:
    return folder / "circuits" / case.TASK


def written(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in circuit_folder(folder).iterdir() if path.is_file()}


def report_text(folder: pathlib.Path) -> str:
    return html.unescape((circuit_folder(folder) / "audit.html").read_text())


def test_the_audit_of_the_planted_circuit_is_of_its_model_its_text_and_its_pairs(folder, path, logged):
    [done] = audit.audit_run(folder, [path], OPTIONS, NAMES)
    assert Audit.load(circuit_folder(folder)) == done
    run, circuit = runs.load(folder), Circuit.load(circuit_folder(folder))
    assert (done.model, done.data) == (trees.digest(run.params), run.data.digest)
    assert (done.circuit, done.status, done.nodes) == (circuit.digest, "found", 7)
    assert [(test.name, test.verdict) for test in done.tests] == [
        ("sufficiency", "passed"), ("shift", "not run"), ("stability", "not run"),
    ]  # fmt: skip
    assert [test.title for test in done.tests] == [CLAIMS[name].title for name in NAMES]
    measured = {m.name: m for m in done.tests[0].measurements}
    # The circuit's own loss was scored by other code on the same pairs; chance is ln 2.
    assert measured["task loss"].value == pytest.approx(circuit.loss, abs=1e-5)
    assert measured["task loss"].control > np.log(2) - 0.01
    assert done.pairs == 8
    # The docs' tables read the verdicts.
    stored = records.circuits_of(folder)[case.TASK]["audit"]
    assert stored == {test.name: test.verdict for test in done.tests}
    lines = "\n".join(logged)
    assert all(f"  {test.name:<20} {test.verdict}" in lines for test in done.tests)
    assert "has no knobs" in lines
    page = report_text(folder)
    assert circuit.digest in page and CLAIMS["sufficiency"].passed in page
    assert CLAIMS["shift"].passed not in page


def test_nodes_that_do_not_do_the_task_fail(folder, path):
    """Negative control: as many nodes that are no path from the bracket to the answer."""
    case.write_circuit(folder, tasks.find(path), case.OTHER_NODES)
    [done] = audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])
    assert (done.status, done.tests[0].verdict) == (NOT_CONFIRMED, "failed")
    assert CLAIMS["sufficiency"].passed not in report_text(folder)
    assert CLAIMS["sufficiency"].failed in report_text(folder)


def test_pairs_are_those_of_the_circuits_settings_with_as_many_report_pairs_as_asked_for(folder, path):
    run, task = runs.load(folder), tasks.find(path)
    circuit = Circuit.load(circuit_folder(folder))
    with pytest.raises(UserError, match=r"only (\d+) distinct pairs .*; --pairs=\1 would do$"):
        contexts.make(run, circuit, task, dataclasses.replace(OPTIONS, pairs=10_000))
    context = contexts.make(run, circuit, task, dataclasses.replace(OPTIONS, pairs=5))
    for split, count in (("search", 16), ("report", 5)):
        batch = pairs.arrays(tasks.build(task, run.tokenizer, count, 0, split=split))
        jax.tree.map(np.testing.assert_array_equal, getattr(context.pairs, split), batch)
    # The second split, and as many pairs of the first.
    assert len(context.pairs.discretize.answer) == 2 * (8 + 8)
    assert context.n_pairs == 5
    assert {str(node.name) for node in circuit.nodes} == circuits_case.PLANTED_NODES
    assert int(context.nodes_U.sum()) == 7


def test_the_command_that_is_written_down_makes_the_same_audit(folder, path, command, fakes):
    fakes(sufficiency="passed", necessity="passed")
    assert command("--pairs=4", "--tests=sufficiency", "--seed=3") == 0
    done = Audit.load(circuit_folder(folder))
    assert done.options == dataclasses.asdict(Options(pairs=4, seed=3))
    program, arguments = shlex.split(done.command)[:3], shlex.split(done.command)[3:]
    assert program == ["python", "-m", "wsparse.audit"]
    assert arguments[:3] == [f"--run={folder}", f"--task={path}", "--tests=sufficiency"]
    assert command(*arguments) == 0
    again = Audit.load(circuit_folder(folder))
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(done, seconds=0)


@pytest.mark.parametrize(
    ("verdicts", "target", "status"),
    [
        ({"sufficiency": "passed", "necessity": "not run", "selectivity": "reported"}, 0.2, 0),
        ({"sufficiency": "passed", "necessity": "failed"}, 0.2, 1),
        ({"sufficiency": "passed"}, 0.01, 1),
    ],
    ids=["nothing failed", "a test failed", "not confirmed on the report split"],
)
def test_strict_tells_by_its_status_whether_the_circuit_stands(
    folder, path, command, fakes, verdicts, target, status
):
    case.write_circuit(folder, tasks.find(path), circuits_case.PLANTED_NODES, target)
    fakes(**verdicts)
    assert command("--strict") == status
    assert command("--report", "--strict") == status
    assert command() == 0


def test_a_test_that_cannot_be_made_is_not_run_with_the_reason(folder, path, fakes):
    fakes(sufficiency="passed", shift=UserError("too few pairs"), minimality="failed")
    [done] = audit.audit_run(folder, [path], OPTIONS, list(tests.TESTS))
    found = {test.name: (test.verdict, test.reason) for test in done.tests}
    assert found["shift"] == ("not run", "too few pairs")
    assert found["minimality"][0] == "failed"


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("a mistake of ours")])
def test_an_audit_that_is_stopped_leaves_what_was_there(folder, path, fakes, stop):
    fakes(sufficiency="passed")
    audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])
    before = written(folder)
    fakes(sufficiency="failed", necessity=stop)
    with pytest.raises(type(stop)):
        audit.audit_run(folder, [path], OPTIONS, ["sufficiency", "necessity"])
    assert written(folder) == before
    # Negative control: one that ends replaces both files.
    audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])
    changed = {name for name, content in written(folder).items() if content != before[name]}
    assert changed == {"audit.json", "audit.html"}


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_tested(
    folder, path, fakes, monkeypatch
):
    fakes(sufficiency=KeyboardInterrupt())
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot write the audit: .* is not a writable directory"):
        audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])


def test_a_report_that_cannot_be_written_leaves_the_earlier_audit(folder, path, fakes, monkeypatch):
    fakes(sufficiency="passed")
    audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])
    before = written(folder)
    fakes(sufficiency="failed")
    monkeypatch.setattr(audit.audit_report, "render", lambda done: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])
    assert written(folder) == before


def test_the_report_alone_is_written_from_the_file_and_nothing_else_is(folder, path, command, fakes):
    fakes(sufficiency="passed")
    assert command() == 0
    before = written(folder)
    (circuit_folder(folder) / "audit.html").unlink()
    # Neither the model nor the text is needed.
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "data")
    assert command("--report") == 0
    assert written(folder) == before


def test_the_report_of_no_audit_or_of_another_circuits_is_refused(folder, path, command, fakes):
    with pytest.raises(UserError, match="no audit of the circuit of closing: run without --report makes it"):
        command("--report")
    fakes(sufficiency="passed")
    assert command() == 0
    case.write_circuit(folder, tasks.find(path), case.OTHER_NODES)
    with pytest.raises(UserError, match="no audit of the circuit of closing"):
        command("--report")


def test_the_reports_of_all_circuits_are_those_that_have_an_audit(folder, path, fakes, logged):
    fakes(sufficiency="passed")
    audit.audit_run(folder, [path], OPTIONS, ["sufficiency"])
    task = dataclasses.replace(tasks.find(path), name="other")
    case.write_circuit(folder, task, circuits_case.PLANTED_NODES)
    assert [done.task for done in audit.rewrite(folder, ["all"])] == [case.TASK]
    assert "note: no audit of the circuit of other: run without --report makes it" in logged
    with pytest.raises(UserError, match="of other:"):
        audit.rewrite(folder, [case.TASK, "other"])


@pytest.fixture
def refused(folder, monkeypatch):
    """Checks that nothing was computed or written."""
    before = written(folder)
    monkeypatch.setattr(contexts, "make", lambda *_: pytest.fail("something was computed"))
    yield
    assert written(folder) == before


@pytest.mark.usefixtures("refused")
class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--tests=sufficency"],
                r"no test 'sufficency' \(did you mean 'sufficiency'\?\); tests are suff",
            ),
            (["--tests="], "tests must name at least one test; tests are sufficiency, necessity"),
            (["--task="], "--task is empty"),
            (["--task=closin"], r"has no circuit of 'closin' \(did you mean 'closing'\?\)"),
            (["--task=closing"], r"comes? from a file of yours.*--task=all,closing.jsonl"),
            (["--pairs=0"], "pairs must be at least 1"),
            (["--seeds=-1"], "seeds must be at least 0"),
            (["--seed=-1"], "seed must be at least 0"),
            (["--run=/nowhere"], "has no circuit of .closing.: python -m wsparse.prune"),
        ],
    )
    def test_what_cannot_be_audited_is_refused_in_one_line(self, command, arguments, message):
        with pytest.raises(UserError, match=message) as caught:
            command(*arguments)
        assert "\n" not in str(caught.value)

    def test_a_circuit_of_other_parameters_is_refused(self, folder, path):
        run = runs.load(folder)
        other = dataclasses.replace(run, params=jax.tree.map(lambda leaf: 2 * leaf, run.params))
        with pytest.raises(UserError, match="belongs to parameters"):
            audit.audit_run(folder, [path], OPTIONS, ["sufficiency"], run=other)


def test_too_few_pairs_are_refused_before_anything_is_tested(folder, path, fakes):
    fakes(sufficiency=AssertionError("something was tested"))
    with pytest.raises(UserError, match="pairs"):
        audit.audit_run(folder, [path], Options(pairs=1000), ["sufficiency"])
    assert not (circuit_folder(folder) / "audit.json").exists()


def test_every_option_is_a_flag_with_help_and_the_command_is_listed(command):
    for field in dataclasses.fields(Options):
        assert field.metadata["help"] in flags.FLAGS[field.name].help
    assert cli.COMMANDS["audit"][0] == audit.__name__
    assert "  audit " in cli.usage()


def test_a_notebook_runs_the_audit_and_shows_its_report(folder, path, fakes):
    fakes(sufficiency="passed", necessity="failed")
    run = wsparse.load(folder)
    circuit = run.circuits[case.TASK]
    done = circuit.audit(task=path, tests=["sufficiency", "necessity"], pairs=4)
    assert dataclasses.asdict(Audit.load(circuit_folder(folder))) == dataclasses.asdict(done)
    assert (done.pairs, done.options["pairs"]) == (4, 4)
    assert repr(done) == "Audit('closing', 1 passed, 1 failed)"
    assert done.show().text == (circuit_folder(folder) / "audit.html").read_text()
    assert done._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(UserError, match=r"pears.*did you mean 'pairs'"):
        circuit.audit(task=path, pears=4)
    with pytest.raises(UserError, match="must be the file of 'closing'"):
        circuit.audit(task="other.jsonl")
    with pytest.raises(UserError, match="file of yours"):
        circuit.audit()
    case.write_circuit(folder, tasks.find(path), case.OTHER_NODES)
    with pytest.raises(UserError, match="another circuit of 'closing' was found since"):
        circuit.audit(task=path)
