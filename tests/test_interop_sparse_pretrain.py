"""Checkpoints of the PyTorch replication: the recorded outputs, strictness, and runs made of them."""

import functools
import json
import logging
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from wsparse import model, runs, trees
from wsparse.config import NODE_SITES
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.interop import convert, parity, sparse_pretrain, torch_file
from wsparse.interop.sparse_pretrain import model_config, params_from_state
from wsparse.nodes import NODES, OTHER_LOCATIONS

GOLDEN = pathlib.Path(__file__).parent / "golden" / "sparse_pretrain"
WEIGHTS = {
    "dense_positions_tied": "pytorch_model.bin",
    "no_bias_resid_mid": "sparse_model.bin",
    "sinks_bigram": "pytorch_model.bin",
}
STORY = (
    "When Mia and Leo went to the park, Mia gave the red ball to Leo. He was happy. She is here. "
    "Five quick wizards jump over boxes. "
)


@functools.cache
def golden(name: str):
    """Fields and state of a checkpoint."""
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    return fields, torch_file.read(GOLDEN / name / WEIGHTS[name])


def changed(section: str, **fields):
    """The fields of a checkpoint with some of a section replaced; None leaves one out."""
    values, _ = golden("sinks_bigram")
    replaced = values[section] | fields
    return values | {section: {key: value for key, value in replaced.items() if value is not None}}


# Recorded outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_checkpoints_give_the_outputs_that_pytorch_recorded(name):
    errors = parity.measure(GOLDEN / name)
    assert set(errors) == {"logits", "loss", *NODES, *OTHER_LOCATIONS}
    for activation, error in errors.items():
        assert error.max < 1e-5, activation
    with np.load(GOLDEN / name / "expected.npz") as expected:
        config, params = sparse_pretrain.load(GOLDEN / name)
        logits, _ = model.forward(params, expected["tokens"], config)
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


@pytest.mark.parametrize(
    "key", ["blocks.1.attn.attn_fn.sink_logit", "bigram_table", "blocks.0.mlp.c_fc.bias"]
)
def test_the_comparison_notices_a_changed_parameter(key, tmp_path):
    """Negative control."""
    shutil.copytree(GOLDEN / "sinks_bigram", tmp_path / "changed")
    state = dict(golden("sinks_bigram")[1])
    state[key] = state[key] + np.float32(0.1)
    torch_file.write(tmp_path / "changed" / "pytorch_model.bin", state)
    assert parity.measure(tmp_path / "changed")["logits"].max > 1e-4


def test_the_golden_models_differ_in_what_the_format_can_say():
    configs = {name: model_config(golden(name)[0]) for name in WEIGHTS}
    assert configs["sinks_bigram"].sink and configs["sinks_bigram"].bigram == "learned"
    assert set(configs["sinks_bigram"].abs_top_k_sites) == set(NODE_SITES)
    dense = configs["dense_positions_tied"]
    assert dense.abs_top_k_fraction is None and dense.tied_embeddings and dense.position == "added"
    assert (dense.norm, dense.activation, dense.sink) == ("layer", "relu", False)
    assert "resid_post_attn" in configs["no_bias_resid_mid"].abs_top_k_sites
    assert not configs["no_bias_resid_mid"].bias


def test_every_number_of_a_state_is_used_once():
    fields, state = golden("sinks_bigram")
    params = params_from_state(model_config(fields), state)
    assert model.count_parameters(params) == sum(array.size for array in state.values())


