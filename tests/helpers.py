"""For several tests: shapes and random parameters of any config, and whether a program is one."""

import ast
import functools

import jax
import numpy as np

from wsparse import model
from wsparse.config import ModelConfig


@functools.cache
def shapes(config: ModelConfig):
    """Shapes and dtypes of the parameters, without computing any."""
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def random_params(config: ModelConfig, *, seed: int = 0, dtype=np.float32, scale: float = 1.0):
    """Parameters of normal random numbers: nothing is at a special value, so nothing is lost unseen."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        return (scale * random.normal(size=leaf.shape)).astype(dtype)

    return jax.tree.map(draw, shapes(config))


def parses(text: str) -> bool:
    """Returns whether a text is a Python program."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
