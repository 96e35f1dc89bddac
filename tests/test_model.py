"""The forward pass against a float64 reference, and its properties."""

import dataclasses
import functools

from helpers import shapes
import jax
import jax.numpy as jnp
from model_case import SMALL, SPARSE, TOKENS, forward, random_params, small_run
import numpy as np
import pytest
import reference

from wsparse import model, trees
from wsparse.config import ABS_TOP_K_SITES, ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import LOCATIONS
from wsparse.ops import attention

# Against the reference -----------------------------------------------------------------------------

# Together they take every value of every option; each AbsTopK site is on in some and off in others, no
# two sites in the same ones.
VARIANTS = {
    "sparse default": SPARSE,
    "dense GPT-2": dataclasses.replace(
        SPARSE, norm="layer", sink=False, bigram="none", position="added", tied_embeddings=True,
        abs_top_k_fraction=None, n_head=4,
    ),
    "every site": dataclasses.replace(
        SPARSE, position="concat", d_pos=6, bigram="frozen", activation="relu", logits_bias=True,
        abs_top_k_sites=ABS_TOP_K_SITES, abs_top_k_fraction=0.4,
    ),
    "no biases, positive stream": dataclasses.replace(
        SPARSE, norm="layer", norm_bias=False, bias=False, residual_activation="relu",
        abs_top_k_sites=("attn_in", "attn_k", "resid_post_attn", "mlp_in", "mlp_neuron", "resid_post_mlp"),
    ),
    "sinusoids": dataclasses.replace(
        SPARSE, position="concat_sinusoid", d_pos=5, sink=False, norm_eps=1e-3, tied_embeddings=True,
        logits_bias=True,
        abs_top_k_sites=("attn_in", "attn_v", "attn_out", "mlp_neuron", "resid_post_mlp"),
    ),
    "odd fraction": dataclasses.replace(
        SPARSE, norm="layer", position="concat", d_pos=3, residual_activation="relu", n_layer=3,
        abs_top_k_sites=("attn_q", "attn_k", "attn_out", "mlp_neuron"), abs_top_k_fraction=0.37,
    ),
}  # fmt: skip


@functools.cache
def reference_runs(config: ModelConfig):
    """Logits `(B, T, V)` and acts with our layout, by the reference."""
    runs = [reference.Model(config, random_params(config)).run(tokens) for tokens in TOKENS]
    logits = np.stack([logits for logits, _ in runs])
    acts = {name: np.stack([np.array(seen[name]) for _, seen in runs]) for name in LOCATIONS}
    return logits, {n: a if n == "final_resid" else np.swapaxes(a, 0, 1) for n, a in acts.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_float64_forward_agrees_with_the_reference_everywhere(name):
    config = VARIANTS[name]
    with jax.enable_x64(True):
        config64 = dataclasses.replace(config, compute_dtype="float64")
        logits, acts = jax.device_get(forward(random_params(config), TOKENS, config64))
    want_logits, want_acts = reference_runs(config)
    assert set(acts) == set(LOCATIONS)
    assert logits.dtype == np.float64
    for location in LOCATIONS:
        np.testing.assert_allclose(
            acts[location], want_acts[location], rtol=1e-10, atol=1e-10, err_msg=location
        )
    np.testing.assert_allclose(logits, want_logits, rtol=1e-10, atol=1e-10)


CHANGES = [
    ("sparse default", {"sink": False}),
    ("sparse default", {"bigram": "none"}),
    ("sparse default", {"norm": "layer", "norm_bias": False}),
    ("sparse default", {"activation": "relu"}),
    ("sparse default", {"residual_activation": "relu"}),
    ("sparse default", {"bias": False}),
    ("sparse default", {"norm_eps": 1e-3}),
    ("sparse default", {"abs_top_k_fraction": 0.3}),
    ("every site", {"position": "none", "d_pos": 0}),
    ("every site", {"logits_bias": False}),
    ("dense GPT-2", {"position": "none"}),
    ("dense GPT-2", {"norm_bias": False}),
    ("dense GPT-2", {"norm_eps": 2**-23}),
    *(
        ("every site", {"abs_top_k_sites": tuple(s for s in ABS_TOP_K_SITES if s != site)})
        for site in ABS_TOP_K_SITES
    ),
]


@pytest.mark.parametrize(
    ("name", "change"), CHANGES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x))
)
def test_the_reference_notices_every_option(name, change):
    """Negative control: with one option changed the agreement above would be far off."""
    config = VARIANTS[name]
    params = random_params(config)
    changed = dataclasses.replace(config, **change)
    for part in ("attn", "mlp"):  # a reference without concatenated positions reads fewer rows
        for kernel in params["blocks"][part].values():
            if (
                "d_pos" in change
                and isinstance(kernel, dict)
                and kernel["kernel"].shape[1] == config.read_width
            ):
                kernel["kernel"] = kernel["kernel"][:, : changed.read_width]
    logits, _ = reference.Model(changed, params).run(TOKENS[0])
    assert np.abs(logits - reference_runs(config)[0][0]).max() > 1e-7


def test_the_variants_tell_all_sites_apart():
    signatures = {
        site: tuple(
            config.abs_top_k_fraction is not None and site in config.abs_top_k_sites
            for config in VARIANTS.values()
        )
        for site in ABS_TOP_K_SITES
    }
    assert len(set(signatures.values())) == len(ABS_TOP_K_SITES)
    assert all(True in s and False in s for s in signatures.values())


