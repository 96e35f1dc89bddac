"""Activations by name: every spelling finds the right numbers, and changes the right ones."""

import dataclasses
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import viewer_case

from wsparse import hooks, model, runs
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
    assert cache.get("attn.v") is cache.get("attn.vv") is None
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


def softmax_with_sink(scores_BHTS, sink_H):
    """Causal, with a logit of each head in the denominator alone; in float64."""
    time = scores_BHTS.shape[-1]
    weights = np.exp(np.float64(scores_BHTS)) * np.tril(np.ones((time, time)))
    return weights / (weights.sum(-1, keepdims=True) + np.exp(np.float64(sink_H))[:, None, None])


def test_attention_patterns_are_found_by_name_and_make_what_heads_give(params, plain, cached):
    _, cache = cached
    q_BTHK, k_BSHK, v_BSHK = (np.asarray(cache[f"blocks.1.attn.hook_{name}"]) for name in "qkv")
    scores_BHTS = np.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / np.sqrt(4)
    pattern_BHTS = cache["blocks.1.attn.hook_pattern"]
    want = softmax_with_sink(scores_BHTS, params["blocks"]["attn"]["sink"][1])
    np.testing.assert_allclose(pattern_BHTS, want, atol=1e-6)
    y_BTHK = np.einsum("bhts,bshk->bthk", want, v_BSHK)
    np.testing.assert_allclose(cache["blocks.1.attn.hook_z"], y_BTHK, atol=1e-5)
    assert (np.sum(pattern_BHTS, -1) < 1).all()
    # Of one layer only, and by a predicate as people write it.
    for names_filter in ("blocks.1.attn.hook_pattern", lambda name: name.endswith("hook_pattern")):
        _, filtered = hooks.run_with_cache(params, TOKENS, CONFIG, names_filter=names_filter)
        np.testing.assert_array_equal(filtered["blocks.1.attn.hook_pattern"], pattern_BHTS)
        assert "blocks.1.attn.hook_z" not in filtered
    assert list(filtered) == [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    _, without = hooks.run_with_cache(params, TOKENS, CONFIG, names_filter="attn.q")
    with pytest.raises(UserError, match="was not recorded: add it to names_filter"):
        without["blocks.1.attn.hook_pattern"]
    with pytest.raises(UserError, match="did you mean 'blocks"):
        without["blocks.1.attn.hook_pattern_"]


def test_a_tap_on_an_attention_pattern_changes_what_heads_read(params, plain, cached):
    name = "blocks.1.attn.hook_pattern"
    same, _ = hooks.run_with_taps(params, TOKENS, CONFIG, taps={name: lambda x: x})
    np.testing.assert_allclose(same, plain[0], rtol=1e-5, atol=1e-5)

    def itself(pattern_BHTS):
        """Head 1 attends to its own token."""
        return pattern_BHTS.at[:, 1].set(jnp.broadcast_to(jnp.eye(7), (2, 7, 7)))

    logits, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps={name: itself})
    assert np.abs(logits - plain[0]).max() > 1e-3
    v_BSHK, z_BTHK = (cache[f"blocks.1.attn.hook_{letter}"] for letter in "vz")
    np.testing.assert_allclose(z_BTHK[:, :, 1], v_BSHK[:, :, 1], rtol=1e-6)
    np.testing.assert_allclose(z_BTHK[:, :, 0], cached[1]["blocks.1.attn.hook_z"][:, :, 0], atol=1e-6)
    # The cache has patterns after the taps too, in this layer and in those that read what it writes.
    np.testing.assert_array_equal(cache[name][:, 1], np.broadcast_to(np.eye(7), (2, 7, 7)))
    pattern = {i: cached[1][f"blocks.{i}.attn.hook_pattern"] for i in range(3)}
    np.testing.assert_allclose(cache["blocks.0.attn.hook_pattern"], pattern[0], atol=1e-6)
    assert np.abs(cache["blocks.2.attn.hook_pattern"] - pattern[2]).max() > 1e-3
    # Queries are changed before the pattern, and what heads give after it.
    taps = {
        "blocks.1.attn.hook_z": lambda z: 2 * z,
        name: lambda pattern: pattern - uniform,
        "1.attn.q": jnp.zeros_like,
    }
    uniform = softmax_with_sink(np.zeros((2, 2, 7, 7)), params["blocks"]["attn"]["sink"][1])
    _, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps=taps)
    np.testing.assert_allclose(cache["1.attn.y"], 0, atol=1e-5)


def test_a_loop_over_nodes_compiles_once_and_sets_each(params, compilations):
    # A shape of this test's own, or it would find what others have compiled.
    tokens = TOKENS[:, :6]
    base = np.asarray(hooks.run_with_cache(params, tokens, CONFIG)[1]["1.mlp.post_act"])
    results = []
    with compilations() as compiled:
        for channel in range(4):
            taps = hooks.set_node(f"1.mlp.post_act.{channel}", CONFIG, value=float(channel))
            logits, cache = hooks.run_with_taps(params, tokens, CONFIG, taps=taps)
            value = np.asarray(cache["1.mlp.post_act"])
            assert (value[..., channel] == channel).all()
            others = np.arange(12) != channel
            np.testing.assert_allclose(value[..., others], base[..., others], rtol=1e-6)
            results.append(np.asarray(logits))
    assert sum("_forward_with_taps" in name for name in compiled) == 1
    assert len({result.tobytes() for result in results}) == 4


