"""Settings of the procedure that finds circuits; flags and recipes of `wsparse.prune` are made from them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import ml_collections

from wsparse.config import check, require, setting

Sampler = Literal["tpe", "random"]
Objective = Literal["mean", "stochastic", "robust"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
HeldTo = Literal["labels", "model", "vocabulary"]
HELD_TO: tuple[HeldTo, ...] = get_args(HeldTo)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the procedure; part of every circuit file. Each field's help is in its metadata."""

    target: float = setting(0.15, "Task loss, in nats, that a circuit must reach.")
    margin: float = setting(
        0.07,
        "Nats below the target that a circuit must have on the pairs it is chosen on, where the model itself "
        "allows it: other templates are a little harder.",
    )
    sweep: tuple[float, ...] = setting(
        (0.05, 0.1, 0.3, 0.5), "Further targets, for the loss-against-edges curve."
    )
    trials: int = setting(8, "Pruning runs of the search.", "at least 1")
    parallel: int = setting(2, "Pruning runs in one vmapped call.", "at least 1")
    sampler: Sampler = setting("tpe", 'Sampler of the hyperparameters, "tpe" or "random".')  # noqa: RUF009
    steps: int = setting(100, "Steps of a pruning run.", "at least 1")
    pairs_per_step: int = setting(16, "Pairs of prompts drawn for a step.", "at least 1")
    search_pairs: int = setting(256, "Pairs that steps draw from.", "at least 1")
    discretize_pairs: int = setting(
        48, "Pairs of the second split that circuits are chosen on, with as many of the first.", "at least 1"
    )
    confirm_pairs: int = setting(
        48,
        "More pairs of the second split, on which the chosen circuit is tried: where it misses the target, "
        "removals are taken back, or one is chosen again, for a lower loss. 0 tries none.",
        "at least 0",
    )
    report_pairs: int = setting(96, "Pairs that numbers are reported on.", "at least 1")
    finalists: int = setting(2, "Trials whose circuits are cleaned up.", "at least 1")
    necessity: float = setting(
        0.65,
        "Loss, in nats, that the model must have without the circuit: nodes are added to the smallest "
        "sufficient circuit until it has. 0 adds none.",
    )
    single_removals: int = setting(
        256,
        "Single removals, in each pass of the clean-up, that may be scored exactly once first-order "
        "estimates lead no further. 0 relies on the estimates alone and takes a tenth of the time.",
        "at least 0",
    )
    objective: Objective = setting(  # noqa: RUF009
        "mean",
        'Ablation that masks are learned against and circuits are held to: "mean"; "stochastic", with closed '
        'nodes let through in part, at random; or "robust", by an adversary too.',
    )
    robust_target: float = setting(
        0.3, "Task loss, in nats, that a circuit must keep under random and adversarial strengths."
    )
    held_to: HeldTo = setting(  # noqa: RUF009
        "labels",
        'What circuits should answer: "labels", the right answers; "model", with the model\'s own '
        'probabilities of the two candidates, which no circuit can do better than; or "vocabulary", with '
        "those of every token.",
    )
    tie_qk: bool = setting(True, "Whether a channel's query and key share a gate.")
    controls: bool = setting(True, "Whether to run the controls.")
    seed: int = setting(0, "Seed of pairs, trials and the sampler.")
    max_tokens: int = setting(4096, "Longest prompt to use; at most the context.", "at least 1")

    def __post_init__(self):
        check(self)
        require(0 <= self.necessity < math.inf, "necessity must be at least 0, and finite", self.necessity)
        known = ", ".join(OBJECTIVES)
        require(self.objective in OBJECTIVES, f"objective must be one of {known}", self.objective)
        require(self.held_to in HELD_TO, f"held_to must be one of {', '.join(HELD_TO)}", self.held_to)
        require(
            self.objective == "mean" or self.target <= self.robust_target < math.log(2),
            f"robust_target must be at least the target, {self.target}, and below ln 2",
            self.robust_target,
        )
        require(0 <= self.seed < 2**31, "seed must be at least 0 and below 2**31", self.seed)
        for target in (self.target, *self.sweep):
            require(0 < target < math.log(2), "a target must be between 0 and ln 2", target)
        bound = f"margin must be at least 0 and below the target {self.target}"
        require(0 <= self.margin < self.target, bound, self.margin)


def recipe(**settings: Any) -> ml_collections.ConfigDict:
    """Returns settings as a recipe's `get_config` does; every key can be overridden by a flag."""
    # Flags can override a tuple, but not a list.
    return ml_collections.ConfigDict(dataclasses.asdict(Settings(**settings)))
