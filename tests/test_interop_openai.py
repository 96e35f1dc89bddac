"""Published checkpoints: the recorded outputs, strictness, runs made of them, and the way back."""

import dataclasses
import functools
import json
import pathlib
import shutil

import helpers
import jax
import ml_dtypes
import numpy as np
import pytest
import tiktoken

from wsparse import model, runs, trees
from wsparse.config import ABS_TOP_K_SITES, ModelConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.interop import bpe_files, convert, openai, parity, torch_file
from wsparse.interop.openai import model_config, params_from_state
from wsparse.nodes import NODES, OTHER_LOCATIONS

GOLDEN = pathlib.Path(__file__).parent / "golden"
GOLDEN_NAMES = ("cat_pos_emb", "dense_layernorm_tied", "rms_abstopk", "sink_bigram")
DOCS = pathlib.Path(__file__).parent.parent / "docs"
LOCATIONS = (*NODES, *OTHER_LOCATIONS)
VOCAB = 300
CONFIG = ModelConfig(vocab_size=VOCAB, context=16, n_layer=2, d_model=16, n_head=2, d_head=8)
TEXT = [
    "def add(first, second):\n    return first + second\n" * 9,
    "for name in names:\n    print(name)\n" * 9,
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n" * 9,
    "while True:\n    value = compute(value, 'text')\n    if value == 0:\n        break\n" * 9,
]


def golden_config(name: str) -> dict:
    return json.loads((GOLDEN / name / "beeg_config.json").read_text())


@functools.cache
def golden(name: str):
    """Fields and state of a published checkpoint."""
    return golden_config(name), torch_file.read(GOLDEN / name / "final_model.pt")


# Recorded outputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_checkpoints_give_the_published_outputs(name):
    errors = parity.measure(GOLDEN / name)
    assert set(errors) == {"logits", "loss", *LOCATIONS}
    for activation, error in errors.items():
        assert error.max < 1e-5, activation
        assert error.mean <= error.max


def test_the_comparison_notices_a_changed_weight(tmp_path):
    """Negative control."""
    shutil.copytree(GOLDEN / "rms_abstopk", tmp_path / "changed")
    _, state = golden("rms_abstopk")
    key = "transformer.h.1.mlp.c_proj.weight"
    changed = dict(state) | {key: state[key] * np.float32(1.001)}
    torch_file.write(tmp_path / "changed" / "final_model.pt", changed)
    errors = parity.measure(tmp_path / "changed")
    assert errors["logits"].max > 1e-5 and errors["mlp.resid_delta"].max > 1e-5
    assert errors["mlp.post_act"].max < 1e-5


def test_the_error_is_relative_to_the_largest_magnitude():
    error = parity.relative_error(np.array([1.0, -4.0, 2.0]), np.array([1.0, -5.0, 2.5]))
    assert error == pytest.approx((1 / 5, 1.5 / 3 / 5))


def test_the_table_in_the_docs_has_every_model_and_activation():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "interop.md").read_text().splitlines()
        if line.startswith("|")
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == "activation")
    assert [cell.removesuffix(": max") for cell in rows[start][1::2]] == list(GOLDEN_NAMES)
    body = {row[0]: [float(cell) for cell in row[1:]] for row in rows[start + 2 : start + 16]}
    assert set(body) == {"logits", "loss", *LOCATIONS}
    assert max(max(numbers) for numbers in body.values()) < parity.TOLERANCE


# Fields and keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_mapping_gives_the_parameters_that_init_gives(name):
    fields, state = golden(name)
    config = model_config(fields)
    params = params_from_state(config, state)
    want = {path: leaf.shape for path, leaf in trees.flatten(helpers.shapes(config)).items()}
    assert {path: leaf.shape for path, leaf in trees.flatten(params).items()} == want


def test_every_number_of_a_published_state_is_used_once():
    fields, state = golden("sink_bigram")
    params = params_from_state(model_config(fields), state)
    assert model.count_parameters(params) == sum(array.size for array in state.values())
    for array in (state["transformer.h.2.attn.c_attn.weight"], state["transformer.h.1.mlp.c_fc.bias"]):
        assert np.isin(array, np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"transformer.h.0.mlp.c_gate.weight": np.ones(3)},
            r"1 keys that do not belong to the config, such as .transformer\.h\.0\.mlp\.c_gate\.weight",
        ),
        (
            lambda s: s | {"transformer.h.3.ln_1.weight": np.ones(32)},
            r"keys that do not belong to the config, such as .transformer\.h\.3\.ln_1\.weight",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "transformer.h.1.ln_2.weight"},
            r"lacks 'transformer\.h\.1\.ln_2\.weight'",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "bigram_table"}, "lacks 'bigram_table'"),
        (
            lambda s: s | {"transformer.h.0.mlp.c_fc.weight": s["transformer.h.0.mlp.c_fc.weight"].T},
            r"c_fc\.weight' must have shape \(128, 32\) for this config, got \(32, 128\)",
        ),
    ],
    ids=["unknown key", "layer too many", "missing key", "missing table", "wrong shape"],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    fields, state = golden("sink_bigram")
    with pytest.raises(UserError, match=message):
        params_from_state(model_config(fields), change(state))


