"""A model in TransformerLens has our logits and our activations under its names; needs the extra `lens`."""

import dataclasses
import sys

from helpers import run_python
import jax
import model_case
import numpy as np
import pytest
import reference
from test_model import VARIANTS

from wsparse import runs
from wsparse.config import DataConfig, TrainConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.interop import pretrained, transformer_lens
from wsparse.nodes import LOCATIONS

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["def add(a, b):\n    return a + b\n", "print('one', \"two\")\n"] * 20
    return tokenizer_lib.train(texts, vocab_size=270)


def exported(folder, config, tokenizer):
    """Exports random parameters of a config, with the tokenizer's vocabulary; returns both."""
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    params = model_case.random_params(config, np.float32)
    pretrained.save_pretrained(folder, config, params, tokenizer)
    return config, params


def bridge_of(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformer_lens")
    torch.set_num_threads(1)
    return transformer_lens.load(folder), torch


def referred(config, params, tokens_BT, kind=reference.Model):
    """Logits and activations of the NumPy reference: `(B, T, V)`, and location -> `(B, L, T, N)`."""
    results = [kind(config, params).run(tokens_T) for tokens_T in tokens_BT]
    acts = {name: np.array([seen[name] for _, seen in results]) for name in LOCATIONS}
    return np.stack([logits for logits, _ in results]), acts


def tokens_of(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 7))


def relative(got, want):
    got = np.asarray(got.detach(), np.float64)
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_every_named_activation_are_those_of_the_reference(name, tmp_path, tokenizer):
    config, params = exported(tmp_path, VARIANTS[name], tokenizer)
    bridge, torch = bridge_of(tmp_path)
    tokens = tokens_of(config)
    logits, cache = bridge.run_with_cache(torch.tensor(tokens))
    want, acts = referred(config, params, tokens)
    assert relative(logits, want) < TOLERANCE
    heads = (config.n_head, config.d_head)
    for location, kind in LOCATIONS.items():
        for layer in range(config.n_layer if kind.hook else 0):
            place = f"blocks.{layer}.{kind.hook}"
            value = acts[location][:, layer]
            shape = (*value.shape[:2], *heads) if kind.channels == "heads" else value.shape
            assert cache[place].shape == shape, place
            assert relative(cache[place], value.reshape(shape)) < TOLERANCE, place


CHANGES = {
    "sink": False, "bigram": "none", "activation": "relu", "abs_top_k_fraction": 0.6, "norm_eps": 0.1,
    "residual_activation": "relu", "norm": "layer",
}  # fmt: skip


def test_none_of_the_keys_of_the_config_is_ignored_on_the_way(tmp_path, tokenizer):
    """A negative control of the tolerance, too."""
    config, params = exported(tmp_path, VARIANTS["sparse default"], tokenizer)
    bridge, torch = bridge_of(tmp_path)
    tokens = tokens_of(config)
    logits = bridge(torch.tensor(tokens))
    params["head"]["norm"]["bias"] = np.zeros(config.d_model)
    for norm in ("attn_norm", "mlp_norm"):
        params["blocks"][norm]["bias"] = np.zeros((config.n_layer, config.d_model))
    for key, value in CHANGES.items():
        other, _ = referred(dataclasses.replace(config, **{key: value}), params, tokens)
        assert relative(logits, other) > 100 * TOLERANCE, key


def halving(site):
    """The reference with the values at a site, or what attention patterns are, halved in every layer."""

    class Halved(reference.Model):
        def sparse(self, at, value):
            return super().sparse(at, value) * (0.5 if at == site else 1.0)

        def attention(self, *args):
            return super().attention(*args) * (0.5 if site == "pattern" else 1.0)

    return Halved


@pytest.mark.parametrize(
    ("place", "site"),
    [
        ("attn.hook_q", "attn_q"),
        ("attn.hook_pattern", "pattern"),
        ("mlp.hook_post", "mlp_neuron"),
        ("ln1.hook_normalized", "attn_in"),
    ],
)
def test_a_hook_that_changes_a_value_changes_what_follows(place, site, tmp_path, tokenizer):
    config, params = exported(tmp_path, VARIANTS["sparse default"], tokenizer)
    bridge, torch = bridge_of(tmp_path)
    tokens = tokens_of(config)
    hooks = [(f"blocks.{i}.{place}", lambda value, hook: value * 0.5) for i in range(config.n_layer)]
    got = bridge.run_with_hooks(torch.tensor(tokens), fwd_hooks=hooks)
    assert relative(got, referred(config, params, tokens, halving(site))[0]) < TOLERANCE
    assert relative(got, referred(config, params, tokens)[0]) > 100 * TOLERANCE


