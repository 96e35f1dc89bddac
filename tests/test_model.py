"""The forward pass against a float64 reference; taps; initial parameters."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from wsparse import model, nodes, taps, trees
from wsparse.config import ABS_TOP_K_SITES, NODE_SITES, ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import NODES, OTHER_LOCATIONS
from wsparse.ops import attention

LOCATIONS = (*NODES, *OTHER_LOCATIONS)
SPARSE = ModelConfig(vocab_size=24, context=8, n_layer=2, d_model=16, n_head=3, d_head=4, d_mlp=40)
# Each selection adds to the time a program compiles; most tests make do with two of the eight.
SMALL = dataclasses.replace(SPARSE, abs_top_k_sites=("attn_v", "mlp_neuron"))
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7)).astype(np.int32)

forward = jax.jit(model.forward, static_argnames=("config", "tap"))


@functools.cache
def fresh(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Initial parameters by path; op by op, so that configs share what is compiled."""
    return trees.flatten(jax.device_get(model.init(config, jax.random.key(seed))))


@functools.cache
def shapes(config: ModelConfig):
    return jax.eval_shape(lambda: model.init(config, jax.random.key(0)))


def random_params(config: ModelConfig, dtype=np.float64, seed: int = 1):
    """Parameters with nothing at a special value: no zero bias, sink or bigram, no gain of 1."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        values = random.normal(size=leaf.shape) * (0.3 if path.endswith("kernel") else 0.5)
        return (1 + values if path.endswith("gain") else values).astype(dtype)

    return trees.map_with_path(draw, shapes(config))


@functools.cache
def small_run(tap=None):
    """Parameters of `SMALL` in float32, and what the jitted forward makes of `TOKENS`."""
    params = random_params(SMALL, np.float32)
    return params, *forward(params, TOKENS, SMALL, tap=tap)


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


# Taps ----------------------------------------------------------------------------------------------


def test_the_identity_tap_is_bitwise_no_tap():
    _, logits, acts = small_run()
    _, tapped_logits, tapped = small_run(taps.identity)
    np.testing.assert_array_equal(
        np.asarray(logits).view(np.uint32), np.asarray(tapped_logits).view(np.uint32)
    )
    assert set(tapped) == set(LOCATIONS)
    for location in LOCATIONS:
        np.testing.assert_array_equal(
            np.asarray(acts[location]).view(np.uint32), np.asarray(tapped[location]).view(np.uint32)
        )


def test_a_tap_is_called_at_every_location_of_every_layer_with_its_index():
    """Channel 0 of every location is overwritten with a number that names location and layer."""
    calls = []

    def stamp(name, value):
        calls.append(str(name))
        layer = 50 if name.layer is None else name.layer
        return value.at[..., 0].set(100 * (1 + LOCATIONS.index(name)) + layer)

    params, _, _ = small_run()
    _, acts = forward(params, TOKENS, SMALL, tap=stamp)
    assert sorted(calls) == sorted(LOCATIONS)  # traced once, whatever the depth
    for location in LOCATIONS:
        code = 100 * (1 + LOCATIONS.index(location))
        layers = [50] if location == "final_resid" else range(SMALL.n_layer)
        stamped = acts[location][None] if location == "final_resid" else acts[location]
        for array, layer in zip(stamped, layers, strict=True):
            assert (np.asarray(array[..., 0]) == code + layer).all(), (location, layer)


@jax.jit
def shifted(params, shift):
    """Forward with `shift[location][layer]` added to every channel there."""

    def tap(name, value):
        by = shift[name] if name.layer is None else shift[name][name.layer]
        return value + by

    return model.forward(params, TOKENS, SMALL, tap=tap)


@pytest.mark.parametrize("location", LOCATIONS)
def test_what_a_tap_changes_is_recorded_and_changes_logits_and_later_layers_only(location):
    params, _, _ = small_run()
    none = {n: np.zeros(() if n == "final_resid" else 2, np.float32) for n in LOCATIONS}
    logits, acts = shifted(params, none)
    for layer in [None] if location == "final_resid" else range(SMALL.n_layer):
        shift = np.float32(0.5) if layer is None else np.eye(2, dtype=np.float32)[layer] / 2
        new_logits, new_acts = shifted(params, none | {location: shift})
        assert np.abs(new_logits - logits).max() > 1e-4
        here = np.asarray(new_acts[location] - acts[location])
        here = here if layer is None else here[layer]
        np.testing.assert_allclose(here, 0.5, atol=1e-5)
        for earlier in range(layer or 0):
            for name in set(LOCATIONS) - {"final_resid"}:
                np.testing.assert_array_equal(new_acts[name][earlier], acts[name][earlier])


def constant(number: float, config=SMALL):
    return {
        name: np.full((config.n_layer, kind.width(config)), number, np.float32)
        for name, kind in NODES.items()
    }


@jax.jit
def masked(params, gates, means):
    return model.forward(params, TOKENS, SMALL, tap=taps.mask(gates, means))


def test_open_gates_change_nothing_and_closed_gates_show_the_means():
    params, logits, acts = small_run()
    random = np.random.default_rng(0)
    means = {n: random.normal(size=m.shape).astype(np.float32) for n, m in constant(0).items()}
    open_logits, open_acts = masked(params, constant(1), means)
    np.testing.assert_array_equal(open_logits, logits)
    for location in LOCATIONS:
        np.testing.assert_array_equal(open_acts[location], acts[location])

    closed_logits, closed = masked(params, constant(0), means)
    for name, mean_LN in means.items():
        want = np.broadcast_to(mean_LN[:, None, None], closed[name].shape)
        np.testing.assert_array_equal(closed[name], want)
    # Downstream of closed gates: every token's stream is its embedding plus the means.
    resid = (
        params["embed"]["tokens"][TOKENS]
        + sum(means["attn.resid_delta"])
        + sum(means["mlp.resid_delta"])
    )
    np.testing.assert_allclose(closed["final_resid"], resid, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        closed["attn.y"][1], _mean_seen_through_sinks(params, means), rtol=1e-5, atol=1e-5
    )
    assert np.abs(closed_logits - logits).max() > 0.1


def _mean_seen_through_sinks(params, means):
    """`attn.y` of layer 1 when q, k and v are their means: v times what the sink leaves of the t + 1 keys."""
    q, k, v = (means[f"attn.{name}"][1].reshape(SMALL.n_head, SMALL.d_head) for name in "qkv")
    score = np.exp((q * k).sum(-1) / 2)  # sqrt(d_head) is 2
    keys = np.arange(1, TOKENS.shape[1] + 1)[:, None]
    share = keys * score / (keys * score + np.exp(params["blocks"]["attn"]["sink"][1]))
    return np.broadcast_to(
        (share[..., None] * v).reshape(1, TOKENS.shape[1], -1), (2, TOKENS.shape[1], v.size)
    )


def test_a_mask_touches_only_the_locations_it_has_gates_for():
    tap = taps.mask({"mlp.post_act": constant(0)["mlp.post_act"]}, constant(0.25))
    value = jnp.ones((2, 7, 40))
    assert (np.asarray(tap(taps.Location("mlp.post_act", 1), value)) == 0.25).all()
    assert tap(taps.Location("attn.q", 1), value) is value


def test_a_patch_replaces_the_chosen_nodes_by_those_of_another_prompt():
    params, logits, acts = small_run()
    other_logits, other = forward(params, TOKENS[::-1].copy(), SMALL)
    nowhere = {"mlp.post_act": np.zeros((2, 40), bool), "attn.resid_in": np.zeros((2, 16), bool)}
    where = jax.tree.map(np.copy, nowhere)
    where["mlp.post_act"][0, 3:30] = True
    patched = jax.jit(
        lambda values, where: model.forward(params, TOKENS, SMALL, tap=taps.patch(values, where))
    )
    new_logits, new = patched(other, where)
    chosen = where["mlp.post_act"][0]
    np.testing.assert_array_equal(
        new["mlp.post_act"][0][..., chosen], other["mlp.post_act"][0][..., chosen]
    )
    np.testing.assert_array_equal(
        new["mlp.post_act"][0][..., ~chosen], acts["mlp.post_act"][0][..., ~chosen]
    )
    np.testing.assert_array_equal(new["mlp.resid_mid"][0], acts["mlp.resid_mid"][0])
    np.testing.assert_array_equal(patched(other, nowhere)[0], logits)
    assert np.abs(new_logits - logits).max() > 1e-3
    # The whole stream patched at a layer's input gives the other prompt's stream from there on.
    everything = nowhere | {"attn.resid_in": np.ones((2, 16), bool)}
    all_logits, all_acts = patched(other, everything)
    np.testing.assert_array_equal(all_acts["final_resid"], other["final_resid"])
    assert np.abs(all_logits - logits).max() > 1e-3
    # The bigram still reads the true token.
    bigram = params["head"]["bigram"]
    np.testing.assert_allclose(
        all_logits - bigram[TOKENS], other_logits - bigram[TOKENS[::-1]], atol=1e-5
    )


@pytest.mark.parametrize(
    "tap",
    [
        taps.mask({"attn.q": np.ones((2, 12))}, {"attn.q": np.ones((2, 12))}),
        taps.patch({"attn.q": np.ones((2, 1, 1, 12))}, {"attn.q": np.ones((2, 12), bool)}),
    ],
    ids=["mask", "patch"],
)
def test_taps_take_numpy_arrays_as_read_from_files(tap):
    """The layer is traced; an array that is not must still be indexable by it."""
    value = np.ones((1, 1, 12), np.float32)
    got = jax.eval_shape(lambda layer: tap(taps.Location("attn.q", layer), value), jnp.int32(0))
    assert got.shape == value.shape


def test_composed_taps_act_from_the_first_to_the_last():
    double, increment = (lambda name, value: value * 2), (lambda name, value: value + 1)
    location, x = taps.Location("attn.q", 0), jnp.array([1.0, 5.0])
    assert taps.compose(double, increment)(location, x).tolist() == [3, 11]
    assert taps.compose(increment, double)(location, x).tolist() == [4, 12]
    assert taps.compose()(location, x) is x


def test_a_location_is_its_name_and_carries_its_layer():
    location = taps.Location("attn.q", 3)
    assert location == "attn.q"
    assert {"attn.q": 1}[location] == 1
    assert location.layer == 3


def test_the_table_of_nodes_has_the_widths_and_neighbors_of_the_parameters():
    flat = trees.flatten(shapes(SMALL))
    _, _, acts = small_run()
    for name, kind in NODES.items():
        assert acts[name].shape == (2, *TOKENS.shape, kind.width(SMALL))
        assert all(flat[path].shape[2] == kind.width(SMALL) for path in kind.incoming)
        assert all(flat[path].shape[1] == kind.width(SMALL) for path in kind.outgoing)
    linked = [path for kind in NODES.values() for path in kind.outgoing]
    assert sorted(linked) == sorted(
        p for p in flat if p.startswith("blocks/") and p.endswith("kernel")
    )
    assert {kind.site for kind in NODES.values()} == set(NODE_SITES)


def test_gradient_through_gates_is_the_finite_difference():
    config = dataclasses.replace(SMALL, abs_top_k_sites=("mlp_neuron",), compute_dtype="float64")
    params, random = random_params(SMALL), np.random.default_rng(5)
    means = {n: random.normal(size=g.shape) for n, g in constant(0).items()}
    gates = {n: random.uniform(0.2, 0.8, size=g.shape) for n, g in constant(0).items()}

    def loss(gates, means):
        logits, _ = model.forward(params, TOKENS, config, tap=taps.mask(gates, means))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(loss))
        _, gradient = both(gates, means)
        for name in NODES:
            direction, step = random.normal(size=gates[name].shape), 1e-6
            ends = [
                float(both(gates | {name: gates[name] + s * direction}, means)[0])
                for s in (step, -step)
            ]
            slope = float(np.sum(np.asarray(gradient[name]) * direction))
            np.testing.assert_allclose(
                (ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5, atol=1e-9, err_msg=name
            )
            assert abs(slope) > 1e-6, name


# Properties of the forward pass ----------------------------------------------------------------------


def test_logits_at_positions_are_those_rows_of_all_logits():
    params, logits, acts = small_run()
    positions = np.array([[6, 0, 0], [2, 5, 1]], np.int32)
    some, some_acts = jax.jit(lambda p, t: model.forward(p, t, SMALL, positions_BP=positions))(
        params, TOKENS
    )
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
    config = dataclasses.replace(
        SMALL, abs_top_k_fraction=None
    )  # no selection that rounding could flip
    low_config = dataclasses.replace(config, compute_dtype="bfloat16")
    low, acts = forward(random_params(config, np.float32), TOKENS, low_config)
    assert low.dtype == jnp.float32
    assert all(array.dtype == jnp.bfloat16 for array in acts.values())
    assert 1e-4 < relative_error(low, reference_runs(config)[0]) < 0.05


@pytest.mark.parametrize(
    "sink", [None, np.array([300.0, -300.0], np.float32)], ids=["no sink", "sink"]
)
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


def test_the_largest_configs_take_shape_in_seconds():
    start = time.perf_counter()
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
    assert time.perf_counter() - start < 20


# Initial parameters --------------------------------------------------------------------------------


def test_initial_parameters_have_the_deviations_of_the_method():
    config = dataclasses.replace(SMALL, position="added")
    seeds = [fresh(config, seed) for seed in range(12)]
    written = {"blocks/attn/out/kernel", "blocks/mlp/proj/kernel"}
    for path in seeds[0]:
        leaf = np.stack([flat[path] for flat in seeds])
        assert leaf.dtype == np.float32
        if path.endswith("gain"):
            assert (leaf == 1).all(), path
        elif path.endswith("kernel") or path in ("embed/tokens", "embed/positions", "head/unembed"):
            std = 0.02 / np.sqrt(2 * config.n_layer) if path in written else 0.02
            scaled, error = leaf.ravel() / std, 1 / np.sqrt(leaf.size)
            np.testing.assert_allclose(scaled.std(), 1, atol=5 * error, err_msg=path)
            np.testing.assert_allclose(scaled.mean(), 0, atol=5 * error, err_msg=path)
            np.testing.assert_allclose((scaled**4).mean(), 3, atol=50 * error, err_msg=path)
        else:
            assert path.endswith("bias") or path in ("blocks/attn/sink", "head/bigram")
            assert (leaf == 0).all(), path


def test_no_two_initial_parameters_share_numbers():
    flat = {path: leaf.ravel() for path, leaf in fresh(SMALL).items() if leaf.std() > 0}
    starts = np.array([leaf[:64] for leaf in flat.values()])
    assert np.abs(np.corrcoef(starts) - np.eye(len(flat))).max() < 0.6


def test_layers_and_seeds_differ_and_a_seed_repeats():
    first, other = fresh(SMALL, 0), fresh(SMALL, 1)
    again = fresh.__wrapped__(SMALL, 0)
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        if leaf.std() > 0:
            assert (leaf != other[path]).mean() > 0.99, path
            assert not path.startswith("blocks/") or (leaf[0] != leaf[1]).mean() > 0.99, path


@pytest.mark.parametrize(
    "change",
    [
        {"sink": False},
        {"bias": False},
        {"bigram": "none"},
        {"position": "added"},
        {"position": "none", "norm": "layer"},
        {"tied_embeddings": True, "logits_bias": True},
        {"n_layer": 3},
    ],
    ids=str,
)
def test_switching_a_part_leaves_the_other_initial_parameters_as_they_were(change):
    before = fresh(SMALL)
    changed = dataclasses.replace(SMALL, **change)
    after = fresh(changed)
    shared = set(before) & set(after)
    assert len(shared) >= 12
    assert "blocks/mlp/fc/kernel" in shared
    for path in shared:
        old, new = before[path], after[path]
        if path.startswith("blocks/"):
            new = new[: len(old)]
        if "n_layer" in change and path.endswith(("out/kernel", "proj/kernel")):
            np.testing.assert_allclose(new * np.sqrt(3 / 2), old, rtol=1e-6)
        else:
            np.testing.assert_array_equal(new, old, err_msg=path)


def test_fixed_sinusoids_do_not_depend_on_the_seed():
    config = dataclasses.replace(SMALL, position="concat_sinusoid", d_pos=5)
    tables = [fresh(config, s)["embed/sinusoids"] for s in (0, 1)]
    np.testing.assert_array_equal(*tables)
    assert tables[0].shape == (8, 5)
    assert (np.abs(tables[0]) <= 1).all()
    assert len({row.tobytes() for row in tables[0]}) == 8  # every position is told apart


@pytest.mark.parametrize(
    ("position", "n_layer", "fraction"), [("none", 1, 0.5), ("concat", 2, None), ("added", 3, None)]
)
def test_logits_and_their_gradients_are_the_same_without_recording(position, n_layer, fraction):
    config = ModelConfig(
        vocab_size=13,
        context=9,
        n_layer=n_layer,
        d_model=16,
        n_head=2,
        d_head=4,
        position=position,
        d_pos=4 if position.startswith("concat") else 0,
        residual_activation="relu",
        abs_top_k_fraction=fraction,
    )
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (5, 9), 0, 13)
    positions = jnp.array([[8, 3], [0, 1], [5, 5], [2, 7], [8, 8]])
    gates = {
        name: jnp.full((n_layer, kind.width(config)), 0.7) for name, kind in nodes.NODES.items()
    }

    @functools.partial(jax.jit, static_argnames="record")
    @functools.partial(jax.grad, has_aux=True)
    def slope_and_logits(gates, *, record):
        tap = taps.mask(gates, jax.tree.map(lambda g: 0.1 * jnp.ones_like(g), gates))
        out, acts = model.forward(
            params, tokens, config, tap=tap, positions_BP=positions, record=record
        )
        assert bool(acts) == record
        return jnp.sum(jnp.sin(out)), out

    slopes, logits = zip(
        *(slope_and_logits(gates, record=each) for each in (False, True)), strict=True
    )
    np.testing.assert_allclose(*logits, rtol=2e-5)
    for name in gates:
        np.testing.assert_allclose(slopes[0][name], slopes[1][name], rtol=2e-4, atol=1e-6)
    assert any(np.abs(slopes[0][name]).max() > 1e-4 for name in gates)