def test_tied_embeddings_that_differ_are_refused():
    fields, state = golden("dense_layernorm_tied")
    with pytest.raises(UserError, match="ties the embeddings"):
        params_from_state(model_config(fields), state | {"lm_head.weight": state["lm_head.weight"] + 1})


def test_an_unknown_published_field_is_refused():
    fields, _ = golden("sink_bigram")
    with pytest.raises(UserError, match="unknown field 'rotary'"):
        model_config(fields | {"rotary": True})
    with pytest.raises(UserError, match="lacks the field n_layer"):
        model_config({key: value for key, value in fields.items() if key != "n_layer"})


def test_an_unknown_published_field_is_not_its_own_suggestion():
    fields, _ = golden("sink_bigram")
    with pytest.raises(UserError) as error:
        model_config(fields | {"sinks": True})
    assert "did you mean 'sinks'" not in str(error.value)
    assert "did you mean 'sink'" in str(error.value)


def test_older_published_files_are_understood():
    fields, state = golden("cat_pos_emb")
    older = {key: value for key, value in fields.items() if key not in ("sink", "d_mlp")}
    assert model_config(older | {"n_mlp": fields["d_mlp"]}) == model_config(fields)
    assert not model_config(older).sink
    assert not model_config(fields | {"sink": None}).sink
    # What the code that the models were trained with wrote, and the published code leaves out.
    more = dict.fromkeys(("n_embd", "expansion_factor", "expansion_factor_mlp", "pfrac"), 2)
    more |= {"bigram_table_rank": None, "debug_exact_topk": True, "sparse_matmul_impl": "triton"}
    more |= {"use_tied_aux_matrix": False, "rtopk": False, "mup_width_multiplier": None}
    assert model_config(fields | more) == model_config(fields)
    without = {key: value for key, value in state.items() if key != "final_logits_bias"}
    params = params_from_state(model_config(fields), without)
    np.testing.assert_array_equal(params["head"]["logits_bias"], np.zeros(96))


def test_a_field_of_older_files_that_changes_inference_must_be_off():
    with pytest.raises(UserError, match=r"use_tied_aux_matrix must be off.*got True"):
        model_config(golden_config("rms_abstopk") | {"use_tied_aux_matrix": True})


