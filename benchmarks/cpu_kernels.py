"""What the CPU kernels gain: `python benchmarks/cpu_kernels.py [--base=ANOTHER_CHECKOUT]`.

Times steps of training and of mask learning, products over nonzeros, and the kernels one by one: with
kernels, in plain JAX, and with the kernels of another checkout of this repository. Every variant is a process
of its own; they take turns call by call, so that a machine whose speed drifts slows all of them, and the
least time of each is what to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

REPO = pathlib.Path(__file__).parents[1]
Call = Callable[[], Any]


# --- The process of a variant -------------------------------------------------------------------------


def cases() -> dict[str, Callable[[], Call]]:
    """Name -> a function that prepares a call."""
    found: dict[str, Callable[[], Call]] = {}
    for d_model in (128, 256, 512):
        found[f"training step, d_model {d_model}"] = lambda d=d_model: training_step(d)
        found[f"mask step, d_model {d_model}"] = lambda d=d_model: mask_step(d)
    for shape in ((256, 1024), (1024, 256), (1024, 4096)):
        for one_of in (64, 1000):
            name = f"product {shape[0]} x {shape[1]}, 1/{one_of}"
            found[name] = lambda shape=shape, n=one_of: product(shape, 1 / n)
    for kernel in ("AbsTopK", "AbsTopK and ablation", "attention", "GELU", "projection"):
        found[f"{kernel}, both ways" if kernel != "projection" else kernel] = lambda k=kernel: part(k)
    return found


def training_step(d_model: int) -> Call:
    import jax

    from wsparse import sharding
    from wsparse.config import ModelConfig, SparsityConfig, TrainConfig

    if has("step.py"):
        from wsparse.step import make_program
    else:
        from wsparse.train import make_program
    config = TrainConfig(
        batch_size=8,
        model=ModelConfig(vocab_size=2048, context=256, n_layer=2, d_model=d_model, n_head=d_model // 16),
        sparsity=SparsityConfig(density=1 / 64, anneal_start=0.0, anneal_end=1e-9),
    )
    program = make_program(config, sharding.make_mesh(config.mesh))
    state = program.init()
    batch = jax.random.randint(jax.random.key(1), (1, 8, 257), 0, 2048)

    def step():
        nonlocal state
        state, report = program.step(state, batch)
        return report

    for _ in range(2):  # after a projection, weights are sparse
        jax.block_until_ready(step())
    return step


def mask_step(d_model: int) -> Call:
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from wsparse import model, sparsity
    from wsparse.circuits import HParams, PairArrays, masks, prune
    from wsparse.config import ModelConfig

    config = ModelConfig(vocab_size=2048, context=64, n_layer=2, d_model=d_model, n_head=d_model // 16)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    project = sparsity.project_top_k(1 / 64)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda p: project.update(zeros, project.init(p), p)[0])(params)
    params = jax.tree.map(jnp.add, params, update)
    rng, answer = np.random.default_rng(0), np.tile([1, 2], 64)
    batch = PairArrays(
        tokens=jnp.asarray(rng.integers(0, 2048, (128, 64)), jnp.int32),
        position=jnp.full(128, 63, jnp.int32),
        answer=jnp.asarray(answer, jnp.int32),
        other=jnp.asarray(answer[::-1].copy(), jnp.int32),
    )
    means = {name: jnp.zeros(shape) for name, shape in masks.shapes(config).items()}
    run = jax.jit(functools.partial(prune, config=config, steps=2, pairs_per_step=64))
    key = jax.random.key(0)
    return lambda: run(params, task_batch=batch, means=means, hparams=HParams(), key=key).losses


def product(shape: tuple[int, int], density: float) -> Call:
    import jax
    import jax.numpy as jnp

    cpu, matmul, *_ = operations()
    del cpu
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4096, shape[0]))
    w = jnp.where(jax.random.uniform(keys[1], shape) < density, jax.random.normal(keys[2], shape), 0.0)
    both = jax.jit(lambda x, w: jax.value_and_grad(lambda x: jnp.sum(matmul(x, w) ** 2))(x))
    return lambda: both(x, w)


def part(name: str) -> Call:
    import jax
    import jax.numpy as jnp

    from wsparse.sparsity import abs_top_k, project_top_k

    _, _, attend, gelu, ablate_largest = operations()

    def both_ways(function, *operands):
        @jax.jit
        def run(operands, tangent):
            y, pull = jax.vjp(function, *operands)
            return y, pull(tangent)

        tangent = jnp.ones_like(jax.eval_shape(function, *operands))
        return lambda: run(operands, tangent)

    x = jax.random.normal(jax.random.key(0), (4096, 1024))
    vector = jnp.linspace(0.0, 1.0, 1024)
    heads = [jax.random.normal(jax.random.key(i), (8, 256, 16, 16)) for i in range(3)]
    w = {"blocks": jax.random.normal(jax.random.key(0), (2, 512, 2048))}
    project = project_top_k(1 / 64)
    update = jax.jit(lambda w: project.update(jax.tree.map(jnp.zeros_like, w), project.init(w), w)[0])
    return {
        "AbsTopK": lambda: both_ways(lambda x: abs_top_k(x, 256), x),
        "AbsTopK and ablation": lambda: both_ways(lambda *xs: ablate_largest(*xs, 256), x, vector, vector),
        "attention": lambda: both_ways(attend, *heads, jnp.zeros(16)),
        "GELU": lambda: both_ways(gelu, x),
        "projection": lambda: lambda: update(w),
    }[name]()


def has(name: str) -> bool:
    """Returns whether the checkout has a file or folder, which older ones may lack."""
    import wsparse

    return (pathlib.Path(wsparse.__file__).parent / name).exists()


def operations() -> tuple[Any, ...]:
    """Returns the switch of the kernels, and the operations that have some."""
    if has("ops"):
        from wsparse.ops import cpu
        from wsparse.ops.attention import attend
        from wsparse.ops.linear import gelu, matmul
        from wsparse.ops.top_k import ablate_largest
    else:
        from wsparse.kernels import cpu

        from wsparse.model import ablate_largest, attend, gelu, matmul
    return cpu, matmul, attend, gelu, ablate_largest


def serve() -> None:
    """Prepares the case that a line names, and times it once for every line that follows."""
    import jax

    cpu, *_ = operations()
    if hasattr(cpu, "enable"):
        cpu.enable()
    prepared: dict[str, Call] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in prepared:
            prepared = {name: cases()[name]()}
            jax.block_until_ready(prepared[name]())
        start = time.perf_counter()
        jax.block_until_ready(prepared[name]())
        print(f"seconds {time.perf_counter() - start}", flush=True)


# --- The command --------------------------------------------------------------------------------------


@contextlib.contextmanager
def variant(checkout: pathlib.Path, kernels: bool) -> Iterator[Callable[[str], float]]:
    """Yields a function that times a case once, in a process of a checkout."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "WSPARSE_CPU_KERNELS": str(int(kernels)),
        "JAX_PLATFORMS": "cpu",
    }
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def measure(name: str) -> float:
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"{checkout}: {name} failed")

    try:
        yield measure
    finally:
        process.stdin.close()
        process.wait()


