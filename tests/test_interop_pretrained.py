"""Pretrained folders: every bit comes back, the card says what is there, and mistakes are named."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import re
import struct
import sys
import threading
import urllib.parse

import helpers
from helpers import run_python
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from wsparse import model, sparsity, trees
from wsparse.config import ModelConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.interop.pretrained import from_pretrained, save_pretrained

CONFIG = ModelConfig(
    vocab_size=257, context=16, n_layer=2, d_model=16, n_head=2, d_head=8, d_mlp=24, position="added"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.train(["x"], 257)


random_params = functools.partial(helpers.random_params, CONFIG)


@pytest.fixture
def saved(tokenizer, tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, random_params(), tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_bit_comes_back(dtype, tokenizer, tmp_path):
    want = random_params(dtype=dtype)
    # A transposed array lies in memory in another order than it is written.
    want["head"]["unembed"] = np.ascontiguousarray(want["head"]["unembed"].T).T
    save_pretrained(tmp_path, CONFIG, want, tokenizer)
    config, params, loaded = from_pretrained(tmp_path)
    assert config == CONFIG and loaded.digest == tokenizer.digest
    got, want = trees.flatten(params), trees.flatten(want)
    assert sorted(got) == sorted(want)
    for path, array in want.items():
        assert isinstance(got[path], jax.Array) and got[path].dtype == dtype
        assert np.asarray(got[path]).tobytes() == array.tobytes(), path


def test_the_folder_has_the_usual_files_and_the_card_says_what_is_in_them(tokenizer, tmp_path):
    params = random_params()
    kernel = params["blocks"]["mlp"]["fc"]["kernel"]
    kernel[:, 1:] = 0
    save_pretrained(tmp_path, CONFIG, params, tokenizer, name="Tiny", val_loss=2.34567)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    card = (tmp_path / "README.md").read_text()
    nonzeros = sum(int(count) for count, _ in sparsity.l0(params).values())
    size = sum(int(count) for _, count in sparsity.l0(params).values())
    assert nonzeros == size - kernel[:, 1:].size
    assert f"| nonzero weights | {nonzeros:,}, {nonzeros / size:.2%} of the sparse matrices |" in card
    assert f"| parameters | {model.count_parameters(params):,} |" in card
    assert "| held-out loss | 2.3457 nats per token |" in card
    assert card.startswith("---\nlibrary_name: wsparse\n") and "\n# Tiny\n" in card


def test_the_card_calls_only_sparse_models_sparse(tokenizer, tmp_path):
    for scale, sparse in ((1, False), (0, True)):
        params = random_params(scale=scale)
        save_pretrained(tmp_path, CONFIG, params, tokenizer)
        card = (tmp_path / "README.md").read_text()
        assert ("\n- weight-sparse\n" in card, "A weight-sparse transformer" in card) == (sparse, sparse)


def test_weights_are_readable_by_those_who_may_read_the_rest(saved):
    modes = {name: (saved / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_card_leaves_out_a_loss_that_is_not_known(saved):
    card = (saved / "README.md").read_text()
    assert "held-out loss" not in card and "\n# model\n" in card


def test_the_code_on_the_card_runs(saved):
    (code,) = re.findall(r"```python\n(.*?)```", (saved / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code.replace("path/of/this/folder", str(saved)), names)
    assert names["logits"].shape == (1, len("def add(a, b):"), 257)


def test_parameters_or_a_tokenizer_of_another_model_are_not_written(tokenizer, tmp_path):
    params = random_params()
    del params["head"]["bigram"]
    with pytest.raises(UserError, match=r"head/bigram. has shape none, the config says \(257, 257\)"):
        save_pretrained(tmp_path / "a", CONFIG, params, tokenizer)
    other = dataclasses.replace(CONFIG, vocab_size=300)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), helpers.shapes(other))
    with pytest.raises(UserError, match=r"tokenizer of 257 tokens, its config says model\.vocab_size=300"):
        save_pretrained(tmp_path / "b", other, zeros, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "README.md"])
def test_files_that_are_not_a_models_are_not_replaced(name, tokenizer, tmp_path):
    (tmp_path / name).write_text('{"steps": 3}')
    with pytest.raises(UserError, match=f"holds {name}, which is not of a model in this layout"):
        save_pretrained(tmp_path, CONFIG, random_params(), tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"steps": 3}'


def test_an_earlier_model_is_replaced(saved, tokenizer):
    params = random_params(seed=1)
    save_pretrained(saved, CONFIG, params, tokenizer)
    for path, leaf in trees.flatten(from_pretrained(saved).params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(params)[path])


def damage_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(values)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer at"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            r"model\.safetensors cannot be read",
        ),
        (
            lambda f: damage_config(f, lambda v: v | {"model_type": "gpt2"}),
            r"is not of a wsparse model \(model_type='gpt2'\)",
        ),
        (
            lambda f: damage_config(f, lambda v: v | {"model": v["model"] | {"d_modle": 3}}),
            r"unknown config key 'model\.d_modle' \(did you mean 'd_model'",
        ),
        (
            lambda f: damage_config(f, lambda v: v | {"model": v["model"] | {"d_mlp": 32}}),
            r"blocks/mlp/fc/bias. has shape \(2, 24\), the config says \(2, 32\)",
        ),
    ],
    ids=["no config", "no tokenizer", "no weights", "truncated", "gpt2", "unknown key", "wider"],
)  # fmt: skip
def test_a_folder_that_is_no_whole_model_is_refused(damage, message, saved):
    damage(saved)
    with pytest.raises(UserError, match=message):
        from_pretrained(saved)


def test_weights_of_another_dtype_or_not_finite_are_refused_in_one_line(saved):
    path, name, whole = saved / "model.safetensors", "embed/tokens", np.ones((257, 16))
    leaves = safetensors.numpy.load_file(path)
    for array, message in (
        (whole.astype(np.int8), "of int8, it must be float32, float16 or bfloat16"),
        (whole, "of float64, it must be float32"),
        (np.where(whole == 1, np.nan, whole).astype(np.float32), "NaN or infinite numbers in"),
        (np.full_like(whole, np.inf, dtype=ml_dtypes.bfloat16), "NaN or infinite numbers in"),
    ):
        path.write_bytes(safetensors.numpy.save(leaves | {name: array}))
        with pytest.raises(UserError, match=message) as error:
            from_pretrained(saved)
        assert "\n" not in str(error.value) and repr(name) in str(error.value)
    # A dtype that the library knows and NumPy does not.
    header = json.dumps({name: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match=r"has a dtype that is not float32, float16 or bfloat16: .*float8"):
        from_pretrained(saved)


def test_a_repository_is_loaded_from_the_hub(saved, monkeypatch):
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, sorted(allow_patterns)))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config, params, _ = from_pretrained("someone/tiny", revision="v1")
    assert config == CONFIG
    np.testing.assert_array_equal(params["embed"]["tokens"], jnp.asarray(random_params()["embed"]["tokens"]))
    files = ["config.json", "model.safetensors", "tokenizer.json"]
    assert asked == [("someone/tiny", "v1", files)]


COMMIT = "c0ffee" + 34 * "0"


@contextlib.contextmanager
def hub(folder):
    """A Hub on this machine, whose one repository, someone/tiny, has the folder's files in branch v1."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            asked.append(path)
            name = path.rsplit("/", 1)[-1]
            if path == "/api/models/someone/tiny/revision/v1":
                siblings = [{"rfilename": each.name} for each in folder.iterdir()]
                body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings})
            elif path == f"/api/models/someone/tiny/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": each.name, "oid": each.name, "size": each.stat().st_size}
                    for each in folder.iterdir()
                ]
                body = json.dumps(entries)
            elif path == f"/someone/tiny/resolve/{COMMIT}/{name}":
                body = (folder / name).read_bytes()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = body.encode() if isinstance(body, str) else body
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_the_clients_own_download_brings_every_bit(saved, tmp_path):
    """In a process of its own: the client reads its settings when it is imported."""
    code = """
from wsparse import trees
from wsparse.errors import UserError
from wsparse.interop.pretrained import from_pretrained
config, params, tokenizer = from_pretrained("someone/tiny", revision="v1")
print(config, trees.digest(params), tokenizer.digest)
try:
    from_pretrained("someone/else")
except UserError as error:
    print(error)
"""
    with hub(saved) as (address, asked):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
        done = run_python("-c", code, **settings)
    assert done.returncode == 0, done.stderr
    loaded, refused = done.stdout.splitlines()
    want = from_pretrained(saved)
    assert loaded == f"{CONFIG} {trees.digest(want.params)} {want.tokenizer.digest}"
    assert refused.startswith("someone/else is not a folder here, and could not be loaded from the")
    files = {path.rsplit("/", 1)[-1] for path in asked if "/resolve/" in path}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}


def test_no_network_is_said_in_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError\nmore\n")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError) as error:
        from_pretrained("someone/tiny")
    assert str(error.value) == (
        "someone/tiny is not a folder here, was not downloaded before, and the Hugging Face Hub does not "
        "answer: is there a network? (ConnectError)"
    )


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^someone/tiny is not a folder here, .* 'wsparse\[hub\]'"):
        from_pretrained("someone/tiny")


def test_a_name_that_is_neither_folder_nor_repository_is_refused():
    with pytest.raises(UserError, match="is neither a folder nor a repository id"):
        from_pretrained("runs/tiny/model")
