"""The page's own forward pass in Chromium: equal to JAX, for every option of a model."""

import dataclasses

import browser_case
import live_case
from live_case import ALONE, TINY, agrees, case, in_browser, in_jax, request
import numpy as np
import pytest

from wsparse import trees
from wsparse.circuits import graph
from wsparse.circuits.pairs import PairArrays, row_losses
from wsparse.config import ABS_TOP_K_SITES

TEXT = 'f("a b'
TOKENS = live_case.tokenizer().encode(TEXT)
browser = pytest.fixture(scope="module")(browser_case.chromium)


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


CONFIGS = {
    "sinks, bigram, every node site": TINY,
    "nothing optional": changed(
        TINY, sink=False, bigram="none", bias=False, abs_top_k_fraction=None, activation="relu"
    ),
    "layer norm, added positions": changed(ALONE, norm="layer", position="added", abs_top_k_sites=()),
    "layer norm without biases, learned positions beside": changed(
        ALONE, norm="layer", norm_bias=False, position="concat", d_pos=5, abs_top_k_sites=("attn_in",)
    ),
    "sinusoids beside, frozen bigram, large epsilon": changed(
        ALONE, position="concat_sinusoid", d_pos=6, bigram="frozen", norm_eps=0.1, abs_top_k_sites=()
    ),
    "tied embeddings, bias of logits, ReLU of the stream": changed(
        ALONE, tied_embeddings=True, logits_bias=True, residual_activation="relu", abs_top_k_sites=()
    ),
    "one head, all kept": changed(ALONE, n_head=1, d_head=7, abs_top_k_fraction=1.0),
    **{f"AbsTopK at {site} alone": changed(ALONE, abs_top_k_sites=(site,)) for site in ABS_TOP_K_SITES},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_all_nodes_are_those_of_jax_in_the_model_and_in_the_circuit(browser, config):
    given = case(config)
    [answer] = in_browser(browser, given, [(request(given, TEXT), "prompt")])
    assert answer["tokens"] == TOKENS and answer["dropped"] == 0
    sides = {side: in_jax(given, side, TOKENS) for side in ("model", "circuit")}
    for side, expected in sides.items():
        agrees(given, answer["before"][side], expected, TOKENS)
    # A negative control: what is compared differs from side to side.
    with pytest.raises(AssertionError):
        agrees(given, answer["before"]["model"], sides["circuit"], TOKENS)


def test_patterns_of_heads_are_the_softmax_of_their_scores_with_the_sink(browser):
    given = case(TINY)
    [answer] = in_browser(browser, given, [(request(given, TEXT, heads=["1.2"]), "prompt")])
    side = answer["before"]["model"]
    assert list(side["patterns"]) == ["1.2"]
    channels = range(2 * TINY.d_head, 3 * TINY.d_head)
    q_TK, k_TK = (np.array([side["values"][f"1.attn.{name}.{c}"] for c in channels]).T for name in "qk")
    scores_TS = np.where(np.tri(len(TOKENS)), np.exp(q_TK @ k_TK.T / np.sqrt(TINY.d_head)), 0)
    sink = np.exp(trees.flatten(given.params)["blocks/attn/sink"][1, 2])
    expected_TS = scores_TS / (scores_TS.sum(1, keepdims=True) + sink)
    np.testing.assert_allclose(
        np.reshape(side["patterns"]["1.2"], (len(TOKENS),) * 2), expected_TS, atol=1e-5
    )


def test_of_equal_magnitudes_the_first_are_kept_as_in_jax(browser):
    """Embeddings of -1, 0 and 1, whose norm leaves many magnitudes equal to the bit."""
    config = changed(ALONE, abs_top_k_sites=("attn_in",), abs_top_k_fraction=0.34)
    given = case(config)
    random = np.random.default_rng(0)
    given.params["embed"]["tokens"] = random.integers(-1, 2, (257, config.d_model)).astype(np.float32)
    given.params["blocks"]["attn_norm"]["gain"] = np.ones((1, config.d_model), np.float32)
    [answer] = in_browser(browser, given, [(request(given, TEXT), "prompt")])
    expected = in_jax(given, "model", TOKENS)
    agrees(given, answer["before"]["model"], expected, TOKENS)
    read = np.array([expected[1][f"0.attn.act_in.{channel}"] for channel in range(config.d_model)])
    assert all(np.count_nonzero(read, axis=0) == 4)
    assert all(len(set(np.abs(column[column != 0]).tolist())) == 1 for column in read.T)


def test_nodes_are_held_at_their_mean_at_zero_or_at_a_value_in_model_and_circuit(browser):
    given = case(TINY)
    kept = [str(name) for name in ("0.attn.q", "0.mlp.post_act", "1.attn.resid_delta")]
    names = [
        f"{name}.{int(np.flatnonzero(given.kept[name.split('.', 1)[1]][int(name[0])])[0])}" for name in kept
    ]
    modes = ("mean", "zero", "set")
    edits = [{"node": n, "mode": m, "value": 1.25} for n, m in zip(names, modes, strict=True)]
    layer, location, channel = 0, "attn.q", int(names[0].rsplit(".", 1)[1])
    held = dict(zip(names, (given.means[location][layer, channel], 0.0, 1.25), strict=True))
    [answer] = in_browser(browser, given, [(request(given, TEXT, edits), "prompt")])
    for side in ("model", "circuit"):
        agrees(given, answer["before"][side], in_jax(given, side, TOKENS), TOKENS)
        agrees(given, answer["now"][side], in_jax(given, side, TOKENS, held), TOKENS)
    with pytest.raises(AssertionError):
        agrees(given, answer["now"]["model"], in_jax(given, "model", TOKENS), TOKENS)


@pytest.mark.parametrize("mode", ["mean", "zero", "set"])
@pytest.mark.parametrize("kernel", ["blocks/attn/out/kernel", "blocks/mlp/fc/kernel"])
def test_an_edge_carries_the_mean_of_its_source_nothing_or_another_weight(browser, mode, kernel):
    given = case(changed(ALONE, abs_top_k_fraction=None))
    weights = trees.flatten(given.params)[kernel]
    [connection] = [c for c in graph.CONNECTIONS if c.kernel == kernel]
    stays = (weights != 0) & ~given.removed[kernel]
    _, i, o = map(int, np.argwhere(stays)[3])
    edge = f"0.{connection.source}.{i}>0.{connection.target}.{o}"
    edit = {"edge": edge, "mode": mode, "value": -0.75}
    [answer] = in_browser(browser, given, [(request(given, TEXT, [edit]), "prompt")])
    flat = {path: np.array(leaf) for path, leaf in trees.flatten(given.params).items()}
    weight = float(flat[kernel][0, i, o])
    flat[kernel][0, i, o] = -0.75 if mode == "set" else 0
    if mode == "mean":
        mean = given.means["attn.y" if connection.source == "attn.v" else connection.source]
        flat[connection.bias][0, o] += weight * mean[0, i]
    cut = dataclasses.replace(given, params=trees.unflatten(flat))
    for side in ("model", "circuit"):
        agrees(given, answer["now"][side], in_jax(cut, side, TOKENS), TOKENS)
    with pytest.raises(AssertionError):
        agrees(given, answer["before"]["model"], in_jax(cut, "model", TOKENS), TOKENS)


def test_losses_over_the_pairs_are_those_of_the_scorer_before_and_after_an_edit(browser):
    given = case(TINY)
    random = np.random.default_rng(5)
    tokens_RT, positions_R = random.integers(0, 257, (6, 6)), np.array([5, 5, 3, 3, 5, 4])
    answers_R = np.array([3, 4, 5, 6, 7, 8])
    channel = int(np.flatnonzero(given.kept["mlp.resid_delta"][1])[0])
    edit = {"node": f"1.mlp.resid_delta.{channel}", "mode": "set", "value": 2.5}
    asked = [(request(given, TEXT, [edit]), "losses")]
    [answer] = in_browser(browser, given, asked, (tokens_RT, positions_R, answers_R))
    assert answer["pairs"] == 3
    others_R = answers_R.reshape(-1, 2)[:, ::-1].ravel()
    pairs = PairArrays(tokens_RT, positions_R, answers_R, others_R)
    for when, held in (("before", {}), ("now", {edit["node"]: 2.5})):
        for side in ("model", "circuit"):
            rows = [
                in_jax(given, side, row.tolist(), held)[0][at]
                for row, at in zip(tokens_RT, positions_R, strict=True)
            ]
            losses_R = np.asarray(row_losses(np.array(rows), pairs))
            right_R = np.array([row[a] > row[b] for row, a, b in zip(rows, answers_R, others_R, strict=True)])
            assert answer[when][side]["loss"] == pytest.approx(losses_R.mean(), abs=1e-5)
            assert answer[when][side]["accuracy"] == pytest.approx(right_R.mean())
    assert answer["before"] != answer["now"]


def test_a_prompt_longer_than_the_context_is_read_from_its_end(browser):
    given = case(ALONE)
    text = "abcdefghij" * 3
    [answer] = in_browser(browser, given, [(request(given, text), "prompt")])
    assert answer["tokens"] == live_case.tokenizer().encode(text)[-16:] and answer["dropped"] == 14
    [empty] = in_browser(browser, given, [(request(given, ""), "prompt")])
    assert empty["tokens"] == [] and empty["before"] is None