def main(argv) -> None:
    """Print a table and one JSON line."""
    del argv
    options: Any = flags.FLAGS
    ours = {"kernels": (REPO, True), "plain JAX": (REPO, False)}
    if options.base:
        ours["base"] = (pathlib.Path(options.base), True)
    if options.plain is False:
        del ours["plain JAX"]
    others = list(ours)[1:]
    names = [name for name in cases() if any(word in name for word in options.only.split(","))]
    columns = [*(f"{name}, ms" for name in ours), *(f"faster than {name}" for name in others)]
    print(f"| case | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    results = {}
    with contextlib.ExitStack() as stack:
        measures = {name: stack.enter_context(variant(*of)) for name, of in ours.items()}
        for name in names:
            times = {key: [measure(name)] for key, measure in measures.items()}
            start = time.monotonic()
            for _ in range(options.rounds - 1):
                if time.monotonic() - start > options.seconds:
                    break
                for key, measure in measures.items():
                    times[key].append(measure(name))
            least = {key: min(values) for key, values in times.items()}
            cells = [f"{1e3 * seconds:.1f}" for seconds in least.values()]
            cells += [f"{least[other] / least['kernels']:.2f}x" for other in others]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            results[name] = least
    print(json.dumps(results))


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        from absl import flags

        from wsparse.command import run_command

        flags.DEFINE_string("base", "", "Another checkout of the repository, to be timed beside.")
        flags.DEFINE_bool("plain", True, "Time plain JAX beside the kernels.")
        flags.DEFINE_string("only", "", "Words, separated by commas; cases that have one are timed.")
        flags.DEFINE_integer("rounds", 30, "Calls of each variant, at most.")
        flags.DEFINE_float("seconds", 60.0, "Seconds for a case after the first call, about.")
        run_command(main)
