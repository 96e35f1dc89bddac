"""What is published on the Hub comes back as the same run with its circuits; mistakes are one line each.

The client is the real one; `hub_case` is the server.
"""

import json
import re
import shutil
import sys

import audit_case
from helpers import run_python
from hub_case import TOKEN, Hub
import huggingface_hub
import huggingface_hub.constants
import pytest
import viewer_case as case

import wsparse
from wsparse import files, runs, trees
from wsparse.circuits.circuit import Circuit
from wsparse.errors import UserError
from wsparse.interop import hub as hub_module
from wsparse.interop.hub import push_to_hub

# What the client itself gets from its library for HTTP.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

MODEL = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
CIRCUITS = {
    *(f"circuits/{case.TASK}/{name}" for name in ("circuit.json", "circuit.npz", "status.json")),
    "circuits/hard/status.json",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that can be loaded, with a circuit, a task without one, a page, and files of no interest."""
    folder = tmp_path_factory.mktemp("hub") / "case"
    given = case.run()
    runs.create(folder, given.config, given.params, given.tokenizer, summary={"val_loss": 2.34567})
    case.write_run(folder)
    (folder / "report.html").write_text("<html>the page</html>")
    (folder / "circuits" / case.TASK / "trials.db").write_text("not for others")
    (folder / "circuits" / ".lock").write_text("held")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, which the client takes for the Hub, without the storage that is another program's."""
    made = Hub()
    with made.serve() as address:
        use(monkeypatch, tmp_path, address)
        yield made


def use(monkeypatch, tmp_path, address):
    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    # Its connections know the proxies of when they were made.
    huggingface_hub.close_session()


@pytest.fixture
def run(folder):
    return runs.load(folder)


def test_a_published_run_comes_back_with_every_bit_and_its_circuits(run, hub, monkeypatch, tmp_path):
    push = push_to_hub(run, "someone/tiny", private=True)
    assert push.url == f"{hub.address}/someone/tiny" and str(push).endswith(f"published at {push.url}")
    assert set(hub.files("someone/tiny")) == MODEL | CIRCUITS | {"report.html", ".gitattributes"}
    assert hub.private["someone/tiny"] is True
    assert hub.files("someone/tiny")["report.html"] == b"<html>the page</html>"
    # One commit: nobody sees a half of it.
    assert len(hub.commits["someone/tiny"]) == 2

    monkeypatch.delenv("HF_TOKEN")
    loaded = wsparse.load("someone/tiny")
    assert loaded.folder.as_posix() == "runs/tiny"
    assert trees.digest(loaded.params) == trees.digest(run.params)
    assert loaded.tokenizer.digest == run.tokenizer.digest
    assert loaded.config.data == run.config.data
    circuit = Circuit.load(run.folder / "circuits" / case.TASK)
    assert list(loaded.circuits) == [case.TASK]
    assert loaded.circuits[case.TASK].digest == circuit.digest
    # Pages of strangers stay on the Hub.
    assert not list((tmp_path / "runs").rglob("*.html"))
    assert wsparse.load("someone/tiny", revision=hub.sha("someone/tiny")).folder == loaded.folder


def test_what_a_later_push_no_longer_has_is_removed_and_nothing_else(run, hub):
    hub.add("someone/tiny", **{
        "README.md": b"# Tiny", "circuits/gone/circuit.json": b"{}", "circuits/table.txt": b"",
        "config.json": json.dumps({"model_type": "wsparse"}).encode(), "model.safetensors": b"older",
    })  # fmt: skip
    push = push_to_hub(run, "someone/tiny")
    assert push.removed == ("circuits/gone/circuit.json", "circuits/table.txt")
    assert "removed     circuits/gone/circuit.json" in str(push)
    assert set(hub.files("someone/tiny")) == MODEL | CIRCUITS | {"report.html", ".gitattributes"}
    assert hub.files("someone/tiny")["model.safetensors"] != b"older"


@pytest.mark.parametrize(
    ("present", "shown"),
    [
        ({"train.py": b""}, "'train.py'"),
        ({"circuits/x/notes.md": b"", "a": b"", "b": b"", "c": b""}, "'circuits/x/notes.md', 'a', 'b' ..."),
        ({"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b""}, "'config.json', 'model.safe"),
        ({"model.safetensors": b""}, "'model.safetensors'"),
    ],
)
def test_a_repository_with_other_files_is_refused_and_stays_as_it_is(present, shown, run, hub):
    hub.add("someone/tiny", **present)
    with pytest.raises(UserError) as error:
        push_to_hub(run, "someone/tiny")
    message = str(error.value)
    assert message.startswith(f"someone/tiny exists and holds {shown}")
    assert "\n" not in message and "choose another name" in message
    assert set(hub.files("someone/tiny")) == {*present, ".gitattributes"}
    assert len(hub.commits["someone/tiny"]) == 2


def refusal(run):
    with pytest.raises(UserError) as error:
        push_to_hub(run, "someone/tiny")
    return str(error.value)


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(run, hub):
    hub.intrude = lambda: hub.add("someone/tiny", **{"theirs.txt": b""})
    assert refusal(run) == (
        "someone/tiny could not be published: it was changed meanwhile: run the same command again"
    )
    assert set(hub.files("someone/tiny")) == {"theirs.txt", ".gitattributes"}


def test_without_a_token_nothing_is_asked_and_the_error_says_how_to_get_one(run, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(run) == (
        "publishing someone/tiny needs a token of the Hugging Face Hub that may write: run `hf auth login`, "
        "or set HF_TOKEN"
    )
    assert hub.asked == []


def test_a_token_that_may_only_read_is_told_in_one_line(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert refusal(run) == (
        "someone/tiny could not be published: the token may not write to it: use one that may, "
        "`hf auth login`"
    )
    assert hub.commits == {}


def test_no_network_is_told_in_one_line(run, monkeypatch, tmp_path):
    use(monkeypatch, tmp_path, "http://127.0.0.1:1")
    message = refusal(run)
    assert message.startswith("someone/tiny could not be published: the Hugging Face Hub does not answer:")
    assert "\n" not in message


def test_the_command_of_a_dry_run_lists_what_would_be_published(folder):
    done = run_python("-m", "wsparse.interop.hub", f"--run={folder}", "--to=someone/tiny", "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    *listed, total = done.stdout.splitlines()
    assert {line.split()[-1] for line in listed} == MODEL | CIRCUITS | {"report.html"}
    assert total.startswith(f"{len(listed)} files, ")
    assert total.endswith("MB: would be published as someone/tiny")


def test_a_dry_run_asks_nothing(run, hub):
    push_to_hub(run, "someone/tiny", dry_run=True)
    assert hub.asked == [] and hub.commits == {}


def test_a_dry_run_needs_no_client(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    run = runs.load(folder)
    assert set(push_to_hub(run, "someone/tiny", dry_run=True).sizes) == MODEL | CIRCUITS | {"report.html"}
    with pytest.raises(UserError, match=r"pip install 'wsparse\[hub\]'"):
        push_to_hub(run, "someone/tiny")


def test_the_card_has_the_table_of_circuits_and_how_to_load_them(folder, tmp_path, monkeypatch):
    circuit = Circuit.load(folder / "circuits" / case.TASK)
    audit = audit_case.audit(
        audit_case.result("sufficiency"), audit_case.result("necessity", "failed"), circuit=circuit.digest
    )
    audit.save(folder / "circuits" / case.TASK)
    # Another circuit of the task has an audit of its own.
    named = shutil.copytree(folder / "circuits" / case.TASK, folder / "circuits" / f"{case.TASK}@b")
    audit_case.audit(audit_case.result("sufficiency"), circuit=circuit.digest).save(named)
    kept = {}

    def upload(stage, push, *, private):
        kept.update(card=(stage / "README.md").read_text())
        return push

    monkeypatch.setattr(hub_module, "_upload", upload)
    try:
        push_to_hub(runs.load(folder), "someone/tiny")
    finally:
        shutil.rmtree(named)
        for path in (folder / "circuits" / case.TASK).glob("audit.*"):
            path.unlink()
    card = kept["card"]
    row = next(line for line in card.splitlines() if line.startswith(f"| {case.TASK} |"))
    loss = f"{circuit.loss:.3f}"
    assert row == (
        f"| {case.TASK} | {circuit.status} | {circuit.counts.nodes} | {circuit.counts.edges} | {loss} "
        "| 0.100 | 1 passed, 1 failed |"
    )
    assert "| hard | not found |  |  |  | 0.100 |  |" in card
    assert f"| {case.TASK}@b | " in card and card.count("1 passed, 1 failed") == 1
    assert card.count("| 1 passed |") == 1
    assert "| held-out loss | 2.3457 nats per token |" in card and "`report.html` shows" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'wsparse.load("someone/tiny")' in code
    names = {}
    exec(code.replace("someone/tiny", str(folder)), names)
    assert names["logits"].shape == (1, len("def add(a, b):"), 257)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "some one/tiny", ""])
def test_what_is_no_repository_id_is_refused(name, folder):
    with pytest.raises(UserError, match="must be a repository id of the Hugging Face Hub, owner/name"):
        push_to_hub(runs.load(folder), name)


def test_files_of_other_names_in_a_folder_of_circuits_are_not_copied(tmp_path):
    source = tmp_path / "source"
    for name in (
        "circuits/a/circuit.json",
        "circuits/a/evil.json",
        "circuits/a/b/circuit.json",
        "circuits/x.npz",
    ):
        files.make_folder((source / name).parent)
        (source / name).write_text("{}")
    hub_module.copy_circuits(source, tmp_path)
    copied = [p.relative_to(tmp_path).as_posix() for p in (tmp_path / "circuits").rglob("*") if p.is_file()]
    assert copied == ["circuits/a/circuit.json"]
    hub_module.copy_circuits(tmp_path / "nothing", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
