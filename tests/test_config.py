"""Configs refuse what they cannot mean, say which key and what to write, and survive JSON."""

import dataclasses
import json
import re

from hypothesis import given
from hypothesis import strategies as st
import ml_collections
import pytest

from wsparse import config as configs
from wsparse.config import (
    ABS_TOP_K_SITES,
    NODE_SITES,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SparsityConfig,
    TrainConfig,
    differences,
    from_dict,
    to_dict,
)
from wsparse.errors import UserError


def refused(match: str, call) -> None:
    with pytest.raises(UserError, match=re.escape(match)) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown config key 'stepz' (did you mean 'steps'?)"),
        ({"model": {"n_layers": 3}}, "unknown config key 'model.n_layers' (did you mean 'n_layer'?)"),
        ({"sparsity": {"densty": 0.5}}, "unknown config key 'sparsity.densty' (did you mean 'density'?)"),
        ({"qqqq": 3}, "unknown config key 'qqqq'"),
        ({"steps": "many"}, "config key 'steps' must be of type int, got 'many'"),
        ({"steps": 3.0}, "config key 'steps' must be of type int, got 3.0"),
        ({"steps": True}, "config key 'steps' must be of type int, got True"),
        ({"steps": None}, "config key 'steps' must be of type int, got None"),
        ({"optimizer": {"sharkfin": 1}}, "config key 'optimizer.sharkfin' must be of type bool, got 1"),
        ({"optimizer": {"eps": "0.1"}}, "config key 'optimizer.eps' must be of type float, got '0.1'"),
        ({"model": {"d_mlp": 1.5}}, "config key 'model.d_mlp' must be of type int, got 1.5"),
        ({"model": 3}, "config key 'model' must be a group of keys, got 3"),
        (
            {"model": {"norm": "rmsnorm"}},
            "config key 'model.norm' must be one of 'rms', 'layer', got 'rmsnorm'",
        ),
        ({"model": {"activation": "gelo"}}, "(did you mean 'gelu'?)"),
        ({"model": {"norm": 3}}, "config key 'model.norm' must be one of 'rms', 'layer', got 3"),
        (
            {"model": {"abs_top_k_sites": "attn_in"}},
            "config key 'model.abs_top_k_sites' must be a list, got 'attn_in'",
        ),
        (
            {"model": {"abs_top_k_sites": [3]}},
            "config key 'model.abs_top_k_sites[0]' must be of type str, got 3",
        ),
        ({"model": {"d_model": 0}}, "model.d_model must be at least 1, got 0"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_key(values, message):
    refused(message, lambda: from_dict(TrainConfig, values))


def test_a_key_that_resembles_nothing_gets_no_suggestion():
    with pytest.raises(UserError) as error:
        from_dict(TrainConfig, {"qqqq": 3})
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(vocab_size=0), "model.vocab_size must be at least 1, got 0"),
        (lambda: ModelConfig(context=0), "model.context must be at least 1, got 0"),
        (lambda: ModelConfig(n_layer=0), "model.n_layer must be at least 1, got 0"),
        (lambda: ModelConfig(n_head=-1), "model.n_head must be at least 1, got -1"),
        (lambda: ModelConfig(d_head=0), "model.d_head must be at least 1, got 0"),
        (lambda: ModelConfig(d_mlp=0), "model.d_mlp must be at least 1, got 0"),
        (
            lambda: ModelConfig(position="concat"),
            "model.d_pos must be at least 1 with position='concat', got 0",
        ),
        (
            lambda: ModelConfig(position="added", d_pos=4),
            "model.d_pos must be 0 with position='added', got 4",
        ),
        (
            lambda: ModelConfig(abs_top_k_fraction=0.0),
            "model.abs_top_k_fraction must be in (0, 1], got 0.0",
        ),
        (
            lambda: ModelConfig(abs_top_k_fraction=1.1),
            "model.abs_top_k_fraction must be in (0, 1], got 1.1",
        ),
        (
            lambda: ModelConfig(abs_top_k_sites=("mlp_neurons",)),
            "unknown site 'mlp_neurons' (did you mean 'mlp_neuron'?)",
        ),
        (
            lambda: ModelConfig(d_model=8, abs_top_k_fraction=0.1, abs_top_k_sites=("attn_out",)),
            "model.abs_top_k_fraction=0.1 keeps no channel of the 8 at 'attn_out'",
        ),
        (lambda: SparsityConfig(density=0.0), "sparsity.density must be in (0, 1], got 0.0"),
        (lambda: SparsityConfig(density=1.5), "sparsity.density must be in (0, 1], got 1.5"),
        (lambda: SparsityConfig(density=float("nan")), "sparsity.density must be in (0, 1], got nan"),
        (lambda: SparsityConfig(min_per_neuron=-1), "sparsity.min_per_neuron must be at least 0, got -1"),
        (
            lambda: SparsityConfig(anneal_start=0.5),
            "anneal_start < anneal_end <= 1 must hold, got (0.5, 0.5)",
        ),
        (lambda: SparsityConfig(anneal_end=1.5), "anneal_start < anneal_end <= 1 must hold, got (0.0, 1.5)"),
        (
            lambda: SparsityConfig(anneal_start=-0.1),
            "anneal_start < anneal_end <= 1 must hold, got (-0.1, 0.5)",
        ),
        (
            lambda: SparsityConfig(overrides="embed/tokens"),
            "overrides must be PATH=DENSITY,..., such as 'embed/tokens=1/128', got 'embed/tokens'",
        ),
        (lambda: SparsityConfig(overrides="a=1/0"), "sparsity.overrides must be PATH=DENSITY,..."),
        (lambda: SparsityConfig(overrides="a=0.5,(=0.5"), "such as 'embed/tokens=1/128', got '(=0.5'"),
        (lambda: SparsityConfig(overrides="a=nan"), "sparsity.overrides must be PATH=DENSITY,..."),
        (lambda: SparsityConfig(overrides="a=0.5,b=1.5"), "sparsity.overrides: b must be in (0, 1], got 1.5"),
        (lambda: SparsityConfig(overrides="a=0"), "sparsity.overrides: a must be in (0, 1], got 0.0"),
        (lambda: OptimizerConfig(learning_rate=0.0), "optimizer.learning_rate must be positive, got 0.0"),
        (lambda: OptimizerConfig(warmup=1.0), "optimizer.warmup must be in [0, 1), got 1.0"),
        (lambda: OptimizerConfig(b2=1.0), "optimizer.b2 must be in [0, 1), got 1.0"),
        (lambda: OptimizerConfig(eps=0.0), "optimizer.eps must be positive, got 0.0"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "optimizer.weight_decay must be at least 0, got -0.1"),
        (lambda: DataConfig(source=" "), "data.source must name a source, got ' '"),
        (lambda: DataConfig(megabytes=0.0), "data.megabytes must be positive, got 0.0"),
        (lambda: DataConfig(validation_fraction=1.0), "data.validation_fraction must be in (0, 1), got 1.0"),
        (lambda: DataConfig(threads=0), "data.threads must be at least 1, got 0"),
        (lambda: DataConfig(prefetch=0), "data.prefetch must be at least 1, got 0"),
        (lambda: MeshConfig(fsdp=0), "mesh: each axis must be at least 1, or -1, got (-1, 0, 1)"),
        (lambda: MeshConfig(fsdp=-1), "mesh: at most one axis may be -1, got (-1, -1, 1)"),
        (lambda: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainConfig(eval_every=-1), "eval_every must be at least 0, got -1"),
        (lambda: TrainConfig(checkpoint_every=-1), "checkpoint_every must be at least 0, got -1"),
        (lambda: TrainConfig(keep_checkpoints=0), "keep_checkpoints must be at least 1, got 0"),
        (
            lambda: TrainConfig(batch_size=6, accumulate=4),
            "batch_size must be a multiple of accumulate=4, got 6",
        ),
    ],
)
def test_each_rule_says_what_must_hold_and_what_arrived(make, message):
    refused(message, make)