# Strictness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (changed("model_config", n_layer=None), "lacks the field model_config.n_layer"),
        (changed("model_config", rotary=True), "unknown field 'rotary' in model_config: it may change"),
        (changed("model_config", use_bigram_tables=True), "did you mean 'use_bigram_table'"),
        (changed("sparsity_config", bridges=2), "unknown field 'bridges' in sparsity_config"),
        (changed("model_config", use_bias="yes"), "model_config.use_bias must be true or false, got 'yes'"),
        (changed("model_config", d_head=5), "d_model must be a multiple of d_head=5, got 32"),
        (changed("model_config", d_head=0), "d_head must be a positive integer, got 0"),
        (changed("model_config", activation="silu"), "activation' must be one of 'gelu', 'relu'"),
        (
            changed("model_config", use_flash_attention=False),
            "use_flash_attention must be true with attention sinks",
        ),
        (
            changed("sparsity_config", activation_sparsity_locations="attn_in,resid_pre"),
            "activation_sparsity_locations has resid_pre.*no variant of the model",
        ),
        (
            changed("sparsity_config", activation_sparsity_locations="attn_inn"),
            "has an unknown site 'attn_inn' .did you mean 'attn_in'",
        ),
        (
            changed("sparsity_config", activation_topk_fraction=0.01),
            "abs_top_k_fraction=0.01 keeps no channel",
        ),
        (golden("sinks_bigram")[0] | {"moe_config": {}}, "unknown section 'moe_config'"),
        ({"model_config": {}}, "must have the section sparsity_config"),
    ],
)
def test_a_field_that_is_missing_unknown_or_without_a_variant_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message) as error:
        model_config(fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"bridges.0.weight": np.ones(3)},
            r"do not belong to the config, such as 'bridges\.0\.weight'",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "ln_f.weight"}, r"lacks 'ln_f\.weight'"),
        (lambda s: s | {"wte.weight": s["wte.weight"].T}, r"'wte\.weight' must have shape \(80, 32\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    fields, state = golden("sinks_bigram")
    with pytest.raises(UserError, match=message):
        params_from_state(model_config(fields), change(state))


def test_masks_of_attention_without_flash_are_ignored():
    fields, state = golden("dense_positions_tied")
    plain = fields | {"model_config": fields["model_config"] | {"use_flash_attention": False}}
    masked = state | {"blocks.0.attn.causal_mask": np.ones((1, 1, 24, 24), np.float32)}
    got = trees.flatten(params_from_state(model_config(plain), masked))
    want = trees.flatten(params_from_state(model_config(fields), state))
    assert all(np.array_equal(got[path], want[path]) for path in want)


def test_fields_have_the_defaults_of_the_published_code():
    sizes = {"n_layer": 1, "d_model": 32, "n_ctx": 8, "d_head": 16, "vocab_size": 50}
    config = model_config({"model_config": sizes, "sparsity_config": {}})
    assert (config.mlp_width, config.norm, config.bigram, config.sink) == (128, "rms", "learned", True)
    assert config.abs_top_k_fraction == 0.25 and set(config.abs_top_k_sites) == set(NODE_SITES)


def test_sites_of_the_training_that_the_config_does_not_repeat_are_warned_of(tmp_path, caplog):
    shutil.copytree(GOLDEN / "sinks_bigram", tmp_path / "model")
    path = tmp_path / "model" / "training_config.yaml"
    path.write_text("sparsity:\n  activation_sparsity_locations: " + ",".join(NODE_SITES) + "\n")
    with caplog.at_level(logging.WARNING):
        sparse_pretrain.load(tmp_path / "model")
    assert not caplog.records
    path.write_text(path.read_text().rstrip() + ",resid_mid,resid_pre\n")
    with caplog.at_level(logging.WARNING):
        sparse_pretrain.load(tmp_path / "model")
    assert "AbsTopK sites: 'resid_post_attn', 'resid_pre'" in caplog.text


def test_weights_in_16_bits_are_widened_exactly(tmp_path):
    shutil.copytree(GOLDEN / "sinks_bigram", tmp_path / "model")
    narrow = {key: array.astype(ml_dtypes.bfloat16) for key, array in golden("sinks_bigram")[1].items()}
    torch_file.write(tmp_path / "model" / "pytorch_model.bin", narrow)
    got = np.asarray(sparse_pretrain.load(tmp_path / "model")[1]["embed"]["tokens"])
    np.testing.assert_array_equal(got, narrow["wte.weight"].astype(np.float32))


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is not a published checkpoint: it has no config\.json"):
        sparse_pretrain.load(tmp_path)
    shutil.copy(GOLDEN / "sinks_bigram" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"has neither pytorch_model\.bin nor sparse_model\.bin"):
        sparse_pretrain.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(UserError, match=r"format from before version 1\.6"):
        sparse_pretrain.load(tmp_path)


# Runs ----------------------------------------------------------------------------------------------


def word_pieces(vocab_size: int) -> Tokenizer:
    """A tokenizer of the kind that these models have: uncased word pieces with [UNK] and [EOS]."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[UNK]", "[EOS]"], show_progress=False
    )
    core.train_from_iterator([STORY] * 20, trainer)
    core.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    return core


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    word_pieces(80).save(str(path))
    return path


def test_an_uncased_tokenizer_of_word_pieces_ends_texts_with_its_own_token(tokenizer_file):
    tokenizer = tokenizer_lib.load(tokenizer_file)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (80, 1)
    assert tokenizer.encode("MIA") == tokenizer.encode(" mia") != tokenizer.encode("leo")
    assert 1 not in tokenizer.encode("[EOS]")


def test_a_checkpoint_becomes_a_run_with_its_tokenizer_and_text(tokenizer_file, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": STORY + str(i)}) + "\n" for i in range(60)))
    convert.import_run(
        GOLDEN / "sinks_bigram", tmp_path / "run", tokenizer=tokenizer_file, source=f"jsonl:{text}"
    )
    run = runs.load(tmp_path / "run")
    assert run.config.data.domain == "stories"
    _, want = sparse_pretrain.load(GOLDEN / "sinks_bigram")
    got = trees.flatten(run.params)
    assert all(np.array_equal(got[path], leaf) for path, leaf in trees.flatten(want).items())
    windows_WT = run.windows("train", n=2)
    assert windows_WT.shape == (2, 24) and (windows_WT < 80).all()


def test_an_import_without_a_tokenizer_says_where_to_find_one(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*sinks_bigram/tokenizer\.json: give the"):
        convert.import_run(GOLDEN / "sinks_bigram", tmp_path / "run", source="idioms")
    assert not (tmp_path / "run").exists()


def test_an_import_into_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.import_run(GOLDEN / "sinks_bigram", tmp_path, source="idioms")
