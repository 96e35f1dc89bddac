"""Pages of whole runs, and of several: what circuits share, and two of them side by side."""

import dataclasses
import itertools
import json
import pathlib
import re

import browser_case
from browser_case import state
from helpers import run_python
import jax
import numpy as np
import pytest
import viewer_case as case
import whole_case

from wsparse import view
from wsparse.circuits import Circuit
from wsparse.errors import UserError
from wsparse.viewer import contents, overlap, page, several

OTHER = "f" * 64
OPTIONS = contents.Options()
DASH = "\N{EN DASH}"
HOSTILE = "<img src=http://127.0.0.1:9/x onerror='window.ran = 1'>"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A run with one circuit, its evidence and its model."""
    folder = tmp_path_factory.mktemp("source")
    jax.config.update("jax_disable_most_optimizations", True)
    case.write_live_run(folder)
    jax.config.update("jax_disable_most_optimizations", False)
    return folder


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory) -> pathlib.Path:
    """A run with several circuits."""
    return whole_case.write(source, tmp_path_factory.mktemp("whole") / "tiny", whole_case.PARTS)


@pytest.fixture(scope="module")
def other(source, tmp_path_factory) -> pathlib.Path:
    """A run of another model, with two circuits of the same tasks."""
    parts = {task: whole_case.PARTS[task] for task in ("quotes", "counting")}
    return whole_case.write(source, tmp_path_factory.mktemp("other") / "dense", parts, digest=OTHER)


@pytest.fixture(scope="module")
def circuits(folder) -> dict[str, Circuit]:
    return {name: Circuit.load(folder / "circuits" / name) for name in whole_case.PARTS}


# ---- What circuits share ----


@pytest.mark.parametrize("part", ["nodes", "edges"])
def test_shared_parts_are_those_that_a_count_of_names_gives(circuits, part):
    found = overlap.contents(circuits)
    assert found is not None and set(found["names"]) == set(circuits) and len(set(found["models"])) == 1

    def names(circuit):
        rows = json.loads(json.dumps([dataclasses.asdict(each) for each in getattr(circuit, part)]))
        return [row["name"] if part == "nodes" else f"{row['source']} {row['target']}" for row in rows]

    for (i, first), (j, second) in itertools.product(enumerate(found["names"]), repeat=2):
        a, b = names(circuits[first]), names(circuits[second])
        shared = sum(name in b for name in a)
        union = len(a) + len(b) - shared
        assert found[part]["shared"][i][j] == shared
        expected = pytest.approx(shared / union) if union else None
        assert found[part]["jaccard"][i][j] == expected
    assert found[part]["sizes"] == [len(names(circuits[name])) for name in found["names"]]
    # Neither everything nor nothing is shared.
    at = [found["names"].index(name) for name in ("quotes", "counting", "brackets")]
    assert found["nodes"]["jaccard"][at[0]][at[1]] == 0
    assert 0 < found["nodes"]["jaccard"][at[0]][at[2]] < 1


def test_what_would_be_shared_by_chance_is_the_mean_over_circuits_drawn_at_random(circuits):
    found = overlap.contents(circuits)
    assert found is not None
    i, j = (found["names"].index(name) for name in ("quotes", "brackets"))
    rng = np.random.default_rng(0)
    counts = []
    for name in ("quotes", "brackets"):
        places = [node.name.rsplit(".", 1)[0] for node in circuits[name].nodes]
        counts.append({place: places.count(place) for place in places})
    width = {"act_in": 16, "resid_delta": 16, "q": 8, "k": 8, "v": 8, "post_act": 24}

    def shared() -> int:
        total = 0
        for place in set(counts[0]) & set(counts[1]):
            n = width[place.split(".")[2]]
            a, b = (set(rng.choice(n, count[place], replace=False)) for count in counts)
            total += len(a & b)
        return total

    drawn = [shared() for _ in range(3000)]
    assert found["expected"][i][j] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(3000))
    assert found["expected"][i][j] == pytest.approx(found["expected"][j][i])


def test_nodes_are_listed_with_all_their_circuits_and_the_most_used_first(circuits):
    found = overlap.contents(circuits)
    assert found is not None
    uses = {name: {found["names"][i] for i, _ in used} for name, _, used in found["uses"]}
    for name, used in uses.items():
        assert used == {task for task, circuit in circuits.items() if name in {n.name for n in circuit.nodes}}
    assert set(uses) == {node.name for circuit in circuits.values() for node in circuit.nodes}
    sizes = [len(used) for *_, used in found["uses"]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1


def test_circuits_of_different_models_share_nothing_that_is_said(circuits):
    """The control: with one model's digest the same circuits share everything."""
    first = circuits["quotes"]
    same = overlap.contents({"a": first, "b": first})
    found = overlap.contents({"a": first, "b": dataclasses.replace(first, model_digest=OTHER)})
    assert same is not None and found is not None
    assert same["nodes"]["jaccard"] == [[1, 1], [1, 1]]
    assert found["nodes"]["jaccard"] == [[1, None], [None, 1]]
    assert found["expected"][0][1] is None and found["models"] == [0, 1]
    assert len(found["uses"]) == 2 * len(same["uses"])
    assert all(len(used) == 1 for *_, used in found["uses"])