def test_an_older_file_loads_with_the_same_outputs(tmp_path):
    """No sink, n_mlp, more fields, and a causal mask among the weights."""
    fields, state = golden("rms_abstopk")
    older = {key: value for key, value in fields.items() if key not in ("sink", "d_mlp")}
    older |= {"n_mlp": fields["d_mlp"], "bigram_table_rank": None, "pfrac": 0.5}
    mask = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}
    (tmp_path / "beeg_config.json").write_text(json.dumps(older))
    torch_file.write(tmp_path / "final_model.pt", state | mask)
    shutil.copy(GOLDEN / "rms_abstopk" / "expected.npz", tmp_path)
    errors = parity.measure(tmp_path)
    assert max(error.max for error in errors.values()) < parity.TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_type": "silu"}, "activation' must be one of 'gelu', 'relu', got 'silu'"),
        ({"n_layer": "3"}, "n_layer' must be of type int, got '3'"),
        ({"afrac_loctypes": None}, "afrac_loctypes must be names separated by commas, got None"),
        ({"afrac_loctypes": "attn_inn"}, "unknown site 'attn_inn' .did you mean 'attn_in'"),
        ({"n_head": 0, "d_head": None}, "n_head must be a positive integer, got 0"),
        ({"d_pos_emb": 0}, "d_pos must be at least 1"),
        ({"rms_norm": "no"}, "rms_norm must be true or false, got 'no'"),
        ({"sinusoidal_cat_pos_emb": 1}, "sinusoidal_cat_pos_emb must be true or false, got 1"),
        ({"enable_bigram_table": None}, "enable_bigram_table must be true or false, got None"),
        ({"learnable_bigram_table": []}, r"learnable_bigram_table must be true or false, got \[\]"),
        ({"ln_bias": "no"}, "norm_bias' must be of type bool, got 'no'"),
        ({"rtopk": ""}, "rtopk must be off.*got ''"),
        ({"\x1b[31m" + "x" * 10**6: 1}, r"unknown field '\\x1b\[31mx{75}':"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_field_with_a_bad_value_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        model_config(golden_config("rms_abstopk") | change)


def test_fields_have_the_defaults_of_the_published_code():
    fields = {"block_size": 8, "vocab_size": 96, "n_layer": 1, "n_head": 2, "d_model": 32}
    config = model_config(fields)
    assert (config.d_head, config.mlp_width, config.norm, config.tied_embeddings) == (16, 128, "layer", True)
    assert model_config(fields | {"afrac": 0.5}).abs_top_k_sites == (
        "attn_in", "attn_out", "mlp_in", "mlp_out",
    )  # fmt: skip


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is not a published checkpoint: it has no beeg_config\.json"):
        openai.load(tmp_path)
    (tmp_path / "beeg_config.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object"):
        openai.load(tmp_path)
    (tmp_path / "beeg_config.json").write_text(json.dumps(golden_config("rms_abstopk")))
    with pytest.raises(UserError, match=r"final_model\.pt cannot be read: No such file"):
        openai.load(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_in_16_bits_are_widened_exactly(dtype, tmp_path):
    fields, state = golden("rms_abstopk")
    (tmp_path / "beeg_config.json").write_text(json.dumps(fields))
    narrow = {key: array.astype(dtype) for key, array in state.items()}
    torch_file.write(tmp_path / "final_model.pt", narrow)
    _, params = openai.load(tmp_path)
    got = np.asarray(params["embed"]["tokens"])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, narrow["transformer.wte.weight"].astype(np.float32))


def test_weights_that_would_be_rounded_are_refused(tmp_path):
    fields, state = golden("rms_abstopk")
    (tmp_path / "beeg_config.json").write_text(json.dumps(fields))
    wide = {key: array.astype(np.float64) for key, array in state.items()}
    torch_file.write(tmp_path / "final_model.pt", wide)
    with pytest.raises(UserError, match="is of type float64"):
        openai.load(tmp_path)


def test_a_causal_mask_of_any_type_is_ignored(tmp_path):
    fields, state = golden("rms_abstopk")
    (tmp_path / "beeg_config.json").write_text(json.dumps(fields))
    mask = np.tril(np.ones((1, 1, 16, 16), bool))
    torch_file.write(tmp_path / "final_model.pt", state | {"transformer.h.0.attn.bias": mask})
    helpers.assert_bitwise(openai.load(tmp_path)[1], openai.load(GOLDEN / "rms_abstopk")[1])


# There and back ------------------------------------------------------------------------------------

VARIANTS = {
    "default": CONFIG,
    "dense": dataclasses.replace(
        CONFIG, norm="layer", tied_embeddings=True, position="added", sink=False, bigram="none",
        abs_top_k_fraction=None,
    ),
    "concat": dataclasses.replace(
        CONFIG, position="concat", d_pos=5, bigram="frozen", logits_bias=True, d_mlp=24,
        abs_top_k_sites=ABS_TOP_K_SITES, activation="relu",
    ),
    "sinusoid": dataclasses.replace(
        CONFIG, position="concat_sinusoid", d_pos=6, bias=False, norm="layer", norm_bias=False,
        residual_activation="relu", n_head=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_comes_back_from_the_published_format_bit_for_bit(name, tmp_path):
    config, params = VARIANTS[name], helpers.random_params(VARIANTS[name])
    openai.save(tmp_path, config, params)
    got_config, got_params = openai.load(tmp_path)
    assert got_config == dataclasses.replace(config, d_mlp=config.mlp_width)
    helpers.assert_bitwise(got_params, params)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_published_checkpoint_is_written_back_bit_for_bit(name, tmp_path):
    openai.save(tmp_path, *openai.load(GOLDEN / name))
    fields, state = golden(name)
    stored = {key: array for key, array in state.items() if not key.endswith(".attn.bias")}
    helpers.assert_bitwise(torch_file.read(tmp_path / "final_model.pt"), stored)
    written = json.loads((tmp_path / "beeg_config.json").read_text())
    unordered = {"afrac_loctypes": None, "flash": None}
    assert written | unordered == fields | unordered
    assert set(written["afrac_loctypes"].split(",")) == set(fields["afrac_loctypes"].split(","))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        openai.save(tmp_path / folder, CONFIG, helpers.random_params(CONFIG))
    openai.save(tmp_path / "c", CONFIG, helpers.random_params(CONFIG, seed=1))
    a, b, c = ((tmp_path / folder / "final_model.pt").read_bytes() for folder in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-3}, r"cannot express model\.norm_eps=0\.001"),
        ({"n_head": 3}, r"model\.d_model to be a multiple of n_head=3, got 16"),
    ],
)
def test_what_the_format_cannot_say_is_refused_before_anything_is_written(change, message, tmp_path):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError, match=message):
        openai.save(tmp_path / "out", config, helpers.random_params(config))
    assert not (tmp_path / "out").exists()


