"""The viewer's data: what the page says is what the model does, and nothing in it can run."""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
import types

from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import numpy as np
import pytest
import viewer_case as case

from wsparse import runs, view
from wsparse.circuits import Circuit, masks, tasks
from wsparse.errors import UserError
from wsparse.viewer import activations, collect, held_out, page

DOC = pathlib.Path(__file__).parents[1] / "docs" / "viewer.md"


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is most of the time of these tests, and the optimizer most of compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("viewer")


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads(case.data_text(folder))


@pytest.fixture(scope="module")
def circuit(data, folder) -> Circuit:
    del data  # Its fixture has written the folder.
    return Circuit.load(folder / "circuits" / case.TASK)


@pytest.fixture(scope="module")
def batch(folder, data) -> tasks.TaskBatch:
    del data
    task = tasks.find(str(folder / f"{case.TASK}.jsonl"))
    return tasks.build(task, case.run().tokenizer, 4, 0, split="report")


def unpacked(packed: dict) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(packed["data"]), f"<{np.dtype(packed['dtype']).str[1:]}")
    return whole * packed["scale"]


# ---- The page ----


@given(
    hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(["int8", "int16"]),
)
def test_packed_arrays_come_back_within_half_a_step(values, dtype):
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
    "text",
    ["</script><script>alert(1)</script>", "<!--<script>", "&lt;", "\u2028", "\ud800", "'\"\\"],
)
def test_embedded_text_cannot_end_its_element_and_comes_back(text):
    embedded = page.embedded({text: [text]})
    assert not set("<>&\u2028") & set(embedded)
    assert json.loads(embedded) == {text: [text]}


def test_the_policy_names_exactly_the_scripts_and_the_style_of_the_page(data):
    text = page.render(data, title="a </title> & b")
    assert "<title>a &lt;/title&gt; &amp; b</title>" in text
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    allowed = set(re.findall(r"'sha256-([^']*)'", policy))
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
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


# ---- The command ----


@pytest.fixture
def loaded(monkeypatch, data):
    """The run's checkpoint is the one in memory."""
    del data
    monkeypatch.setattr(runs, "load", lambda folder: dataclasses.replace(case.run(), folder=folder))


def test_the_command_writes_one_page(folder, loaded, tmp_path, monkeypatch, capsys, data):
    out = tmp_path / "report.html"
    given = types.SimpleNamespace(
        run=str(folder),
        out=str(out),
        task=["all", str(folder / f"{case.TASK}.jsonl")],
        source="",
        pairs=2,
        max_nodes=2000,
    )
    monkeypatch.setattr(flags, "FLAGS", given)
    monkeypatch.setattr(held_out, "windows", lambda run, *, tokens, source: case.windows())
    assert view.main([]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    [text] = re.findall(r'id="data">(.*?)</script>', out.read_text(), re.DOTALL)
    written = json.loads(text)
    assert written["circuits"] == data["circuits"] and written["nodes"] == data["nodes"]
    assert "1 circuits of 2 tasks" in capsys.readouterr().out

    monkeypatch.setattr(
        page, "render", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    before = out.read_bytes()
    assert view.main([]) == 130
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_users_own_task_must_be_named(folder, loaded):
    with pytest.raises(UserError, match=r"--task=all,closing\.jsonl"):
        collect.collect(folder, collect.Options())


def test_a_circuit_of_other_parameters_is_refused(folder, loaded, monkeypatch):
    other = dataclasses.replace(
        case.run(), folder=folder, params=jax.tree.map(lambda leaf: leaf + 1, case.run().params)
    )
    monkeypatch.setattr(runs, "load", lambda folder: other)
    options = collect.Options(task=("all", str(folder / f"{case.TASK}.jsonl")))
    with pytest.raises(UserError, match="belongs to parameters"):
        collect.collect(folder, options)


def test_what_is_missing_is_said_with_the_command_that_makes_it(folder, tmp_path, data):
    with pytest.raises(UserError, match="is not a run folder"):
        view.write(tmp_path, tmp_path / "report.html", collect.Options())
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"has no circuits: python -m wsparse\.prune --run="):
        collect.collect(tmp_path, collect.Options())
    with pytest.raises(UserError, match="did you mean 'closing'"):
        collect.read_circuits(folder, ["closign"])
    with pytest.raises(UserError, match=r"has no circuits \(1 tasks were tried"):
        collect.read_circuits(folder, ["hard"])


@pytest.mark.parametrize("options", [{"pairs": 0}, {"max_nodes": 0}, {"task": ()}])
def test_options_that_show_nothing_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        collect.Options(**options)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(folder, tmp_path):
    for out in (tmp_path, tmp_path / "missing" / "report.html"):
        with pytest.raises(UserError, match="cannot write"):
            view.write(folder, out, collect.Options())


def test_masks_and_places_agree():
    for name in masks.names(case.CONFIG)[::37]:
        assert activations.place(name).name == name
