"""Notes and tours, in Chromium: what is written is shown, kept in address, page and file, and read again."""

import copy
import json
import pathlib

import browser_case
from browser_case import address, state
import pytest
import viewer_case as case

from wsparse.circuits.notes import FILE, Notes, Step
from wsparse.viewer import contents
from wsparse.viewer import page as page_lib

browser = pytest.fixture(scope="module")(browser_case.chromium)
folder = pytest.fixture(scope="module")(case.live_folder)
circuit = pytest.fixture(scope="module")(case.live_circuit)
OPEN = f"#task={case.TASK}"
NOTES = f"{OPEN}&notes=true"
LABEL = "is the string <b>open</b>?"


@pytest.fixture(scope="module")
def data(folder) -> dict:
    """The run's data, with a second task of the same circuit."""
    found = json.loads(page_lib.embedded(contents.read_run(folder, contents.Options())))
    found["tasks"].append(dict(found["tasks"][0], task="other"))
    found["circuits"]["other"] = copy.deepcopy(found["circuits"][case.TASK])
    return found


@pytest.fixture(scope="module")
def path(data, folder) -> pathlib.Path:
    return written(data, folder / "report.html")


def written(data: dict, path: pathlib.Path) -> pathlib.Path:
    path.write_text(page_lib.render(data, title="a run"), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser, path):
    with browser_case.opening(browser, path, OPEN) as opened:
        yield opened


def node(page, name):
    return page.locator(f'.node[data-name="{name}"]').first


def write_everything(page, names: list[str]) -> None:
    """A name, a group of three, two more pins and a caption."""
    for name in names[:3]:
        node(page, name).click(modifiers=["Shift"])
    node(page, names[4]).click()
    page.get_by_role("textbox", name=f"Name of {names[4]}").fill(LABEL)
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Notes").click()
    page.get_by_role("textbox", name="Caption of the circuit").fill("It closes\nstrings & more")
    page.get_by_role("textbox", name="Name of the group").fill("quotes")
    page.get_by_role("button", name="Group them").click()


@pytest.fixture(scope="module")
def names(data) -> list[str]:
    """Nodes of the circuit, most important first."""
    return [each["name"] for each in data["circuits"][case.TASK]["nodes"]]


def shown(page) -> dict:
    """What the page shows of notes."""
    return {
        "labels": page.locator("#graph .label").all_text_contents(),
        "boxes": page.locator("#graph .group .name").all_text_contents(),
        "members": page.locator("#graph .node.inside").count(),
        "pins": page.locator("#graph .pin").count(),
        "caption": page.locator("#panel .caption").all_inner_texts(),
    }


EVERYTHING = {
    "labels": [LABEL],
    "boxes": ["quotes"],
    "members": 3,
    "pins": 3,
    "caption": ["It closes", "strings & more"],
}


def test_a_name_is_in_graph_tip_panel_and_lists_and_typing_is_not_disturbed(open_page, data, names):
    page = open_page()
    source = data["circuits"][case.TASK]["edges"][0][0]
    name = names[source]
    node(page, name).click()
    box = page.get_by_role("textbox", name=f"Name of {name}")
    box.click()
    page.keyboard.type("open?")
    assert page.locator("#graph .label").all_text_contents() == ["open?"]
    assert box.evaluate("e => e === document.activeElement")
    assert node(page, name).get_attribute("aria-label").startswith("open?: layer")
    # Keys of the page are letters of the name.
    page.keyboard.type("nt.p")
    assert box.input_value() == "open?nt.p" and "notes" not in state(page) and "tour" not in state(page)
    page.keyboard.press("Escape")
    node(page, name).hover()
    assert page.locator("#tip").inner_text().splitlines()[1] == "open?nt.p"
    assert f"{name} open?nt.p" in page.locator("#panel").inner_text()
    node(page, name).click()
    box.fill(" ")
    assert page.locator("#graph .label").count() == 0 and "n" not in state(page)
    assert node(page, name).get_attribute("aria-label").startswith("layer")


