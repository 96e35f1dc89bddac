"""The tokenizer loses nothing, is reproducible, and agrees with another implementation."""

import collections

from helpers import check, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import tokenizers

from wsparse.data import sources, tokenizer

VOCAB = 700
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
codelike = st.text(st.sampled_from("abz_ \t\n\r'\"()[]{}:+=.,0129é漢🙂/\\\u2028\u00a0\u0301"), max_size=60)


def texts(megabytes: float) -> list[str]:
    counts: collections.Counter[str] = collections.Counter()
    source = sources.open_source("stdlib")
    return list(sources.documents(source, counts, max_bytes=megabytes * 1e6))


@pytest.fixture(scope="module")
def trained() -> tokenizer.Tokenizer:
    return tokenizer.train(texts(0.3), VOCAB)


@settings(max_examples=300, deadline=None)
@given(st.one_of(anything, codelike))
def test_every_text_round_trips_exactly(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_every_byte_of_utf8_is_reachable(trained):
    # Every lead and continuation byte that UTF-8 uses, in text the merges never saw.
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, 0x110000, 997)]))
    assert trained.decode(trained.encode(text)) == text


def test_end_of_text_is_the_last_id_and_no_text_encodes_to_it(trained):
    assert trained.vocab_size == VOCAB
    assert trained.end_of_text == VOCAB - 1
    text = "a<|endoftext|>b"
    ids = trained.encode(text)
    assert trained.end_of_text not in ids
    assert trained.end_of_text not in trained.encode_batch([text])[0]
    assert trained.decode(ids) == text
    assert trained.token_id("<|endoftext|>") is None
    # The control: the library's own default would have recognized it.
    plain = tokenizers.Tokenizer.from_str(trained.to_json())
    assert trained.end_of_text in plain.encode(text).ids


def test_the_batch_encodes_as_each_text_alone(trained):
    documents = texts(0.05)
    assert trained.encode_batch(documents) == [trained.encode(text) for text in documents]


def test_token_id_is_given_for_single_tokens_only(trained):
    assert trained.decode([trained.token_id(" self")]) == " self"
    assert trained.token_id(" self is not one token") is None
    assert trained.token_id("") is None


def test_save_and_load_give_the_same_tokenizer(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    again = tokenizer.load(tmp_path / "tokenizer.json")
    text = "def f(x):\n    return x<|endoftext|>\n"
    assert again.digest == trained.digest
    assert again.encode(text) == trained.encode(text)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_reproducible_in_another_process_and_depends_on_the_text(trained):
    script = (
        "import collections; from wsparse.data import sources, tokenizer;"
        "s = sources.open_source('stdlib');"
        "d = sources.documents(s, collections.Counter(), max_bytes=3e5);"
        f"print(tokenizer.train(d, {VOCAB}).digest)"
    )
    printed = run_python("-c", script)
    assert printed.stdout.strip() == trained.digest, printed.stderr
    assert tokenizer.train(texts(0.3)[:-1], VOCAB).digest != trained.digest


def test_what_a_foreign_file_has_on_does_not_change_the_ids(trained):
    core = tokenizers.Tokenizer.from_str(trained.to_json())
    core.enable_truncation(3)
    core.enable_padding(length=50)
    core.model.dropout = 0.9
    foreign = tokenizer.from_json(core.to_str())
    documents = texts(0.02)
    expected = trained.encode_batch(documents)
    assert foreign.encode_batch(documents) == expected
    assert [foreign.encode(text) for text in documents] == expected
    # Negative control: the library's own does as the file says. That of this package has one digest.
    assert tokenizers.Tokenizer.from_str(core.to_str()).encode(documents[0]).ids != expected[0]
    assert foreign.digest == trained.digest


def byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


@pytest.fixture(scope="module")
def reference(trained):
    tiktoken = pytest.importorskip("tiktoken")
    byte = byte_of_character()
    ranks = {
        bytes(byte[character] for character in token): token_id
        for token, token_id in trained.core.get_vocab(with_added_tokens=False).items()
    }
    return tiktoken.Encoding("reference", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_tiktoken_encodes_real_code_the_same(trained, reference):
    for text in texts(0.5):
        assert trained.encode(text) == reference.encode(text, disallowed_special=())


@settings(max_examples=200, deadline=None)
@given(text=codelike)
def test_tiktoken_encodes_odd_text_the_same(trained, reference, text):
    assert trained.encode(text) == reference.encode(text, disallowed_special=())


def test_bad_sizes_and_files_are_one_line(tmp_path):
    check("at least 257.*got 256", lambda: tokenizer.train(["text"], 256))
    check("vocab_size=300.*4 characters gave only 260", lambda: tokenizer.train(["text"], 300))
    check("needs more text: 0 characters gave only 257", lambda: tokenizer.train([], 258))
    check("no tokenizer at", lambda: tokenizer.load(tmp_path / "none.json"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": "1.0", "mod')
    check("not a tokenizer.json", lambda: tokenizer.load(broken))
    foreign = tmp_path / "foreign.json"
    foreign.write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    check("foreign.json.*endoftext", lambda: tokenizer.load(foreign))


def test_the_smallest_vocabulary_is_the_bytes_and_end_of_text():
    smallest = tokenizer.train([], 257)
    byte = byte_of_character()
    tokens = [smallest.core.id_to_token(i) for i in smallest.encode("héllo")]
    assert [byte[token] for token in tokens] == list("héllo".encode())
