"""Little stories: documents, pairs that differ only in what decides, and their tasks in the commands."""

from collections import Counter
import hashlib
import itertools
import json
import re

import jax
import pytest

from wsparse import model, notebook, prune, runs
from wsparse import tasks as command
from wsparse.circuits import probe, tasks
from wsparse.circuits.attacks import texts
from wsparse.config import DataConfig, ModelConfig, TrainConfig
from wsparse.data import sources
from wsparse.data import tokenizer as tokenizer_lib
from wsparse.errors import UserError
from wsparse.pytext.words import SPLITS
from wsparse.stories import documents, prompts, words
from wsparse.stories.contrasts import CONTRASTS

# The first pairs of every task, split and two seeds, and the first documents: whoever changes one changes
# every circuit, or every run trained on `stories`.
GOLDEN_PAIRS = "1e23967f6b9c186445a162360f7273ff422ab840873e527c6581fd2ec0052ad6"
GOLDEN_DOCUMENTS = "8c3988aaebc35bb94d283bd7e63df13b5462812ae928bfe94c29361d5e6bba3e"
NAMES = {*words.GIRLS, *words.BOYS}


def pairs_of(name, split="search", count=100, **options):
    return list(itertools.islice(prompts.pairs(name, options.pop("seed", 0), split, **options), count))


def sides(pair):
    return (pair.first, pair.second)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_lib.train(itertools.islice(documents.documents(0), 400), 512)


# Texts ---------------------------------------------------------------------------------------------


def test_documents_and_pairs_never_change():
    of_documents = hashlib.sha256("".join(documents.document(3, i) for i in range(20)).encode())
    of_pairs = hashlib.sha256()
    for name, split, seed in itertools.product(CONTRASTS, SPLITS, (0, 1)):
        for side in itertools.chain(*map(sides, pairs_of(name, split, 3, seed=seed))):
            of_pairs.update(f"{side.prompt}\0{side.rest}\0{side.answer}\0".encode())
    assert of_documents.hexdigest() == GOLDEN_DOCUMENTS
    assert of_pairs.hexdigest() == GOLDEN_PAIRS


def test_documents_depend_on_the_seed_and_the_index_alone():
    made = list(itertools.islice(documents.documents(7, start=2), 3))
    assert made == [documents.document(7, i) for i in (2, 3, 4)]
    assert len({documents.document(seed, i) for seed in (0, 1, -1) for i in range(50)}) == 150
    with pytest.raises(UserError, match="index must be 0 or more"):
        documents.document(0, -1)


def test_documents_show_both_sides_of_every_contrast_about_equally():
    text = " ".join(itertools.islice(documents.documents(0), 2000))
    shown = Counter(re.findall(r" (?:she|he|it was|it is)\b", text))
    assert 0.9 < shown[" she"] / shown[" he"] < 1.1
    assert 0.9 < shown[" it was"] / shown[" it is"] < 1.1
    scenes = re.findall(r"When (\w+) and (\w+) \w+ to the \w+, (\w+) \w+ the [\w ]+ to (\w+)\.", text)
    assert len(scenes) > 1000 and all({a, b} == {giver, taker} for a, b, giver, taker in scenes)
    assert 0.45 < sum(a == giver for a, _, giver, _ in scenes) / len(scenes) < 0.55


def test_pronouns_and_tenses_of_documents_are_right():
    """An independent reading of the sentences by regular expressions."""
    text = " ".join(itertools.islice(documents.documents(1), 500))
    moves = "|".join(words.MOVES)
    people = re.findall(rf"(\w+) (?:{moves}) to the \w+(?: with a \w+ \w+)?(?:,| because) (she|he) ", text)
    assert len(people) > 300 and all((name in words.GIRLS) == (who == "she") for name, who in people)
    verbs = {verb: ("was", "is")[time] for stay in words.STAYS for time, verb in enumerate(stay)}
    animals = re.findall(r"(\w+) (?:by|near) the \w+(?: and the \w+)? and it (was|is) ", text)
    assert len(animals) > 300 and all(verbs[verb] == form for verb, form in animals)


# Pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRASTS)
def test_the_sides_of_a_pair_have_the_same_words_in_another_order(name):
    for pair in pairs_of(name):
        counts = [Counter(re.findall(r"\w+", side.prompt.lower())) for side in sides(pair)]
        differing = (counts[0] - counts[1]) | (counts[1] - counts[0])
        # Who gives occurs twice.
        assert differing.total() == (2 if name == "indirect_object" else 0)
        assert pair.first.prompt != pair.second.prompt
        if name == "indirect_object":
            assert set(differing) == {pair.first.answer.strip().lower(), pair.second.answer.strip().lower()}


