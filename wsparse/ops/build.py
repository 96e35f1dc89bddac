"""Compiles the CPU kernels of `wsparse/ops/csrc` on first use, with whatever C++ compiler there is.

The library is kept in the user's cache folder under a hash of everything it depends on: the sources, the
flags, the processor, and jaxlib, whose headers it is compiled against.
"""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
import importlib.util
import logging
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

import jax
import jaxlib

from wsparse import files
from wsparse.errors import UserError

log = logging.getLogger(__name__)

_SOURCES = pathlib.Path(__file__).parent / "csrc"

# NaN and infinity keep their meaning; multiply-adds may be fused. Errors of the math library and traps of
# floating-point numbers are never looked at, and knowing that lets loops be vectorized.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
)

_TIMEOUT_SECONDS = 600


def library() -> pathlib.Path | None:
    """Returns the path of the compiled kernels, or None where they cannot be compiled.

    The reason is logged in one line.
    """
    try:
        target = _cache_folder() / f"kernels-{_key()}.so"
        if target.exists():
            return target
        files.make_folder(target.parent)
        return _compile(target)
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("CPU kernels are off: %s", error)
        return None


def _compile(target: pathlib.Path) -> pathlib.Path | None:
    """Compiles with the first compiler that succeeds; of several processes, the last one's file stays."""
    reason = "no C++ compiler (clang++ or g++, or pip install 'wsparse[cpu]')"
    for compiler in _compilers():
        log.info("compiling the CPU kernels (once) with %s", shlex.join(compiler))
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
            output = pathlib.Path(folder) / target.name
            reason = _run([*compiler, *_flags(compiler), "-x", "c++", "-", "-o", str(output)])
            if reason is None:
                os.replace(output, target)
                return target
    log.warning("CPU kernels are off: %s", reason)
    return None


def _run(command: list[str]) -> str | None:
    """Runs a compiler over all sources as one file. Returns the reason for a failure, or None."""
    try:
        done = subprocess.run(
            command,
            input=_unit(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    line = next((line for line in lines if "error" in line), lines[-1])
    return f"{command[0]}: {line.strip()[:200]}"


def _unit() -> str:
    """One file that includes every source: XLA's header, which takes most of the time, is read once."""
    return "".join(f'#include "{path.name}"\n' for path in sorted(_SOURCES.glob("*.cc")))


def _compilers() -> Iterator[list[str]]:
    """Yields commands to try, in order."""
    if command := os.environ.get("CXX"):
        try:
            yield shlex.split(command)
        except ValueError as error:
            raise UserError(f"CXX={command} is no command: {error}") from error
    for name in ("clang++", "g++"):
        if path := shutil.which(name):
            yield [path]
    if importlib.util.find_spec("ziglang"):
        yield [sys.executable, "-m", "ziglang", "c++"]


def _flags(compiler: list[str]) -> list[str]:
    # zig adds checks of undefined behavior, and calls to a runtime that reports it.
    extra = ["-fno-sanitize=all"] if "ziglang" in compiler else []
    return [*_FLAGS, *extra, f"-I{_SOURCES}", f"-isystem{jax.ffi.include_dir()}"]


def _key() -> str:
    """Returns a hash of everything that the library depends on."""
    parts = [*_FLAGS, os.environ.get("CXX", ""), jaxlib.__version__, _processor()]
    parts += [path.name + path.read_text() for path in sorted(_SOURCES.iterdir()) if path.is_file()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Returns what distinguishes this machine's processor: its model and the instructions that it has."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "wsparse"