def test_notes_are_kept_in_the_address_and_are_not_taken_back_by_the_back_button(open_page, names):
    page = open_page()
    write_everything(page, names)
    assert page.get_by_text("the address holds the notes on this circuit").is_visible()
    page.get_by_role("button", name="Close").click()
    assert shown(page) == EVERYTHING
    assert len(state(page)["n"]) < 250
    other = open_page(address(page))
    assert shown(other) == EVERYTHING and state(other) == state(page)
    assert other.locator("main b").count() == 0
    # Another task has notes of its own, and going back loses none.
    page.locator("#task").select_option("other")
    assert shown(page)["labels"] == [] and "n" not in state(page)
    page.go_back()
    assert shown(page) == EVERYTHING
    page.go_back()
    page.go_back()
    assert page.locator("#graph .label").count() == 1
    page.locator("#home").click()
    page.get_by_role("link", name=case.TASK, exact=True).click()
    assert shown(page) == EVERYTHING and "n" in state(page)


def go_to(page, fragment: str) -> None:
    """What pasting a link into the tab does."""
    page.evaluate("fragment => { location.hash = fragment; }", fragment)
    page.wait_for_timeout(50)


def test_the_page_with_notes_is_saved_and_opens_with_them_and_under_the_same_policy(
    open_page, names, tmp_path, path
):
    page = open_page()
    write_everything(page, names)
    page.locator("#theme").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the page with the notes").click()
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    assert download.value.suggested_filename.endswith("-notes.html")
    fresh = open_page(OPEN, saved)
    assert shown(fresh) == EVERYTHING and "n" not in state(fresh)
    policy = "document.querySelector('meta[http-equiv]').content"
    assert fresh.evaluate(policy) == page.evaluate(policy)
    # Nothing of the view is in it, and all of the data is.
    assert '<html lang="en">' in saved.read_text(encoding="utf-8")
    before, after = (
        json.loads(text.read_text().split('id="data">')[1].split("</script>")[0]) for text in (path, saved)
    )
    for task in before["circuits"]:
        del before["circuits"][task]["written"], after["circuits"][task]["written"]
    assert after == before
    # And it can be saved again: the notes are those of the page now.
    fresh.keyboard.press("n")
    assert fresh.get_by_text("These are the notes of this page.").is_visible()
    fresh.get_by_role("button", name="Unpin all").click()
    with fresh.expect_download() as download:
        fresh.get_by_role("button", name="Download the page with the notes").click()
    download.value.save_as(saved)
    assert shown(open_page(OPEN, saved)) == EVERYTHING | {"pins": 0}


def test_the_notes_file_of_the_page_is_read_by_view(open_page, names, circuit, folder, tmp_path):
    page = open_page()
    write_everything(page, names)
    page.get_by_role("button", name="Remove step 1").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download notes.json").click()
    file = tmp_path / FILE
    download.value.save_as(file)
    notes = Notes.load(file)
    assert (notes.task, notes.circuit) == (case.TASK, circuit.digest)
    assert notes.labels == {names[4]: LABEL} and notes.pins == tuple(names[:3])
    assert [(group.name, set(group.nodes)) for group in notes.groups] == [("quotes", set(names[:3]))]
    before = contents.read_run(folder, contents.Options())["circuits"][case.TASK]["written"]["tour"]
    assert [step.caption for step in notes.tour] == [step["caption"] for step in before[1:]]
    assert notes.tour[-1].edits[0].mode == "mean"
    again = contents.read_run(folder, contents.Options(notes=(str(file),)))
    fresh = open_page(OPEN, written(again, tmp_path / "again.html"))
    assert shown(fresh) == EVERYTHING
    fresh.keyboard.press(".")
    assert fresh.locator("#tour-at").inner_text() == f"1 of {len(notes.tour)}"