def test_scores_and_patterns_have_hooks_on_the_way(tmp_path, tokenizer):
    config, _ = exported(tmp_path, VARIANTS["sparse default"], tokenizer)
    bridge, torch = bridge_of(tmp_path)
    _, cache = bridge.run_with_cache(torch.tensor(tokens_of(config)))
    scores, pattern = (cache[f"blocks.0.attn.hook_{name}"] for name in ("attn_scores", "pattern"))
    sink = bridge.blocks[0].attn.original_component.sink.detach()[None, :, None]
    total = scores.exp().sum(-1) + sink.exp()
    torch.testing.assert_close(pattern, scores.exp() / total[..., None])
    assert torch.all(pattern.sum(-1) < 1)


def test_text_is_cut_as_our_tokenizer_cuts_it_and_continued(tmp_path, tokenizer):
    config, params = exported(tmp_path, VARIANTS["sparse default"], tokenizer)
    bridge, torch = bridge_of(tmp_path)
    text = "return a"
    tokens = tokenizer.encode(text)
    assert 1 < len(tokens) < config.context - 1
    assert bridge.to_tokens(text).tolist() == [tokens]
    assert bridge.to_string(torch.tensor(tokens)) == text
    assert relative(bridge(text), referred(config, params, [tokens])[0]) < TOLERANCE
    out = bridge.generate(torch.tensor([tokens]), max_new_tokens=2, do_sample=False, verbose=False)
    for _ in range(2):
        tokens = [*tokens, int(np.argmax(referred(config, params, [tokens])[0][0, -1]))]
    assert out.tolist() == [tokens]


def test_what_would_change_the_function_is_refused(tmp_path, tokenizer):
    config, _ = exported(tmp_path, VARIANTS["sparse default"], tokenizer)
    bridge, torch = bridge_of(tmp_path)
    tokens = torch.tensor(tokens_of(config))
    with pytest.raises(RuntimeError, match="compatibility mode"):
        bridge.enable_compatibility_mode()
    with pytest.raises(UserError, match="no padding"):
        bridge(tokens, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2))
    with pytest.raises(UserError, match=f"at most {config.context} tokens"):
        bridge(torch.zeros(1, config.context + 1, dtype=torch.long))
    with pytest.raises(UserError, match="bigram table"):
        bridge(torch.zeros(2, 7, config.d_model), start_at_layer=1)


def test_transformer_lens_finds_the_adapter_by_its_entry_point():
    """In a process that has imported nothing of ours."""
    pytest.importorskip("transformer_lens")
    program = (
        "from importlib.metadata import entry_points;"
        "assert [e for e in entry_points(group='transformer_lens.architectures')"
        " if e.name == 'WsparseForCausalLM'], 'not installed';"
        "from transformer_lens.config import TransformerBridgeConfig as Config;"
        "from transformer_lens.factories.architecture_adapter_factory import"
        " ArchitectureAdapterFactory as Factory;"
        "cfg = Config(d_model=8, d_head=4, n_layers=1, n_ctx=8, architecture='WsparseForCausalLM');"
        "print(type(Factory.select_architecture_adapter(cfg)).__name__)"
    )
    done = run_python("-c", program)
    if "not installed" in done.stderr:
        pytest.skip("the package is not installed")
    assert done.stdout.strip() == "WsparseAdapter", done.stderr


# ---- Without PyTorch ----


def test_a_run_is_exported_with_one_command_and_the_module_needs_no_torch(tmp_path, tokenizer):
    config = dataclasses.replace(VARIANTS["sparse default"], vocab_size=tokenizer.vocab_size)
    params = model_case.random_params(config, np.float32)
    train_config = TrainConfig(model=config, data=DataConfig(source="idioms"))
    runs.create(tmp_path / "run", train_config, params, tokenizer, summary={})
    transformer_lens.export(tmp_path / "run", tmp_path / "out")
    got = pretrained.from_pretrained(tmp_path / "out")
    assert got.config == config
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got.params), params)
    with pytest.raises(UserError, match="choose another folder"):
        transformer_lens.export(tmp_path / "run", tmp_path / "run")
    assert runs.read_config(tmp_path / "run") == train_config
    with pytest.raises(UserError, match=r"out is a model .*, not a run: wsparse\.load"):
        transformer_lens.export(tmp_path / "out", tmp_path / "other")
    program = (
        "import sys, wsparse.interop.transformer_lens;"
        "assert not {'torch', 'transformers', 'transformer_lens', 'jax'} & set(sys.modules)"
    )
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr


def test_without_the_extra_and_for_another_folder_there_is_one_line(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is not an exported model: python -m"):
        transformer_lens.load(tmp_path)
    exported(tmp_path / "out", VARIANTS["sparse default"], tokenizer)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'wsparse\[lens\]'"):
        transformer_lens.load(tmp_path / "out")