def test_overrides_are_read_as_fractions_or_decimals_and_may_change_what_is_dense():
    config = SparsityConfig(density=1.0, overrides=" embed/tokens=1/128, blocks/(attn|mlp)/.*=2e-2,")
    assert config.targets == (("embed/tokens", 1 / 128), ("blocks/(attn|mlp)/.*", 0.02))
    assert config.sparse
    assert not SparsityConfig(density=1.0, overrides="a=1").sparse


def test_derived_sizes():
    config = ModelConfig(d_model=32, n_head=3, d_head=4, position="concat", d_pos=5)
    assert (config.mlp_width, config.attention_width, config.read_width) == (128, 12, 37)
    assert dataclasses.replace(config, d_mlp=7).mlp_width == 7
    widths = {site: config.site_width(site) for site in ABS_TOP_K_SITES}
    assert widths == {
        "attn_in": 37, "attn_q": 12, "attn_k": 12, "attn_v": 12, "attn_out": 32, "resid_post_attn": 32,
        "mlp_in": 37, "mlp_neuron": 128, "mlp_out": 32, "resid_post_mlp": 32,
    }  # fmt: skip
    assert set(ABS_TOP_K_SITES) - set(NODE_SITES) == {"resid_post_attn", "resid_post_mlp"}


def test_the_default_epsilon_is_that_of_the_norm():
    assert ModelConfig(norm="rms").eps == 2.0**-23
    assert ModelConfig(norm="layer").eps == 1e-5
    assert ModelConfig(norm_eps=1e-3).eps == 1e-3


