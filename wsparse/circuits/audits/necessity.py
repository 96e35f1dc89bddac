"""Does the model lose the task without the circuit, and more so than without other nodes?"""

from __future__ import annotations

import numpy as np

from wsparse.circuits.audits import random_sets
from wsparse.circuits.audits.context import Context
from wsparse.circuits.audits.record import Measurement, TestResult

# Random sets that are ablated, and a loss near chance: more is not asked for.
_SETS, _CHANCE = 32, 0.65


def necessity(context: Context) -> TestResult:
    """Returns the model's loss without the circuit, beside its loss without random sets like it."""
    rng = context.rng("necessity")
    without_BV = context.logits(~context.nodes_U)
    losses_B = context.losses(without_BV)
    sets = [
        random_sets.matched(context.nodes_U, context.activity, context.config, rng)
        for _ in range(min(_SETS, context.options.draws))
    ]
    random_S = np.array([context.losses(context.logits(~set_U)).mean() for set_U in sets])
    limit = float(np.quantile(random_S, 0.95))
    as_harmful = float(np.mean(random_S >= losses_B.mean()))
    loss = context.mean("task loss without", losses_B, rng, control=float(random_S.mean()))
    assert loss.low is not None
    bound = min(max(context.settings.necessity, context.circuit.target), _CHANCE)
    return TestResult(
        question="Does the model lose the task when the circuit's nodes are at their means?",
        procedure=f"{context.n_pairs} pairs of the report split. The circuit's nodes are at their means, and "
        "everything else is as it is.",
        control=f"{len(sets)} random sets of as many nodes of each location and layer, each node drawn among "
        "the eight outside the circuit that are nearest in mean absolute activation.",
        criterion=f"The lower end of the loss's interval is at least {bound:g}, and above 95% of the "
        "random sets.",
        verdict="passed" if loss.low >= bound and loss.low > limit else "failed",
        measurements=[
            loss,
            context.mean("accuracy without", context.margins(without_BV) > 0, rng, unit="share"),
            Measurement(name="95% of random sets lose less than", value=limit),
            Measurement(name="random sets that hurt as much", value=as_harmful, unit="share"),
        ],
    )
