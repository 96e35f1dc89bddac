"""Continuations are what the model says, drawn as asked, and end where a document ends."""

import functools
import itertools
import types

from absl import flags
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wsparse import model, runs, sample, trees
from wsparse.config import ModelConfig, TrainConfig
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError

CONFIG = ModelConfig(
    vocab_size=257, context=6, n_layer=2, d_model=16, n_head=2, d_head=8, d_mlp=32, position="added"
)
PROMPTS = np.array([[5, 200, 31], [7, 7, 90]], np.int32)


@functools.cache
def params():
    """Large random weights, so that what comes next depends on everything before."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        scale = {"embed": 0.3, "blocks": 1.0, "head": 0.3}[path.split("/")[0]]
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return trees.map_with_path(fill, helpers.shapes(CONFIG))


@functools.cache
def forward():
    return jax.jit(lambda params, tokens: model.forward(params, tokens, CONFIG)[0])


def logits_after(tokens: list[int]) -> np.ndarray:
    """Logits of the token after these, through `forward`, of which the context's last ones count."""
    kept = tokens[-CONFIG.context :]
    padded = np.zeros((1, CONFIG.context), np.int32)
    padded[0, : len(kept)] = kept
    return np.asarray(forward()(params(), padded))[0, len(kept) - 1]


def draw(prompts: np.ndarray, steps: int, *, seed=0, pad=0, **options) -> np.ndarray:
    padded = np.full((len(prompts), CONFIG.context), pad, np.int32)
    padded[:, : prompts.shape[1]] = prompts
    length = jnp.int32(prompts.shape[1])
    drawn = sample.generate(
        params(), jnp.asarray(padded), length, jax.random.key(seed), config=CONFIG, steps=steps, **options
    )
    return np.asarray(drawn)


def greedy(prompt: np.ndarray, steps: int) -> list[int]:
    tokens = prompt.tolist()
    for _ in range(steps):
        tokens.append(int(np.argmax(logits_after(tokens))))
    return tokens[len(prompt) :]


# Drawing ----------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_argmax_of_forward_step_by_step_and_slides_over_the_context():
    """3 + 12 tokens in a context of 6: the window slides for most of them."""
    drawn = draw(PROMPTS, 12, temperature=0)
    assert drawn.shape == (2, 12)
    assert drawn.dtype == np.int32
    for row, prompt in zip(drawn, PROMPTS, strict=True):
        assert row.tolist() == greedy(prompt, 12)
    # Neither the seed nor the padding matters.
    np.testing.assert_array_equal(draw(PROMPTS, 12, temperature=0, seed=1, pad=99), drawn)
    # Negative control: another prompt goes on differently, and so does this one without its first token.
    assert drawn[0].tolist() != drawn[1].tolist()
    assert greedy(PROMPTS[0][1:], 12) != drawn[0].tolist()


def test_a_full_prompt_slides_from_the_first_token_on():
    prompts = np.arange(2 * CONFIG.context, dtype=np.int32).reshape(2, -1) * 11
    for row, prompt in zip(draw(prompts, 12, temperature=0), prompts, strict=True):
        assert row.tolist() == greedy(prompt, 12)


MANY = np.repeat(PROMPTS[:1], 100, axis=0)


def test_the_draw_depends_on_the_seed_alone():
    first = draw(MANY, 12, temperature=50.0, top_k=4)
    np.testing.assert_array_equal(draw(MANY, 12, temperature=50.0, top_k=4), first)
    assert np.any(draw(MANY, 12, temperature=50.0, top_k=4, seed=1) != first)


def test_only_the_top_k_tokens_are_drawn_and_at_a_high_temperature_all_of_them():
    drawn = draw(MANY, 12, temperature=50.0, top_k=4)
    best = np.argsort(logits_after(PROMPTS[0].tolist()))[::-1]
    assert set(drawn[:, 0].tolist()) == set(best[:4].tolist())
    for row in drawn[:5]:
        tokens = PROMPTS[0].tolist()
        for token in row.tolist():
            assert token in np.argsort(logits_after(tokens))[-4:]
            tokens.append(token)


# Logits to draw from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_all_but_the_k_largest_logits_are_minus_infinity(top_k):
    logits = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    found = np.asarray(sample.next_token_logits(logits, temperature=0.5, top_k=top_k))
    for row, kept in zip(logits, found, strict=True):
        best = np.argsort(row)[::-1][:top_k]
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(kept)), np.sort(best))
        np.testing.assert_allclose(kept[best], row[best] / 0.5)


@pytest.mark.parametrize("top_k", [0, 7, 100])
def test_every_logit_stays_without_a_limit(top_k):
    logits = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)
    found = sample.next_token_logits(logits, temperature=2.0, top_k=top_k)
    np.testing.assert_allclose(found, logits / 2.0)


def test_of_equal_logits_no_more_than_k_are_kept():
    logits = jnp.array([[1.0, 3.0, 3.0, 3.0, 0.0]])
    found = np.asarray(sample.next_token_logits(logits, temperature=1.0, top_k=2))
    assert np.isfinite(found).sum() == 2


