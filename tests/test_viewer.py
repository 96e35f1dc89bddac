"""The viewer: one page from the folders of circuits, in which nothing can run, and its command."""

import base64
import dataclasses
import hashlib
import html
import json
import logging
import pathlib
import re
import shutil

from absl import flags
import audit_case
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest
import viewer_case as case

from wsparse import view
from wsparse.circuits import Circuit
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.circuits.circuit import NOT_CONFIRMED
from wsparse.circuits.evidence_file import Evidence
from wsparse.errors import UserError
from wsparse.viewer import contents, page

DOC = pathlib.Path(__file__).parents[1] / "docs" / "viewer.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A run with a circuit and its evidence."""
    folder = tmp_path_factory.mktemp("viewer")
    # Compiling is most of the time of these tests, and the optimizer most of compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    case.data_text(folder)
    jax.config.update("jax_disable_most_optimizations", False)
    return folder


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads(case.data_text(folder))


@pytest.fixture
def copied(folder, tmp_path) -> pathlib.Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(folder, tmp_path / "run")


def unpacked(packed: dict) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(packed["data"]), f"<{np.dtype(packed['dtype']).str[1:]}")
    return whole * packed["scale"]


# ---- The page ----


@given(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(["uint8", "int16"]),
)
def test_packed_arrays_come_back_within_half_a_step(values, dtype):
    values = np.abs(values) if dtype == "uint8" else values
    packed = page.packed(values, dtype)
    largest = np.max(np.abs(values), initial=0)
    assert packed["scale"] == pytest.approx(largest / np.iinfo(dtype).max, abs=1e-300)
    np.testing.assert_allclose(unpacked(packed), values, rtol=0, atol=0.501 * packed["scale"])


def test_numbers_keep_every_digit_of_a_float32_and_what_is_not_finite_becomes_null():
    third = np.float32(1 / 3)
    found = json.loads(page.embedded({"a": third, "b": [np.nan, np.inf], "c": np.int32(4)}))
    assert np.float32(found["a"]) == third and np.float32(round(found["a"], 5)) != third
    assert found["b"] == [None, None] and found["c"] == 4


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", "<!--<script>", "&lt;", "\u2028", "\ud800", "'\"\\"]
)
def test_embedded_text_cannot_end_its_element_and_comes_back(text):
    embedded = page.embedded({text: [text]})
    assert not set("<>&\u2028") & set(embedded)
    assert json.loads(embedded) == {text: [text]}


def test_no_two_scripts_of_the_page_define_the_same_name():
    """A second function would silently take the place of the first."""
    for names in (page.SCRIPTS, [f"engine/{name}" for name in page.ENGINE]):
        code = "".join(map(page.static, names))
        defined = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", code, re.MULTILINE)
        assert len(defined) > 20 and sorted(defined) == sorted(set(defined))


def test_the_policy_names_exactly_the_scripts_and_the_style_of_the_page(data):
    text = page.render(data, title="a </title> & b")
    assert "<title>a &lt;/title&gt; &amp; b</title>" in text
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    allowed = set(re.findall(r"'sha256-([^']*)'", policy))
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    # A worker from a text of the page, and no other place to load from.
    assert re.findall(r"(\S+) blob:", policy) == ["worker-src"] and "http" not in policy
    inline = re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", text, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() for c in inline}
    assert len(inline) == 3 and hashes == allowed
    changed = hashlib.sha256((inline[0] + " ").encode()).digest()
    assert base64.b64encode(changed).decode() not in allowed


