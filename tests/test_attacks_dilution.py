"""Text before a prompt is predicted from runs in which the two never meet."""

import functools

import circuits_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import model, taps, trees
from wsparse.circuits.ablation import answer_margins
from wsparse.circuits.attacks import dilution
from wsparse.circuits.pairs import PairArrays
from wsparse.config import ModelConfig

N_TEXT, N_PROMPT = 7, 5


def config(n_layer: int, **changes) -> ModelConfig:
    values = {
        "vocab_size": 11,
        "context": 16,
        "n_layer": n_layer,
        "d_model": 12,
        "n_head": 3,
        "d_head": 4,
        "d_mlp": 8,
        "position": "concat_sinusoid",
        "d_pos": 4,
    }
    return ModelConfig(**(values | changes))


@functools.cache
def params(config: ModelConfig, seed: int) -> model.Params:
    """Weights so large that attention is far from uniform."""
    drawn = trees.flatten(model.init(config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(drawn))
    return trees.unflatten(
        {
            path: leaf if "positions" in path else leaf + jax.random.normal(key, leaf.shape)
            for key, (path, leaf) in zip(keys, drawn.items(), strict=True)
        }
    )


def prompts(seed: int) -> PairArrays:
    rng = np.random.default_rng(seed)
    return PairArrays(
        tokens=jnp.asarray(rng.integers(0, 11, (6, N_PROMPT)), jnp.int32),
        position=jnp.asarray(rng.integers(1, N_PROMPT, 6), jnp.int32),
        answer=jnp.full(6, 3, jnp.int32),
        other=jnp.full(6, 4, jnp.int32),
    )


def both(config: ModelConfig, seed: int, ablated=None, n_text: int = N_TEXT, reading: float = 1.0):
    """Returns predicted and measured margins, and the shares of attention."""
    alone = prompts(seed)
    text = np.random.default_rng(seed + 1).integers(0, 11, n_text)
    joined = np.concatenate([np.tile(text, (6, 1)), alone.tokens], axis=1)
    after = alone._replace(tokens=jnp.asarray(joined, jnp.int32), position=alone.position + n_text)
    measured_B = answer_margins(params(config, seed), after, ablated, config=config)
    predicted_B, shares_LBH = dilution.predicted_margins(
        params(config, seed),
        alone,
        # The padding is read by nothing.
        jnp.asarray(np.append(text, [7, 7]), jnp.int32),
        jnp.int32(n_text),
        jnp.full((config.n_layer, config.n_head), reading),
        ablated,
        config=config,
    )
    return np.asarray(predicted_B), np.asarray(measured_B), np.asarray(shares_LBH)


@pytest.mark.parametrize("position", ["none", "added", "concat_sinusoid"])
def test_the_prediction_is_exact_in_one_layer(position):
    one = config(1, sink=position != "none", position=position, d_pos=4 if "concat" in position else 0)
    for seed in range(4):
        predicted_B, measured_B, shares_LBH = both(one, seed)
        np.testing.assert_allclose(predicted_B, measured_B, atol=2e-4)
        assert np.all((shares_LBH >= 0) & (shares_LBH <= 1)) and 0.1 < shares_LBH.mean() < 0.9


def test_the_prediction_is_exact_for_a_circuit_of_one_layer():
    one = config(1)
    gates = {"attn.v": jnp.asarray(np.arange(12)[None] % 2, jnp.float32)}
    constants = {"attn.v": jnp.full((1, 12), 0.3)}
    predicted_B, measured_B, _ = both(one, 3, taps.mask(gates, constants))
    np.testing.assert_allclose(predicted_B, measured_B, atol=2e-4)
    assert not np.allclose(measured_B, both(one, 3)[1], atol=0.1)


def test_the_prediction_leaves_out_what_earlier_tokens_of_the_prompt_read():
    """The control: where it is not exact by construction, it is not exact."""
    predicted_B, measured_B, _ = both(config(2), 0)
    assert not np.allclose(predicted_B, measured_B, atol=0.05)


def test_a_text_that_no_head_reads_moves_the_positions_and_nothing_else():
    two = config(2, position="none", d_pos=0)
    predicted_B, _, shares_LBH = both(two, 5, reading=0.0)
    alone_B = answer_margins(params(two, 5), prompts(5), config=two)
    np.testing.assert_allclose(predicted_B, alone_B, atol=1e-4)
    assert not shares_LBH.any()


def test_longer_texts_take_larger_shares_of_uniform_attention():
    uniform = circuits_case.PLANTED
    for n_text in (1, 2):
        _, shares_LBH = dilution.predicted_margins(
            circuits_case.planted_params(),
            circuits_case.planted_pairs(4, 0),
            jnp.array([5, 6, 7], jnp.int32),
            jnp.int32(n_text),
            jnp.ones((uniform.n_layer, uniform.n_head)),
            None,
            config=uniform,
        )
        assert np.asarray(shares_LBH) == pytest.approx(n_text / (n_text + 6), abs=1e-6)