# The command ------------------------------------------------------------------------------------------


def chain_params(tokenizer: tokenizer_lib.Tokenizer, *, chain: str):
    """A model whose next token is decided by the last one: the chain's characters, then the end."""
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), helpers.shapes(CONFIG))
    ids = [tokenizer.token_id(character) for character in chain] + [tokenizer.end_of_text]
    for token, following in itertools.pairwise(ids):
        zeros["head"]["bigram"][token, following] = 50.0
    # After the end, a new document would begin.
    zeros["head"]["bigram"][tokenizer.end_of_text, ids[0]] = 50.0
    return jax.tree.map(jnp.asarray, zeros)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`command(arguments)` is `python -m wsparse.sample` with a chain of characters for a model."""
    values = flags.FlagValues()
    define = {
        name: functools.partial(getattr(flags, name), flag_values=values)
        for name in ("DEFINE_string", "DEFINE_integer", "DEFINE_float")
    }
    monkeypatch.setattr(sample, "flags", types.SimpleNamespace(FLAGS=values, **define))
    sample._define_flags()
    tokenizer = tokenizer_lib.train(["a"], 257)
    run = runs.Run(
        tmp_path, TrainConfig(model=CONFIG), 1, chain_params(tokenizer, chain="abcdefghij"), tokenizer
    )
    monkeypatch.setattr(runs, "load", lambda folder: run)

    def call(*arguments: str):
        argv = values(["sample", *arguments])
        return sample.main(argv)

    return call


def test_a_sample_ends_at_the_end_of_its_document(command, capsys):
    command("--run=x", "--prompt=fgh", "--tokens=5", "--temperature=0")
    assert capsys.readouterr().out == "fghij\n"
    # Negative control: where the end is further away, all 5 tokens are printed.
    command("--run=x", "--prompt=abc", "--tokens=5", "--temperature=0")
    assert capsys.readouterr().out == "abcdefgh\n"


def test_every_sample_is_printed_with_its_number(command, capsys):
    command("--run=x", "--prompt=i", "--tokens=5", "--temperature=0", "--samples=2")
    assert capsys.readouterr().out == "--- sample 1\nij\n--- sample 2\nij\n"


def test_a_prompt_longer_than_the_context_is_continued_from_its_end(command, capsys):
    command("--run=x", "--prompt=zzzzzzzzzzzzfg", "--tokens=5", "--temperature=0")
    assert capsys.readouterr().out == "zzzzzzzzzzzzfghij\n"


def test_an_empty_prompt_begins_a_document(command, capsys):
    command("--run=x", "--prompt=", "--tokens=5", "--temperature=0")
    assert capsys.readouterr().out == "abcde\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=a"], ["--run"]),
        (["--run=x"], ["--prompt"]),
        (["--run=x", "--prompt=a", "--tokens=0"], ["--tokens", "[1, 1000000]", "0"]),
        (["--run=x", "--prompt=a", "--samples=-1"], ["--samples", "[1, 10000]", "-1"]),
        (["--run=x", "--prompt=a", "--top_k=-2"], ["--top_k", "[0, ", "-2"]),
        (["--run=x", "--prompt=a", "--temperature=-0.5"], ["--temperature", "[0, ", "-0.5"]),
        (["--run=x", "--prompt=a", "--temperature=1e-320"], ["--temperature", "at least 1e-06", "1e-320"]),
        (["--run=x", "--prompt=a", "--temperature=1e300"], ["--temperature", "1000000.0]", "1e+300"]),
        (["--run=x", "--prompt=a", f"--tokens={10**12}"], ["--tokens", "[1, 1000000]", str(10**12)]),
        (["--run=x", "--prompt=a", f"--samples={10**12}"], ["--samples", "[1, 10000]", str(10**12)]),
        (["--run=x", "--prompt=a", f"--seed={2**63}"], ["--seed", f"{2**63 - 1}]", str(2**63)]),
        (["--run=x", "--prompt=\udcff"], ["--prompt", "UTF-8"]),
    ],
)
def test_wrong_options_are_errors_of_one_line(command, arguments, words):
    with pytest.raises((UserError, flags.IllegalFlagValueError)) as error:
        command(*arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_extremes_of_options_are_drawn_as_any_other(command, capsys):
    for extreme in (
        f"--seed={2**63 - 1}",
        f"--seed={-(2**63)}",
        "--temperature=1e-6",
        f"--top_k={2**31 - 1}",
    ):
        command("--run=x", "--prompt=fgh", "--tokens=5", "--temperature=0.01", extreme)
        assert capsys.readouterr().out == "fghij\n"


@pytest.mark.parametrize("what", ["missing", "no run", "no checkpoint"])
def test_a_folder_that_is_no_run_is_an_error_of_one_line(tmp_path, what):
    folder = tmp_path / "run"
    if what != "missing":
        folder.mkdir()
    if what == "no checkpoint":
        (folder / "config.json").write_text("{}")
    with pytest.raises(UserError) as error:
        runs.load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