def test_the_page_names_no_other_file(data):
    code = page.render(data, title="x").replace(page.static(page.LIBRARY), "")
    assert not re.findall(r"\b(?:src|href)\s*=\s*[\"']", code)
    assert set(re.findall(r"https?://[^\s'\"]+", code)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in code and "insertAdjacentHTML" not in code


def test_the_vendored_library_is_the_one_that_the_documentation_records():
    digest = hashlib.sha256(page.static(page.LIBRARY).encode()).hexdigest()
    assert digest in DOC.read_text()
    assert "Permission to use, copy, modify" in page.static("d3.LICENSE")


def test_the_list_of_keys_has_those_of_the_documentation():
    section = DOC.read_text().split("## Keys")[1].split("##")[0]
    _, *keys = re.findall(r"^\| ([^|]+) \| [^|]+\|$", section, re.MULTILINE)
    shown = re.findall(r"<kbd>(.*?)</kbd>", page.static("page.html"))
    assert list(map(html.unescape, shown)) == " ".join(keys).split()


# ---- The data ----


def test_fewer_nodes_and_pairs_than_were_measured_can_be_shown(folder, data, caplog):
    caplog.set_level(logging.INFO, "wsparse")
    less = contents.read_run(folder, contents.Options(pairs=1, max_nodes=5))
    shown, everything = less["circuits"][case.TASK], data["circuits"][case.TASK]
    assert [n["name"] for n in shown["nodes"]] == [n["name"] for n in everything["nodes"][:5]]
    least = min(node["importance"] for node in shown["nodes"])
    assert all(node["importance"] <= least for node in everything["nodes"][5:])
    assert shown["total_nodes"] == case.N_NODES
    assert f"5 of {case.N_NODES} nodes are shown" in shown["notes"][0]
    assert shown["notes"][0] in caplog.text
    assert all(s < 5 and t < 5 for s, t, _ in shown["edges"])
    assert set(less["texts"][0]["nodes"]) == {node["name"] for node in shown["nodes"]}
    assert json.loads(page.embedded(shown["rows"])) == everything["rows"][:2]
    for name, values in shown["values"].items():
        own = everything["values"][name]
        for side in ("model", "circuit"):
            fewer, all_values = unpacked(values[side]), unpacked(own[side])[: 2 * 5]
            length = sum(len(row["tokens"]) for row in everything["rows"][:2])
            assert len(fewer) == length
            np.testing.assert_allclose(fewer[:10], all_values, atol=own[side]["scale"])


def test_circuits_of_one_text_share_it_and_others_bring_theirs(copied):
    first = copied / "circuits" / case.TASK
    status = json.loads((first / "status.json").read_text())
    circuit = Circuit.load(first)
    evidence = Evidence.load(first, circuit)
    for name, shift, digest in (
        ("same", 0, circuit.model_digest),
        ("other", 1, circuit.model_digest),
        ("another", 0, "0"),
    ):
        where = copied / "circuits" / name
        changed = dataclasses.replace(circuit, task=name, model_digest=digest)
        changed.save(where)
        (where / "status.json").write_text(json.dumps({**status, "task": name}))
        windows_WT = (evidence.windows_WT + shift) % 257
        dataclasses.replace(evidence, task=name, circuit=changed.digest, windows_WT=windows_WT).save(where)
    found = contents.read_run(copied, contents.Options())
    texts = {task: shown["text"] for task, shown in found["circuits"].items()}
    assert len(found["texts"]) == 3
    assert texts["same"] == texts[case.TASK] != texts["other"]
    # A node of the same name does something else on it in another model.
    assert texts["another"] not in (texts["same"], texts["other"])


def test_a_circuit_above_its_target_says_so(copied):
    path = copied / "circuits" / case.TASK / "circuit.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "loss": 0.179, "target": 0.15}))
    found = contents.read_run(copied, contents.Options())
    shown = found["circuits"][case.TASK]
    assert (shown["status"], shown["misses"]) == (NOT_CONFIRMED, "the target is 0.15")
    assert [row["status"] for row in found["tasks"]] == [NOT_CONFIRMED, "not found"]


@pytest.mark.parametrize("loss", ["low", None, [], float("nan"), True])
def test_a_summary_whose_loss_is_not_a_number_leaves_it_out(copied, loss):
    (copied / "summary.json").write_text(json.dumps({"val_loss": loss, "nonzeros": 5}))
    summary = contents.read_run(copied, contents.Options())["run"]["summary"]
    assert summary == {"val_loss": None, "nonzeros": 5}


def test_the_page_of_one_circuit_opens_with_it(folder):
    text = contents.circuit_page(folder / "circuits" / case.TASK)
    [embedded] = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    found = json.loads(embedded)
    assert found["opens"] == case.TASK and found["run"]["name"] == folder.name


# ---- Missing and damaged evidence ----


def test_a_circuit_without_evidence_names_the_command_that_measures_it(copied, caplog):
    command = rf"no evidence of closing: python -m wsparse\.prune --run={copied} --evidence"
    where = copied / "circuits" / case.TASK
    (where / "evidence.json").unlink()
    with pytest.raises(UserError, match=command):
        contents.read_run(copied, contents.Options())
    with pytest.raises(UserError, match="no evidence of its circuit"):
        contents.circuit_page(where)


def test_a_circuits_audit_is_on_its_page_with_marks_and_meanings(copied):
    where = copied / "circuits" / case.TASK
    circuit = Circuit.load(where)
    assert contents.read_run(copied, contents.Options())["circuits"][case.TASK]["audit"] is None
    tests = [
        audit_case.result("sufficiency"),
        audit_case.result("necessity", "failed"),
        audit_case.result("shift", "not run", reason="it has no knobs"),
    ]
    audit_case.audit(*tests, circuit=circuit.digest).save(where)
    shown = contents.read_run(copied, contents.Options())["circuits"][case.TASK]["audit"]
    assert shown["file"] == "audit.html"
    assert [tuple(test.values()) for test in shown["tests"]] == [
        (CLAIMS["sufficiency"].title, "passed", "✓", CLAIMS["sufficiency"].passed),
        (CLAIMS["necessity"].title, "failed", "✗", CLAIMS["necessity"].failed),
        (CLAIMS["shift"].title, "not run", "○", "it has no knobs"),
    ]
    assert CLAIMS["necessity"].title in contents.circuit_page(where)
    # The audit of another circuit is none.
    audit_case.audit(*tests, circuit="0" * 64).save(where)
    assert contents.read_run(copied, contents.Options())["circuits"][case.TASK]["audit"] is None


def test_evidence_of_another_circuit_is_none(copied):
    where = copied / "circuits" / case.TASK
    circuit = Circuit.load(where)
    assert Evidence.load(where, circuit) is not None
    fewer = dataclasses.replace(circuit, nodes=circuit.nodes[1:], edges=[])
    assert Evidence.load(where, fewer) is None
    assert Evidence.load(where, dataclasses.replace(circuit, model_digest="0")) is None


def drop_array(where):
    with np.load(where / "evidence.npz") as stored:
        arrays = {name: stored[name] for name in stored.files if name != "counts_NB"}
    np.savez(where / "evidence.npz", **arrays)


def change_array(name, change):
    def damage(where):
        with np.load(where / "evidence.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        arrays[name] = change(arrays[name])
        np.savez(where / "evidence.npz", **arrays)

    return damage


def change_key(key, value):
    def damage(where):
        path = where / "evidence.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda where: (where / "evidence.npz").unlink(), r"evidence\.npz cannot be read"),
        (lambda where: (where / "evidence.npz").write_bytes(b""), r"evidence\.npz cannot be read"),
        (lambda where: (where / "evidence.json").write_text("{"), r"evidence\.json"),
        (drop_array, "'counts_NB' is missing"),
        (change_array("model_values_PX", lambda a: a[:-1]), "model_values_PX must be numbers"),
        (change_array("quantile_E", lambda a: a.astype(str)), "quantile_E must be numbers"),
        (change_array("excerpts_E6", lambda a: a + 100), "excerpts do not fit"),
        (change_array("excerpts_E6", lambda a: a[::-1]), "excerpts do not fit"),
        (change_array("excerpts_E6", lambda a: a.astype(float)), "excerpts_E6 must be numbers"),
        (change_array("excerpt_values_Z", lambda a: a.astype(str)), "excerpt_values_Z must be numbers"),
        (change_array("excerpt_values_Z", lambda a: a[1:]), "excerpts do not fit"),
        (change_key("prompts", [{}]), r"'prompts\[0\].length' is missing"),
        (change_key("prompts", []), "must be numbers of shape"),
        (change_key("nodes", None), "'nodes' must be a list"),
        (change_key("token_texts", {"5": 5}), "'token_texts.5' must be of type str"),
    ],
)
def test_damaged_evidence_is_refused_in_one_line(copied, damage, message):
    where = copied / "circuits" / case.TASK
    damage(where)
    with pytest.raises(UserError, match=rf"is damaged: .*{message}") as caught:
        contents.read_run(copied, contents.Options())
    assert "\n" not in str(caught.value) and "--evidence" in str(caught.value)


