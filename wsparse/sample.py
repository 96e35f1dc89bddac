"""Continue a prompt: `python -m wsparse.sample --run=runs/tiny --prompt='def add(a, b):'`."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

from absl import flags
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from wsparse import model, runs
from wsparse.command import run_command
from wsparse.config import ModelConfig
from wsparse.errors import UserError
from wsparse.ops import cpu

# Over a smaller temperature logits may be infinite.
_COLDEST = 1e-6


def next_token_logits(logits_BV: jax.Array, *, temperature: float, top_k: int) -> jax.Array:
    """Returns logits over the temperature, all but the `top_k` largest (0 is all) at minus infinity."""
    if 0 < top_k < logits_BV.shape[-1]:
        # By index, since several logits may equal the k-th.
        chosen_BK = lax.top_k(logits_BV, top_k)[1]
        rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        kept_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, chosen_BK].set(True)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return logits_BV / temperature


@functools.partial(jax.jit, static_argnames=("config", "steps", "temperature", "top_k"))
def generate(
    params: model.Params,
    prompt_BT: jax.Array,
    length: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    steps: int,
    temperature: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
    """Returns int32 `(B, steps)` tokens drawn after each prompt.

    Once the context is full the oldest token is dropped for each new one.

    Args:
      params: Parameters of the model.
      prompt_BT: Int32 prompts, padded at the end to the context T.
      length: Tokens of each prompt, at least 1.
      key: Key of the draws.
      config: Config of the model.
      steps: Tokens to draw.
      temperature: 0 takes the most likely token.
      top_k: Draw from the k most likely tokens only; 0 is all.
    """

    def step(state, key):
        tokens_BT, length = state
        position_BP = jnp.full((tokens_BT.shape[0], 1), length - 1)
        logits_BPV, _ = model.forward(params, tokens_BT, config, positions_BP=position_BP)
        logits_BV = logits_BPV[:, 0]
        if temperature == 0:
            token_B = jnp.argmax(logits_BV, axis=-1)
        else:
            kept = next_token_logits(logits_BV, temperature=temperature, top_k=top_k)
            token_B = jax.random.categorical(key, kept)
        full = length == tokens_BT.shape[1]
        shifted = jnp.where(full, jnp.roll(tokens_BT, -1, axis=1), tokens_BT)
        position = jnp.where(full, length - 1, length)
        tokens_BT = lax.dynamic_update_slice(shifted, token_B[:, None].astype(tokens_BT.dtype), (0, position))
        return (tokens_BT, position + 1), token_B.astype(jnp.int32)

    _, drawn = lax.scan(step, (prompt_BT, length), jax.random.split(key, steps))
    return drawn.T


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    options: Any = flags.FLAGS
    if 0 < options.temperature < _COLDEST:
        raise UserError(
            f"--temperature must be 0, which takes the most likely token, or at least {_COLDEST}, "
            f"got {options.temperature}"
        )
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt must be text in UTF-8") from error
    cpu.enable()
    run = runs.load(options.run)
    context = run.config.model.context
    # A document begins after the end of another, as in training.
    ids = [run.tokenizer.end_of_text, *run.tokenizer.encode(options.prompt)]
    kept = ids[-context:]
    prompt_BT = np.full((options.samples, context), run.tokenizer.end_of_text, np.int32)
    prompt_BT[:, : len(kept)] = kept
    drawn = generate(
        run.params,
        jnp.asarray(prompt_BT),
        jnp.int32(len(kept)),
        jax.random.key(options.seed),
        config=run.config.model,
        steps=options.tokens,
        temperature=float(options.temperature),
        top_k=options.top_k,
    )
    for index, row in enumerate(np.asarray(drawn)):
        if options.samples > 1:
            print(f"--- sample {index + 1}")
        end = np.flatnonzero(row == run.tokenizer.end_of_text)
        print(options.prompt + run.tokenizer.decode(row[: end[0]] if end.size else row))


def _define_flags() -> None:
    flags.DEFINE_string("run", None, "The run's folder.", required=True)
    flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
    # The bounds are what memory and 64 bits hold.
    tokens = "Tokens to draw; a sample ends early at the end of its document."
    flags.DEFINE_integer("tokens", 64, tokens, lower_bound=1, upper_bound=1_000_000)
    flags.DEFINE_integer("samples", 1, "Continuations to print.", lower_bound=1, upper_bound=10_000)
    temperature = "0 always takes the most likely token."
    flags.DEFINE_float("temperature", 0.8, temperature, lower_bound=0, upper_bound=1e6)
    top_k = "Draw from the k most likely tokens only; 0 is all of them."
    flags.DEFINE_integer("top_k", 0, top_k, lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=-(2**63), upper_bound=2**63 - 1)


if __name__ == "__main__":
    _define_flags()
    run_command(main)
