"""Random choices of a grammar whose texts are documents to train on, and prompts of tasks.

Only `random.Random.random` is called, the one method whose sequence Python promises to keep between versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import random
from typing import TypeVar

from wsparse.errors import UserError
from wsparse.pytext.words import Split

T = TypeVar("T")


class Choices:
    """The random choices about one text.

    Attributes:
      split: Split whose words are used; None in documents, which use all of them.
      cut: Mark that ends the prompt; "" in documents and in distractors.
      fixed: Knobs that are set from outside.
      knobs: Knobs with the values that were drawn.
    """

    def __init__(
        self,
        rng: random.Random,
        split: Split | None = None,
        *,
        cut: str = "",
        fixed: Mapping[str, int] | None = None,
    ):
        self.rng = rng
        self.split = split
        self.cut = cut
        self.fixed = fixed or {}
        self.knobs: dict[str, int] = {}

    @property
    def paired(self) -> bool:
        """Whether this draws a prompt, one side of a pair."""
        return self.split is not None

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def embellish(self, probability: float) -> bool:
        """Returns whether to elaborate: by chance in documents, never in prompts."""
        return not self.paired and self.chance(probability)

    def plain(self, probability: float) -> bool:
        """Returns whether to keep to the plain form: by chance in documents, always in prompts."""
        return self.paired or self.chance(probability)

    def knob(self, name: str, choices: Sequence[int], *, common: Sequence[int] = ()) -> int:
        """Returns a knob's value: one of the choices or, in documents, of those and the `common` ones.

        Raises:
          UserError: It is set from outside to a value that is not among the choices.
        """
        drawn = self.either(*choices) if self.paired else self.either(*choices, *common)
        if name in self.fixed:
            drawn = self.fixed[name]
            if drawn not in choices:
                known = ", ".join(str(choice) for choice in sorted(set(choices)))
                raise UserError(f"the knob {name!r} must be one of {known} here, got {drawn}")
        self.knobs[name] = drawn
        return drawn

    def between(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def either(self, *choices: T) -> T:
        """Returns one of a few turns of phrase, which all splits share."""
        return choices[int(self.rng.random() * len(choices))]
