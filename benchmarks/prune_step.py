"""What a step of pruning costs: `python benchmarks/prune_step.py [--density=0.015625]`.

The model is that of the public PyTorch replication (d_model 256, 2 layers, vocabulary 2048, AbsTopK at every
location, sinks, bigram table), with 64 pairs of 64 tokens a step; that replication takes 0.64 s a step on two
CPU cores. In one process the step is timed beside the same step with the other objectives and without
AbsTopK, beside a forward and backward pass of the whole dense model, and beside its floors: the matrix
products at the rate this machine reaches on a large product, and one selection of every AbsTopK site. Its
parts are timed by themselves, each beside its own floor: reading what it needs and writing what it gives
once, at the rate at which this machine negates an array of 8 MB, or its FLOPs at the rate of a large product.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
import math
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import timing

from wsparse import model, sparsity, trees
from wsparse.circuits import HParams, PairArrays, masks, procedure, prune
from wsparse.circuits.settings import Objective
from wsparse.command import run_command
from wsparse.config import ModelConfig
from wsparse.ops import cpu
from wsparse.ops.attention import attend
from wsparse.ops.linear import gelu, matmul
from wsparse.ops.top_k import ablate_largest

PAIRS, TIME, STEPS = 64, 64, 4
ANSWERS, TOKENS = 2 * PAIRS, 2 * PAIRS * TIME


def sparse_params(config: ModelConfig, density: float) -> model.Params:
    """Random weights, each matrix with its share of nonzeros."""
    params = model.init(config, jax.random.key(0))
    project = sparsity.project_top_k(density)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(lambda p: project.update(zeros, project.init(p), p)[0])(params)
    return jax.tree.map(jnp.add, params, update)


def pairs(config: ModelConfig) -> PairArrays:
    """Random prompts, answered at their last tokens."""
    rng = np.random.default_rng(0)
    answer = np.tile([1, 2], PAIRS)
    return PairArrays(
        tokens=jnp.asarray(rng.integers(0, config.vocab_size, (2 * PAIRS, TIME)), jnp.int32),
        position=jnp.full(2 * PAIRS, TIME - 1, jnp.int32),
        answer=jnp.asarray(answer, jnp.int32),
        other=jnp.asarray(answer[::-1].copy(), jnp.int32),
    )


def stepper(config: ModelConfig, params: model.Params, objective: Objective = "mean") -> Callable[[], object]:
    """A call that runs `STEPS` steps of pruning."""
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (32, TIME))
    subject = procedure.Subject(params, config, windows)
    options = {"config": config, "steps": STEPS, "pairs_per_step": PAIRS, "objective": objective}
    run = jax.jit(functools.partial(prune, **options))
    batch = pairs(config)
    return lambda: (
        run(
            params, task_batch=batch, means=subject.node_means, hparams=HParams(), key=jax.random.key(0)
        ).losses
    )


def dense_pass(config: ModelConfig, params: model.Params) -> Callable[[], object]:
    """A call that runs `STEPS` forward and backward passes with logits everywhere, as training does."""
    batch = pairs(config)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = model.forward(params, batch.tokens, config)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.grad(loss)(params)

    return lambda: [gradient(params) for _ in range(STEPS)]


class Part(NamedTuple):
    """A part of a step: a call that runs it, forward and backward, and its least bytes and FLOPs."""

    call: Callable[[], object]
    n_bytes: float
    flops: float


def sites(config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and width of every AbsTopK site; the last layer works at the answers but for keys and values."""
    everywhere = ("attn.act_in", "attn.k", "attn.v")
    return [
        (TOKENS if layer < config.n_layer - 1 or name in everywhere else ANSWERS, width)
        for layer in range(config.n_layer)
        for name, (_, width) in masks.shapes(config).items()
    ]


def products(config: ModelConfig, params: model.Params) -> list[tuple[int, jax.Array]]:
    """Rows of activations and the matrix of every product; see `sites`."""
    kernels = {path: each for path, each in trees.flatten(params["blocks"]).items() if "kernel" in path}
    everywhere = ("attn/k/kernel", "attn/v/kernel")
    found = [
        (TOKENS if layer < config.n_layer - 1 or path in everywhere else ANSWERS, each[layer])
        for layer in range(config.n_layer)
        for path, each in kernels.items()
    ]
    return [*found, (ANSWERS, params["head"]["unembed"])]


def attention_flops(config: ModelConfig) -> int:
    """FLOPs of scores and weighted values, forward."""
    queries = TOKENS * (config.n_layer - 1) + ANSWERS
    return 2 * 2 * queries * TIME * config.attention_width


