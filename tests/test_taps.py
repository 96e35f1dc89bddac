"""Taps see and change every location; masks, patches and compositions do what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from model_case import SMALL, TOKENS, constant, forward, random_params, small_run
import numpy as np
import pytest

from wsparse import model, taps
from wsparse.config import ModelConfig
from wsparse.nodes import LOCATIONS, NODES
from wsparse.sparsity import abs_top_k


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
        return value.at[..., 0].set(100 * (1 + list(LOCATIONS).index(name)) + layer)

    params, _, _ = small_run()
    _, acts = forward(params, TOKENS, SMALL, tap=stamp)
    assert sorted(calls) == sorted(LOCATIONS)  # traced once, whatever the depth
    for location in LOCATIONS:
        code = 100 * (1 + list(LOCATIONS).index(location))
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
    resid = params["embed"]["tokens"][TOKENS] + sum(means["attn.resid_delta"]) + sum(means["mlp.resid_delta"])
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
    np.testing.assert_array_equal(new["mlp.post_act"][0][..., chosen], other["mlp.post_act"][0][..., chosen])
    np.testing.assert_array_equal(new["mlp.post_act"][0][..., ~chosen], acts["mlp.post_act"][0][..., ~chosen])
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
    np.testing.assert_allclose(all_logits - bigram[TOKENS], other_logits - bigram[TOKENS[::-1]], atol=1e-5)


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
            ends = [float(both(gates | {name: gates[name] + s * direction}, means)[0]) for s in (step, -step)]
            slope = float(np.sum(np.asarray(gradient[name]) * direction))
            np.testing.assert_allclose(
                (ends[0] - ends[1]) / (2 * step), slope, rtol=1e-5, atol=1e-9, err_msg=name
            )
            assert abs(slope) > 1e-6, name


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
    gates = {name: jnp.full((n_layer, kind.width(config)), 0.7) for name, kind in NODES.items()}

    @functools.partial(jax.jit, static_argnames="record")
    @functools.partial(jax.grad, has_aux=True)
    def slope_and_logits(gates, *, record):
        tap = taps.mask(gates, jax.tree.map(lambda g: 0.1 * jnp.ones_like(g), gates))
        out, acts = model.forward(params, tokens, config, tap=tap, positions_BP=positions, record=record)
        assert bool(acts) == record
        return jnp.sum(jnp.sin(out)), out

    slopes, logits = zip(*(slope_and_logits(gates, record=each) for each in (False, True)), strict=True)
    np.testing.assert_allclose(*logits, rtol=2e-5)
    for name in gates:
        np.testing.assert_allclose(slopes[0][name], slopes[1][name], rtol=2e-4, atol=1e-6)
    assert any(np.abs(slopes[0][name]).max() > 1e-4 for name in gates)


def test_a_tap_sees_the_same_shapes_whatever_is_recorded_unless_it_is_position_wise():
    params, _, _ = small_run()

    class Watch:
        def __init__(self, position_wise):
            self.position_wise, self.seen = position_wise, set()

        def __call__(self, location, value):
            self.seen.add((str(location), value.shape[1]))
            return value

    def seen(position_wise, **options):
        tap = Watch(position_wise)
        positions = jnp.array([[1], [2]])
        forward = functools.partial(model.forward, config=SMALL, tap=tap, positions_BP=positions)
        jax.eval_shape(functools.partial(forward, **options), params, TOKENS)
        return tap.seen

    everywhere = {(location, TOKENS.shape[1]) for location in LOCATIONS}
    assert seen(False, record=True) == seen(False, record=False) == everywhere
    assert seen(True, record=True) == everywhere
    assert ("mlp.post_act", 1) in seen(True, record=False)


def test_a_composition_with_a_mask_is_fused_and_short_only_where_both_allow_it(monkeypatch):
    """The mask alone and a composition that begins with it take the fused way; the numbers are the same."""
    params, _, _ = small_run()
    mask = taps.mask(constant(0.25), constant(0.5))
    double = lambda location, value: 2 * value if location == "attn.v" else value
    fused = []
    original = taps.NodeAblation.fused

    def counted(self, location, value, k):
        fused.append(str(location))
        return original(self, location, value, k)

    monkeypatch.setattr(taps.NodeAblation, "fused", counted)
    composed = taps.compose(mask, double)
    got, _ = jax.jit(lambda p: model.forward(p, TOKENS, SMALL, tap=composed))(params)
    assert set(fused) == set(LOCATIONS)
    by_hand = lambda location, value: double(location, mask(location, value))
    want, _ = jax.jit(lambda p: model.forward(p, TOKENS, SMALL, tap=by_hand))(params)
    np.testing.assert_array_equal(got, want)

    fused.clear()
    other_way = taps.compose(double, mask)
    got, _ = jax.jit(lambda p: model.forward(p, TOKENS, SMALL, tap=other_way))(params)
    assert not fused
    assert np.abs(got - want).max() > 1e-4

    assert taps.is_position_wise(taps.compose(mask, mask))
    assert not taps.is_position_wise(composed)
    assert not taps.is_position_wise(taps.patch({}, {}))


def test_a_tap_of_the_users_own_may_offer_a_fused_form():
    class KeepAndNegate:
        def __call__(self, location, value):
            return -value

        def fused(self, location, value, k):
            return -abs_top_k(value, k)

    params, _, _ = small_run()
    tap = KeepAndNegate()
    got, _ = jax.jit(lambda p: model.forward(p, TOKENS, SMALL, tap=tap))(params)
    want, _ = jax.jit(lambda p: model.forward(p, TOKENS, SMALL, tap=lambda _, x: -x))(params)
    np.testing.assert_array_equal(got, want)
