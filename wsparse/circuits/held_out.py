"""Windows of text that a run was not trained on."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

from wsparse import runs
from wsparse.config import DataConfig
from wsparse.data import batches, corpus, prepared, sources, streams
from wsparse.errors import UserError

# Held-out text to read, in bytes.
_BYTES = 150_000


def windows(run: runs.Run, *, tokens: int, source: str = "") -> np.ndarray:
    """Different windows of a run's held-out text, or of another source.

    The documents are those that training holds out, since the same rule chooses them: by the digest of their
    text, and where that leaves a source with none, the one of the smallest digest.

    Args:
      run: what the windows are for.
      tokens: about how many.
      source: a mix like `data.source`, all of whose documents are used; "" is the run's own.

    Returns:
      int32 `(W, T)`, T the run's context.

    Raises:
      UserError: a source cannot be read, or has less than a window of text.
    """
    data, context = run.config.data, run.config.model.context
    components: list[tuple[float, streams.TokenStream]] = []
    for part in sources.parse_mix(source or data.source):
        folder = sources.arrayrecord_folder(part.name)
        if folder is not None:
            opened = prepared.open_folder(folder)
            components += [(part.weight * w, stream) for w, stream in opened.validation]
            continue
        fraction = 1.0 if source else data.validation_fraction
        texts = _documents(part, data, fraction)
        components.append((part.weight, corpus.encode_stream(texts, run.tokenizer)))
    components = [each for each in components if streams.window_count(len(each[1]), context)]
    if not components:
        raise UserError(
            f"{source or data.source!r} has less than a window of {context} tokens of held-out text: name "
            "another text with --source=files:GLOB"
        )
    count = max(1, tokens // context)
    [batch] = batches.eval_batches(components, batch_size=count, context=context, batches=1)
    return np.unique(batch[:, :-1], axis=0)


def _documents(part: sources.Part, data: DataConfig, fraction: float) -> list[str]:
    """Enough of the held-out documents of one part of a mix."""
    counts: collections.Counter[str] = collections.Counter()
    texts: Iterable[str] = sources.documents(
        sources.open_source(part.name, seed=data.seed),
        counts,
        max_bytes=data.megabytes * 1e6 * part.weight,
    )
    holdout, found, size, smallest = corpus.Holdout(fraction), [], 0, None
    for text in texts:
        digest = corpus.text_digest(text)
        smallest = min(smallest or (digest, text), (digest, text))
        if digest in holdout:
            found.append(text)
            size += len(text)
            if size >= _BYTES * part.weight:
                break
    return found or ([smallest[1]] if smallest else [])