def relative_error(got, want) -> float:
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


# Properties of the forward pass ----------------------------------------------------------------------


def test_logits_at_positions_are_those_rows_of_all_logits():
    params, logits, acts = small_run()
    positions = np.array([[6, 0, 0], [2, 5, 1]], np.int32)
    some, some_acts = jax.jit(lambda p, t: model.forward(p, t, SMALL, positions_BP=positions))(params, TOKENS)
    want = np.take_along_axis(np.asarray(logits), positions[..., None], axis=1)
    np.testing.assert_allclose(some, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(some_acts["final_resid"], acts["final_resid"])
    assert np.abs(np.asarray(logits)[:, :3] - want).max() > 0.1


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_token_changes_no_earlier_logit(at):
    params, logits, acts = small_run()
    tokens = TOKENS.copy()
    tokens[:, at] = (tokens[:, at] + 1) % SMALL.vocab_size
    changed, changed_acts = forward(params, tokens, SMALL)
    np.testing.assert_array_equal(changed[:, :at], logits[:, :at])
    np.testing.assert_array_equal(changed_acts["final_resid"][:, :at], acts["final_resid"][:, :at])
    for later in range(at, TOKENS.shape[1]):
        assert np.abs(changed[:, later] - logits[:, later]).max(-1).min() > 1e-5


def test_sequences_of_a_batch_do_not_see_each_other():
    params, logits, _ = small_run()
    tokens = TOKENS.copy()
    tokens[1] = 0
    np.testing.assert_array_equal(forward(params, tokens, SMALL)[0][0], logits[0])


def test_remat_changes_no_gradient_and_fixed_tables_have_none():
    config = dataclasses.replace(
        SMALL, abs_top_k_fraction=None, bigram="frozen", position="concat_sinusoid", d_pos=4
    )
    params = random_params(config, np.float32)

    def run(config):
        def loss(params):
            logits, _ = model.forward(params, TOKENS, config)
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        return value, trees.flatten(jax.device_get(gradient))

    (value, gradient), (remat_value, remat_gradient) = (
        run(config),
        run(dataclasses.replace(config, remat=True)),
    )
    np.testing.assert_allclose(remat_value, value, rtol=1e-6)
    for path, leaf in gradient.items():
        np.testing.assert_allclose(remat_gradient[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    without = {path for path, leaf in gradient.items() if not np.any(leaf)}
    assert without == {"head/bigram", "embed/sinusoids"}


def test_bfloat16_runs_near_float32_and_returns_float32_logits():
    config = dataclasses.replace(SMALL, abs_top_k_fraction=None)  # no selection that rounding could flip
    low_config = dataclasses.replace(config, compute_dtype="bfloat16")
    low, acts = forward(random_params(config, np.float32), TOKENS, low_config)
    assert low.dtype == jnp.float32
    assert all(array.dtype == jnp.bfloat16 for array in acts.values())
    assert 1e-4 < relative_error(low, reference_runs(config)[0]) < 0.05


@pytest.mark.parametrize("sink", [None, np.array([300.0, -300.0], np.float32)], ids=["no sink", "sink"])
def test_attention_stays_finite_at_large_scores(sink):
    q = np.full((1, 4, 2, 8), 30.0, np.float32)
    pattern = np.asarray(attention.attention_pattern(q, q, sink))
    assert np.isfinite(pattern).all()
    assert (np.triu(pattern[0, 0], 1) == 0).all()
    np.testing.assert_allclose(pattern[0, :, 3].sum(-1), 1, rtol=1e-6)
    if sink is not None:  # a sink far above the scores takes everything
        small = np.asarray(attention.attention_pattern(q / 100, q / 100, sink))
        np.testing.assert_allclose(small[0, :, 3].sum(-1), [0, 1], atol=1e-6)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="context is 8 tokens, got a sequence of 9"):
        model.forward(shapes(SMALL), np.zeros((1, 9), np.int32), SMALL)


def equations(jaxpr) -> int:
    """Number of equations, those of inner programs included."""
    inner = sum(equations(j) for e in jaxpr.eqns for p in e.params.values() for j in _jaxprs(p))
    return len(jaxpr.eqns) + inner


def _jaxprs(param):
    for each in param if isinstance(param, (tuple, list)) else [param]:
        each = getattr(each, "jaxpr", each)
        if hasattr(each, "eqns"):
            yield each


def test_the_program_does_not_grow_with_depth():
    def program(n_layer):
        config = dataclasses.replace(SMALL, n_layer=n_layer, remat=True)
        loss = lambda params: jnp.sum(model.forward(params, TOKENS, config)[0])
        return equations(jax.make_jaxpr(jax.grad(loss))(shapes(config)).jaxpr)

    assert program(2) == program(12) > 100


def test_the_largest_configs_take_shape_without_their_arrays():
    config = ModelConfig(n_layer=24, d_model=4096, n_head=256, compute_dtype="bfloat16", remat=True)
    params = shapes(config)
    logits, acts = jax.eval_shape(
        lambda params, tokens: model.forward(params, tokens, config),
        params,
        jax.ShapeDtypeStruct((64, 256), np.int32),
    )
    assert logits.shape == (64, 256, 2048)
    assert acts["mlp.post_act"].shape == (24, 64, 256, 4 * 4096)
    assert model.count_parameters(params) > 4e9
