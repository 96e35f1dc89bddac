"""Settings of the procedure that finds circuits; flags and recipes of `wsparse.prune` are made from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import ml_collections

from wsparse.config import require, setting

Sampler = Literal["tpe", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the procedure; part of every circuit file. Each field's help is in its metadata."""

    target: float = setting(0.15, "Task loss, in nats, that a circuit must reach.")
    margin: float = setting(
        0.07,
        "Nats below the target that a circuit must have on the pairs it is chosen on, where the model itself "
        "allows it: other templates are a little harder. A task whose model is further above the target than "
        "this is not tried.",
    )
    sweep: tuple[float, ...] = setting(
        (0.05, 0.1, 0.3, 0.5), "Further targets, for the loss-against-edges curve."
    )
    trials: int = setting(8, "Pruning runs of the search.")
    parallel: int = setting(2, "Pruning runs in one vmapped call.")
    sampler: Sampler = setting("tpe", 'Sampler of the hyperparameters, "tpe" or "random".')  # noqa: RUF009
    steps: int = setting(100, "Steps of a pruning run.")
    pairs_per_step: int = setting(16, "Pairs of prompts drawn for a step.")
    search_pairs: int = setting(256, "Pairs that steps draw from.")
    discretize_pairs: int = setting(
        48, "Pairs of the second split that circuits are chosen on, with as many of the first."
    )
    report_pairs: int = setting(96, "Pairs that numbers are reported on.")
    finalists: int = setting(2, "Trials whose circuits are cleaned up.")
    necessity: float = setting(
        0.65,
        "Loss, in nats, that the model must have without the circuit: nodes are added to the smallest "
        "sufficient circuit until it has. 0 adds none.",
    )
    single_removals: int = setting(
        256,
        "Single removals, in each pass of the clean-up, that may be scored exactly once first-order "
        "estimates lead no further. 0 relies on the estimates alone and takes a tenth of the time.",
    )
    tie_qk: bool = setting(True, "Whether a channel's query and key share a gate.")
    controls: bool = setting(True, "Whether to run the controls.")
    seed: int = setting(0, "Seed of pairs, trials and the sampler.")
    max_tokens: int = setting(4096, "Longest prompt to use; at most the context.")

    def __post_init__(self):
        for name in (
            "trials", "parallel", "steps", "pairs_per_step", "search_pairs", "discretize_pairs",
            "report_pairs", "finalists", "max_tokens",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(0 <= self.necessity < math.inf, "necessity must be at least 0, and finite", self.necessity)
        require(self.single_removals >= 0, "single_removals must be at least 0", self.single_removals)
        require(0 <= self.seed < 2**31, "seed must be at least 0 and below 2**31", self.seed)
        for target in (self.target, *self.sweep):
            require(0 < target < math.log(2), "a target must be between 0 and ln 2", target)
        bound = f"margin must be at least 0 and below the target {self.target}"
        require(0 <= self.margin < self.target, bound, self.margin)


def recipe(**settings: Any) -> ml_collections.ConfigDict:
    """Returns settings as a recipe's `get_config` does; every key can be overridden by a flag."""
    # Flags can override a tuple, but not a list.
    return ml_collections.ConfigDict(dataclasses.asdict(Settings(**settings)))