def test_the_tour_that_is_made_from_the_evidence_is_not_written_into_the_notes_file(
    open_page, names, tmp_path
):
    page = open_page()
    write_everything(page, names)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download notes.json").click()
    download.value.save_as(tmp_path / FILE)
    notes = Notes.load(tmp_path / FILE)
    assert notes.tour == () and notes.labels == {names[4]: LABEL}


LEAVES = """() => {
  const leaving = new Event('beforeunload', { cancelable: true });
  window.dispatchEvent(leaving);
  return !leaving.defaultPrevented;
}"""


def test_the_page_is_not_left_without_a_question_while_notes_are_neither_in_the_address_nor_in_a_file(
    open_page, names
):
    page = open_page(f"{OPEN}&node={names[0]}")
    box = page.get_by_role("textbox", name=f"Name of {names[0]}")
    assert page.evaluate(LEAVES)
    box.fill("open?")
    assert page.evaluate(LEAVES) and "n" in state(page)
    # The address says the notes on one circuit.
    page.locator("#task").select_option("other")
    assert not page.evaluate(LEAVES)
    page.go_back()
    assert page.evaluate(LEAVES)
    page.locator("#home").click()
    assert not page.evaluate(LEAVES)
    page.go_back()
    page.keyboard.press("n")
    with page.expect_download():
        page.get_by_role("button", name="Download the page with the notes").click()
    page.locator("#home").click()
    assert page.evaluate(LEAVES)
    # What is written after it is in no file.
    page.go_back()
    page.get_by_role("textbox", name="Caption of the circuit").fill("é" * 2000 + "x" * 2000)
    for i in range(3):
        page.get_by_role("textbox", name=f"Caption of step {i + 1}").fill(f"{i}" * 2000)
    assert "n" not in state(page) and not page.evaluate(LEAVES)


def test_pinned_nodes_are_drawn_alone_and_the_model_runs_on_them_alone(open_page, names):
    page = open_page()
    for name in names[:2]:
        node(page, name).click(modifiers=["Shift"])
    node(page, names[5]).click()
    page.keyboard.press("p")
    assert page.locator("#graph .pin").count() == 3
    assert page.get_by_role("button", name="Pin", exact=True).get_attribute("aria-pressed") == "true"
    page.keyboard.press("n")
    page.get_by_role("button", name="Show only these").click()
    drawn = page.locator("#graph .node").evaluate_all("all => all.map((e) => e.dataset.name)")
    assert sorted(drawn) == sorted([*names[:2], names[5]])
    assert f"Only the 3 pinned nodes of {case.N_NODES} are drawn" in page.locator("#notes").inner_text()
    assert page.locator("#keep").is_disabled() and page.locator("#prefix").is_hidden()
    copy_of = open_page(address(page))
    assert copy_of.locator("#graph .node").count() == 3
    page.get_by_role("button", name=f"Unpin {names[5]}").click()
    assert page.locator("#graph .node").count() == 2
    # A toggle keeps its name and the focus.
    alone = page.get_by_role("button", name="Show only these", exact=True)
    alone.press("Enter")
    assert alone.get_attribute("aria-pressed") == "false"
    assert alone.evaluate("e => e === document.activeElement")
    assert page.locator("#graph .node").count() == case.N_NODES
    page.get_by_role("button", name="Hold the rest at its mean").click()
    page.wait_for_selector(".losses:not(.waiting)")
    assert page.locator(".edits li").count() == case.N_NODES - 2
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".edits li").count() == 0


