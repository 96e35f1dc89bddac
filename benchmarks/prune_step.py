"""What a step of pruning costs: `python benchmarks/prune_step.py [--density=0.015625]`.

The model is that of the public PyTorch replication (d_model 256, 2 layers, vocabulary 2048, AbsTopK at every
location, sinks, bigram table), with 64 pairs of 64 tokens a step; that replication takes 0.64 s a step on two
CPU cores. In one process the step is timed beside the same step without AbsTopK, beside a forward and
backward pass of the whole dense model, and beside its floors: the matrix products at the rate this machine
reaches on a large product, and one selection of every AbsTopK site. Its parts are timed by themselves, each
beside its own floor: reading what it needs and writing what it gives once, at the rate at which this machine
negates an array of 8 MB, or its FLOPs at the rate of a large product.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import json
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import timing

from wsparse import model, sparsity, trees
from wsparse.circuits import HParams, PairArrays, find, masks, prune
from wsparse.config import ModelConfig
from wsparse.errors import run_command

PAIRS, TIME, STEPS = 64, 64, 4


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


def stepper(config: ModelConfig, params: model.Params) -> Callable[[], object]:
    """A call that runs `STEPS` steps of pruning."""
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (32, TIME))
    subject = find.Subject(params, config, windows)
    run = jax.jit(functools.partial(prune, config=config, steps=STEPS, pairs_per_step=PAIRS))
    batch = pairs(config)
    return lambda: (
        run(
            params,
            task_batch=batch,
            means=subject.node_means,
            hparams=HParams(),
            key=jax.random.key(0),
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


def parts(config: ModelConfig, params: model.Params) -> dict[str, Part]:
    """A step's largest parts; in the last layer all but keys and values is computed at the answers only."""
    rows, full, first = 2 * PAIRS, 2 * PAIRS * TIME, config.n_layer - 1
    keys = iter(jax.random.split(jax.random.key(3), 256))

    def normal(*sizes):
        return jax.random.normal(next(keys), sizes)

    block, read = params["blocks"], ("attn.act_in", "attn.k", "attn.v")
    sites, products = [], []
    for layer in range(config.n_layer):
        for name, (_, width) in masks.shapes(config).items():
            sites.append((full if layer < first or name in read else rows, width))
        for path, each in trees.flatten(block).items():
            if path.endswith("kernel"):
                whole = layer < first or any(f"attn/{name}/" in path for name in "kv")
                products.append((full if whole else rows, each[layer]))
    products.append((rows, params["head"]["unembed"]))

    def ablation(x, gate_N, mean_N):
        return model.ablate_largest(x, gate_N, mean_N, x.shape[-1] // 4)

    heads = (config.n_head, config.d_head)
    attention = [
        timing.forward_and_backward(
            lambda q, k, v, sink, at: model.attend(q, k, v, sink, at),
            normal(rows, queries, *heads),
            *(normal(rows, TIME, *heads) for _ in range(2)),
            normal(config.n_head),
            jnp.broadcast_to(jnp.arange(TIME - queries, TIME, dtype=jnp.int32), (rows, queries)),
            gradients=3,
        )
        for queries in [TIME] * first + [1]
    ]
    elements = sum(n * width for n, width in sites)
    nonzeros = [int(jnp.count_nonzero(w)) * n for n, w in products]
    width = config.attention_width
    scores = full * TIME * first + rows * TIME
    return {
        "AbsTopK and ablation": Part(
            timing.every(
                timing.forward_and_backward(
                    ablation, normal(n, wide), jnp.ones(wide), normal(wide), gradients=2
                )
                for n, wide in sites
            ),
            # Read and write forward; backward reads the value and the gradient, and writes one.
            4 * 5 * elements,
            0,
        ),
        "products over the nonzeros": Part(
            timing.every(
                timing.forward_and_backward(model.matmul, normal(n, w.shape[0]), w, gradients=1)
                for n, w in products
            ),
            4 * 2 * sum(n * sum(w.shape) for n, w in products),
            4 * sum(nonzeros),
        ),
        "attention": Part(
            timing.every(attention),
            # Four arrays forward; backward those, the result's gradient, and three gradients.
            4 * 12 * width * full,
            # Two products forward, and five backward, of which one makes the scores again.
            2 * 7 * scores * width,
        ),
        "GELU": Part(
            timing.forward_and_backward(model.gelu, normal(first * full + rows, config.mlp_width)),
            4 * 5 * (first * full + rows) * config.mlp_width,
            0,
        ),
    }


def main(argv) -> None:
    """Time the variants in turns and print a table and one JSON line."""
    del argv
    config = ModelConfig(vocab_size=2048, context=TIME, n_layer=2, d_model=256, n_head=16)
    params = sparse_params(config, flags.FLAGS.density)
    plain = dataclasses.replace(config, abs_top_k_fraction=None)
    calls = {
        "step": stepper(config, params),
        "step without AbsTopK": stepper(plain, params),
        "dense forward and backward": dense_pass(config, params),
    }
    of_step = parts(config, params)
    timed = {**calls, **{name: part.call for name, part in of_step.items()}}
    medians = timing.medians_in_turns(timed, flags.FLAGS.rounds)
    medians |= {name: medians[name] / STEPS for name in calls}
    tokens, answers = 2 * PAIRS * TIME, 2 * PAIRS
    floors = {
        "products, were they dense": _products(config, tokens, answers) / timing.matmul_rate(),
        "AbsTopK (one selection of every site)": _selections(config, tokens),
    }
    rate, bandwidth = timing.matmul_rate(), timing.bandwidth()
    for name, part in of_step.items():
        floors[name] = max(part.n_bytes / bandwidth, part.flops / rate)
    for name in calls:
        print(f"{name:52}{medians[name]:8.3f} s")
    for name in of_step:
        print(f"  {name:50}{medians[name]:8.3f} s, floor {floors[name]:.3f}")
    for name in floors.keys() - of_step.keys():
        print(f"floor: {name:45}{floors[name]:8.3f} s")
    print(f"at {rate / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.1f} GB/s")
    nonzeros = sum(n for n, _ in sparsity.l0(params).values())
    print(
        f"{nonzeros} nonzero weights of {sum(leaf.size for leaf in trees.flatten(params).values())}; "
        f"{masks.n_nodes(config)} nodes; {0.64 / medians['step']:.2f} times as fast as 0.64 s"
    )
    print(json.dumps({"seconds": medians, "floors": floors}))


def _products(config: ModelConfig, tokens: int, answers: int) -> float:
    """FLOPs of a step: weights get no gradient, and the last layer runs at the answers only."""
    reads = 3 * config.d_model * config.attention_width
    rest = config.attention_width * config.d_model + 2 * config.d_model * config.mlp_width
    attention = 2 * TIME * config.attention_width
    full = tokens * (reads + rest + attention) * (config.n_layer - 1)
    last = tokens * reads * 2 / 3 + answers * (reads / 3 + rest + attention)
    return 4 * (full + last + answers * config.d_model * config.vocab_size)


def _selections(config: ModelConfig, tokens: int) -> float:
    """Seconds for AbsTopK of every site of a full layer and of the last layer's reads."""
    widths = [shape[1] for shape in masks.shapes(config).values()]
    last = [
        shape[1]
        for name, shape in masks.shapes(config).items()
        if name in ("attn.act_in", "attn.k", "attn.v")
    ]
    total = 0.0
    for width in [*widths * (config.n_layer - 1), *last]:
        x = jax.random.normal(jax.random.key(width), (tokens, width))
        select = jax.jit(lambda x: sparsity.abs_top_k(x, x.shape[-1] // 4))
        timing.seconds(lambda select=select, x=x: select(x))
        total += timing.seconds(lambda select=select, x=x: select(x))
    return total


if __name__ == "__main__":
    flags.DEFINE_float("density", 1 / 64, "Share of weights that are not zero.")
    flags.DEFINE_integer("rounds", 5, "Timed calls of each variant.")
    run_command(main)