# The tokenizer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.train(TEXT, VOCAB)


def as_tiktoken(folder: pathlib.Path) -> tiktoken.Encoding:
    """The tokenizer of the two files by another implementation."""
    printable = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if chr(b) not in printable]
    to_byte = {c: ord(c) for c in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ids = json.loads((folder / "encoder.json").read_text())
    end = ids.pop(tokenizer_lib.END_OF_TEXT)
    ranks = {bytes(to_byte[c] for c in token): i for token, i in ids.items()}
    return tiktoken.Encoding(
        "folder", pat_str=tokenizer_lib.PATTERN, mergeable_ranks=ranks,
        special_tokens={tokenizer_lib.END_OF_TEXT: end},
    )  # fmt: skip


def test_the_published_tokenizer_encodes_as_tiktoken_does(tokenizer, tmp_path):
    bpe_files.save(tmp_path, tokenizer)
    loaded, other = bpe_files.load(tmp_path), as_tiktoken(tmp_path)
    assert loaded.end_of_text == VOCAB - 1 == other.eot_token
    random = np.random.default_rng(0)
    alphabet = list("adefinrstx_ \n\t()'\":=.0129é漢🙂\u00a0")
    texts = ["".join(random.choice(alphabet, size=40)) for _ in range(500)]
    texts += [*TEXT, "a<|endoftext|>b", "", "1234567", "  \n\n  x\r\n"]
    for text in texts:
        assert loaded.encode(text) == other.encode_ordinary(text) == tokenizer.encode(text)
    # The control: other priorities give other tokens.
    merges = (tmp_path / "vocab.bpe").read_text().splitlines()
    (tmp_path / "vocab.bpe").write_text("\n".join([merges[0], *reversed(merges[1:])]))
    assert any(bpe_files.load(tmp_path).encode(text) != tokenizer.encode(text) for text in texts)


def test_a_trained_tokenizer_comes_back_from_the_two_files_with_its_digest(tokenizer, tmp_path):
    bpe_files.save(tmp_path, tokenizer)
    assert bpe_files.load(tmp_path).digest == tokenizer.digest


def test_end_of_text_keeps_an_id_that_is_not_the_last(tokenizer, tmp_path):
    bpe_files.save(tmp_path, tokenizer)
    ids = json.loads((tmp_path / "encoder.json").read_text())
    moved = {token: (i + 1) % VOCAB for token, i in ids.items()}
    (tmp_path / "encoder.json").write_text(json.dumps(moved))
    loaded = bpe_files.load(tmp_path)
    assert loaded.end_of_text == 0 and loaded.vocab_size == VOCAB
    assert loaded.encode(TEXT[0]) == [i + 1 for i in tokenizer.encode(TEXT[0])]


def test_end_of_text_that_is_not_listed_is_the_next_id(tokenizer, tmp_path):
    bpe_files.save(tmp_path, tokenizer)
    ids = json.loads((tmp_path / "encoder.json").read_text())
    del ids[tokenizer_lib.END_OF_TEXT]
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    assert bpe_files.load(tmp_path).end_of_text == VOCAB - 1


@pytest.mark.parametrize(
    ("ids", "merges", "message"),
    [
        (lambda ids: ids | {"de": "7"}, None, "the id of 'de' must be an integer, got '7'"),
        (lambda ids: ids | {"zzz": VOCAB + 1}, None, "the ids must be 0 to 300, each of them once"),
        (lambda ids: ids | {"zzz": VOCAB}, None, r"no merge in vocab\.bpe makes the token 'zzz'"),
        (lambda ids: {k: i for i, k in enumerate(set(ids) - {"a"})}, None, "of the 256 bytes have no token"),
        (None, "a b c", r"vocab\.bpe:2: must be two tokens"),
        (None, "a zzz", "needs the token 'zzz', which"),
    ],
    ids=["not a number", "a hole", "unmerged", "no byte", "three parts", "unknown part"],
)  # fmt: skip
def test_tokenizer_files_that_contradict_each_other_are_refused(ids, merges, message, tokenizer, tmp_path):
    bpe_files.save(tmp_path, tokenizer)
    if ids:
        values = json.loads((tmp_path / "encoder.json").read_text())
        (tmp_path / "encoder.json").write_text(json.dumps(ids(values)))
    if merges:
        first, *rest = (tmp_path / "vocab.bpe").read_text().splitlines()
        (tmp_path / "vocab.bpe").write_text("\n".join([first, merges, *rest]))
    with pytest.raises(UserError, match=message):
        bpe_files.load(tmp_path)


# Runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """A published checkpoint with its tokenizer, and the parameters in it."""
    folder = tmp_path_factory.mktemp("published")
    params = helpers.random_params(CONFIG)
    openai.save(folder, CONFIG, params)
    bpe_files.save(folder, tokenizer)
    return folder, params


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """The run made of it, with text from a folder of its own."""
    where = tmp_path_factory.mktemp("imported")
    for number, text in enumerate(TEXT):
        (where / f"{number}.py").write_text(text)
    convert.import_run(published[0], where / "run", source=f"files:{where}/*.py")
    return where / "run"


def test_an_imported_run_is_read_like_one_that_was_trained(imported, published, tokenizer):
    run = runs.load(imported)
    assert run.config.model == dataclasses.replace(CONFIG, d_mlp=64)
    helpers.assert_bitwise(run.params, published[1])
    assert run.tokenizer.digest == tokenizer.digest
    summary = json.loads((imported / "summary.json").read_text())
    assert summary["parameters"] == model.count_parameters(published[1])
    assert summary["l0"] == 1.0 and run.step == 0
    assert (imported / "checkpoints" / "0" / "digests.json").exists()


def test_pruning_draws_its_text_from_the_source_that_the_import_named(imported, tokenizer, tmp_path):
    windows = runs.load(imported).windows("train", n=8)
    assert windows.shape[1] == CONFIG.context
    text = tokenizer.decode(windows[0])
    assert any(text[5:-5].split("<|endoftext|>")[0] in each for each in TEXT)


def test_an_imported_run_is_exported_as_it_came(imported, published, tmp_path):
    openai.export_run(imported, tmp_path / "out")
    for name in ("beeg_config.json", "final_model.pt", "encoder.json", "vocab.bpe"):
        assert (tmp_path / "out" / name).read_bytes() == (published[0] / name).read_bytes(), name


def test_an_export_replaces_nothing_and_leaves_nothing_half_written(imported, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "beeg_config.json").write_text("theirs")
    with pytest.raises(UserError, match="exists and is not empty"):
        openai.export_run(imported, tmp_path / "out")
    assert (tmp_path / "out" / "beeg_config.json").read_text() == "theirs"

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bpe_files, "save", fail)
    monkeypatch.setattr(bpe_files, "check", lambda tokenizer: None)
    with pytest.raises(KeyboardInterrupt):
        openai.export_run(imported, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_import_without_a_tokenizer_says_what_works_without(tmp_path):
    with pytest.raises(UserError, match=r"has no encoder\.json.*--tokenizer=FOLDER.*load works"):
        convert.import_run(GOLDEN / "sink_bigram", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_import_with_anothers_tokenizer_is_refused(published, tmp_path):
    with pytest.raises(UserError, match="the tokenizer has 300 tokens, the model 96"):
        convert.import_run(GOLDEN / "sink_bigram", tmp_path / "run", tokenizer=published[0])
    assert not (tmp_path / "run").exists()


def test_an_import_refuses_a_bad_source_and_a_folder_that_is_taken(published, imported, tmp_path):
    with pytest.raises(UserError, match="sdtlib"):
        convert.import_run(published[0], tmp_path / "run", source="sdtlib")
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.import_run(published[0], imported)


def test_an_import_that_fails_leaves_nothing(published, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "sizes", fail)
    with pytest.raises(KeyboardInterrupt):
        convert.import_run(published[0], tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_import_to_where_no_folder_can_be_names_the_folder_that_was_asked_for(published, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        convert.import_run(published[0], tmp_path / "file" / "run")
    assert str(error.value) == f"cannot make the folder {tmp_path / 'file' / 'run'}: Not a directory"