@pytest.mark.parametrize("name", CONTRASTS)
def test_what_decides_stands_more_than_three_words_before_the_decision(name):
    for pair in pairs_of(name):
        tails = [re.findall(r"\w+|,", side.prompt)[-3:] for side in sides(pair)]
        assert tails[0] == tails[1]


def test_splits_share_neither_openings_nor_words():
    shared = {
        "she",
        "he",
        "it",
        "was",
        "is",
        "and",
        "the",
        "a",
        "to",
        "with",
        "by",
        "near",
        "when",
        "because",
    }
    shared |= {
        "there",
        "lived",
        "once",
        "path",
        "led",
        "sun",
        "shone",
        "over",
        "wind",
        "at",
        "lay",
        "on",
        "table",
    }
    shared |= {"everyone", "heard", "wanted"}
    for name in CONTRASTS:
        found = []
        for split in SPLITS:
            made = pairs_of(name, split, 150)
            text = " ".join(side.prompt for pair in made for side in sides(pair))
            # The names of pronouns decide.
            left = set(re.findall(r"\w+", text.lower())) - shared
            found.append(left - ({name.lower() for name in NAMES} if name == "pronoun" else set()))
        for a, b in itertools.combinations(found, 2):
            assert not a & b, name
        assert min(map(len, found)) >= 10
    openings = [
        {re.sub(r"\b(the|a) \w+( \w+)?", "", p.template) for p in pairs_of("tense", s)} for s in SPLITS
    ]
    assert not (openings[0] & openings[1] or openings[1] & openings[2] or openings[0] & openings[2])


@pytest.mark.parametrize("name", CONTRASTS)
def test_each_task_has_thousands_of_pairs(name):
    assert len({pair.first.prompt for pair in pairs_of(name, "report", 2200)}) >= 2000


def test_knobs_are_noted_with_each_pair_and_can_be_set():
    for count in (0, 1, 2):
        fixed = pairs_of("indirect_object", count=20, knobs={"distractors": count, "length": 1, "order": 0})
        for pair in fixed:
            assert pair.knobs == {"distractors": count, "length": 1, "order": 0}
            assert len(re.findall(r"When \w+ and", pair.first.prompt)) == count + 1
            assert re.search(
                r"When (\w+) and \w+ \w+ to the \w+, \1 \w+ the \w+ \w+ \w+ to$", pair.first.prompt
            )
    joint = pairs_of("pronoun", count=20, knobs={"joint": 1, "distractors": 0})
    assert all(pair.first.prompt.count(".") == 1 for pair in joint)
    timed = pairs_of("tense", count=20, knobs={"times": 0})
    assert all(pair.knobs["times"] == 0 for pair in timed)
    with pytest.raises(UserError, match=r"no knob 'times'.*it has distractors, joint, length"):
        pairs_of("pronoun", count=1, knobs={"times": 0})
    with pytest.raises(UserError, match="'distractors' must be one of 0, 1, 2 here, got 3"):
        pairs_of("tense", count=1, knobs={"distractors": 3})


def test_a_split_has_words_of_its_own_in_all_lists():
    for fillers in (words.PLACES, words.MOVES, words.STAYS, words.GIFTS, words.ANIMALS, words.PAST_TIMES):
        parts = [set(words.fillers_of(split, fillers)) for split in SPLITS]
        assert sum(map(len, parts)) == len(set(fillers)) == len(set().union(*parts))
    assert not set(words.GIRLS) & set(words.BOYS)


# Tasks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRASTS)
def test_tasks_of_stories_have_answers_of_one_token_and_no_shortcut(name, tokenizer):
    search, report = (tasks.build(name, tokenizer, 128, 0, split=split) for split in ("search", "report"))
    for row, (prompt, answer) in enumerate(zip(report.prompts, report.answers, strict=True)):
        ids = report.tokens[row, : report.position[row] + 1].tolist()
        assert tokenizer.encode(prompt + answer) == [*ids, report.answer[row]]
        assert tokenizer.encode(prompt + report.answers[row ^ 1]) == [*ids, report.other[row]]
    accuracies = probe.shortcuts(search, report)
    assert max(accuracies.values()) < 0.6


