"""The command that converts tells formats apart by their files, and keeps its first names."""

import dataclasses
import pathlib
import shutil

import helpers
from helpers import run_python
import numpy as np
import pytest
from test_interop_openai import CONFIG, TEXT
from test_interop_openai import VOCAB as OPENAI_VOCAB
from test_interop_sparse_pretrain import GOLDEN, word_pieces
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from wsparse import runs, trees
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.interop import bpe_files, openai, sparse_pretrain
from wsparse.interop.convert import import_run


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint of the published code, with its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    openai.save(folder, CONFIG, helpers.random_params(CONFIG))
    bpe_files.save(folder, tokenizer_lib.train(TEXT, OPENAI_VOCAB))
    return folder


@pytest.fixture
def replicated(tmp_path):
    """A checkpoint of the replication, with its tokenizer."""
    folder = shutil.copytree(GOLDEN / "sinks_bigram", tmp_path / "replicated")
    word_pieces(80).save(str(folder / "tokenizer.json"))
    return folder


def test_either_format_becomes_a_run_with_the_text_of_its_kind(published, replicated, tmp_path):
    for folder, module, domain, source in (
        (published, openai, "python", "stdlib"),
        (replicated, sparse_pretrain, "stories", sparse_pretrain.SOURCE),
    ):
        out = tmp_path / f"run of {domain}"
        config = import_run(folder, out)
        assert (config.data.domain, config.data.source) == (domain, source)
        want = trees.flatten(module.load(folder)[1])
        got = trees.flatten(runs.load(out).params)
        assert got.keys() == want.keys() and all(np.array_equal(got[path], want[path]) for path in want)


def test_a_tokenizer_may_be_given_as_its_file_or_its_folder(replicated, tmp_path):
    for number, tokenizer in enumerate((replicated, replicated / "tokenizer.json")):
        config = import_run(
            GOLDEN / "sinks_bigram", tmp_path / str(number), tokenizer=tokenizer, source="stories"
        )
        assert config.data.source == "stories"


def test_what_is_neither_format_is_refused_and_nothing_is_written(replicated, tmp_path):
    (replicated / "pytorch_model.bin").unlink()
    out = tmp_path / "out"
    for folder in (replicated, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"it has neither beeg_config\.json nor pytorch_model\.bin nor"):
            import_run(folder, out)
    assert not out.exists()


def foreign_bpe() -> tokenizer_lib.Tokenizer:
    """Byte-level BPE of words, as GPT-2 splits them."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=OPENAI_VOCAB, special_tokens=[tokenizer_lib.END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(TEXT, trainer)
    return tokenizer_lib.from_json(core.to_str())


@pytest.mark.parametrize("kind", ["WordPiece", "BPE"])
def test_a_run_whose_tokenizer_the_format_cannot_express_is_not_exported(
    kind, replicated, published, tmp_path, monkeypatch
):
    run, out = tmp_path / "run", tmp_path / "out"
    import_run(replicated if kind == "WordPiece" else published, run)
    if kind == "BPE":
        loaded = dataclasses.replace(runs.load(run), tokenizer=foreign_bpe())
        monkeypatch.setattr(runs, "load", lambda folder: loaded)
    with pytest.raises(UserError, match=rf"cannot express this tokenizer \({kind}\)") as error:
        openai.export_run(run, out)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("module", ["convert", "openai"])
def test_the_command_imports_and_exports_under_either_name(module, published, tmp_path):
    def command(*arguments: str) -> str:
        done = run_python("-m", f"wsparse.interop.{module}", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run, back = tmp_path / "run", tmp_path / "back"
    assert command(f"--from={published}", f"--out={run}").startswith(f"wrote {run}: python -m wsparse.sample")
    assert runs.read_config(run).data.source == "stdlib"
    # The model has sinks.
    exported = command(f"--from={run}", f"--out={back}", "--export")
    assert exported.endswith(f"the published code's load_model({str(back)!r}, flash=True)\n")
    for name in (openai.CONFIG_FILE, openai.WEIGHTS_FILE):
        assert (back / name).read_bytes() == (published / pathlib.Path(name)).read_bytes()