# ---- The command ----


@pytest.fixture
def command():
    """Runs the command line."""
    defined = set(flags.FLAGS)
    view._define_flags()

    def run(folder, out, *arguments: str) -> None:
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["view", f"--run={folder}", f"--out={out}", *arguments])
        view.main([])

    yield run
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)


def test_every_option_is_a_flag_with_help_and_no_task_at_all_is_refused(command, folder, tmp_path):
    for field in dataclasses.fields(contents.Options):
        assert field.metadata["help"] in flags.FLAGS[field.name].help
    with pytest.raises(UserError, match="task must name at least one task"):
        command(folder, tmp_path / "report.html", "--task=")


def test_the_command_writes_one_page(folder, data, tmp_path, monkeypatch, caplog, command):
    caplog.set_level(logging.INFO, "wsparse")
    out = tmp_path / "report.html"
    command(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    [text] = re.findall(r'id="data">(.*?)</script>', out.read_text(), re.DOTALL)
    assert json.loads(text) == data
    assert "1 circuits of 2 tasks" in caplog.text

    monkeypatch.setattr(page, "render", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
    before = out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        command(folder, out)
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_circuits_of_one_task_count_it_once(copied, tmp_path, command, caplog):
    caplog.set_level(logging.INFO, "wsparse")
    circuits = copied / "circuits"
    shutil.copytree(circuits / case.TASK, circuits / f"{case.TASK}@b")
    command(copied, tmp_path / "report.html")
    assert "2 circuits of 2 tasks" in caplog.text


def test_the_command_imports_no_jax_and_reads_neither_weights_nor_text(copied, data):
    for name in ("config.json", f"{case.TASK}.jsonl"):
        (copied / name).unlink()
    code = (
        "import sys, wsparse.view as view\n"
        "from wsparse import command\n"
        "view._define_flags()\n"
        "command.run_command(lambda argv: view.main(argv) or sum(\n"
        "    name in sys.modules for name in ('jax', 'flax', 'wsparse.model')))\n"
    )
    done = run_python("-c", code, f"--run={copied}")
    assert done.returncode == 0, done.stderr
    text = (copied / "report.html").read_text()
    assert (
        json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])["circuits"]
        == (data["circuits"])
    )


