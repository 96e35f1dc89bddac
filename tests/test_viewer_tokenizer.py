"""The tokenizer of the page, in Chromium, gives the tokens of the Python one."""

import itertools
import json
import random
import sys
import unicodedata

import browser_case
import pytest

from wsparse.data import tokenizer as tokenizer_lib
from wsparse.pytext.documents import documents
from wsparse.viewer import live, page

browser = pytest.fixture(scope="module")(browser_case.chromium)
# Characters that ways to split text tell apart, and bytes of which a token may end within a character.
MARKS = "abzA_ \t\n\r\x0b\x0c\x1c\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\ufeff\u200b\u180e"
MARKS += "'\"()[]{}:+=.,/\\"
OTHERS = "0129\u0661\u00bd\u2167éß漢字ｱ\u0301\u0e33🙂🏳\u200d\u20e3\x00\x7f\u00ad\ue000"


@pytest.fixture(scope="module")
def trained() -> tokenizer_lib.Tokenizer:
    texts = ["é漢字🙂 ½ \u3000\u3000 naïve\r\n\r\n" * 20, *itertools.islice(documents(0), 300)]
    return tokenizer_lib.train(texts, 700)


@pytest.fixture(scope="module")
def encode(browser, trained):
    """Encodes texts in the page, or tells the texts of all tokens."""
    tab = browser.new_page()
    code = page.static("engine/tokenizer.js")

    def run(result: str, texts=()):
        body = f"([data, texts]) => {{ {code}\n const found = openTokenizer(data); return {result}; }}"
        return tab.evaluate(body, [json.loads(json.dumps(live.tokenizer(trained.to_json()))), list(texts)])

    yield run
    tab.close()


def strings() -> list[str]:
    draw = random.Random(0)
    alphabets = [MARKS, MARKS + OTHERS, " \n\r\t", "ab ", "a", "0123456789 ", "def return(x):\n    ['\"]"]
    found = ["".join(draw.choices(each, k=draw.randrange(40))) for each in alphabets for _ in range(300)]
    found += ["", " ", "<|endoftext|>", "a<|endoftext|>b", "\ufeffx", "aaaaaaaaaaaaaaaaa", "x" * 400]
    return found + list(itertools.islice(documents(7), 20))


def test_texts_are_encoded_as_in_python(encode, trained):
    texts = strings()
    found = encode("texts.map(found.encode)", texts)
    assert found == trained.encode_batch(texts)
    # What is compared is not all the same, and merges were made.
    assert len({len(ids) for ids in found}) > 20 and max(map(max, filter(None, found))) > 256


def test_every_character_that_python_knows_is_encoded_alike_between_letters_and_blanks(encode, trained):
    known = (c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) not in ("Cn", "Cs"))
    texts = [f"a{c}b {c} {c}{c}1{c}\n{c}" for c in itertools.islice(known, 0, None, 67)]
    assert len(texts) > 3000
    differing = [
        text for text, a, b in zip(
            texts, encode("texts.map(found.encode)", texts), trained.encode_batch(texts), strict=True
        ) if a != b
    ]  # fmt: skip
    assert differing == []


def test_every_token_has_the_text_that_python_decodes(encode, trained):
    assert encode("found.texts") == [trained.decode([i]) for i in range(trained.vocab_size)]


def test_a_tokenizer_that_splits_in_another_way_is_not_put_in_a_page(trained):
    values = json.loads(trained.to_json())
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    with pytest.raises(live.NotLive, match="kind that the page cannot"):
        live.tokenizer(json.dumps(values))
    with pytest.raises(live.NotLive):
        live.tokenizer(json.dumps(json.loads(trained.to_json()) | {"pre_tokenizer": {"type": "ByteLevel"}}))
