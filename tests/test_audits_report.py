"""The report of an audit says what its record says, and concludes what the table of claims allows."""

import dataclasses
import html.parser
import re

import audit_case as case
import browser_case
from helpers import REPO
import pytest

from wsparse.circuits.audits import claims, report
from wsparse.circuits.audits.claims import CLAIMS
from wsparse.circuits.audits.record import Audit, Curve, Measurement
from wsparse.circuits.audits.tests import TESTS

HOSTILE = "<script>window.ran = 1</script>\"'&<img src=http://127.0.0.1:9/x onerror=window.ran=2>"


class Page(html.parser.HTMLParser):
    """The text of a page, its tags and its attributes; checks that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.parts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())


def squeezed(text: str) -> str:
    return " ".join(text.replace(">", " ").split())


# ---- Claims ----


def test_every_test_has_claims_in_the_order_of_the_report_and_nothing_else_has():
    assert list(CLAIMS) == list(TESTS)


def test_the_document_has_every_claim_under_the_heading_of_its_test():
    text = (REPO / "docs" / "evidence.md").read_text()
    sections = dict(part.split("\n", 1) for part in text.split("\n### ")[1:])
    assert list(sections) == [claim.title for claim in CLAIMS.values()]
    for name, claim in CLAIMS.items():
        section = squeezed(sections[claim.title])
        assert section.startswith(f"`{name}`. ")
        labels = ("If passed, it may be said", "If failed, it must be said", "It never follows")
        for label, said in zip(labels, (claim.passed, claim.failed, claim.never), strict=True):
            assert f"- **{label}:** {said}" in section
    for sentence in (*claims.ALWAYS, claims.UNSUPPORTED):
        assert sentence in squeezed(text)
    for verdict, mark in report.MARKS.items():
        assert f"| {mark} {verdict} |" in text


def test_numbers_in_claims_are_those_of_the_tests():
    """The words are written by hand; the bounds that they name are constants of the tests."""
    from wsparse.circuits.audits import (
        attention_patterns,
        interchange,
        minimality,
        node_roles,
        nonsense,
        seeds,
        shift,
        strengths,
    )

    assert f"{strengths._JUDGED} steps" in CLAIMS["adversarial_steps"].passed
    assert strengths._BUDGETS == (1, 10, 40) and "1, 10 or 40" in CLAIMS["adversarial_budgets"].passed
    assert (node_roles._KEPT, node_roles._SHARE) == (0.5, 0.9)
    assert f"above {node_roles._KEPT}" in CLAIMS["node_roles"].passed
    assert f"distance of {attention_patterns._MOST} " in CLAIMS["attention_patterns"].passed
    assert interchange._STAY == interchange._FLIP == 0.9 and "90%" in CLAIMS["interchange"].passed
    assert minimality._SHARE == 0.1 and "a tenth" in CLAIMS["minimality"].passed
    assert shift._AGREEMENT == shift._ACCURATE == 0.9 and CLAIMS["shift"].passed.count("90%") == 2
    assert (seeds._SUCCESS, seeds._OVERLAP, seeds._FEW) == (0.9, 0.5, 0.1)
    assert "90%" in CLAIMS["stability"].passed and "at least 0.5" in CLAIMS["stability"].passed
    assert "fewer than 10%" in CLAIMS["exclusion"].passed
    assert nonsense._RATIO == 2 and "twice as many" in CLAIMS["nonsense"].passed


def test_a_statement_allows_what_was_passed_requires_what_failed_and_forbids_for_both():
    said = claims.statement(
        case.audit(
            case.result("sufficiency"),
            case.result("adversarial_steps", "failed"),
            case.result("selectivity", "reported"),
            case.result("shift", "not run", reason="it has no knobs"),
        )
    )
    assert said.allowed == [CLAIMS["sufficiency"].passed]
    assert said.required == [CLAIMS["adversarial_steps"].failed]
    measured = ("sufficiency", "adversarial_steps", "selectivity")
    assert said.forbidden == [*(CLAIMS[name].never for name in measured), *claims.ALWAYS]
    assert f"{CLAIMS['shift'].title}: not run, it has no knobs." in said.untested
    assert f"{CLAIMS['selectivity'].title}: reported without a verdict." in said.untested


def test_tests_that_were_not_asked_for_are_said_to_be_untested():
    said = claims.statement(case.audit(case.result("sufficiency")))
    others = [claim.title for name, claim in CLAIMS.items() if name != "sufficiency"]
    assert said.untested == [f"{title}: not asked for." for title in others]
    # Negative control: where all were run, nothing is left open.
    assert claims.statement(case.audit()).untested == []


@pytest.mark.parametrize("verdict", ["failed", "not run", "reported", None])
def test_nothing_stands_without_a_circuit_that_does_the_task(verdict):
    others = [case.result("minimality"), case.result("exclusion")]
    first = [] if verdict is None else [case.result("sufficiency", verdict)]
    assert claims.UNSUPPORTED in claims.statement(case.audit(*first, *others)).required
    passed = claims.statement(case.audit(case.result("sufficiency"), *others))
    assert claims.UNSUPPORTED not in passed.required


def test_the_statement_depends_on_verdicts_and_not_on_numbers():
    one = case.audit(case.result("sufficiency"), case.result("necessity", "failed"))
    other = dataclasses.replace(
        one,
        loss=9.0,
        tests=[dataclasses.replace(t, measurements=[], question="?", curves=[]) for t in one.tests],
    )
    assert claims.statement(one) == claims.statement(other)


# ---- The page ----


def test_the_report_says_everything_that_the_record_holds():
    audit = case.audit(
        case.result("sufficiency"),
        case.result("necessity", "failed", criterion="At least 0.65."),
        case.result("shift", "not run", reason="it has no knobs"),
        options={"pairs": 48, "draws": 64},
    )
    text = Page(report.render(audit)).text
    for value in (audit.model, audit.data, audit.circuit, audit.wsparse, audit.command, audit.form):
        assert value in text
    for value in ("pairs 48, draws 64", "robust ablation", "48 pairs", "1,200 steps", "12 nodes, 9 edges"):
        assert value in text
    for test in audit.tests[:2]:
        for part in (test.title, test.question, test.procedure, test.control, test.criterion):
            assert part in text
    assert "0.1250.100 to 0.1500.688nats" in text
    assert "it has no knobs" in text
    for verdict in ("passed", "failed", "not run"):
        assert f"{report.MARKS[verdict]} {verdict}" in text
    assert "Tests: 1 passed, 1 failed, 1 not run, 14 not asked for." in text
    # The statement comes last.
    said = claims.statement(audit)
    order = [*said.allowed, *said.required, *said.untested, *said.forbidden]
    end = text[text.rindex("Statement") :]
    assert [end.index(sentence) for sentence in order] == sorted(end.index(sentence) for sentence in order)
    assert end.endswith(claims.ALWAYS[-1])


def test_a_number_that_is_missing_is_none_and_counts_are_whole():
    measurements = [
        Measurement(name="size", value=None, control=1234, unit="nodes"),
        Measurement(name="median", value=22.5, low=0, high=1, unit="edges"),
        Measurement(name="growth", value=-0.0001),
    ]
    text = Page(report.render(case.audit(case.result("stability", measurements=measurements)))).text
    assert "sizenone1,234nodes" in text
    assert "median22.50 to 1edges" in text
    assert "growth0.000nats" in text


@pytest.mark.parametrize(
    ("held_to", "words"),
    [
        ("labels", "the right answers"),
        ("model", "the model's own answers"),
        ("vocabulary", "the model's probabilities of all tokens"),
    ],
)
def test_the_report_says_what_the_circuit_was_held_to(held_to, words):
    text = " ".join(Page(report.render(case.audit(held_to=held_to))).text.split())
    assert f"masks learned under robust ablation, to a loss of 0.15 against {words}" in text


def test_whatever_a_record_says_is_text_and_the_page_fetches_and_runs_nothing():
    measurement = Measurement(name=HOSTILE, value=1.0, unit=HOSTILE)
    curve = Curve(x_label=HOSTILE, y_label=HOSTILE, x=[0], y=[0])
    texts = dict.fromkeys(("title", "question", "procedure", "control", "criterion"), HOSTILE)
    hostile = case.result("sufficiency", measurements=[measurement], curves=[curve], **texts)
    not_run = case.result("shift", "not run", title=HOSTILE, reason=HOSTILE)
    names = ("task", "form", "run", "model", "data", "circuit", "wsparse", "status", "objective", "command")
    page = Page(
        report.render(case.audit(hostile, not_run, options={"a": HOSTILE}, **dict.fromkeys(names, HOSTILE)))
    )
    assert not {"script", "img", "link", "iframe", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert page.text.count("window.ran = 1") >= 15
    # Negative control: a tag that gets in would be seen.
    assert "script" in Page("<p><script></script></p>").tags


def test_a_curve_is_drawn_at_its_points():
    svg = report._plot(Curve(x_label="x", y_label="y", x=[0, 5, 10], y=[0, 1, 2], control=[2, 2, 2]))
    lines = [
        [tuple(map(float, point.split(","))) for point in found.split()]
        for found in re.findall(r'points="([^"]*)"', svg)
    ]
    control, circuit = lines
    # Equal steps to the right and upwards; the largest value is at the top.
    assert circuit[1][0] - circuit[0][0] == pytest.approx(circuit[2][0] - circuit[1][0])
    assert circuit[0][1] - circuit[1][1] == pytest.approx(circuit[1][1] - circuit[2][1])
    assert circuit[0][1] > circuit[2][1]
    assert {y for _, y in control} == {circuit[2][1]}
    assert "stroke-dasharray" in svg and ">control<" in svg
    alone = report._plot(Curve(x_label="x", y_label="y", x=[3], y=[0]))
    assert "nan" not in alone and ">control<" not in alone


def test_the_table_has_a_row_for_each_circuit_and_names_what_failed():
    one = case.audit(case.result("sufficiency"), case.result("necessity", "failed"))
    two = case.audit(case.result("sufficiency"), task="a_longer_name", loss=0.5)
    head, first, second = report.table([one, two]).splitlines()
    assert head.split()[:3] == ["task", "nodes", "loss"]
    assert first.split() == [case.TASK, "12", "0.125", "1", "1", "0", "0", "necessity"]
    assert second.split() == ["a_longer_name", "12", "0.500", "1", "0", "0", "0"]


def test_a_report_of_a_saved_audit_is_the_same(tmp_path):
    audit = case.audit()
    audit.save(tmp_path)
    assert report.render(Audit.load(tmp_path)) == report.render(audit)


def test_a_test_that_this_version_does_not_know_is_shown_without_a_claim():
    unknown = dataclasses.replace(case.result("sufficiency"), name="from_the_future", title="The future")
    page = Page(report.render(case.audit(unknown)))
    assert "The future" in page.text
    assert claims.statement(case.audit(unknown)).allowed == []


# ---- In a browser ----


browser = pytest.fixture(scope="module")(browser_case.chromium)


def test_the_page_fits_screen_and_paper_runs_nothing_and_prints_as_a4(browser, tmp_path):
    names = dict.fromkeys(("task", "command"), HOSTILE + " --option=" + "x" * 300)
    path = tmp_path / report.FILE
    path.write_text(report.render(case.audit(**names)), encoding="utf-8")
    page = browser.new_page(viewport={"width": 900, "height": 700})
    trouble = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("request", lambda r: trouble.append(r.url) if r.resource_type != "document" else None)
    page.goto(path.as_uri())
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0
    assert page.locator("svg").count() == len(CLAIMS)
    assert page.evaluate("window.ran") is None and trouble == []
    pdf = page.pdf(prefer_css_page_size=True)
    [width, height] = map(float, re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)[0])
    assert (width, height) == pytest.approx((595, 842), abs=1)
    # Print is as wide as the paper inside of its margins: 180 of 210 mm.
    page.set_viewport_size({"width": 680, "height": 900})
    page.emulate_media(media="print")
    assert page.evaluate(overflow) <= 0
    page.close()