def test_configs_are_frozen_hashable_and_keyword_only():
    assert hash(ModelConfig()) == hash(ModelConfig())
    assert ModelConfig() == ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().n_layer = 3
    with pytest.raises(TypeError):
        ModelConfig(100)


def test_what_is_not_set_keeps_its_default():
    config = from_dict(TrainConfig, {"steps": 7, "model": {"n_layer": 2}})
    assert config == TrainConfig(steps=7, model=ModelConfig(n_layer=2))


def test_a_config_dict_is_read_and_integers_pass_for_floats():
    values = ml_collections.ConfigDict({"model": {"n_layer": 2, "abs_top_k_sites": ("attn_q",)}})
    values.optimizer = {"learning_rate": 1}
    config = from_dict(TrainConfig, values)
    assert config.model.abs_top_k_sites == ("attn_q",)
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)


positive = st.integers(1, 4096)
share = st.floats(0.01, 0.99)
models = st.builds(
    lambda position, d_pos, **rest: ModelConfig(
        position=position, d_pos=d_pos if position.startswith("concat") else 0, **rest
    ),
    position=st.sampled_from(["none", "added", "concat", "concat_sinusoid"]),
    d_pos=positive,
    vocab_size=positive,
    n_layer=positive,
    d_mlp=st.none() | st.integers(4, 4096),
    norm=st.sampled_from(["rms", "layer"]),
    norm_eps=st.none() | st.floats(1e-12, 1e-2),
    bias=st.booleans(),
    bigram=st.sampled_from(["learned", "frozen", "none"]),
    abs_top_k_fraction=st.none() | st.floats(0.25, 1),
    abs_top_k_sites=st.lists(st.sampled_from(ABS_TOP_K_SITES), unique=True).map(tuple),
).filter(lambda config: config.d_pos >= 0)
trains = st.builds(
    TrainConfig,
    model=models,
    sparsity=st.builds(SparsityConfig, density=share, min_per_neuron=st.integers(0, 9)),
    optimizer=st.builds(OptimizerConfig, learning_rate=share, warmup=share, sharkfin=st.booleans()),
    data=st.builds(
        DataConfig, source=st.text(min_size=1).filter(str.strip), megabytes=share, seed=st.integers()
    ),
    mesh=st.builds(MeshConfig, fsdp=positive, tensor=positive),
    steps=positive,
    seed=st.integers(),
)


