"""The edges into every node of an unrolled circuit add up to what a plain NumPy circuit computes there."""

import dataclasses

import helpers
import jax
import numpy as np
import pytest
import reference
import viewer_case

from wsparse.circuits import graph, masks, tasks
from wsparse.circuits.circuit import CircuitNode
from wsparse.circuits.unrolled import unroll
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS, NODES

SITES = {kind.site: name for name, kind in NODES.items()}
BASE = ModelConfig(
    vocab_size=31, context=12, n_layer=2, d_model=12, n_head=2, d_head=4, d_mlp=20, abs_top_k_fraction=None
)
CONFIGS = {
    "default": BASE,
    "layer norm, tied, no bias": dataclasses.replace(
        BASE, norm="layer", tied_embeddings=True, bias=False, position="added", sink=False
    ),
    "concatenated positions": dataclasses.replace(
        BASE, position="concat", d_pos=4, norm="layer", logits_bias=True
    ),
    "AbsTopK everywhere": dataclasses.replace(
        BASE,
        abs_top_k_fraction=0.5,
        abs_top_k_sites=(*(kind.site for kind in NODES.values()), "resid_post_attn", "resid_post_mlp"),
    ),
    "ReLU of the stream, sinusoids": dataclasses.replace(
        BASE,
        residual_activation="relu",
        position="concat_sinusoid",
        d_pos=4,
        bigram="none",
        activation="relu",
    ),
}
PROMPT = (3, 17, 3, 8, 25, 1, 9)


class Circuit(reference.Model):
    """The reference with a circuit's nodes alone; `before` has what AbsTopK and the ablation get."""

    def __init__(self, config, params, kept, means):
        super().__init__(config, params)
        self.kept, self.means = kept, means
        self.before = {name: [] for name in NODES}
        self.products = []

    def sparse(self, site, x):
        location = SITES.get(site)
        if location is None:
            return super().sparse(site, x)
        layer = len(self.before[location])
        self.before[location].append(x)
        return np.where(self.kept[location][layer], super().sparse(site, x), self.means[location][layer])

    def linear(self, x, p):
        self.products.append(super().linear(x, p))
        return self.products[-1]


def cut(params, config, removed, means):
    """Parameters whose removed weights carry a mean: NumPy, from the definition."""
    params = jax.tree.map(np.array, params)
    for c in CONNECTIONS:
        _, part, name, _ = c.kernel.split("/")
        linear = params["blocks"][part][name]
        inputs = means["attn.y" if c.source == "attn.v" else c.source]
        linear.setdefault("bias", np.zeros((config.n_layer, linear["kernel"].shape[2])))
        carried = np.einsum("li,lio->lo", inputs, linear["kernel"] * removed[c.kernel])
        linear["bias"] = linear["bias"] + carried
        linear["kernel"] = np.where(removed[c.kernel], 0, linear["kernel"])
    return params


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Some circuit, for the fields that do not matter here."""
    task = tasks.find(str(viewer_case.write_task(tmp_path_factory.mktemp("task"))))
    return viewer_case.circuit(task)


def make(config, template, seed=0):
    """A model, a circuit of two thirds of its nodes with weights cut, and the circuit in the reference."""
    rng = np.random.default_rng(seed)
    params = helpers.random_params(config, seed=seed, scale=0.5)
    kept = {name: rng.random(shape) < 0.67 for name, shape in masks.shapes(config).items()}
    shapes = masks.shapes(config) | {"attn.y": (config.n_layer, config.attention_width)}
    means = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    removed = {path: rng.random(weights.shape) < 0.2 for path, weights in graph.nonzero(params).items()}
    names = np.array(masks.names(config))[np.asarray(masks.flatten(kept))]
    nodes = [CircuitNode(str(name), 0.5, 0.0) for name in names]
    circuit = dataclasses.replace(
        template, config=config, nodes=nodes, edges=[], means=means, removed=removed
    )
    with_bias = dataclasses.replace(config, bias=True)
    plain = Circuit(with_bias, cut(params, config, removed, means), kept, means)
    return params, circuit, plain


def sums(found):
    """Vertex -> the sum of the edges into it."""
    totals = dict.fromkeys((v for v in found.values if v.kind in ("node", "logit")), 0.0)
    for (_, target), number in found.links.items():
        totals[target] += number
    return totals


def expected(plain, config, found, logits_TV):
    """Vertex -> value before the nonlinearity, from the reference's run."""
    hidden = plain.products[4::6]
    want = {}
    for vertex in sums(found):
        if vertex.kind == "logit":
            want[vertex] = logits_TV[vertex.position, vertex.index]
            continue
        layer, place = divmod(vertex.row - 1, len(NODES))
        location = tuple(NODES)[place]
        before = hidden[layer] if location == "mlp.post_act" else plain.before[location][layer]
        want[vertex] = before[vertex.position, vertex.index]
    return want


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def case(request, template):
    config = request.param
    params, circuit, plain = make(config, template)
    found = unroll(params, config, circuit, PROMPT, [5, 6])
    logits_TV, values = plain.run(np.array(PROMPT))
    return config, circuit, plain, found, logits_TV, values


def test_edges_into_a_vertex_add_up_to_its_value_before_the_nonlinearity(case):
    config, _, plain, found, logits_TV, _ = case
    got, want = sums(found), expected(plain, config, found, logits_TV)
    assert len(got) > 100
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4, atol=1e-4)