def test_a_group_is_one_box_whose_panel_has_its_nodes_and_outer_edges(open_page, data, names):
    nodes, edges = (data["circuits"][case.TASK][key] for key in ("nodes", "edges"))
    source, target, _ = edges[0]
    inside = {source, target}
    page = open_page()
    for i in inside:
        node(page, nodes[i]["name"]).click(modifiers=["Shift"])
    page.keyboard.press("n")
    page.get_by_role("button", name="Group them").click()
    box = page.locator(".node.group")
    assert box.count() == 1 and box.locator(".size").text_content() == "2 nodes"
    assert page.locator("path.edge.inside").count() == sum({s, t} <= inside for s, t, _ in edges) >= 1
    box.click()
    panel = page.locator("#panel")
    assert panel.locator("h2").inner_text() == "group" == state(page)["group"]
    assert page.locator("#said").inner_text() == "group"
    outer = [edge for edge in edges if len({edge[0], edge[1]} & inside) == 1]
    assert panel.locator("table.edges tr").count() == len(outer)
    assert panel.locator(".rows li").count() == 2
    assert page.locator("path.edge.lit:not(.inside)").count() == len(outer)
    assert "selected" in box.get_attribute("class") and "dim" not in box.get_attribute("class")
    # By keys: the box is where its first node was, and Escape returns to it.
    page.keyboard.press("Escape")
    assert "group" not in state(page) and page.evaluate("document.activeElement.dataset.group") == "group"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.name") not in {nodes[i]["name"] for i in inside}
    box.focus()
    page.keyboard.press("Enter")
    one_box = page.get_by_role("button", name="Draw as one box")
    assert one_box.get_attribute("aria-pressed") == "true"
    one_box.click()
    assert page.locator(".node.group").count() == 0 and page.locator(".node.member").count() == 2
    page.get_by_role("button", name=f"Take {nodes[source]['name']} out").click()
    assert page.locator(".node.member").count() == 1
    page.get_by_role("button", name="Ungroup").click()
    assert page.locator(".node.member").count() == 0 and "group" not in state(page)


def test_a_group_is_renamed_as_it_is_typed_but_not_to_a_name_that_is_taken(open_page, names):
    page = open_page()
    for first, name in ((0, "a"), (2, "b")):
        for each in names[first : first + 2]:
            node(page, each).click(modifiers=["Shift"])
        page.keyboard.press("n")
        page.get_by_role("textbox", name="Name of the group", exact=True).fill(name)
        page.get_by_role("button", name="Group the").click()
        page.get_by_role("button", name="Close").click()
    page = open_page(address(page).replace("&notes=true", "") + "&notes=true")
    box = page.get_by_role("textbox", name="Name of the group b")
    box.fill("a")
    assert page.locator(".group .name").all_text_contents() == ["a", "b"]
    box.fill("quotes")
    assert page.locator(".group .name").all_text_contents() == ["a", "quotes"]
    assert box.evaluate("e => e === document.activeElement")
    page.get_by_role("button", name="2 nodes").last.click()
    assert state(page)["group"] == "quotes" and page.locator(".group.selected").count() == 1


def test_a_tour_is_walked_by_buttons_keys_and_links(open_page, data):
    tour = data["circuits"][case.TASK]["written"]["tour"]
    page = open_page()
    page.get_by_role("button", name="Tour", exact=True).click()
    caption, at = page.locator("#tour-caption"), page.locator("#tour-at")
    assert caption.inner_text() == tour[0]["caption"] and at.inner_text() == f"1 of {len(tour)}"
    assert page.get_by_role("button", name="Previous", exact=True).is_disabled()
    page.get_by_role("button", name="Next", exact=True).click()
    assert state(page)["node"] == tour[1]["node"] and state(page)["tour"] == "1"
    # Its captions tell values in the circuit.
    assert state(page)["side"] == "circuit"
    assert page.locator(".node.selected").count() == 1
    # The token of the step is marked in the prompts.
    marked = page.locator("#panel .prompt").first.locator(".tokens .focus")
    spans = page.locator("#panel .prompt").first.locator(".tokens span")
    assert marked.count() == 1 and "focus" in spans.nth(tour[1]["token"]).get_attribute("class")
    assert page.get_by_role("button", name="Next", exact=True).evaluate("e => e === document.activeElement")
    page.keyboard.press(".")
    assert state(page)["edge"] == tour[2]["edge"] and page.locator("path.edge.lit").count() == 1
    other = open_page(address(page))
    assert other.locator("#tour-caption").inner_text() == tour[2]["caption"]
    page.keyboard.press(",")
    assert caption.inner_text() == tour[1]["caption"]
    page.go_back()
    assert caption.inner_text() == tour[2]["caption"]
    for _ in tour:
        page.keyboard.press(".")
    page.wait_for_selector(".losses:not(.waiting)")
    edit = tour[-1]["edits"][0]
    assert state(page)["edits"] == f"{edit['name']}={edit['mode']}" and at.inner_text().startswith(
        f"{len(tour)} of"
    )
    assert page.get_by_role("button", name="Next", exact=True).is_disabled()
    page.get_by_role("button", name="End the tour").click()
    assert page.locator("#tour").is_hidden() and not {"tour", "edits", "try"} & set(state(page))


