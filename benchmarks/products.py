"""Products with a sparse matrix against dense ones: `python benchmarks/products.py`.

For the shapes of a small and of a large layer, and for densities from 1/4 to 1/1000, the product of 4096
rows of activations with a matrix over its nonzeros is timed beside the dense product, in turns, forward and
for the gradient of the activations. The sparse times include finding the nonzeros. Where the ratio crosses 1
is where `wsparse.ops.cpu.DENSITY_LIMIT` belongs. What no product can beat is timed beside them: reading
and writing as many bytes as the activations of both sides have.
"""

from __future__ import annotations

from collections.abc import Callable
import json

from absl import flags
import jax
import jax.numpy as jnp
import timing

from wsparse.command import run_command
from wsparse.errors import UserError
from wsparse.ops import cpu

ROWS = 4096
SHAPES = ((256, 256), (256, 1024), (1024, 256), (1024, 4096))
DENSITIES = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 256, 1 / 1000)


def calls(shape: tuple[int, int], density: float) -> dict[str, Callable[[], object]]:
    """The four products of one shape and density, and the traffic of one."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, (ROWS, n)) for key, n in zip(keys[:2], shape, strict=True))
    kept = jax.random.uniform(keys[2], shape) < density
    w = jnp.where(kept, jax.random.normal(keys[3], shape), 0.0)
    dense, dense_gradient = jax.jit(jnp.matmul), jax.jit(lambda dy, w: dy @ w.T)
    half, negated = jnp.ones((ROWS, sum(shape) // 2)), jax.jit(jnp.negative)
    sparse, sparse_gradient = map(jax.jit, (cpu.sparse_product, cpu.sparse_product_transposed))
    return {
        "dense": lambda: dense(x, w),
        "sparse": lambda: sparse(x, w),
        "dense gradient": lambda: dense_gradient(dy, w),
        "sparse gradient": lambda: sparse_gradient(dy, w),
        "traffic": lambda: negated(half),
    }


def main(argv) -> None:
    """Time every shape at every density and print a table and one JSON line."""
    del argv
    if not cpu.enable():
        raise UserError("the products need the CPU kernels: one device and a C++ compiler")
    results = []
    for shape in SHAPES:
        for density in DENSITIES:
            seconds = timing.medians_in_turns(calls(shape, density), flags.FLAGS.rounds)
            forward = seconds["dense"] / seconds["sparse"]
            gradient = seconds["dense gradient"] / seconds["sparse gradient"]
            print(
                f"{shape[0]:5} x {shape[1]:<5} 1/{round(1 / density):<5} "
                f"forward {forward:6.2f}x, gradient {gradient:6.2f}x as fast as dense; "
                f"its traffic alone {seconds['dense'] / seconds['traffic']:6.2f}x"
            )
            results.append({"shape": shape, "density": density, "seconds": seconds})
    print(json.dumps(results))


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 9, "Timed calls of each product.")
    run_command(main)
