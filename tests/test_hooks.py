"""Activations by name: every spelling finds the right numbers, and changes the right ones."""

import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import hooks, model
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import NODES, OTHER_LOCATIONS

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "hooks.md"
CONFIG = ModelConfig(
    vocab_size=24, context=8, n_layer=3, d_model=16, n_head=2, d_head=4, d_mlp=12,
    abs_top_k_fraction=None,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 7)).astype(np.int32)
# A TransformerLens name -> ours; written out, so that the table in the code is checked.
SAME = {
    "hook_resid_pre": "{}.attn.resid_in",
    "hook_resid_mid": "{}.mlp.resid_mid",
    "hook_attn_out": "{}.attn.resid_delta",
    "hook_mlp_out": "{}.mlp.resid_delta",
    "ln1.hook_normalized": "{}.attn.act_in",
    "ln2.hook_normalized": "{}.mlp.act_in",
    "mlp.hook_post": "{}.mlp.post_act",
    "attn.hook_q": "{}.attn.q",
    "attn.hook_k": "{}.attn.k",
    "attn.hook_v": "{}.attn.v",
    "attn.hook_z": "{}.attn.y",
}
HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")


@pytest.fixture(scope="module")
def params():
    return helpers.random_params(CONFIG, seed=1, scale=1 / 3)


@pytest.fixture(scope="module")
def plain(params):
    """Logits and acts of the forward pass itself."""
    return jax.jit(model.forward, static_argnames="config")(params, TOKENS, CONFIG)


@pytest.fixture(scope="module")
def cached(params):
    return hooks.run_with_cache(params, TOKENS, CONFIG)


def test_the_cache_holds_what_the_forward_pass_gives(plain, cached):
    logits, acts = plain
    got_logits, cache = cached
    np.testing.assert_array_equal(got_logits, logits)
    for location in (*NODES, *OTHER_LOCATIONS):
        np.testing.assert_array_equal(cache[location], acts[location])
        if location != "final_resid":
            np.testing.assert_array_equal(cache[f"2.{location}"], acts[location][2])
    assert "1.attn.q" in cache and "final_resid" in cache and "3.attn.q" not in cache
    assert len(cache) == 3 * 11 + 1