def test_circuits_that_share_nodes_are_put_side_by_side_and_one_circuit_has_no_overlap(circuits):
    shuffled = {name: circuits[name] for name in ("quotes", "counting", "quotes@small", "brackets")}
    found = overlap.contents(shuffled)
    assert found is not None
    assert found["names"].index("counting") in (0, 3)
    assert overlap.contents({"quotes": circuits["quotes"]}) is None


def test_circuits_without_any_edge_have_no_overlap_of_edges(circuits):
    bare = dataclasses.replace(circuits["quotes"], edges=[])
    found = overlap.contents({"a": bare, "b": bare})
    assert found is not None and found["edges"]["jaccard"][0][1] is None
    assert found["nodes"]["jaccard"][0][1] == 1


# ---- Several runs ----


def test_a_page_of_two_runs_has_both_under_their_names(folder, other):
    alone = [contents.read_run(each, OPTIONS) for each in (folder, other)]
    data = several.read([folder, other], OPTIONS)
    expected = [f"tiny/{task}" for task in alone[0]["circuits"]]
    expected += [f"dense/{task}" for task in alone[1]["circuits"]]
    assert list(data["circuits"]) == expected
    assert {row["task"] for row in data["tasks"]} >= {"tiny/hard", "dense/hard", "dense/quotes"}
    for index, (name, own) in enumerate(zip(("tiny", "dense"), alone, strict=True)):
        of_run = (data, data["others"][0])[index]
        assert of_run["run"]["name"] == name and of_run["live"] == own["live"] and own["live"] is not None
        for task, circuit in own["circuits"].items():
            found = data["circuits"][f"{name}/{task}"]
            assert found["run"] == index and found["nodes"] == circuit["nodes"]
            text, shown = data["texts"][found["text"]], own["texts"][circuit["text"]]
            assert page.embedded(text) == page.embedded(shown)
    models = dict(zip(data["overlap"]["names"], data["overlap"]["models"], strict=True))
    assert {name.split("/")[0]: model for name, model in models.items()} == {"tiny": 0, "dense": 1}
    assert data["comparison"]["tasks"] == 2 and len(data["comparison"]["edges"]) == 2


def test_runs_of_one_name_are_told_apart_and_a_run_twice_is_refused(folder, source, tmp_path):
    twin = whole_case.write(source, tmp_path / "tiny", {"quotes": range(4)})
    data = several.read([folder, twin], OPTIONS)
    assert f"{twin}/quotes" in data["circuits"] and f"{folder}/quotes" in data["circuits"]
    # Of one model, whatever the runs are called.
    assert set(data["overlap"]["models"]) == {0}
    with pytest.raises(UserError, match="given twice"):
        several.read([folder, folder / ".." / "tiny"], OPTIONS)
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        view.write(folder, tmp_path / "x.html", OPTIONS, [tmp_path / "nowhere"])


def test_the_command_takes_further_runs_and_names_of_circuits(folder, other, tmp_path):
    out = tmp_path / "both.html"
    arguments = [f"--run={folder}", f"--with={other}", "--task=quotes", f"--out={out}"]
    done = run_python("-m", "wsparse.view", *arguments)
    assert done.returncode == 0, done.stderr
    assert "<title>tiny, dense: circuits</title>" in out.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', out.read_text(encoding="utf-8"))[0])
    assert list(data["circuits"]) == ["tiny/quotes", "dense/quotes"]
    named = contents.read_run(folder, contents.Options(task=("quotes@small",)))
    assert list(named["circuits"]) == ["quotes@small"]
    assert len(named["circuits"]["quotes@small"]["nodes"]) == 8