def test_a_tour_of_ones_own_is_made_from_what_is_shown(open_page, names, tmp_path):
    page = open_page(f"{OPEN}&node={names[0]}&pair=1&edits={names[1]}=zero&notes=true")
    for _ in range(page.locator(".steps li").count()):
        page.get_by_role("button", name="Remove step 1", exact=True).click()
    assert page.locator("#tour-open").is_hidden()
    page.get_by_role("button", name="Add what is shown as a step").click()
    page.get_by_role("textbox", name="Caption of step 1").fill("Look here")
    page.get_by_role("button", name="Add what is shown as a step").click()
    page.get_by_role("button", name="Move step 2 up").click()
    page.get_by_role("button", name="Remove step 1").click()
    other = open_page(address(page))
    other.keyboard.press("n")
    other.keyboard.press(".")
    assert other.locator("#tour-caption").inner_text() == "Look here"
    other.wait_for_selector(".losses:not(.waiting)")
    shown_now = state(other)
    assert (shown_now["node"], shown_now["pair"], shown_now["edits"]) == (names[0], "1", f"{names[1]}=zero")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download notes.json").click()
    download.value.save_as(tmp_path / FILE)
    [step] = Notes.load(tmp_path / FILE).tour
    assert (step.caption, step.node, step.pair) == ("Look here", names[0], 1)


def test_a_tour_with_edits_says_so_where_the_page_does_not_run_the_model(open_page, data, tmp_path):
    static = copy.deepcopy(data) | {"live": None, "static": "the model is too large"}
    for each in static["circuits"].values():
        each["live"] = None
    last = len(data["circuits"][case.TASK]["written"]["tour"]) - 1
    page = open_page(f"{OPEN}&tour={last}", written(static, tmp_path / "static.html"))
    assert "does not run the model" in page.locator("#tour-caption").inner_text()


def test_notes_of_another_circuit_are_named_as_such_in_file_and_address(
    open_page, data, names, folder, tmp_path
):
    page = open_page()
    write_everything(page, names)
    changed = copy.deepcopy(data)
    changed["circuits"][case.TASK]["digest"] = "f" * 64
    changed["circuits"]["other"]["written"]["remarks"] = ["The notes were written for another circuit."]
    file = written(changed, tmp_path / "changed.html")
    other = open_page(address(page), file)
    assert (
        "written for another circuit of this task, and are left out" in other.locator("#notes").inner_text()
    )
    assert other.locator("#graph .label").count() == 0
    assert "written for another circuit" in open_page("#task=other", file).locator("#notes").inner_text()


@pytest.mark.parametrize("text", ["x", "!!!", "W10", "WzJd", "bnVsbA", "WzEsIjMyNTdjYWUwIiwx", "%00"])
def test_an_address_whose_notes_cannot_be_read_opens_the_circuit_and_says_so(open_page, text):
    page = open_page(f"{OPEN}&n={text}")
    assert page.locator(".node").count() == case.N_NODES
    assert "The notes in the address" in page.locator("#notes").inner_text()


