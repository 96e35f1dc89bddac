"""The kernels' build: cached, tried with one compiler after the other, and never an error."""

import logging
import os
import pathlib
import subprocess

from helpers import run_python
import pytest

from wsparse.ops import build, cpu


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wsparse"


def compiler(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


WRITES_OUTPUT = 'while [ "$1" != -o ]; do shift; done; echo compiled > "$2"; echo x >> "$0.calls"'


def test_the_library_is_compiled_once_and_kept_by_its_hash(cache, tmp_path, monkeypatch):
    script = compiler(tmp_path / "c++", WRITES_OUTPUT)
    monkeypatch.setenv("CXX", str(script))
    path = build.library()
    assert path.parent == cache and path.read_text() == "compiled\n"
    assert build.library() == path
    assert pathlib.Path(f"{script}.calls").read_text() == "x\n"
    # Another source, processor or jaxlib is another library.
    for name, value in (("_processor", lambda: "another"), ("_unit", build._unit)):
        monkeypatch.setattr(build, name, value)
    assert build.library() != path
    assert sorted(cache.glob("build-*")) == []


def test_the_next_compiler_is_tried_where_one_fails(cache, tmp_path, monkeypatch):
    broken = compiler(tmp_path / "broken", "echo 'fatal error: no' >&2; exit 1")
    works = compiler(tmp_path / "works", WRITES_OUTPUT)
    monkeypatch.setattr(build, "_compilers", lambda: iter([[str(broken)], [str(works)]]))
    assert build.library().read_text() == "compiled\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'x.cc:1: error: broken here' >&2; echo more >&2; exit 1", "broken here"),
        (r"printf 'x.cc: error: broken \377here' >&2; exit 1", "broken"),
        ("exit 3", "exit status 3"),
        (None, "no C++ compiler"),
    ],
)
def test_a_failure_to_compile_is_one_line(cache, tmp_path, monkeypatch, caplog, body, reason):
    commands = [] if body is None else [[str(compiler(tmp_path / "c++", body))]]
    monkeypatch.setattr(build, "_compilers", lambda: iter(commands))
    with caplog.at_level(logging.WARNING):
        assert build.library() is None
    (record,) = caplog.records
    assert reason in record.getMessage() and "\n" not in record.getMessage()


def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.library() is None
    assert len(caplog.records) == 1


def test_a_user_without_a_home_folder_is_one_line(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert build.library() is None
    (record,) = caplog.records
    assert "home directory" in record.getMessage()


def test_a_compiler_that_is_no_command_is_one_line(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", 'g++ "')
    assert build.library() is None
    (record,) = caplog.records
    assert "CXX=g++" in record.getMessage()


@pytest.mark.parametrize("content", ["not a library", None])
def test_a_library_that_does_not_load_or_lacks_a_kernel_is_one_line(tmp_path, monkeypatch, caplog, content):
    path = tmp_path / "kernels.so"
    if content is None:
        if (compiler := next(build._compilers(), None)) is None:
            pytest.skip("no C++ compiler")
        subprocess.run([*compiler, "-shared", "-x", "c++", "-", "-o", path], input=b"int x;", check=True)
    else:
        path.write_text(content)
    monkeypatch.setattr(build, "library", lambda: path)
    assert not cpu.load.__wrapped__()
    assert len(caplog.records) == 1


FORWARD = """
import ctypes, sys
import jax, jax.numpy as jnp
calls = []
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        calls.append(name)
        return super().__getattr__(name)
ctypes.CDLL = Library
register = jax.ffi.register_ffi_target
jax.ffi.register_ffi_target = lambda name, *a, **k: (calls.append(name), register(name, *a, **k))
from wsparse import model
from wsparse.config import ModelConfig
from wsparse.ops import cpu
config = ModelConfig(vocab_size=16, context=8, n_layer=1, d_model=16, n_head=2)
params = model.init(config, jax.random.key(0))
tokens = jnp.zeros((1, 8), jnp.int32)
plain, _ = model.forward(params, tokens, config)
assert not cpu.enabled()
ours = lambda: [name for name in calls if name == "mallopt" or name.startswith("wsparse_")]
print(ours())
assert cpu.enable() and cpu.enable() and cpu.enabled()
print(sorted(set(ours()))[0], len(ours()))
fast, _ = model.forward(params, tokens, config)
print(float(jnp.abs(fast - plain).max()) < 1e-5)
"""


def test_importing_the_model_and_calling_forward_change_nothing_in_the_process():
    done = run_python("-c", FORWARD, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    before, after, equal = done.stdout.splitlines()
    assert before == "[]"
    # Two calls of mallopt; every kernel is looked up and registered.
    assert after == f"mallopt {1 + 2 * len(cpu._KERNELS)}"
    assert equal == "True"
