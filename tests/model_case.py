"""A small model with nothing at a special value, and what its forward pass makes of some tokens."""

import dataclasses
import functools

import helpers
import jax
import numpy as np

from wsparse import model, trees
from wsparse.config import ModelConfig
from wsparse.nodes import NODES

SPARSE = ModelConfig(vocab_size=24, context=8, n_layer=2, d_model=16, n_head=3, d_head=4, d_mlp=40)
# Each selection adds to the time a program compiles; most tests make do with two of the eight.
SMALL = dataclasses.replace(SPARSE, abs_top_k_sites=("attn_v", "mlp_neuron"))
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7)).astype(np.int32)

forward = jax.jit(model.forward, static_argnames=("config", "tap"))


@functools.cache
def fresh(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial parameters by path; op by op, so that configs share what is compiled."""
    return trees.flatten(jax.device_get(model.init(config, jax.random.key(seed))))


def random_params(config: ModelConfig, dtype=np.float64, seed: int = 1):
    """Parameters with nothing at a special value: no zero bias, sink or bigram, no gain of 1."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.normal(size=leaf.shape) * (0.3 if path.endswith("kernel") else 0.5)
        return (1 + values if path.endswith("gain") else values).astype(dtype)

    return trees.map_with_path(draw, helpers.shapes(config))


@functools.cache
def small_run(tap=None):
    """Parameters of `SMALL` in float32, and what the jitted forward makes of `TOKENS`."""
    params = random_params(SMALL, np.float32)
    return params, *forward(params, TOKENS, SMALL, tap=tap)


def constant(number: float, config=SMALL):
    """The number for every node, location -> `(L, N)`."""
    return {
        name: np.full((config.n_layer, kind.width(config)), number, np.float32)
        for name, kind in NODES.items()
    }
