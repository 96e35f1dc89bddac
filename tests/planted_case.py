"""The planted model with a decoy, as tests of objectives and of audits use it."""

import functools

import planted

from wsparse.circuits.subject import Pairs

PLANTED = planted.make("canceled decoy")
chosen = PLANTED.chosen


@functools.cache
def pairs() -> Pairs:
    splits = {
        "search": PLANTED.pairs(32, 0), "discretize": PLANTED.pairs(16, 1), "report": PLANTED.pairs(24, 2)
    }  # fmt: skip
    return Pairs(task="planted", form="left or right", **splits)
