"""The planted model with a decoy, as tests of objectives and of audits use it."""

import functools

import numpy as np

from wsparse.circuits import masks, planted
from wsparse.circuits.subject import Pairs, Subject

PLANTED = planted.make("canceled decoy")


@functools.cache
def subject() -> Subject:
    return Subject(PLANTED.params, PLANTED.config, PLANTED.windows)


@functools.cache
def pairs() -> Pairs:
    splits = {
        "search": PLANTED.pairs(32, 0), "discretize": PLANTED.pairs(16, 1), "report": PLANTED.pairs(24, 2)
    }  # fmt: skip
    return Pairs(task="planted", form="left or right", **splits)


def chosen(nodes) -> np.ndarray:
    """Returns a mask of nodes, bool `(U,)`."""
    return masks.from_names(sorted(nodes), PLANTED.config)