def test_notes_in_an_address_may_hold_anything_and_harm_nothing(open_page, circuit):
    labels = [[0, {}], [99, "x"], 7, [1, "<img src=x>"]]
    groups = [[[], 3], ["g", [0, 0, 99, "a"], 1], ["g", [1]], ["h", [0]]]
    tour = [["", 0], ["step", 99, [0, 99], -1, "x", "9.x=zero"], 3]
    values = [1, circuit.digest[:8], 5, labels, groups, {"a": 1}, tour]
    page = open_page(OPEN)
    encoded = page.evaluate("v => btoa(JSON.stringify(v)).replaceAll('=', '')", values)
    page = open_page(f"{OPEN}&n={encoded}&tour=0")
    assert page.locator("#graph .label").all_text_contents() == ["<img src=x>"]
    assert page.locator("img").count() == 0
    assert page.locator("#tour-caption").inner_text() == "step"
    assert page.locator("#graph .group").count() == 0 and page.locator(".node.member").count() == 1


def test_notes_too_long_for_the_address_say_so_and_are_kept_in_the_page(open_page, names):
    page = open_page(NOTES)
    back = page.get_by_role("button", name="Back to the page")
    assert back.is_disabled()
    page.get_by_role("textbox", name="Caption of the circuit").fill("é" * 2000)
    assert back.is_enabled()
    for i in range(3):
        page.get_by_role("textbox", name=f"Caption of step {i + 1}").fill(f"{i}" * 2000)
    assert page.get_by_text("too long for the address").is_visible() and "n" not in state(page)
    page.get_by_role("button", name="Close").click()
    page.locator("#task").select_option("other")
    page.go_back()
    assert len(page.locator("#panel .caption").inner_text()) == 2000
    page.keyboard.press("n")
    # They are replaced after a question alone.
    other = open_page()
    node(other, names[0]).click()
    other.get_by_role("textbox", name=f"Name of {names[0]}").fill("theirs")
    for accepted in (False, True):
        page.once("dialog", lambda dialog: dialog.accept() if accepted else dialog.dismiss())  # noqa: B023
        go_to(page, address(other))
        assert page.locator("#graph .label").count() == accepted
        page.go_back()
        if not accepted:
            page.once("dialog", lambda dialog: dialog.dismiss())
            page.get_by_role("button", name="Back to the page").click()
            assert page.get_by_text("too long for the address").is_visible()
    page.get_by_role("button", name="Back to the page").click()
    assert page.get_by_text("These are the notes of this page.").is_visible()


def test_what_the_slider_hides_is_said_and_can_be_shown(open_page, names, data):
    page = open_page(f"{OPEN}&node={names[-1]}&keep=5")
    assert "The slider hides it in the graph." in page.locator("#panel").inner_text()
    page.get_by_role("button", name="Show it").click()
    assert (
        page.locator(".node.selected").count() == 1
        and page.get_by_role("button", name="Show it").count() == 0
    )
    source, target, _ = max(data["circuits"][case.TASK]["edges"], key=lambda edge: max(edge[:2]))
    page = open_page(f"{OPEN}&edge={names[source]}>{names[target]}&keep=2")
    page.get_by_role("button", name="Show it").click()
    assert page.locator("path.edge.lit:not(.gone)").count() == 1


def test_a_group_shows_what_its_nodes_would_in_slider_and_selection(open_page, names):
    page = open_page()
    last = names[-2:]
    for name in last:
        node(page, name).click(modifiers=["Shift"])
    page.keyboard.press("n")
    page.get_by_role("button", name="Group them").click()
    box = page.locator(".node.group")
    page.locator("#keep").fill(str(case.N_NODES - 1))
    assert box.is_visible()
    page.locator("#keep").fill("3")
    assert box.is_hidden()
    page.locator("#keep").fill(str(case.N_NODES))
    node(page, names[0]).click()
    assert "dim" in box.get_attribute("class")
    box.click()
    page.locator("#panel").get_by_role("button", name=last[0], exact=True).first.click()
    assert "selected" in box.get_attribute("class") and state(page)["node"] == last[0]
    assert "in the group" in page.locator(".naming").inner_text()