def test_answers_of_several_tokens_are_refused_by_the_task_with_the_reason():
    letters = tokenizer_lib.train(["abcdefgh " * 40], 260)
    with pytest.raises(UserError, match=r"task 'pronoun' fits no form.*use a larger vocabulary") as error:
        tasks.build("pronoun", letters, 4, 0)
    assert "is cut as ' ', 's', not as ' she'" in str(error.value)


def test_an_uncased_tokenizer_without_white_space_does_the_tasks():
    """One like those of published models of stories."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.decoder = normalizers.Lowercase(), decoders.WordPiece()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=["[UNK]", "[EOS]"], show_progress=False
    )
    core.train_from_iterator(itertools.islice(documents.documents(0), 300), trainer)
    tokenizer = tokenizer_lib.Tokenizer(core)
    for name in CONTRASTS:
        batch = tasks.build(name, tokenizer, 32, 0)
        assert batch.end_of_text == 1
        for row in range(64):
            ids = tokenizer.encode(batch.prompts[row] + batch.answers[row])
            assert ids == [*batch.tokens[row, : batch.position[row] + 1].tolist(), batch.answer[row]]
            assert batch.other[row] == batch.answer[row ^ 1] != batch.answer[row]


def test_all_tasks_are_those_of_the_kind_of_text():
    assert tasks.names_of("python") == tuple(tasks.TASKS)
    assert tasks.names_of("stories") == tuple(CONTRASTS)
    assert set(tasks.built_in()) == {*tasks.TASKS, *CONTRASTS}
    for name in CONTRASTS:
        assert tasks.find(name).summary and tasks.find(name).domain == "stories"
    with pytest.raises(UserError, match=r"no task 'pronuon' .did you mean 'pronoun'"):
        tasks.find("pronuon")


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run of stories whose model knows nothing."""
    folder = tmp_path_factory.mktemp("stories") / "run"
    config = ModelConfig(
        vocab_size=512, context=128, n_layer=1, d_model=16, n_head=2, d_head=8, bigram="none"
    )
    data = DataConfig(source="stories", domain="stories", megabytes=0.05)
    params = model.init(config, jax.random.key(0))
    runs.create(folder, TrainConfig(model=config, data=data), params, tokenizer, summary={})
    return runs.load(folder)


def test_the_table_of_a_run_of_stories_has_its_tasks_and_no_others(run):
    every = command.report(run, map(tasks.find, tasks.names_of("stories")), n_pairs=8)
    assert [line.split()[0] for line in every.splitlines()[1:]] == list(CONTRASTS)
    assert str(notebook.load(run.folder).tasks(n_pairs=8)) == every


def test_all_tasks_of_prune_are_those_of_the_runs_text(run):
    assert prune.chosen_tasks(run.folder, ["all"]) == list(tasks.STORY_TASKS.values())
    assert prune.chosen_tasks(run.folder, ["for_while"]) == [tasks.TASKS["for_while"]]
    with pytest.raises(UserError, match="--task is empty"):
        prune.chosen_tasks(run.folder, [])


@pytest.mark.slow
def test_prune_tries_a_task_of_stories(run):
    rows = prune.run(run.folder, [tasks.find("pronoun")], prune.Settings(trials=1, steps=1))
    assert [row["task"] for row in rows] == ["pronoun"]
    status = json.loads((run.folder / "circuits" / "pronoun" / "status.json").read_text())
    assert status["status"] == "the model cannot do it"


def test_the_text_of_a_run_of_stories_is_the_generators(run):
    assert run.windows("train", n=4).shape == (4, 128)
    source = sources.open_source("stories", seed=2)
    assert source.endless
    made = list(sources.documents(source, Counter(), max_bytes=5000))
    assert made == [documents.document(2, i) for i in range(len(made))]


def test_finished_passages_of_either_side_stand_before_prompts(tokenizer):
    task = tasks.find("pronoun")
    batch = tasks.build(task, tokenizer, 4, 0, split="report")
    made = texts.make_texts(task, tokenizer, batch, context=256, most_statements=4, draws=2, seed=0)
    of_side = {side: " ".join(text.text for text in made if text.side == side) for side in (None, 0, 1)}
    assert not re.search(r"\b(she|he)\b", of_side[None])
    assert re.search(r"\bshe\b", of_side[0]) and not re.search(r"\bhe\b", of_side[0])
    assert re.search(r"\bhe\b", of_side[1]) and not re.search(r"\bshe\b", of_side[1])
