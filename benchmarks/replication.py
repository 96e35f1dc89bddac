"""Tokens per second in the configurations of the public PyTorch replication.

`python benchmarks/replication.py`. That replication (Drori 2026) trains at 5,150 and 640 tokens/s in these
two configurations on two CPU cores, with AbsTopK at every site, sinks, a bigram table and density 1/64.
Here a whole step of `wsparse.train` is timed at the final density beside its own parts, each compiled by
itself on arrays of the step's shapes, and beside its floor: the FLOPs of its matrix products, were all of
them dense, at the rate this machine reaches on a large one in the same run. The parts take turns with the
step. `--density=1` shows the start of training, when they are dense.
"""

from __future__ import annotations

from collections.abc import Callable
import json

from absl import flags
import jax
import jax.numpy as jnp
import optax
import timing

from wsparse import model, sharding, sparsity
from wsparse.command import run_command
from wsparse.config import ModelConfig, SparsityConfig, TrainConfig
from wsparse.nodes import NODES
from wsparse.ops import cpu
from wsparse.ops.attention import attend
from wsparse.ops.linear import gelu, matmul
from wsparse.step import Program, make_optimizer, make_program

# Name: d_model, layers, context, batch, and the replication's tokens/s.
SIZES = {"256 wide": (256, 2, 128, 32, 5150), "512 wide": (512, 4, 256, 16, 640)}


def recipe(name: str, density: float) -> TrainConfig:
    """The replication's configuration, at its final density from the first step."""
    d_model, layers, context, batch, _ = SIZES[name]
    return TrainConfig(
        model=ModelConfig(
            vocab_size=2048, context=context, n_layer=layers, d_model=d_model, n_head=d_model // 16
        ),
        sparsity=SparsityConfig(density=density, anneal_start=0.0, anneal_end=1e-9),
        batch_size=batch,
        steps=1000,
    )


def parts(config: TrainConfig, program: Program, params: model.Params) -> dict[str, Callable[[], object]]:
    """Calls that do what a step does of each part: all layers, forward and backward."""
    shape, tokens = config.model, config.batch_size * config.model.context
    heads = (config.batch_size, shape.context, shape.n_head, shape.d_head)
    keys = iter(jax.random.split(jax.random.key(2), 64))

    def normal(*sizes):
        return jax.random.normal(next(keys), sizes)

    def both_ways(function, *operands):
        return timing.forward_and_backward(function, *operands, layers=shape.n_layer)

    block = params["blocks"]
    kernels = [block["attn"][name]["kernel"][0] for name in ("q", "k", "v", "out")]
    kernels += [block["mlp"][name]["kernel"][0] for name in ("fc", "proj")]
    widths = [kind.width(shape) for kind in NODES.values()]
    optimizer = make_optimizer(config)
    gradients = jax.tree.map(jnp.ones_like, params)
    # A search is easy where most are zeros, as a step's are only once they are projected.
    moved = jax.tree.map(lambda leaf: leaf + 1e-3 * normal(*leaf.shape), params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    x_BTD = normal(config.batch_size, shape.context, shape.d_model)
    tokens_BT = jax.random.randint(next(keys), x_BTD.shape[:2], 0, shape.vocab_size)

    @jax.jit
    def head(head_params, x_BTD):
        def value(head_params, x_BTD):
            logits = model.Head(shape).apply(
                {"params": head_params}, x_BTD, tokens_BT, params["embed"]["tokens"]
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BT)
            return jnp.mean(each)

        return jax.grad(value, argnums=(0, 1))(head_params, x_BTD)

    return {
        "attention": both_ways(attend, normal(*heads), normal(*heads), normal(*heads), normal(shape.n_head)),
        "AbsTopK": timing.every(
            both_ways(lambda x: sparsity.abs_top_k(x, x.shape[-1] // 4), normal(tokens, width))
            for width in widths
        ),
        "products of the layers": timing.every(
            both_ways(matmul, normal(tokens, kernel.shape[0]), kernel) for kernel in kernels
        ),
        "GELU": both_ways(gelu, normal(tokens, shape.mlp_width)),
        "logits and loss": lambda: head(params["head"], x_BTD),
        "optimizer without projection": lambda: update(gradients, state, params),
        "projection": lambda: program.project(moved),
    }


def main(argv) -> None:
    """Time both configurations and print a table and one JSON line for each."""
    del argv
    cpu.enable()
    for name, (*_, theirs) in SIZES.items():
        config = recipe(name, flags.FLAGS.density)
        program = make_program(config, sharding.make_mesh(config.mesh))
        step, params = timing.stepper(program, config)
        calls = {"step": step, **parts(config, program, params)}
        medians = timing.medians_in_turns(calls, flags.FLAGS.rounds)
        medians["optimizer without projection"] -= medians["projection"]
        rate = timing.matmul_rate()
        tokens = config.batch_size * config.model.context
        flops = 3 * model.forward_flops(config.model, tokens)
        ours, floor = tokens / medians["step"], flops / rate
        print(f"{name}: {ours:.0f} tokens/s, {ours / theirs:.2f} times {theirs}")
        rest = medians["step"] - sum(value for part, value in medians.items() if part != "step")
        for part, value in {**medians, "everything else": rest}.items():
            print(f"  {part:30}{value:8.3f} s{value / medians['step']:8.0%}")
        print(
            f"  {'floor, every product dense':30}{floor:8.3f} s at {rate / 1e9:.0f} GFLOP/s; "
            f"the step takes {medians['step'] / floor:.2f} times as long"
        )
        print(json.dumps({"config": name, "tokens_per_s": ours, "seconds": medians, "floor": floor}))


if __name__ == "__main__":
    flags.DEFINE_float("density", 1 / 64, "Share of weights that are not zero.")
    flags.DEFINE_integer("rounds", 5, "Timed calls of the step and of each part.")
    run_command(main)
