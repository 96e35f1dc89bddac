"""The attack says before which texts the planted model fails, and it fails there."""

import dataclasses
import itertools
import json
import pathlib

from absl import flags
import audit_case as case
import circuits_case
import numpy as np
import pytest

from wsparse import attack, runs
from wsparse.circuits import tasks
from wsparse.circuits.attacks import texts
from wsparse.circuits.attacks.measure import Options
from wsparse.circuits.attacks.record import JSON, PICTURE, text_of
from wsparse.errors import UserError
from wsparse.pytext import prompts

OPTIONS = Options(pairs=6, draws=3, statements=4, resamples=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A run of the planted model that reads more than its prompts."""
    folder = tmp_path_factory.mktemp("attack") / "planted"
    case.write_run(folder, context=64)
    return folder


@pytest.fixture(scope="module")
def path(folder) -> str:
    return str(folder.parent / f"{case.TASK}.jsonl")


@pytest.fixture(scope="module")
def done(folder, path):
    [done] = attack.attack_run(folder, [path], OPTIONS)
    return done


def test_a_task_with_too_few_pairs_is_refused_with_how_many_would_do(folder, path):
    options = dataclasses.replace(OPTIONS, pairs=10_000)
    with pytest.raises(UserError, match=r"only (\d+) distinct pairs .*; --pairs=\1 would do$"):
        attack.attack_run(folder, [path], options)


def loss(done, kind: str, statements: int, of: str) -> float:
    [point] = [p for p in done.points if (p.kind, p.statements) == (kind, statements)]
    return getattr(point, of)


def test_the_planted_circuit_says_before_which_texts_the_model_fails(done):
    """Its head averages the signs of brackets, which finished ones of the other kind outvote."""
    for of in ("predicted", "circuit", "model"):
        assert loss(done, "other", 4, of) > 2 * np.log(2) > loss(done, "other", 1, of) > 0.3
        # The next layer's norm undoes what neutral text dilutes.
        assert all(loss(done, kind, 4, of) < 0.15 for kind in ("neutral", "own"))
    for agreement in done.agreements:
        assert agreement.correlation > 0.9 and agreement.explained > 0.8
        assert agreement.low <= agreement.correlation <= agreement.high
        assert agreement.n_predicted_wrong > 0
        assert agreement.wrong_where_predicted > 0.9 and agreement.wrong_elsewhere < 0.1


def test_the_one_head_of_the_circuit_is_what_the_text_acts_through(done):
    assert {(head.layer, head.head) for head in done.heads} == {(0, 0)}
    change = {head.kind: head.change for head in done.heads}
    assert change["other"] > 1 > 0.1 > max(abs(change["own"]), abs(change["neutral"]))
    assert all(0.5 < head.share < 1 for head in done.heads)


def test_without_positions_a_text_that_is_not_read_changes_nothing(done):
    assert all(point.moved == pytest.approx(done.alone[0], abs=1e-4) for point in done.points)


def test_a_circuit_that_reads_no_bracket_predicts_no_failure(folder, path, done):
    """Negative control: the predictions are the circuit's, and not the model's."""
    run, task = runs.load(folder), tasks.find(path)
    case.write_circuit(folder, task, case.OTHER_NODES)
    try:
        [other] = attack.attack_run(folder, [path], OPTIONS, run=run)
    finally:
        case.write_circuit(folder, task, circuits_case.PLANTED_NODES)
    of_model = other.agreements[1]
    assert of_model.explained < 0.2 < done.agreements[1].explained
    assert loss(other, "other", 4, "model") == pytest.approx(loss(done, "other", 4, "model"), abs=1e-5)


def test_folder_and_log_have_what_was_measured(folder, path, logged):
    [done] = attack.attack_run(folder, [path], OPTIONS)
    place = folder / "circuits" / case.TASK
    stored = json.loads((place / JSON).read_text())
    assert stored["circuit"] == done.circuit and len(stored["points"]) == len(done.points) == 9
    assert (place / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert text_of(done) in "\n".join(logged)
    assert set(done.texts) == {"neutral", "own", "other"}


def test_longer_texts_begin_with_shorter_ones_and_prompts_keep_their_tokens(folder, path):
    run, task = runs.load(folder), tasks.find(path)
    batch = tasks.build(task, run.tokenizer, 4, 0, split="report")
    made = texts.make_texts(task, run.tokenizer, batch, context=64, most_statements=4, draws=2, seed=0)
    by_side = {side: [text for text in made if text.side == side] for side in (None, 0, 1)}
    for side, of_side in by_side.items():
        longest = max(of_side, key=lambda text: text.statements)
        assert sum(longest.text.startswith(text.text) for text in of_side) == longest.statements.bit_length()
        assert all(len(text.ids) + batch.tokens.shape[1] <= 64 for text in of_side)
        assert all((text.text.count("(") > 0) == (side == 0) for text in of_side)
    assert [by_side[0][0].kind(side) for side in (0, 1)] == ["own", "other"]


def test_a_task_whose_pairs_never_end_has_texts(folder, path):
    run, task = runs.load(folder), tasks.find(path)

    def endless(seed, split):
        while True:
            yield from task.stream(seed, split)

    batch = tasks.build(task, run.tokenizer, 4, 0, split="report")
    made = texts.make_texts(
        dataclasses.replace(task, stream=endless),
        run.tokenizer, batch, context=64, most_statements=2, draws=1, seed=0,
    )  # fmt: skip
    assert {text.side for text in made} == {None, 0, 1}


@pytest.mark.parametrize("domain", ["python", "stories"])
def test_neutral_text_before_a_users_task_is_of_the_kind_that_the_model_reads(folder, path, domain):
    task = tasks.find(path)
    lines = list(itertools.islice(texts._statements(task, None, 0, domain), 20))
    assert [line.endswith(".\n") for line in lines] == [domain == "stories"] * 20
    assert [" = " in line for line in lines] == [domain == "python"] * 20


def test_statements_of_builtin_tasks_show_their_side():
    for side, quote in enumerate("'\""):
        stream = prompts.statements("single_double_quote", side, 0, "report")
        assert all(quote in next(stream) for _ in range(20))


@pytest.fixture
def command(folder):
    """Runs the command line on the run."""
    defined = set(flags.FLAGS)
    attack._define_flags()

    def run(*arguments: str) -> None:
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["attack", f"--run={folder}", *arguments])
        attack.main([])

    yield run
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task="], "--task is empty"),
        (["--task=fstring_brace"], "no circuit"),
        (["--pairs=0"], "pairs"),
        (["--max_tokens=2"], "max_tokens=2"),
    ],
)
def test_what_cannot_be_attacked_is_refused_in_one_line(folder, path, command, arguments, message):
    place = folder / "circuits" / case.TASK
    before = {p.name for p in place.iterdir()}
    if not any("--task" in argument for argument in arguments):
        arguments = [f"--task={path}", *arguments]
    with pytest.raises(UserError, match=message) as error:
        command(*arguments)
    assert "\n" not in str(error.value)
    assert {p.name for p in place.iterdir()} == before


def test_no_room_for_a_text_is_an_error_that_says_the_lengths(tmp_path):
    path = case.write_run(tmp_path / "short", context=8)
    with pytest.raises(UserError, match="no text fits before the prompts of task 'closing': the longest"):
        attack.attack_run(tmp_path / "short", [str(path)], OPTIONS)
