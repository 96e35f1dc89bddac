"""What each test of an audit lets people say: the statement at the end of a report is made from this table.

docs/evidence.md explains the tests and has every claim; a test of this package compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses

from wsparse.circuits.audits.record import Audit, TestResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a test lets people say.

    Attributes:
      title: Heading of the test.
      passed: What may be said where the criterion is met.
      failed: What must be said where it is not.
      never: What does not follow, whatever the verdict.
    """

    title: str
    passed: str
    failed: str
    never: str


CLAIMS: dict[str, Claim] = {
    "sufficiency": Claim(
        title="The circuit alone",
        passed="With every other node at its mean over pretraining text, the circuit's loss is within the "
        "target on prompts that it was not chosen on.",
        failed="The circuit is not shown to reach the target on prompts that it was not chosen on.",
        never="That the model does the task in this way: with most nodes at their means the model is in a "
        "state that no text brings about.",
    ),
    "necessity": Claim(
        title="The model without the circuit",
        passed="With the circuit's nodes at their means the model's loss is at least the criterion's, and "
        "above its loss without 95% of the random sets of nodes like them.",
        failed="The model keeps part of the task without the circuit, or loses as much without other nodes "
        "like the circuit's.",
        never="That every node of the circuit is needed, or that no node outside it is.",
    ),
    "matrix": Claim(
        title="Kinds of ablation",
        passed="With means as constants, the circuit's loss stays within the target whether or not edges are "
        "strict, norms are the whole model's, and only kept nodes compete in AbsTopK.",
        failed="The circuit's loss is not within the target under every variant of mean ablation: whether it "
        "does the task depends on how the rest of the model is ablated.",
        never="That it holds with other constants, whose losses have no criterion here, or under ablations "
        "that were not tried.",
    ),
    "norm_scale": Claim(
        title="The norms' scale",
        passed="With norms at the whole model's scales the circuit's loss stays within the target.",
        failed="With norms at the whole model's scales the circuit's loss is not within the target: what it "
        "does may rest on scales that the ablation changes.",
        never="That anything else that surrounds the circuit is as in the model.",
    ),
    "partial_ablation": Claim(
        title="Partial ablation",
        passed="The circuit's loss stays within the robust target in the worst 5% of the random draws in "
        "which the rest of the model was let through in part.",
        failed="The circuit's loss leaves the robust target when the rest of the model is let through in "
        "part, at random.",
        never="That it holds for every choice of what is let through: what is drawn at random mostly cancels "
        "out, and what is chosen to do harm does not.",
    ),
    "adversarial_steps": Claim(
        title="An adversary that chooses strengths",
        passed="The circuit's loss stays within the robust target against 20 steps of this adversary, from "
        "eight starts.",
        failed="There are strengths of ablation with which the circuit's loss leaves the robust target: "
        "nodes outside it can undo what it does.",
        never="That it holds against more steps, other starts or any other adversary: a search that finds "
        "nothing does not show that nothing is there.",
    ),
    "adversarial_budgets": Claim(
        title="An adversary that ablates a few nodes",
        passed="The model's loss stays within the robust target whenever this adversary ablates 1, 10 or 40 "
        "nodes outside the circuit.",
        failed="The model's loss leaves the robust target when at most 40 chosen nodes outside the circuit "
        "are ablated: the task depends on more than the circuit.",
        never="That no set of as many nodes outside the circuit matters to the task: the adversary tries few "
        "of them.",
    ),
    "node_roles": Claim(
        title="Roles of nodes",
        passed="On prompts of the task, at least nine in ten of the circuit's nodes that vary have a "
        "correlation above 0.5 between circuit and model.",
        failed="More than one in ten of the circuit's nodes that vary have a correlation of at most 0.5 "
        "between circuit and model: what they do in the circuit does not describe them in the model.",
        never="That a node means in the model what it means in the circuit: correlations compare no scales, "
        "and only prompts of the task.",
    ),
    "attention_patterns": Claim(
        title="Attention",
        passed="From the last token of prompts, the circuit's heads attend on average within a total "
        "variation distance of 0.25 of where they attend in the model.",
        failed="The circuit's heads attend elsewhere than in the model: what they are said to look at holds "
        "for the circuit alone.",
        never="That what a head looks at is what it uses, or that attention from other tokens agrees.",
    ),
    "interchange": Claim(
        title="Interchange of values",
        passed="In the whole model, at least 90% of decisions flip when the circuit's nodes take their "
        "values on the pair's other prompt, and at least 90% stay with those of another prompt of the same "
        "side.",
        failed="In the whole model, fewer than 90% of decisions flip, or fewer than 90% stay: the decision "
        "does not follow the values of the circuit's nodes.",
        never="That each node carries what its label says, as all are exchanged together, or that nothing "
        "else would flip decisions.",
    ),
    "minimality": Claim(
        title="Leaving one out",
        passed="Of the nodes that were tried, at most a tenth can be left out alone with the loss within the "
        "target.",
        failed="More than a tenth of the nodes that were tried can be left out alone: the circuit's size "
        "overstates what the target needs.",
        never="That no smaller circuit exists: nodes are left out one at a time, and other nodes are never "
        "put in their place.",
    ),
    "selectivity": Claim(
        title="Other tasks without the circuit",
        passed="Without the circuit's nodes the loss of its own task grows more than twice as much as that "
        "of the other tasks that were tried, on average.",
        failed="Without the circuit's nodes the loss of its own task grows at most twice as much as that of "
        "others: the nodes are not shown to belong to this task alone.",
        never="That the nodes do nothing else: tasks that were not tried, and other text, may need them.",
    ),
    "shift": Claim(
        title="Prompts of other kinds",
        passed="For every tried value of the generator's knobs at which the model is right on at least 90% "
        "of prompts, circuit and model make the same choice on at least 90%.",
        failed="Circuit and model are not shown to make the same choices on every kind of prompt that the "
        "task's generator makes.",
        never="That they do so on prompts that the generator does not make, such as code that people wrote.",
    ),
    "stability": Claim(
        title="Other seeds",
        passed="At least 90% of the seeds of the same search reach the circuit's loss in at most twice as "
        "many nodes, and two of their circuits have on average a Jaccard index of at least 0.5.",
        failed="Other seeds of the same search miss the circuit's loss, need more than twice as many nodes, "
        "or find different ones: this circuit is one of several that the search could have returned.",
        never="That another kind of search, or the same model trained from another seed, has this circuit.",
    ),
    "exclusion": Claim(
        title="Without the nodes that were found",
        passed="With the circuit's nodes forbidden, fewer than 10% of the seeds of the same search reach the "
        "circuit's loss in at most twice as many nodes.",
        failed="The same search reaches the circuit's loss without any of the circuit's nodes, in at most "
        "twice as many: other circuits do the task too.",
        never="That no other circuit exists: this search found few, or none, in the seeds that it had, and "
        "did not count larger ones.",
    ),
    "nonsense": Claim(
        title="Nonsense that can be learned",
        passed="Wherever the same search learns the tried nonsense to the circuit's loss, it needs at least "
        "twice as many nodes as for the task.",
        failed="The same search learns nonsense to the circuit's loss with fewer than twice as many nodes as "
        "for the task, or does not find the task again: size and loss are no evidence of a mechanism.",
        never="That the circuit is the model's own way to do the task, or that other nonsense is as hard.",
    ),
    "random_weights": Claim(
        title="Random weights",
        passed="No seed of the same search reaches the circuit's loss in at most twice as many nodes in the "
        "model with shuffled weights.",
        failed="The same search reaches the circuit's loss in a model with shuffled weights, in at most "
        "twice as many nodes: the mask, or what is not shuffled (biases, gains, the bigram table), can do "
        "the task.",
        never="That what was found was learned for this task.",
    ),
}

