"""The table of locations is that of the parameters, and nodes' names are read strictly."""

import dataclasses
import re

from helpers import run_python, shapes
from model_case import SMALL, TOKENS, small_run
import pytest

from wsparse import nodes, taps, trees
from wsparse.config import NODE_SITES
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS, LOCATIONS, NODES, Node


def test_the_table_of_nodes_has_the_widths_and_neighbors_of_the_parameters():
    flat = trees.flatten(shapes(SMALL))
    _, _, acts = small_run()
    for name, kind in NODES.items():
        assert acts[name].shape == (2, *TOKENS.shape, kind.width(SMALL))
        assert all(flat[path].shape[2] == kind.width(SMALL) for path in kind.incoming)
        assert all(flat[path].shape[1] == kind.width(SMALL) for path in kind.outgoing)
    linked = [path for kind in NODES.values() for path in kind.outgoing]
    assert sorted(linked) == sorted(p for p in flat if p.startswith("blocks/") and p.endswith("kernel"))
    assert {kind.site for kind in NODES.values()} == set(NODE_SITES)


def test_the_table_agrees_with_the_configs_sites_on_widths():
    config = dataclasses.replace(SMALL, position="concat", d_pos=5)
    for kind in NODES.values():
        assert kind.width(config) == config.site_width(kind.site)
    assert len({kind.width(config) for kind in NODES.values()}) == 4


def test_every_recorded_location_is_in_the_table_with_its_width():
    _, _, acts = small_run()
    assert {name: value.shape[-1] for name, value in acts.items()} == {
        name: kind.width(SMALL) for name, kind in LOCATIONS.items()
    }


def test_a_kernels_neuron_axis_is_the_side_that_is_not_the_residual_stream():
    # Written down from the method, not read from the table.
    assert {c.kernel.removeprefix("blocks/"): c.neuron_axis for c in CONNECTIONS} == {
        "attn/q/kernel": 1,
        "attn/k/kernel": 1,
        "attn/v/kernel": 1,
        "attn/out/kernel": 0,
        "mlp/fc/kernel": 1,
        "mlp/proj/kernel": 0,
    }
    flat = trees.flatten(shapes(SMALL))
    for c in CONNECTIONS:
        source, target = (NODES[name].width(SMALL) for name in (c.source, c.target))
        assert flat[c.kernel].shape[1:] == (source, target)
        assert flat[c.bias].shape[1:] == (target,)


@pytest.mark.parametrize("name", ["0.attn.q.0", "1.mlp.post_act.39", "12.attn.resid_delta.1048576"])
def test_a_nodes_name_is_read_and_printed(name):
    assert str(Node.parse(name)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a node is written layer.location.channel"),
        ("0.attn.q", "a node is written layer.location.channel"),
        ("0.attn.q.1.2", "a node is written layer.location.channel"),
        ("00.attn.q.1", "a node is written layer.location.channel"),
        ("-1.attn.q.1", "a node is written layer.location.channel"),
        ("0.attn.q.1\n", "a node is written layer.location.channel"),
        ("0.attn.q.\u0661", "a node is written layer.location.channel"),
        ("0.attn.q." + 10_000 * "1", "a node is written layer.location.channel"),
        ("0.attn.y.1", "there is no node location 'attn.y'"),
        ("0.attn.qq.1", "did you mean 'attn.q'"),
        ("2.attn.q.1", "it has 2 layers and 12 channels at attn.q"),
        ("0.attn.q.12", "it has 2 layers and 12 channels at attn.q"),
    ],
    ids=range(12),
)
def test_a_name_that_is_not_a_node_of_the_model_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Node.parse(name, SMALL)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_nodes_sort_by_layer_then_as_the_forward_pass_goes():
    names = ["0.attn.act_in.3", "0.attn.q.11", "0.attn.v.2", "0.mlp.act_in.0", "1.attn.k.1"]
    shuffled = sorted(map(Node.parse, names), key=str, reverse=True)
    assert [str(node) for node in sorted(shuffled, key=Node.order)] == names


def test_reading_names_needs_no_jax():
    program = (
        "import sys; from wsparse.nodes import Node; Node.parse('0.attn.q.1'); print('jax' in sys.modules)"
    )
    assert run_python("-c", program).stdout.strip() == "False"


def test_taps_are_still_found_where_they_were():
    assert nodes.mask is taps.mask and nodes.Location is taps.Location
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nodes.nothing  # noqa: B018