def test_transformer_lens_names_find_the_same_numbers(plain, cached):
    _, acts = plain
    _, cache = cached
    for layer in range(3):
        for hook, ours in SAME.items():
            want = acts[ours.format(layer).split(".", 1)[1]][layer]
            if hook in HEADS:
                want = want.reshape(2, 7, 2, 4)
            np.testing.assert_array_equal(cache[f"blocks.{layer}.{hook}"], want)
    for layer in (0, 1):
        np.testing.assert_array_equal(
            cache[f"blocks.{layer}.hook_resid_post"], acts["attn.resid_in"][layer + 1]
        )
    np.testing.assert_array_equal(cache["blocks.2.hook_resid_post"], acts["final_resid"])
    # The stream adds up under those names as it does there.
    total = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]
    np.testing.assert_allclose(total, cache["blocks.1.hook_resid_mid"], rtol=1e-6, atol=1e-6)
    total = total + cache["blocks.1.hook_mlp_out"]
    np.testing.assert_allclose(total, cache["blocks.1.hook_resid_post"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("names_filter", "names"),
    [
        ("1.attn.q", ["1.attn.q"]),
        (["blocks.1.attn.hook_q", "mlp.post_act"], ["blocks.1.attn.hook_q", "mlp.post_act"]),
        (lambda name: name.endswith("hook_z"), [f"blocks.{i}.attn.hook_z" for i in range(3)]),
        (lambda name: name.startswith("0.mlp.res"), ["0.mlp.resid_mid", "0.mlp.resid_delta"]),
    ],
    ids=["one", "several", "predicate", "our names"],
)  # fmt: skip
def test_only_what_is_asked_for_is_kept(names_filter, names, params, plain):
    _, cache = hooks.run_with_cache(params, TOKENS, CONFIG, names_filter=names_filter)
    assert list(cache) == names
    location = "attn.v"
    with pytest.raises(UserError, match=r"'attn\.v' was not recorded: add it to names_filter"):
        cache[location]
    assert all(value.size for value in cache.values())


def without_neuron(name, value):
    if name == "mlp.post_act":
        return jnp.where(name.layer == 1, value.at[..., 5].set(9.0), value)
    return value


def test_a_tap_by_name_does_what_a_tap_of_the_forward_pass_does(params, plain):
    want, want_acts = jax.jit(model.forward, static_argnames=("config", "tap"))(
        params, TOKENS, CONFIG, tap=without_neuron
    )
    for name in ("1.mlp.post_act", "blocks.1.mlp.hook_post"):
        taps = {name: lambda x: x.at[..., 5].set(9.0)}
        logits, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps=taps)
        np.testing.assert_allclose(logits, want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(cache["2.attn.q"], want_acts["attn.q"][2], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(cache[name][..., 5], 9.0)
    assert np.abs(want - plain[0]).max() > 1e-3


def test_heads_stand_apart_in_a_tap_of_transformer_lens(params, plain):
    def cut(z_BTHK):
        assert z_BTHK.shape == (2, 7, 2, 4)
        return z_BTHK.at[:, :, 1].set(0.0)

    logits, cache = hooks.run_with_taps(
        params, TOKENS, CONFIG, taps={"blocks.0.attn.hook_z": cut, "2.attn.y": lambda y: 2 * y}
    )
    acts = plain[1]
    np.testing.assert_array_equal(cache["0.attn.y"][..., 4:], 0.0)
    np.testing.assert_allclose(cache["0.attn.y"][..., :4], acts["attn.y"][0][..., :4], rtol=1e-6)
    assert np.abs(logits - plain[0]).max() > 1e-3


def test_taps_of_one_place_are_applied_in_order_and_of_all_layers_in_each(params, plain):
    taps = {"attn.resid_delta": lambda x: x + 1, "blocks.1.hook_attn_out": lambda x: x * 0}
    _, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps=taps)
    first = plain[1]["attn.resid_delta"][0] + 1
    np.testing.assert_allclose(cache["0.attn.resid_delta"], first, rtol=1e-6)
    np.testing.assert_array_equal(cache["1.attn.resid_delta"], 0.0)
    assert np.abs(cache["2.attn.resid_delta"]).min() > 0


def test_the_residual_after_the_last_block_can_be_changed(params):
    taps = {"blocks.2.hook_resid_post": jnp.zeros_like}
    logits, _ = hooks.run_with_taps(params, TOKENS, CONFIG, taps=taps)
    bigram = params["head"]["bigram"][TOKENS]
    np.testing.assert_allclose(logits, bigram, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("3.attn.q", "2.attn.q"),
        ("blocks.3.attn.hook_q", "blocks.2.attn.hook_q"),
        ("blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post"),
        ("blocks.1.attn.hook_attn_scores", "blocks.1."),
        ("attn.qq", "attn.q"),
        ("0.final_resid", "final_resid"),
        ("blocks.00.attn.hook_q", "blocks.0.attn.hook_q"),
    ],
)
def test_a_name_without_a_place_is_refused_with_the_nearest(name, near, params):
    for run in (
        lambda: hooks.run_with_cache(params, TOKENS, CONFIG, names_filter=name),
        lambda: hooks.run_with_taps(params, TOKENS, CONFIG, taps={name: lambda x: x}),
    ):
        with pytest.raises(UserError, match=f"no activation '{name}' in a model of 3 layers") as e:
            run()
        assert f"did you mean '{near}" in str(e.value)


def test_the_attention_pattern_is_answered_with_what_computes_it(params, cached):
    with pytest.raises(UserError, match=r"is not recorded; it is model\.attention_pattern") as error:
        cached[1]["blocks.1.attn.hook_pattern"]
    expression = re.search(r"it is (model\.attention_pattern\(.*\)), with sink", str(error.value))
    pattern = eval(
        expression[1], {"model": model, "cache": cached[1], "sink": params["blocks"]["attn"]["sink"][1]}
    )
    assert pattern.shape == (2, 2, 7, 7)
    assert (np.sum(np.asarray(pattern), -1) < 1).all()
    with pytest.raises(UserError, match="did you mean 'blocks"):
        cached[1]["blocks.1.attn.hook_pattern_"]


