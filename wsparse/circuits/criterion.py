"""What candidates are held to while a circuit is cut and cleaned up: a loss under one ablation, or many.

With the objective "mean" that is the loss under mean ablation. With the others it is the largest of that and
of the losses under a bank of strengths of closed nodes: drawn ones and, for "robust", those that adversaries
found against earlier candidates. A candidate that passes is attacked anew; if that succeeds, the adversary
joins the bank and the search goes on from where it was.

Shapes: U nodes of the model in one vector, B rows of pairs, G groups of a bank.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from wsparse.circuits import adversary
from wsparse.circuits.discretize import Subgraph
from wsparse.circuits.pairs import PairArrays
from wsparse.circuits.scoring import Bank, Scorer
from wsparse.circuits.settings import Objective
from wsparse.circuits.subnetwork import Subnetwork

# Groups of the bank: one of drawn strengths, the others of the latest adversaries.
_GROUPS = 4
# Candidates that one stage may propose before it gives up; starts of an attack on one.
_ROUNDS, _STARTS = 6, 4
# What losses under the bank are multiplied by after each candidate that was refuted: a candidate at the very
# edge of the bank is beyond that of the next adversary.
_STRICTER = 1.3

T = TypeVar("T")


class Criterion:
    """What candidates are held to, on the pairs that circuits are chosen on.

    Attributes:
      scorer: Scorer whose losses are compared with a goal; a new one after each adversary.
    """

    def __init__(
        self,
        scorer: Scorer,
        pairs: PairArrays,
        *,
        objective: Objective = "mean",
        weight: float = 1.0,
        seed: int = 0,
    ):
        """Make the criterion of an objective.

        Args:
          scorer: Scorer of mean ablation.
          pairs: Pairs that circuits are chosen on.
          objective: See `mask_learning`.
          weight: What losses under the bank are multiplied by: the target under mean ablation divided by
            that under the bank.
          seed: Seed of the bank's draws and of the adversaries' starts.
        """
        self._plain, self._pairs, self._objective, self._weight = scorer, pairs, objective, weight
        self._rng = np.random.default_rng(seed)
        self._adversaries: list[np.ndarray] = []
        self._strictness = 1.0
        self.scorer = scorer.against(self._bank())

    def settle(
        self,
        propose: Callable[[Scorer], T],
        subgraph: Callable[[T], Subgraph | None],
        goal: float,
        *,
        rounds: int = _ROUNDS,
    ) -> T | None:
        """Returns the first proposal that no adversary refutes, or has no subgraph; None if all are refuted.

        Args:
          propose: Returns a proposal under the scorer, whose bank grows from call to call.
          subgraph: Returns the subgraph of a proposal.
          goal: Loss that a subgraph must keep under attack.
          rounds: Proposals after which it gives up.
        """
        for _ in range(rounds):
            proposal = propose(self.scorer)
            candidate = subgraph(proposal)
            if candidate is None or not self._refutes(candidate, goal):
                self._strictness = max(1.0, self._strictness / _STRICTER)
                return proposal
        return None

    @property
    def is_adversarial(self) -> bool:
        """Whether candidates are attacked."""
        return self._objective == "robust"

    def _refutes(self, candidate: Subgraph, goal: float) -> bool:
        """Returns whether an adversary breaks a candidate; it joins the bank then."""
        if not self.is_adversarial:
            return False
        found = Subnetwork(self._plain, candidate.nodes, candidate.remaining(self._plain))
        seed, bound = int(self._rng.integers(2**31)), goal / self._weight
        attack = adversary.ascend(found, self._pairs, seed=seed, starts=_STARTS, until=bound)
        if attack.loss <= bound:
            return False
        # No loss under the bank is asked to be lower than that without it, or than the model's own.
        self._strictness = min(self._strictness * _STRICTER, 1 / self._weight)
        self._adversaries = [*self._adversaries, attack.strengths][1 - _GROUPS :]
        self.scorer = self._plain.against(self._bank())
        if self.scorer.mask(self._pairs, np.ones_like(candidate.nodes)).loss > goal:
            self._strictness = 1.0
            self.scorer = self._plain.against(self._bank())
        return True

    @functools.cached_property
    def _drawn(self) -> np.ndarray:
        size = sum(mean_LN.size for name, mean_LN in self._plain.means.items() if name != "attn.y")
        return self._rng.random((len(self._pairs.position), size), np.float32)

    def _bank(self) -> Bank | None:
        if self._objective == "mean":
            return None
        strengths_BU = self._drawn.copy()
        # Without adversaries every group has drawn strengths.
        group_B = np.repeat(np.arange(len(strengths_BU) // 2) % _GROUPS, 2)
        for i, adversary_U in enumerate(self._adversaries, start=1):
            strengths_BU[group_B == i] = adversary_U
        members_GB = np.equal(np.arange(_GROUPS)[:, None], group_B).astype(np.float32)
        groups_GB = members_GB / np.maximum(members_GB.sum(1, keepdims=True), 1)
        weight = jnp.float32(self._weight * self._strictness)
        return Bank(jnp.asarray(strengths_BU), jnp.asarray(groups_GB), weight)
