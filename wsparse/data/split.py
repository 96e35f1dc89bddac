"""Which documents are held out, and which of the others the tokenizer learns from.

The side of a document depends on its content alone, so copies are always on the same side. Documents are
seen one at a time and not kept, except for a bounded sample.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import hashlib
import heapq

from wsparse.errors import UserError

# In characters. Merges hardly change with more text than this, and learning them takes seconds.
TOKENIZER_SAMPLE_SIZE = 10_000_000


def text_digest(text: str) -> bytes:
    """Returns the sha256 of a document."""
    return hashlib.sha256(text.encode("utf-8")).digest()


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The digests of held-out documents: a fraction by their first 8 bytes, and some extra ones."""

    fraction: float
    extra: frozenset[bytes] = frozenset()

    def __contains__(self, digest: bytes) -> bool:
        return int.from_bytes(digest[:8], "big") < self.fraction * 2**64 or digest in self.extra


@dataclasses.dataclass(frozen=True)
class Scan:
    """The split, and documents of the training side to learn a tokenizer from."""

    holdout: Holdout
    sample: tuple[str, ...]


def scan(
    components: Iterable[tuple[str, Iterable[str]]],
    *,
    validation_fraction: float,
    sample_size: int = TOKENIZER_SAMPLE_SIZE,
) -> Scan:
    """Decides the split and draws the tokenizer's sample, in one pass and bounded memory.

    When the fraction leaves a source with no held-out document, the one with the smallest digest is held
    out. The sample is the training documents with the smallest digests (read from another byte than the
    split's), as many as fit in `sample_size` and at least one: they come evenly from the whole corpus, and
    are the same whatever the order.

    Args:
      components: Name and documents of every source of the mix.
      validation_fraction: Fraction of documents held out.
      sample_size: Limit of the sample, in characters.

    Raises:
      UserError: A source does not have two different documents, one for each side.
    """
    by_fraction = Holdout(validation_fraction)
    extra = set()
    sample: list[tuple[int, str, bytes]] = []
    size, dropped = 0, None
    for name, documents in components:
        smallest = largest = None
        held_out = False
        for text in documents:
            digest = text_digest(text)
            if digest in by_fraction:
                held_out = True
                continue
            smallest = min(smallest or digest, digest)
            largest = max(largest or digest, digest)
            # Negative, because heapq drops its smallest first.
            entry = (-int.from_bytes(digest[8:16], "big"), text, digest)
            # What comes after a document that did not fit does not fit either, or the sample would depend
            # on the order of the documents.
            if dropped is not None and entry <= dropped:
                continue
            heapq.heappush(sample, entry)
            size += len(text)
            while size > sample_size and len(sample) > 1:
                dropped = heapq.heappop(sample)
                size -= len(dropped[1])
        if smallest is None or (smallest == largest and not held_out):
            raise UserError(
                f"the source {name!r} must have a document to train on and another to hold out "
                f"(validation_fraction={validation_fraction}): raise megabytes or give more documents"
            )
        if not held_out:
            extra.add(smallest)
    holdout = Holdout(validation_fraction, frozenset(extra))
    chosen = sorted((entry for entry in sample if entry[2] not in holdout), reverse=True)
    return Scan(holdout, tuple(text for _, text, _ in chosen))


def split(documents: Iterable[str], holdout: Holdout) -> tuple[list[str], list[str]]:
    """Returns training and held-out documents, both in the given order."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in documents:
        sides[text_digest(text) in holdout].append(text)
    return sides