def test_no_edge_can_be_left_out_or_be_another_number(case):
    """Negative control: each of a sample of edges is missed where it is gone."""
    config, _, plain, found, logits_TV, _ = case
    want = expected(plain, config, found, logits_TV)
    large = [link for link, number in found.links.items() if abs(number) > 1e-2]
    assert {source.kind for source, _ in large} == {"node", "embedding", "constants"}
    for link in large[:: max(1, len(large) // 50)]:
        links = {other: number for other, number in found.links.items() if other != link}
        got = sums(dataclasses.replace(found, links=links))[link[1]]
        assert abs(got - want[link[1]]) > 5e-3


def test_values_are_those_of_the_circuit_and_of_no_node_that_is_zero(case):
    _, circuit, _, found, logits_TV, values = case
    kept = circuit.mask()
    for vertex, value in found.values.items():
        if vertex.kind == "node":
            layer, place = divmod(vertex.row - 1, len(NODES))
            location = tuple(NODES)[place]
            assert kept[location][layer, vertex.index] and value != 0
            assert value == pytest.approx(values[location][layer][vertex.position, vertex.index], abs=1e-4)
        elif vertex.kind == "logit":
            assert value == pytest.approx(logits_TV[-1, vertex.index], abs=1e-4)
        else:
            assert value is None
    exponents = np.exp(logits_TV[-1] - logits_TV[-1].max())
    assert found.probabilities == pytest.approx({t: exponents[t] / exponents.sum() for t in (5, 6)}, abs=1e-4)


def test_the_whole_model_has_other_sums(template):
    """Negative control: what is removed matters, and so do weights that are cut."""
    config = CONFIGS["default"]
    params, circuit, plain = make(config, template)
    found = unroll(params, config, circuit, PROMPT, [5, 6])
    for kept, removed in (
        ({name: np.ones_like(each) for name, each in plain.kept.items()}, circuit.removed),
        (plain.kept, {path: np.zeros_like(each) for path, each in circuit.removed.items()}),
    ):
        other = Circuit(plain.config, cut(params, config, removed, circuit.means), kept, circuit.means)
        logits_TV, _ = other.run(np.array(PROMPT))
        want = expected(other, config, found, logits_TV)
        assert np.abs(np.array(list(sums(found).values())) - list(want.values())).max() > 0.1


def test_an_edge_through_a_head_is_value_times_attention_times_weight(template):
    config = dataclasses.replace(BASE, n_layer=1, sink=False)
    params, circuit, plain = make(config, template)
    _, values = plain.run(np.array(PROMPT))
    q, k, v = (values[f"attn.{name}"][0] for name in "qkv")
    edges = {
        (source, target): number
        for (source, target), number in unroll(params, config, circuit, PROMPT, [5]).links.items()
        if source.kind == "node" and source.row == 1 + tuple(NODES).index("attn.v")
    }
    assert len(edges) > 100
    for (source, target), number in edges.items():
        head = slice(source.index // 4 * 4, source.index // 4 * 4 + 4)
        exponents = np.exp([q[target.position, head] @ k[s, head] / 2 for s in range(target.position + 1)])
        attention = exponents[source.position] / exponents.sum()
        weight = params["blocks"]["attn"]["out"]["kernel"][0, source.index, target.index]
        value = v[source.position, source.index]
        assert number == pytest.approx(value * attention * weight, abs=1e-5)


def test_what_no_logit_depends_on_is_left_out(case):
    _, _, _, found, _, _ = case
    after = {}
    for source, target in found.links:
        after.setdefault(source, []).append(target)
    n_layer = 2
    for vertex in found.values:
        layer, place = divmod(vertex.row - 1, len(NODES))
        location = tuple(NODES)[place] if vertex.kind == "node" else ""
        if location in ("attn.q", "attn.k"):
            assert vertex not in after
        elif vertex.kind != "logit":
            assert vertex in after
        if location.startswith("mlp") and layer == n_layer - 1:
            # The last MLP acts on the last token alone.
            assert vertex.position == len(PROMPT) - 1
    assert any(v.kind == "node" and tuple(NODES)[(v.row - 1) % len(NODES)] == "attn.k" for v in found.values)


def test_edges_lead_upward_and_never_back_in_time(case):
    _, _, _, found, _, _ = case
    for source, target in found.links:
        assert source.row < target.row or (source.kind == "constants" and source.row == target.row)
        assert source.position <= target.position
        if source.position < target.position:
            assert tuple(NODES)[(source.row - 1) % len(NODES)] == "attn.v"


def test_without_answers_the_most_likely_tokens_have_logits(template):
    config = CONFIGS["default"]
    params, circuit, plain = make(config, template)
    logits_TV, _ = plain.run(np.array(PROMPT))
    found = unroll(params, config, circuit, PROMPT, most_likely=3)
    assert list(found.probabilities) == np.argsort(-logits_TV[-1])[:3].tolist()


def test_prompts_of_all_lengths_share_a_program(template, compilations):
    config = CONFIGS["default"]
    params, circuit, _ = make(config, template)
    unroll(params, config, circuit, PROMPT, [5])
    with compilations() as count:
        unroll(params, config, circuit, PROMPT[:3], [5])
    assert not count


@pytest.mark.parametrize("length", [0, 13])
def test_a_prompt_that_does_not_fit_is_refused(length, template):
    config = CONFIGS["default"]
    params, circuit, _ = make(config, template)
    with pytest.raises(UserError, match=f"1 to 12 tokens, this one has {length}"):
        unroll(params, config, circuit, [1] * length)