def test_numbers_of_losses_name_their_split_in_panel_and_curve(open_page):
    panel = open_page().locator("#panel")
    text = panel.inner_text()
    assert "control, on the pairs that circuits are chosen on: shuffled labels" in text
    assert (
        panel.locator("section", has_text="Loss against edges").get_by_text("on the report split").count()
        == 1
    )


def test_a_page_whose_numbers_are_none_opens(open_page, data, tmp_path):
    """As a damaged or older summary has them."""
    empty = copy.deepcopy(data)
    empty["run"]["summary"] = {"val_loss": None, "nonzeros": None}
    empty["mean_edges"] = None
    own = empty["circuits"][case.TASK]
    own |= {
        "loss": None,
        "scores": {},
        "controls": {"shuffled_labels": {"least_loss": None, "reached": False}},
    }
    for row in empty["tasks"]:
        row |= {key: None for key in ("sufficiency", "model_loss", "necessity", "seconds") if key in row}
    file = written(empty, tmp_path / "empty.html")
    assert "\N{EN DASH}" in open_page("", file).locator("#tasks").inner_text()
    page = open_page(OPEN, file)
    assert page.locator(".node").count() == case.N_NODES
    node(page, own["nodes"][0]["name"]).click()
    assert page.locator("#panel .prompt").count() == 3


@pytest.mark.parametrize("width", [390, 1024])
def test_narrow_windows_do_not_scroll_sideways_and_controls_have_names(open_page, names, width):
    page = open_page()
    write_everything(page, names)
    page.get_by_role("textbox", name="Caption of the circuit").fill("x" * 300)
    hash_now = address(page)
    for fragment in (
        hash_now,
        f"{hash_now}&tour=2",
        f"{hash_now.replace('notes=true', '')}&group=quotes",
        hash_now.replace("notes=true", ""),
    ):
        page = open_page(fragment)
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        unnamed = (
            page.locator("#panel, #tour, .bar")
            .locator("input, textarea, button")
            .evaluate_all(
                "all => all.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent)).length"
            )
        )
        assert unnamed == 0


def test_notes_work_in_the_srcdoc_of_a_frame(browser, path, names, tmp_path):
    """Where the address cannot be written, notes are kept in the page."""
    with browser_case.framing(browser, path, tmp_path, width=1400) as frame:
        frame.locator("#tasks tbody th a").get_by_text(case.TASK).click()
        frame.locator(f'.node[data-name="{names[0]}"]').click()
        frame.get_by_role("textbox", name=f"Name of {names[0]}").fill("open?")
        frame.get_by_role("button", name="Tour", exact=True).click()
        frame.get_by_role("button", name="Next", exact=True).click()
        assert frame.locator("#graph .label").all_text_contents() == ["open?"]
        frame.locator("#home").click()
        frame.locator("#tasks tbody th a").get_by_text(case.TASK).click()
        assert frame.locator("#graph .label").all_text_contents() == ["open?"]
        with frame.owner.page.expect_download() as download:
            frame.get_by_role("button", name="Notes").click()
            frame.get_by_role("button", name="Download the page with the notes").click()
        assert download.value.suggested_filename.endswith("-notes.html")


def test_the_captions_and_steps_of_a_file_are_those_of_the_page(open_page, circuit, folder, tmp_path):
    step = Step(caption="Only this", node=circuit.nodes[0].name)
    Notes(task=case.TASK, circuit=circuit.digest, caption="From a file", tour=(step,)).save(
        tmp_path / "x.json"
    )
    again = contents.read_run(folder, contents.Options(notes=(str(tmp_path / "x.json"),)))
    page = open_page(OPEN, written(again, tmp_path / "again.html"))
    assert page.locator("#panel .caption").inner_text() == "From a file"
    page.get_by_role("button", name="Tour", exact=True).click()
    assert page.locator("#tour-at").inner_text() == "1 of 1" and "n" not in state(page)