def parts(config: ModelConfig, params: model.Params) -> dict[str, Part]:
    """A step's largest parts."""
    first, heads = config.n_layer - 1, (config.n_head, config.d_head)
    keys = iter(jax.random.split(jax.random.key(3), 256))

    def normal(*sizes):
        return jax.random.normal(next(keys), sizes)

    def ablation(x, gate_N, mean_N):
        return ablate_largest(x, gate_N, mean_N, x.shape[-1] // 4)

    def attention(queries):
        at_BT = jnp.arange(TIME - queries, TIME, dtype=jnp.int32)[None]
        return timing.forward_and_backward(
            attend,
            normal(ANSWERS, queries, *heads),
            *(normal(ANSWERS, TIME, *heads) for _ in range(2)),
            fixed=(normal(config.n_head), jnp.broadcast_to(at_BT, (ANSWERS, queries))),
        )

    all_sites, all_products = sites(config), products(config, params)
    neurons = (first * TOKENS + ANSWERS, config.mlp_width)
    return {
        "AbsTopK and ablation": Part(
            timing.every(
                timing.forward_and_backward(
                    ablation, normal(n, width), jnp.ones(width), fixed=(normal(width),)
                )
                for n, width in all_sites
            ),
            # Read and write forward; backward reads the value and the gradient, and writes one.
            4 * 5 * sum(n * width for n, width in all_sites),
            0,
        ),
        "products over the nonzeros": Part(
            timing.every(
                timing.forward_and_backward(matmul, normal(n, w.shape[0]), fixed=(w,))
                for n, w in all_products
            ),
            4 * 2 * sum(n * sum(w.shape) for n, w in all_products),
            4 * sum(n * int(jnp.count_nonzero(w)) for n, w in all_products),
        ),
        "attention": Part(
            timing.every(attention(queries) for queries in [TIME] * first + [1]),
            # Four arrays forward; backward those, the result's gradient, and three gradients.
            4 * 12 * config.attention_width * TOKENS,
            # Two products forward, and five backward, of which one makes the scores again.
            attention_flops(config) * 7 / 2,
        ),
        "GELU": Part(timing.forward_and_backward(gelu, normal(*neurons)), 4 * 5 * math.prod(neurons), 0),
    }


def selections(config: ModelConfig) -> float:
    """Seconds for AbsTopK of every site that is not at the answers only."""
    total = 0.0
    for width in [width for rows, width in sites(config) if rows == TOKENS]:
        x = jax.random.normal(jax.random.key(width), (TOKENS, width))
        select = jax.jit(lambda x: sparsity.abs_top_k(x, x.shape[-1] // 4))
        timing.seconds(lambda select=select, x=x: select(x))
        total += timing.seconds(lambda select=select, x=x: select(x))
    return total


def main(argv) -> None:
    """Time the variants in turns and print a table and one JSON line."""
    del argv
    cpu.enable()
    config = ModelConfig(vocab_size=2048, context=TIME, n_layer=2, d_model=256, n_head=16)
    params = sparse_params(config, flags.FLAGS.density)
    plain = dataclasses.replace(config, abs_top_k_fraction=None)
    calls = {
        "step": stepper(config, params),
        "step, objective stochastic": stepper(config, params, "stochastic"),
        "step, objective robust": stepper(config, params, "robust"),
        "step without AbsTopK": stepper(plain, params),
        "dense forward and backward": dense_pass(config, params),
    }
    of_step = parts(config, params)
    timed = {**calls, **{name: part.call for name, part in of_step.items()}}
    medians = timing.medians_in_turns(timed, flags.FLAGS.rounds)
    medians |= {name: medians[name] / STEPS for name in calls}
    rate, bandwidth = timing.matmul_rate(), timing.bandwidth()
    # Forward, and the gradients of the activations: weights get none.
    dense = sum(2 * n * w.size for n, w in products(config, params)) + attention_flops(config)
    floors = {
        "products, were they dense": 2 * dense / rate,
        "AbsTopK (one selection of every site)": selections(config),
    }
    of_parts = {name: max(part.n_bytes / bandwidth, part.flops / rate) for name, part in of_step.items()}
    for name in calls:
        print(f"{name:52}{medians[name]:8.3f} s")
    for name, floor in of_parts.items():
        print(f"  {name:50}{medians[name]:8.3f} s, floor {floor:.3f}")
    for name, floor in floors.items():
        print(f"floor: {name:45}{floor:8.3f} s")
    robust = medians["step, objective robust"] / medians["step"]
    print(f"a step against an adversary takes {robust:.2f} times as long as one against means")
    print(f"at {rate / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.1f} GB/s")
    nonzeros = sum(n for n, _ in sparsity.l0(params).values())
    print(
        f"{nonzeros} nonzero weights of {sum(leaf.size for leaf in trees.flatten(params).values())}; "
        f"{masks.n_nodes(config)} nodes; {0.64 / medians['step']:.2f} times as fast as 0.64 s"
    )
    print(json.dumps({"seconds": medians, "floors": floors | of_parts}))


if __name__ == "__main__":
    flags.DEFINE_float("density", 1 / 64, "Share of weights that are not zero.")
    flags.DEFINE_integer("rounds", 5, "Timed calls of each variant.")
    run_command(main)