UNSUPPORTED = (
    "The circuit alone is not shown to do the task. Where other tests passed, that describes a set of nodes "
    "and not how the task is done."
)
ALWAYS = (
    "All numbers hold for this model, this circuit and prompts of this generator, on a split that the "
    "circuit was not chosen on. Other models, and other tasks, need audits of their own.",
    "An audit is a list of ways in which a circuit could have been refuted. Passing it does not prove that "
    "the circuit is how the model decides.",
)


@dataclasses.dataclass(frozen=True)
class Statement:
    """What an audit lets people say.

    Attributes:
      allowed: What may be said.
      required: What must be said beside it.
      untested: What nothing may be said about, and why.
      forbidden: What does not follow.
    """

    allowed: list[str]
    required: list[str]
    untested: list[str]
    forbidden: list[str]


def statement(audit: Audit) -> Statement:
    """Returns the statement of an audit, from its verdicts and the table of claims alone."""
    found = {test.name: test for test in audit.tests}
    known = [name for name in CLAIMS if name in found]
    required = [CLAIMS[name].failed for name in known if found[name].verdict == "failed"]
    if "sufficiency" not in known or found["sufficiency"].verdict != "passed":
        required.append(UNSUPPORTED)
    return Statement(
        allowed=[CLAIMS[name].passed for name in known if found[name].verdict == "passed"],
        required=required,
        untested=list(_untested(found)),
        forbidden=[CLAIMS[name].never for name in known if found[name].verdict != "not run"] + list(ALWAYS),
    )


def _untested(found: dict[str, TestResult]) -> Iterator[str]:
    for name, claim in CLAIMS.items():
        test = found.get(name)
        if test is None:
            yield f"{claim.title}: not asked for."
        elif test.verdict == "not run":
            yield f"{claim.title}: not run, {test.reason}."
        elif test.verdict == "reported":
            yield f"{claim.title}: reported without a verdict."
