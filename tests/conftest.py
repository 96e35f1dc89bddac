"""Every test sees 8 CPU devices, no silent rank promotion, quick compilation, one hypothesis profile."""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import logging
import os
import pathlib
import signal
import sysconfig

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
# Compiling is most of the time of the tests, and the optimizer most of compiling. Here for the commands that
# tests start; `quick_compilation` says which tests optimize.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# A shell has its background jobs ignore Ctrl-C; the commands under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import HealthCheck, settings  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile(
    "wsparse",
    deadline=None,  # the first example of a jitted function compiles it
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("wsparse")

Counter = Callable[[], contextlib.AbstractContextManager[list[str]]]


# Compiled as users' programs are: what is meant for TPUs, and values known to the last digit.
_AS_USERS = ("test_aot", "test_ops_tpu", "test_viewer", "test_viewer_browser")


# Files that take longest, by far: they start first, so that no process is left with one at the end.
_LONGEST = ("test_aot", "test_multiprocess", "test_notebooks", "test_end_to_end", "test_circuits_workers")


def pytest_configure(config):
    # By itself xdist starts with the files of most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    order = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    quick = request.module.__name__.rpartition(".")[2] not in _AS_USERS
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    # Every compiled program takes several memory maps, of which a process may have only 65,530.
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With WSPARSE_NO_SKIPS a test that is skipped has failed: for a machine that has all that tests need."""
    report = yield
    if report.skipped and "WSPARSE_NO_SKIPS" in os.environ:
        report.outcome, report.longrepr = "failed", f"skipped, with WSPARSE_NO_SKIPS: {report.longrepr[-1]}"
    return report


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """`with log_lines() as lines:` collects what the package logs inside."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("wsparse")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the package logs during a test."""
    with log_lines() as lines:
        yield lines


@contextlib.contextmanager
def collect_compilations() -> Iterator[list[str]]:
    """`with collect_compilations() as names:` collects the name of every function that XLA compiles inside.

    Eager operations count too: what the block needs must have been made before it.
    """
    names: list[str] = []

    def listen(event, duration, **labels):
        del duration
        if event.endswith("backend_compile_duration"):
            names.append(labels.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def compilations() -> Counter:
    """See `collect_compilations`."""
    return collect_compilations


@pytest.fixture(scope="session")
def tokenizers():
    """Tokenizers of generated and of real Python, by vocabulary size."""
    from wsparse.data import tokenizer
    from wsparse.pytext.documents import documents

    texts = list(itertools.islice(documents(0), 1500))
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts += [(library / f"{name}.py").read_text() for name in ("argparse", "ast", "typing")]
    return {vocab: tokenizer.train(texts, vocab) for vocab in (512, 1024, 2048)}