# ---- The page ----


browser = pytest.fixture(scope="module")(browser_case.chromium)


@pytest.fixture(scope="module")
def pages(folder, other, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The pages of one run, and of two of which one has a name that would do harm as HTML."""
    out = tmp_path_factory.mktemp("pages")
    one = contents.read_run(folder, OPTIONS)
    two = several.read([folder, other], OPTIONS)
    two["others"][0]["run"]["name"] = HOSTILE
    found = {}
    for name, data in (("one", one), ("two", two)):
        found[name] = out / f"{name}.html"
        found[name].write_text(page.render(data, title=name), encoding="utf-8")
    return found


@pytest.fixture
def open_page(browser, pages):
    with browser_case.opening(browser, pages["one"]) as opened:

        def of_name(fragment="", name="one", width=1440, path=None):
            return opened(fragment, path or pages[name], viewport={"width": width, "height": 900})

        yield of_name


def test_the_page_counts_statuses_and_its_matrix_has_the_overlaps(open_page, circuits):
    tab = open_page()
    assert "1 the model cannot do it" in tab.locator("#statuses").inner_text()
    # Two circuits of a task are one task, and the one without a circuit counts.
    assert tab.locator("#headline").inner_text().startswith("4 circuits of 4 tasks; geometric mean")
    names = tab.locator("#matrix tbody th").all_inner_texts()
    assert names == tab.locator("#matrix thead th").all_inner_texts() and set(names) == set(circuits)
    found = overlap.contents(circuits)
    assert found is not None

    def cells():
        return [row.locator("td").all_inner_texts() for row in tab.locator("#matrix tbody tr").all()]

    def expected(part):
        of = found[part]
        return [
            [
                str(of["sizes"][i]) if i == j else DASH if value is None else f"{value:.2f}"
                for j, value in enumerate(row)
            ]
            for i, row in enumerate(of["jaccard"])
        ]

    assert cells() == expected("nodes")
    tab.locator("#overlap-part").get_by_role("button", name="edges").click()
    assert cells() == expected("edges") != expected("nodes")
    assert state(tab)["overlap"] == "edges"
    # Others of its name are headings of the table of tasks.
    tab.locator("#overlap-part").get_by_role("button", name="nodes").press("Enter")
    focused = "document.activeElement.closest('#overlap-part') && document.activeElement.textContent"
    assert cells() == expected("nodes") and tab.evaluate(focused) == "nodes"
    tab.locator("#matrix tbody tr").first.locator("td").nth(1).hover()
    assert "Jaccard index" in tab.locator("#tip").inner_text()


def test_more_overlap_is_a_deeper_color_on_which_the_number_can_be_read(open_page):
    for theme in ("light", "dark"):
        tab = open_page(f"#theme={theme}")
        cells = tab.locator("#matrix tbody td:not(.own)").evaluate_all(
            f"""cells => cells.map((cell) => {{
              const luminance = {browser_case.LUMINANCE};
              const text = getComputedStyle(cell.querySelector('a')).color;
              return [+cell.innerText, luminance(getComputedStyle(cell).backgroundColor), luminance(text)];
            }})"""
        )
        ordered = sorted((value, ground) for value, ground, _ in cells)
        grounds = [ground for _, ground in ordered]
        assert grounds == sorted(grounds, reverse=theme == "light") and len(set(grounds)) > 2
        for _, ground, ink in cells:
            assert browser_case.contrast(ground, ink) > 4.5


def test_a_cell_opens_both_circuits_with_their_shared_nodes_colored_at_one_place(open_page, circuits):
    tab = open_page()
    tab.get_by_role("link", name=re.compile("^quotes and brackets:")).click()
    assert state(tab)["task"] == "quotes" and state(tab)["with"] == "brackets"
    names = [{node.name for node in circuits[task].nodes} for task in ("quotes", "brackets")]
    places = []
    for half, own in zip(("left", "right"), names, strict=True):
        items = tab.locator(f"#{half} .node")
        assert set(items.evaluate_all("items => items.map((i) => i.dataset.name)")) == own
        shared = tab.locator(f"#{half} .node.shared")
        assert set(shared.evaluate_all("items => items.map((i) => i.dataset.name)")) == names[0] & names[1]
        pairs = shared.evaluate_all(
            "items => items.map((i) => [i.dataset.name, i.getAttribute('transform')])"
        )
        places.append(dict(pairs))
    assert places[0] == places[1] and len(set(places[0].values())) == len(places[0])
    edges = [{f"{e.source}>{e.target}" for e in circuits[task].edges} for task in ("quotes", "brackets")]
    lines = tab.locator("#left .edge.shared").evaluate_all("lines => lines.map((l) => l.dataset.edge)")
    assert set(lines) == edges[0] & edges[1] and tab.locator("#left .edge").count() == len(edges[0])
    colors = [
        tab.locator(f"#left .node.{kind} rect").first.evaluate("e => getComputedStyle(e).fill")
        for kind in ("shared", "own")
    ]
    assert colors[0] != colors[1]
    assert (
        f"{len(names[0] & names[1])} of {len(names[0] | names[1])} nodes" in tab.locator("#pair").inner_text()
    )
    tab.go_back()
    assert tab.locator("#overview").is_visible() and tab.locator("#pair").is_hidden()


def test_a_node_is_selected_in_both_halves_and_opens_in_either(open_page, circuits):
    tab = open_page("#task=quotes&with=brackets")
    name = max(circuits["quotes"].nodes, key=lambda node: node.importance).name
    tab.locator(f'#right .node[data-name="{name}"]').click()
    assert tab.locator(".half .node.selected").count() == 2 and state(tab)["node"] == name
    assert "in both circuits" in tab.locator("#pair-node").inner_text()
    tab.locator(f'#right .node[data-name="{name}"]').focus()
    tab.keyboard.press("Enter")
    assert tab.locator(".half .node.selected").count() == 0
    alone = min(circuits["brackets"].nodes, key=lambda node: node.importance).name
    tab.locator(f'#right .node[data-name="{alone}"]').press("Enter")
    assert "in this circuit alone" in tab.locator("#pair-node").inner_text()
    tab.get_by_role("link", name="open it in brackets").click()
    assert tab.locator("#circuit-title").inner_text() == "brackets" and state(tab)["node"] == alone
    assert tab.locator("#panel h2").first.inner_text() == alone


def test_both_halves_are_panned_together(open_page):
    tab = open_page("#task=quotes&with=brackets")
    moves = (
        "() => ['left', 'right'].map((id) => document.querySelector(`#${id} g`).getAttribute('transform'))"
    )
    before = tab.evaluate(moves)
    box = tab.locator("#left").bounding_box()
    tab.mouse.move(box["x"] + 8, box["y"] + 8)
    tab.mouse.wheel(0, -200)
    after = tab.evaluate(moves)
    assert before[0] == before[1] and after[0] == after[1] != before[0]


def test_the_lists_choose_both_sides_and_nothing_returns_to_one(open_page):
    tab = open_page("#task=quotes")
    tab.locator("#with").select_option("counting")
    assert tab.locator("#pair").is_visible() and tab.locator("#circuit").is_hidden()
    tab.locator("#task").select_option("brackets")
    assert (state(tab)["task"], state(tab)["with"]) == ("brackets", "counting")
    # The one on the right comes to the left, and the other way round.
    tab.locator("#task").select_option("counting")
    assert (state(tab)["task"], state(tab)["with"]) == ("counting", "brackets")
    tab.locator("#with").select_option("")
    assert tab.locator("#circuit").is_visible() and tab.locator("#circuit-title").inner_text() == "counting"
    assert tab.locator("#graph .node").count() == len(whole_case.PARTS["counting"])
    tab.locator("#task").select_option("")
    assert tab.locator("#overview").is_visible() and "with" not in state(tab)


def test_circuits_of_different_models_are_shown_without_shared_nodes_and_the_page_says_so(open_page):
    tab = open_page("#task=tiny/quotes&with=dense/quotes", "two")
    assert tab.locator("#facts").inner_text() == "2 runs"
    assert "different models" in tab.locator("#pair-note").inner_text()
    assert tab.locator(".half .node.shared, .half .edge.shared").count() == 0
    assert tab.locator("#left .node").count() == len(whole_case.PARTS["quotes"])
    assert "shared" not in tab.locator("#pair-sizes").inner_text()
    assert "Nodes by location" in tab.locator("#pair-nodes").inner_text()
    assert tab.locator("#pair-legend").is_hidden()
    # The control: within one of them the same page colors.
    same = open_page("#task=tiny/quotes&with=tiny/brackets", "two")
    assert "2 layers of width 16" in same.locator("#facts").inner_text()
    assert same.locator("#left .node.shared").count() > 0
    assert "different models" not in same.locator("#pair").inner_text()


def test_the_table_of_nodes_is_sorted_filtered_and_opens_a_node_in_a_circuit(open_page, circuits):
    tab = open_page()
    found = overlap.contents(circuits)
    assert found is not None
    rows = tab.locator("#uses-table tbody tr")
    assert rows.locator("th").all_inner_texts() == [name for name, *_ in found["uses"]]
    assert (
        rows.first.locator(".number").first.inner_text() == f"{len(found['uses'][0][2])} of {len(circuits)}"
    )
    tab.locator("#location").select_option("attn.q")
    shown = rows.locator("th").all_inner_texts()
    assert shown == [name for name, *_ in found["uses"] if ".attn.q." in name] and shown
    assert state(tab)["location"] == "attn.q"
    name, task = shown[0], found["names"][next(u for n, _, u in found["uses"] if n == shown[0])[0][0]]
    rows.first.locator("ul").get_by_role("link", name=task, exact=True).click()
    assert (state(tab)["task"], state(tab)["node"]) == (task, name)
    assert tab.locator("#panel h2").first.inner_text() == name


def test_only_nodes_that_the_page_has_are_links(open_page, folder, circuits):
    cut = contents.read_run(folder, contents.Options(max_nodes=6))
    path = folder / "cut.html"
    path.write_text(page.render(cut, title="cut"), encoding="utf-8")
    tab = open_page(path=path)
    here = {task: {node["name"] for node in each["nodes"]} for task, each in cut["circuits"].items()}
    some = set()
    for row in tab.locator("#uses-table tbody tr").all():
        name = row.locator("th").inner_text()
        tasks = row.locator("ul a").all_inner_texts()
        assert set(tasks) == {task for task in here if name in here[task]}
        assert row.locator("th a").count() == bool(tasks)
        some.add(bool(tasks))
    assert some == {True, False}


HOLD_ANSWERS = """() => {
  window.held = [];
  window.Worker = class extends window.Worker {
    set onmessage(hear) { super.onmessage = hear && ((event) => window.held.push(() => hear(event))); }
  };
}"""
RELEASE = "() => window.held.splice(0).forEach((hear) => hear())"


def test_an_answer_about_the_circuit_that_was_left_is_not_shown_as_that_of_the_next_one(open_page):
    tab = open_page("#task=quotes&prompt=left")
    tab.evaluate(HOLD_ANSWERS)
    tab.locator("#try").click()
    # That the model is loaded, and the answer.
    tab.wait_for_function("() => window.held.length > 1")
    tab.locator("#task").select_option("counting")
    tab.locator("#try").click()
    tab.evaluate(RELEASE)
    assert tab.locator("#panel .pick").is_hidden() and "Starting" in tab.locator("#panel").inner_text()
    tab.wait_for_function(
        f"() => {{ ({RELEASE})(); return document.querySelector('#panel .losses:not(.waiting)'); }}"
    )
    shown = "".join(tab.locator("#panel .pick span").all_text_contents())
    assert shown == tab.get_by_role("textbox", name="Prompt").input_value() != "left"


def test_the_runs_of_a_page_are_named_and_each_runs_its_own_model(open_page):
    tab = open_page("", "two")
    assert HOSTILE in tab.locator("#runs").inner_text() and "tiny" in tab.locator("#runs").inner_text()
    assert "(4 tasks)" in tab.locator("#headline").inner_text()
    assert "a ratio of" in tab.locator("#comparison").inner_text()
    for task in ("tiny/quotes", "dense/quotes", "tiny/counting"):
        tab.locator("#task").select_option(task)
        tab.locator("#try").click()
        tab.wait_for_function("() => document.querySelector('#panel .losses:not(.waiting)')")
        assert "could not be run" not in tab.locator("#panel").inner_text()
        tab.locator("#try").click()


@pytest.mark.parametrize("width", [390, 1024])
def test_nothing_is_wider_than_the_window(open_page, width):
    for fragment in ("", "#task=quotes&with=brackets"):
        tab = open_page(fragment, width=width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        labels = tab.locator(".half .node text")
        heights = labels.evaluate_all("labels => labels.map((l) => l.getBoundingClientRect().height)")
        assert all(height > 9 for height in heights)