def test_whatever_the_taps_are_the_model_is_compiled_once_for_a_shape(params, compilations):
    tokens = TOKENS[:1, :5]
    with compilations() as compiled:
        for name in ("0.attn.q", "attn.q", "2.mlp.post_act", "final_resid", "blocks.1.attn.hook_pattern"):
            for factor in (2.0, 3.0):
                hooks.run_with_taps(params, tokens, CONFIG, taps={name: lambda x, by=factor: by * x})
        hooks.run_with_taps(params, tokens, CONFIG, taps={"0.attn.v": jnp.sin, "1.attn.resid_delta": jnp.cos})
        hooks.run_with_cache(params, tokens, CONFIG)
    assert sum("_forward" in name for name in compiled) == 2
    # Another shape is another program: the count can count.
    with compilations() as compiled:
        hooks.run_with_taps(params, TOKENS[:1, :4], CONFIG, taps={"0.attn.v": jnp.sin})
    assert sum("_forward" in name for name in compiled) == 2


def test_the_layer_of_a_recorded_name_compiles_nothing(params, compilations):
    with compilations() as compiled:
        for i in range(3):
            hooks.run_with_cache(params, TOKENS[:, :3], CONFIG, names_filter=f"{i}.mlp.act_in")
    assert sum("_forward" in name for name in compiled) == 1


def test_a_tap_is_called_in_every_run_with_numbers_that_it_may_look_at(params):
    factor, seen = 2.0, []

    def scaled(x):
        seen.append(float(x[0, 0, 0]))
        return factor * x if seen[-1] != 0 else x

    values = []
    for factor in (2.0, 3.0):  # noqa: B007 (read by the tap)
        _, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps={"0.attn.q": scaled})
        values.append(cache["0.attn.q"])
    np.testing.assert_allclose(values[1] / values[0], 1.5, rtol=1e-6)
    assert len(seen) == 2


def test_taps_of_all_places_at_once_are_those_of_one_forward_pass(params):
    """Each sees what the ones before it have changed: an order that is wrong anywhere gives other numbers."""

    def shifted(_, x):
        return 1.05 * x + 0.01

    want, want_acts = jax.jit(model.forward, static_argnames=("config", "tap"))(
        params, TOKENS, CONFIG, tap=shifted
    )
    places = (*NODES, *OTHER_LOCATIONS)
    taps = dict.fromkeys(places, lambda x: shifted(None, x))
    logits, cache = hooks.run_with_taps(params, TOKENS, CONFIG, taps=taps)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
    for name in places:
        np.testing.assert_allclose(cache[name], want_acts[name], rtol=1e-4, atol=1e-4)


def test_what_a_run_was_given_is_not_changed_afterwards(params, monkeypatch):
    """It may not have been read yet: computations are dispatched, not awaited."""
    given = []
    forward = hooks._forward_with_taps

    def watched(params, tokens_BT, acts, changed, *, config):
        given.append((changed, {name: mask.copy() for name, mask in changed.items()}))
        return forward(params, tokens_BT, acts, changed, config=config)

    monkeypatch.setattr(hooks, "_forward_with_taps", watched)
    hooks.run_with_taps(params, TOKENS, CONFIG, taps={"attn.q": jnp.sin, "mlp.post_act": jnp.sin})
    assert len(given) == 6
    for changed, snapshot in given:
        for name, mask in changed.items():
            np.testing.assert_array_equal(mask, snapshot[name])


@pytest.mark.slow
def test_gradients_pass_through_taps():
    config = dataclasses.replace(CONFIG, n_layer=1)
    params = helpers.random_params(config, seed=1, scale=1 / 3)

    def change(scale):
        """Through the place that is tapped, and through the values that come to it."""
        taps = {"0.attn.v": lambda x: scale * x, "0.mlp.post_act": lambda x: scale * x}
        return jnp.mean(hooks.run_with_taps(params, TOKENS, config, taps=taps)[0] ** 2)

    want = (change(0.92) - change(0.88)) / 0.04
    assert abs(want) > 1e-3
    np.testing.assert_allclose(jax.grad(change)(0.9), want, rtol=2e-2)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A run in the folder that the docs' examples read, below the working folder."""
    source = viewer_case.run()
    runs.create(tmp_path / "runs" / "tiny", source.config, source.params, source.tokenizer, summary={})
    monkeypatch.chdir(tmp_path)


def examples(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.usefixtures("tiny")
def test_the_examples_of_the_docs_run_and_their_ablations_change_the_logits(capsys):
    names: dict = {}
    one_neuron, every_neuron, a_head = examples(DOCS)
    for block in (one_neuron, a_head):
        exec(block, names)
        assert float(np.abs(names["ablated"] - names["logits"]).max()) > 0
    # Some neurons change the logits, and others are 0 at every token of the text.
    exec(every_neuron, names)
    assert 0 < len(capsys.readouterr().out.split()) < viewer_case.CONFIG.mlp_width
    assert names["pattern"].shape == (1, 2, 12, 12)


@pytest.mark.usefixtures("tiny")
def test_the_ablation_of_the_readme_changes_the_logits():
    (block,) = (block for block in examples(DOCS.parent.parent / "README.md") if "tap=" in block)
    names: dict = {}
    exec(block, names)
    assert float(np.abs(names["ablated"] - names["logits"]).max()) > 0


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
    assert "| `blocks.{i}.attn.hook_pattern` | (B, H, T, T) |" in DOCS.read_text()
    assert cache["blocks.0.attn.hook_pattern"].shape == (2, 2, 7, 7)
    documented = [hook for _, hook, _ in rows]
    assert sorted(documented) == sorted({*SAME, "hook_resid_post"})
    assert {*documented, "attn.hook_pattern"} == {
        n.split(".", 2)[2] for n in hooks.names(CONFIG) if n.startswith("blocks")
    }