@given(trains)
def test_a_config_survives_json(config):
    text = json.dumps(to_dict(config))
    assert from_dict(TrainConfig, json.loads(text)) == config


@given(trains, trains)
def test_differences_are_empty_exactly_for_equal_configs(a, b):
    assert differences(to_dict(a), to_dict(a)) == []
    assert (differences(to_dict(a), to_dict(b)) == []) == (a == b)


def test_differences_name_each_leaf_with_both_values():
    a = TrainConfig(steps=5)
    b = TrainConfig(steps=6, model=ModelConfig(n_layer=2, abs_top_k_fraction=None))
    assert differences(to_dict(a), to_dict(b)) == [
        "model.abs_top_k_fraction: 0.25 -> None",
        "model.n_layer: 8 -> 2",
        "steps: 5 -> 6",
    ]


def test_differences_show_keys_that_only_one_side_has():
    assert differences({"a": 1, "g": {"x": 1}}, {"b": 2, "g": {}}) == [
        "a: 1 -> None", "b: None -> 2", "g.x: 1 -> None",
    ]  # fmt: skip


def test_every_field_has_a_help_text_and_describe_lists_it():
    described = {key: text for key, _, text in configs.describe(TrainConfig())}
    assert described.keys() >= {"steps", "model.n_layer", "optimizer.b1", "mesh.fsdp"}
    for key, text in described.items():
        assert re.fullmatch(r"\S.*\.", text), key


@pytest.mark.parametrize(
    "values", [{"norm_eps": value} for value in (float("nan"), -1e-6, 0.0, float("inf"))]
)
def test_an_epsilon_that_is_no_small_positive_number_is_refused(values):
    refused("model.norm_eps must be in (0, 1)", lambda: ModelConfig(**values))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_a_number_that_is_not_finite_is_refused(number):
    with pytest.raises(UserError, match=r"config key 'optimizer\.weight_decay' must be"):
        from_dict(TrainConfig, {"optimizer": {"weight_decay": number}})


def test_older_spellings_are_read():
    values = {"optimizer": {"gradient_rms": "normalise"}}
    assert from_dict(TrainConfig, values) == TrainConfig()

    @dataclasses.dataclass
    class Old:
        discretize_pairs: int

    assert from_dict(Old, {"discretise_pairs": 3}) == Old(3)
    refused("config key 'discretize_pairs' is missing", lambda: from_dict(Old, {}))


def test_lists_dicts_and_nested_dataclasses_are_checked_item_by_item():
    @dataclasses.dataclass
    class Point:
        loss: float

    @dataclasses.dataclass
    class Scores:
        curve: list[float]
        counts: dict[str, int]

    scores = from_dict(Scores, {"curve": [1, 2.5], "counts": {"nodes": 3}})
    assert scores == Scores([1.0, 2.5], {"nodes": 3})
    refused(
        "config key 'curve[1]' must be of type float, got 'x'",
        lambda: from_dict(Scores, {"curve": [1, "x"], "counts": {}}),
    )
    refused(
        "config key 'counts.nodes' must be of type int, got 'many'",
        lambda: from_dict(Scores, {"curve": [], "counts": {"nodes": "many"}}),
    )
    refused(
        "config key 'counts' must be a group of keys, got []",
        lambda: from_dict(Scores, {"curve": [], "counts": []}),
    )
    refused("must be a group of keys, got 3", lambda: from_dict(Point, 3))


def test_a_long_value_and_a_hostile_key_are_cut_and_quoted_in_messages():
    with pytest.raises(UserError) as error:
        from_dict(TrainConfig, {"steps": "x" * 10**6})
    assert len(str(error.value)) < 400
    with pytest.raises(UserError) as error:
        from_dict(TrainConfig, {"\x1b[2J" + "x" * 10**6: 1})
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 400