def test_a_loop_over_nodes_compiles_once_and_sets_each(params, plain, compilations):
    base = np.asarray(plain[1]["mlp.post_act"][1])
    results = []
    with compilations() as compiled:
        for channel in range(4):
            taps = hooks.set_node(f"1.mlp.post_act.{channel}", CONFIG, value=float(channel))
            logits, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps=taps)
            value = np.asarray(cache["1.mlp.post_act"])
            assert (value[..., channel] == channel).all()
            others = np.arange(12) != channel
            np.testing.assert_allclose(value[..., others], base[..., others], rtol=1e-6)
            results.append(np.asarray(logits))
    assert sum("_forward_with_taps" in name for name in compiled) == 1
    assert len({result.tobytes() for result in results}) == 4


def test_the_same_function_is_compiled_once_and_another_is_another(params, compilations):
    double, triple = (lambda x: 2 * x), (lambda x: 3 * x)
    with compilations() as compiled:
        runs = [
            hooks.run_with_taps(params, TOKENS, CONFIG, taps={"0.attn.q": function})[1]["0.attn.q"]
            for function in (double, double, triple)
        ]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_allclose(runs[2] / runs[0], 1.5, rtol=1e-6)
    assert sum("_forward_with_taps" in name for name in compiled) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1.mlp.post_act.12", "3 layers and 12 channels"),
        ("3.mlp.post_act.0", "3 layers"),
        ("1.mlp.post_act", "written layer.location.channel"),
        ("1.mlp.postact.3", "did you mean 'mlp.post_act'"),
    ],
)
def test_a_node_that_the_model_lacks_is_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        hooks.set_node(name, CONFIG)


def test_a_cache_prints_what_it_holds(params, cached):
    assert repr(cached[1]) == (
        "Activations(34 of 3 layers: 0.attn.resid_in, 0.attn.act_in, 0.attn.q, ..., final_resid)"
    )
    _, cache = hooks.run_with_cache(params, TOKENS, CONFIG, names_filter="1.attn.q")
    assert repr(cache) == "Activations(1 of 3 layers: 1.attn.q)"


def test_a_tap_that_changes_the_shape_is_refused(params):
    with pytest.raises(UserError, match=r"of '1\.attn\.q' must return shape \(2, 7, 8\).*got \(2, 7\)"):
        hooks.run_with_taps(params, TOKENS, CONFIG, taps={"1.attn.q": lambda x: x[..., 0]})


def test_tokens_without_a_batch_are_refused(params):
    with pytest.raises(UserError, match=r"integers of shape \(batch, time\), got int32 of shape \(7,\)"):
        hooks.run_with_cache(params, TOKENS[0], CONFIG)


def test_the_table_in_the_docs_names_every_hook_with_its_place_and_shape(cached):
    _, cache = cached
    sizes = {"B": 2, "T": 7, "D": 16, "R": 16, "H": 2, "K": 4, "F": 12}
    rows = re.findall(r"\| `(\S+)` \| `blocks\.\{i\}\.(\S+)` \| \(([^)]*)\) \|", DOCS.read_text())
    for ours, hook, shape in rows:
        value = cache[f"blocks.0.{hook}"]
        assert value.shape == tuple(sizes[letter] for letter in shape.split(", "))
        same = cache[ours.replace("{i}", "0").replace("{i+1}", "1")]
        np.testing.assert_array_equal(value.reshape(same.shape), same)
    documented = [hook for _, hook, _ in rows]
    assert sorted(documented) == sorted({*SAME, "hook_resid_post"})
    assert set(documented) == {n.split(".", 2)[2] for n in hooks.names(CONFIG) if n.startswith("blocks")}