def test_the_text_of_excerpts_is_an_option_of_the_evidence(folder, tmp_path, command):
    with pytest.raises(UserError, match=r"--evidence --source=files:/src/\*\.py"):
        command(folder, tmp_path / "x.html", "--source=files:/src/*.py")


def test_a_task_of_the_users_own_needs_no_file(folder, data):
    for name in (case.TASK, f"somewhere/else/{case.TASK}.jsonl"):
        found = contents.read_run(folder, contents.Options(task=(name,)))
        assert list(found["circuits"]) == [case.TASK]
    del data


def test_what_is_missing_is_said_with_the_command_that_makes_it(folder, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        view.write(tmp_path / "nothing", tmp_path / "report.html", contents.Options())
    with pytest.raises(UserError, match=r"has no circuits: python -m wsparse\.prune --run="):
        contents.read_run(tmp_path, contents.Options())
    with pytest.raises(UserError, match="did you mean 'closing'"):
        contents.read_run(folder, contents.Options(task=("closign",)))
    with pytest.raises(UserError, match=r"has no circuits \(1 tasks were tried"):
        contents.read_run(folder, contents.Options(task=("hard",)))


@pytest.mark.parametrize("options", [{"pairs": 0}, {"max_nodes": 0}, {"task": ()}])
def test_options_that_show_nothing_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        contents.Options(**options)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(contents, "read_run", lambda *args: pytest.fail("read"))
    for out in (tmp_path, tmp_path / "missing" / "x.html", tmp_path / "file" / "x.html"):
        with pytest.raises(UserError, match="cannot write"):
            view.write(folder, out, contents.Options())
