"""Commands end in one line, whatever happens to them and whenever it does."""

import dataclasses
import signal
import time

from absl import flags
from helpers import run_python, start_python
import pytest

from wsparse import command
from wsparse.config import setting

# A command whose `main` does what argv[1] says; no jax, so that it starts at once.
COMMAND = """
import errno, gc, logging, sys, time
from absl import flags
from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.progress import progress

log = logging.getLogger("wsparse.example")

class Destructor:
    def __del__(self):
        print("deep", flush=True)
        time.sleep(20)

def main(argv):
    what = flags.FLAGS.what
    if what == "log":
        log.info("a line")
        log.debug("hidden")
        logging.getLogger("absl").error("a library's error")
        return 3
    if what == "user":
        raise UserError("what to change")
    if what == "missing":
        open("/does/not/exist")
    if what == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if what == "pipe":
        while True:
            log.info("a line")
    try:
        print("deep", flush=True) if what == "wait" else Destructor()
        time.sleep(20)
    finally:
        print("in order", flush=True)

flags.DEFINE_string("what", "", "")
flags.DEFINE_float("number", 1.0, "")
flags.DEFINE_string("out", None, "")
run_command(main)
"""


def finish(*arguments: str) -> tuple[int, str, str]:
    done = run_python("-c", COMMAND, *arguments, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_is_no_failure(flag):
    status, out, err = finish(flag)
    assert (status, err) == (0, "")
    assert "--what:" in out


def test_log_lines_go_to_stdout_and_those_of_libraries_nowhere():
    assert finish("--what=log") == (3, "a line\n", "")
    # Control: a user can ask for them.
    status, out, err = finish("--what=log", "--verbosity=1")
    assert (status, out) == (3, "a line\n")
    assert "a library's error" in err


@dataclasses.dataclass(kw_only=True)
class Fields:
    """Of every kind that `define_fields` knows."""

    its_source: str = setting(dataclasses.MISSING, "Must be given.")
    its_size: int | None = setting(None, "By default all.")
    its_share: float | None = setting(None, "By default half.")
    its_names: tuple[str, ...] = setting(("a", "b"), "Some names.")
    its_rate: float = setting(0.5, "A rate.")


def test_fields_of_a_dataclass_become_flags_of_their_types_with_their_defaults_told():
    command.define_fields(Fields, "For tests: ")
    names = [field.name for field in dataclasses.fields(Fields)]
    try:
        assert command.given_fields(Fields) == {}
        assert flags.FLAGS["its_rate"].help == "For tests: A rate. Default: 0.5."
        assert flags.FLAGS["its_names"].help == "For tests: Some names. Default: 'a,b'."
        assert flags.FLAGS["its_size"].help == "For tests: By default all."
        # Only the one without a default must be given.
        with pytest.raises(flags.IllegalFlagValueError, match="--its_source"):
            flags.FLAGS.validate_all_flags()
        for name, text in zip(names, ("x", "3", "1e3", "c,d", "2"), strict=True):
            flags.FLAGS[name].parse(text)
        flags.FLAGS.validate_all_flags()
        values = command.given_fields(Fields)
        assert values == dict(zip(names, ("x", 3, 1e3, ["c", "d"], 2.0), strict=True))
        assert isinstance(values["its_size"], int)
    finally:
        for name in names:
            delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--what=user"], "error: what to change"),
        (["--what=missing"], "error: /does/not/exist: No such file or directory"),
        (["--number=nan"], "error: --number must be a finite number, got nan"),
        (["--number=-inf"], "error: --number must be a finite number, got -inf"),
        (["word"], "error: unexpected argument 'word': options are written --name=value"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, line):
    assert finish(*arguments) == (2, "", line + "\n")


def test_a_full_disk_is_one_line_that_says_where_and_what_is_free(tmp_path):
    status, out, err = finish("--what=full", f"--out={tmp_path}/x")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: cannot write {tmp_path}/x: No space left on device (")
    assert err.endswith(f" MB free in {tmp_path})\n")


def test_a_reader_that_goes_away_ends_the_command_quietly():
    with start_python("-c", COMMAND, "--what=pipe") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a line\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("what", ["wait", "destructor"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_unwinds_and_ends_in_one_line(what, number):
    """Where Python would drop the exception as well: in a destructor."""
    process = start_python("-c", COMMAND, f"--what={what}")
    assert process.stdout is not None
    assert process.stdout.readline() == "deep\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=15)
    assert process.returncode == 128 + number
    assert out == "in order\n"
    assert err == f"{number.name}: stopped; run the same command again to go on\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("seconds", [0.3, 0.7])
def test_a_signal_while_a_command_is_imported_ends_in_one_line(number, seconds):
    """From the package's own import on; before it, it is Python that is interrupted."""
    program = (
        "import sys; sys.argv[0] = '-m'; import wsparse; print('in', flush=True); "
        "import wsparse.train, time; time.sleep(20)"
    )
    process = start_python("-c", program)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 128 + number
    assert err == f"{number.name}: stopped; run the same command again to go on\n"
