"""The CPU kernels' loops under sanitizers of memory, undefined behavior and data races."""

import os
import pathlib
import shutil
import subprocess

import jax
import pytest

from wsparse.ops import build

SOURCE = pathlib.Path(__file__).parent / "csrc" / "kernels_under_sanitizers.cc"
COMPILER = next(filter(None, map(shutil.which, ("clang++", "g++"))), None)


def run(tmp_path, *flags):
    program = tmp_path / "program"
    command = [COMPILER, "-std=c++17", "-O1", "-g", "-march=native", "-fno-strict-aliasing", *flags]
    command += [f"-I{build._SOURCES}", f"-isystem{jax.ffi.include_dir()}"]
    subprocess.run([*command, str(SOURCE), "-o", str(program), "-pthread"], check=True)
    environment = os.environ | {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_pass_under(sanitizers, tmp_path):
    done = run(tmp_path, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    assert (done.stdout, done.returncode) == ("passed\n", 0), done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_buffer_that_is_too_small_is_noticed(tmp_path):
    text = SOURCE.read_text().replace("std::vector<Cut> cuts(rows)", "std::vector<Cut> cuts(rows - 1)")
    broken = tmp_path / "broken.cc"
    broken.write_text(text)
    program = tmp_path / "program"
    flags = ["-std=c++17", "-O1", "-march=native", "-fno-strict-aliasing", "-fsanitize=address"]
    flags += [f"-I{build._SOURCES}", f"-isystem{jax.ffi.include_dir()}"]
    subprocess.run([COMPILER, *flags, str(broken), "-o", str(program), "-pthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
