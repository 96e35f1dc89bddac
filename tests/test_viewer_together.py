"""Parts of the page together, in Chromium: groups with bands, ends, tours, tables, and two circuits."""

import collections
import copy
import csv
import io
import itertools
import json
import pathlib
import re
from xml.etree import ElementTree

import browser_case
from browser_case import address, state
import pytest
import viewer_case as case

from wsparse.viewer import contents, several
from wsparse.viewer import page as page_lib

browser = pytest.fixture(scope="module")(browser_case.chromium)
OPEN = f"#task={case.TASK}"
LABEL = "open\u0001 <b>&"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("viewer")


@pytest.fixture(scope="module")
def data(folder) -> dict:
    case.write_live_run(folder)
    return json.loads(page_lib.embedded(contents.read_run(folder, contents.Options())))


@pytest.fixture(scope="module")
def names(data) -> list[str]:
    """Nodes of the circuit, most important first."""
    return [each["name"] for each in data["circuits"][case.TASK]["nodes"]]


@pytest.fixture(scope="module")
def pages(data, folder) -> dict[str, pathlib.Path]:
    """The page of a run, that of a circuit with dense blocks, and that of two runs with the same circuit."""
    circuit = case.Circuit.load(folder / "circuits" / case.TASK)
    second = copy.deepcopy(data)
    second["run"]["name"] = "again"
    named = {f"{name}/{case.TASK}": circuit for name in ("first", "again")}
    shown = {"one": data, "dense": case.dense(data)}
    shown["two"] = several.joined({"first": data, "again": second}, named)
    found = {}
    for name, each in shown.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(page_lib.render(each, title=name), encoding="utf-8")
    return found


@pytest.fixture
def open_page(browser, pages):
    with browser_case.opening(browser, pages["one"], OPEN) as opened:

        def of_name(fragment=OPEN, name="one", path=None, **options):
            return opened(fragment, path or pages[name], **options)

        yield of_name


@pytest.fixture
def written(tmp_path):
    """Writes a page of other data; the file's path is returned."""

    def write(data: dict) -> pathlib.Path:
        path = tmp_path / "other.html"
        path.write_text(page_lib.render(data, title="other"), encoding="utf-8")
        return path

    return write


def value_of(names: list[str]) -> str:
    """A value of a head."""
    return next(name for name in names if ".attn.v." in name)


def node(page, name):
    return page.locator(f'.node[data-name="{name}"]').first


def group(page, names: list[str]):
    """Puts nodes into a group; returns its box."""
    for name in names:
        node(page, name).click(modifiers=["Shift"])
    page.keyboard.press("n")
    page.get_by_role("button", name="Group the").click()
    page.get_by_role("button", name="Close").click()
    return page.locator(".node.group")


def ends(data: dict, task: str = case.TASK) -> list[tuple[str, str]]:
    """The edges of the circuit, the largest first."""
    circuit = data["circuits"][task]
    nodes = [each["name"] for each in circuit["nodes"]]
    return [(nodes[source], nodes[target]) for source, target, _ in circuit["edges"]]


def saved(page, button) -> tuple[str, list[list[str]]]:
    with page.expect_download() as download:
        button.click()
    text = pathlib.Path(download.value.path()).read_text(encoding="utf-8")
    return download.value.suggested_filename, list(csv.reader(io.StringIO(text)))


# ---- Groups ----


def test_keys_go_through_the_edges_between_a_group_and_what_is_outside_and_along_them(open_page, data):
    edges = ends(data)
    degree = collections.Counter(end for edge in edges for end in edge)
    inside = set(max(edges, key=lambda edge: min(degree[end] for end in edge)))
    outer = [edge for edge in edges if len(inside & set(edge)) == 1]
    assert {end for edge in outer for end in edge} >= inside
    page = open_page()
    group(page, sorted(inside)).focus()
    found = []
    for _ in outer:
        page.keyboard.press("e")
        found.append(state(page)["edge"])
        assert page.locator("path.edge.lit:visible").count() == 1
    assert found == [f"{source}>{target}" for source, target in outer]
    page.keyboard.press("f")
    assert page.evaluate("document.activeElement.dataset.name") == next(iter(set(outer[-1]) - inside))


def test_arrows_leave_a_box_whose_first_node_is_hidden_by_the_slider(open_page, data, names):
    alone = [name for name in names if not any(name in edge for edge in ends(data))]
    first = next(name for name in alone if name.split(".")[2] not in ("act_in", "resid_delta"))
    lined = next(name for name in names[names.index(first) + 1 :] if name in ends(data)[0])
    page = open_page()
    box = group(page, [first, lined])
    assert box.get_attribute("data-name") == lined
    page.locator("#keep").fill(str(names.index(lined)))
    box.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.name") not in (first, lined)


def test_a_band_stands_for_no_edge_of_a_box_which_stands_elsewhere(open_page, data):
    edges = ends(case.dense(data))
    members = ["0.attn.q.0", "0.attn.v.5"]
    page = open_page(OPEN, "dense")
    group(page, members)
    dense = [t for s, t in edges if t.split(".")[2] in "qkv" and int(t.split(".")[3]) < case.CONFIG.d_head]
    assert page.locator(".handle text").text_content() == str(sum(t not in members for t in dense))
    assert page.locator("path.edge:visible").count() == len(edges) - sum(t not in members for t in dense)


def test_the_box_of_a_group_covers_no_node_beside_it(open_page, data, folder):
    path = folder / "wide.html"
    path.write_text(page_lib.render(case.dense(data, 24), title="wide"), encoding="utf-8")
    page = open_page(OPEN, path=path)
    group(page, ["0.attn.act_in.3", "0.attn.act_in.4"])
    boxes = page.locator(".node:visible > rect").evaluate_all(
        "all => all.map((e) => { const { x, y, width, height } = e.getBoundingClientRect();"
        " return [x, y, width, height]; })"
    )
    left = [box for box in boxes if box[0] < page.locator(".group").bounding_box()["x"] + 100]
    assert len({round(x + width / 2) for x, _, width, _ in left}) > 1, "they stand side by side"
    for (x, y, width, height), (u, v, w, h) in itertools.combinations(boxes, 2):
        assert min(x + width, u + w) <= max(x, u) or min(y + height, v + h) <= max(y, v)


def test_a_group_that_is_selected_stays_so_when_it_is_renamed(open_page, names):
    page = open_page()
    group(page, names[:2]).click()
    page.keyboard.press("n")
    page.get_by_role("textbox", name="Name of the group group").fill("quotes")
    assert state(page)["group"] == "quotes" and page.locator(".group.selected").count() == 1
    page.get_by_role("button", name="Close").click()
    assert page.locator("#panel h2").inner_text() == "quotes"


def test_long_names_are_cut_between_characters(open_page, names):
    page = open_page(f"{OPEN}&node={names[0]}")
    page.get_by_role("textbox", name=f"Name of {names[0]}").fill("\N{GRINNING FACE}" * 30)
    assert page.locator("#graph .label").text_content() == "\N{GRINNING FACE}" * 25 + "…"


@pytest.mark.parametrize("way", ["Pin", "Unpin"])
def test_however_the_last_pin_goes_the_next_one_does_not_hide_the_other_nodes(open_page, names, way):
    page = open_page()
    node(page, names[0]).click(modifiers=["Shift"])
    page.keyboard.press("n")
    page.get_by_role("button", name="Show only these").click()
    if way == "Pin":
        node(page, names[0]).click()
        page.get_by_role("button", name="Pin", exact=True).click()
    else:
        page.get_by_role("button", name=f"Unpin {names[0]}").click()
    assert "only" not in state(page)
    node(page, names[1]).click(modifiers=["Shift"])
    assert page.locator("#graph .node").count() == case.N_NODES


def test_the_address_that_is_gone_back_to_has_the_notes_that_are_shown(open_page, names):
    page = open_page()
    node(page, names[0]).click()
    node(page, names[1]).click()
    page.get_by_role("textbox", name=f"Name of {names[1]}").fill("later")
    page.go_back()
    assert state(page)["node"] == names[0] and page.locator("#graph .label").text_content() == "later"
    copy_of = open_page(address(page))
    assert copy_of.locator("#graph .label").all_text_contents() == ["later"]


def test_back_returns_to_notes_that_a_link_or_the_pages_own_have_replaced(open_page, names):
    page, other = open_page(), open_page()
    for each, label in ((page, "mine"), (other, "theirs")):
        node(each, names[0]).click()
        each.get_by_role("textbox", name=f"Name of {names[0]}").fill(label)
    address(page)
    labels = page.locator("#graph .label")
    page.evaluate("fragment => { location.hash = fragment; }", address(other))
    labels.get_by_text("theirs").wait_for()
    assert labels.all_text_contents() == ["theirs"]
    for move, expected in ((page.go_back, "mine"), (page.go_forward, "theirs"), (page.go_back, "mine")):
        move()
        assert labels.all_text_contents() == [expected]
    page.get_by_role("button", name="Notes", exact=True).click()
    page.get_by_role("button", name="Back to the page").click()
    assert labels.count() == 0 and "n" not in state(page)
    page.go_back()
    assert labels.all_text_contents() == ["mine"]


def test_the_last_pin_that_goes_brings_all_nodes_back(open_page, names):
    page = open_page()
    node(page, names[0]).click(modifiers=["Shift"])
    page.keyboard.press("n")
    page.get_by_role("button", name="Show only these").click()
    assert page.locator("#graph .node").count() == 1
    node(page, names[0]).click(modifiers=["Shift"])
    assert page.locator("#graph .node").count() == case.N_NODES and "only" not in state(page)


def test_the_rest_is_held_only_where_the_page_has_all_of_it(open_page, names, data, written):
    cut = copy.deepcopy(data)
    cut["circuits"][case.TASK]["total_nodes"] += 1
    page = open_page(path=written(cut))
    node(page, names[0]).click(modifiers=["Shift"])
    page.keyboard.press("n")
    assert page.get_by_role("button", name="Show only these").is_visible()
    assert page.get_by_role("button", name="Hold the rest").count() == 0


# ---- Tours ----


def test_a_step_that_selects_nothing_does_not_leave_an_end_selected(open_page, data):
    assert data["circuits"][case.TASK]["written"]["tour"][0]["node"] is None
    page = open_page(f"{OPEN}&end=embedding")
    page.keyboard.press(".")
    assert state(page).get("tour") == "0" and "end" not in state(page)


def test_keys_of_one_circuit_do_nothing_beside_another(open_page, names):
    page = open_page(f"#task=first/{case.TASK}&with=again/{case.TASK}&node={names[0]}&tour=1&pair=1", "two")
    before = address(page)
    for key in (".", ",", "t", "n", "p", "[", "]"):
        page.keyboard.press(key)
    assert address(page) == before
    page.keyboard.press("Escape")
    assert "node" not in state(page)


def test_nothing_but_a_node_stays_selected_when_a_circuit_is_put_beside(open_page):
    page = open_page(f"#task=first/{case.TASK}&end=embedding", "two")
    page.locator("#with").select_option(f"again/{case.TASK}")
    assert set(state(page)) == {"task", "with"}


def test_a_view_is_that_of_the_address_while_the_circuit_is_tried(open_page, data):
    source, target = ends(data)[0]
    low = {"width": 1440, "height": 460}
    page = open_page(f"{OPEN}&view=3,0,-300&try=true&edge={source}>{target}", viewport=low)
    # It has been panned to the edge, which writes how far it is zoomed into the address.
    assert state(page)["try"] == "true" and state(page)["view"].startswith("3.000,")


# ---- Files ----


def test_every_table_of_whole_runs_and_of_two_circuits_has_its_csv_again_after_it_is_drawn_anew(
    open_page, data, folder
):
    page = open_page("", "two")
    page.locator("#overlap-part").get_by_role("button", name="edges").click()
    page.locator("#location").select_option("attn.q")
    tables = page.locator("main table:visible")
    assert tables.count() == tables.locator("caption button.csv").count() == 3
    name, rows = saved(page, page.locator("#matrix .csv"))
    assert name == f"{data['run']['name']}_again_Overlap_of_circuits.csv"
    circuit = case.Circuit.load(folder / "circuits" / case.TASK)
    size = str(len(circuit.edges))
    assert [row[1:] for row in rows[1:]] == [[size, "1"], ["1", size]]
    _, rows = saved(page, page.locator("#uses-table .csv"))
    uses = {(node.name, task) for node in circuit.nodes if ".attn.q." in node.name for task in named()}
    assert {(row[0], row[1]) for row in rows[1:]} == uses
    importance = {node.name: node.importance for node in circuit.nodes}
    assert all(float(row[2]) == pytest.approx(importance[row[0]], rel=1e-8) for row in rows[1:])
    page = open_page(f"#task={named()[0]}&with={named()[1]}", "two")
    tables = page.locator("main table:visible")
    assert tables.count() == tables.locator("caption button.csv").count() == 2
    name, _ = saved(page, page.locator("#pair-sizes .csv"))
    assert name == f"first_{case.TASK}-again_{case.TASK}.csv"


def test_numbers_are_separated_on_the_page_and_plain_in_its_files(open_page, pages, names, tmp_path):
    [text] = re.findall(r'id="data">(.*?)</script>', pages["two"].read_text(encoding="utf-8"))
    data = json.loads(text)
    data["mean_edges"] = 1234.4
    first = data["circuits"][named()[0]]
    first["nodes"][0]["importance"] = -1.5e-7
    first["counts"]["edges"] = 1234
    path = tmp_path / "numbers.html"
    path.write_text(page_lib.render(data, title="numbers"), encoding="utf-8")
    assert "edges 1,234 in" in open_page("#", path=path).locator("#headline").inner_text()
    page = open_page(f"#task={named()[0]}&with={named()[1]}", path=path)
    assert "1,234" in page.locator("#pair-sizes").inner_text()
    _, rows = saved(page, page.locator("#pair-sizes .csv"))
    sizes = {row[0]: row[1] for row in rows}
    assert (int(sizes["edges"]), float(sizes["loss alone"])) == (1234, first["loss"])
    cell = page.locator("#pair-nodes tr", has_text=names[0]).first.locator("td").nth(1)
    assert cell.inner_text() == "\N{MINUS SIGN}1.50e\N{MINUS SIGN}7"
    _, rows = saved(page, page.locator("#pair-nodes .csv"))
    row = next(row for row in rows if row[0] == names[0])
    again = data["circuits"][named()[1]]["nodes"][0]["importance"]
    assert [float(value) for value in row[2:]] == [-1.5e-7, pytest.approx(again, rel=1e-8)]


def test_lists_of_two_circuits_say_where_they_are_cut_and_their_file_is_not(open_page, pages, tmp_path):
    [text] = re.findall(r'id="data">(.*?)</script>', pages["two"].read_text(encoding="utf-8"))
    data = json.loads(text)
    more = [f"0.mlp.post_act.{100 + i}" for i in range(101)]
    for circuit in (data["circuits"][name] for name in named()):
        about = data["texts"][circuit["text"]]["nodes"]
        like = next(node for node in circuit["nodes"] if node["name"].startswith("0.mlp.post_act."))
        circuit["nodes"] += [like | {"name": name} for name in more]
        circuit["total_nodes"] = len(circuit["nodes"])
        circuit["edges"] *= 1 + 5000 // len(circuit["edges"])
        about |= dict.fromkeys(more, about[like["name"]])
    path = tmp_path / "long.html"
    path.write_text(page_lib.render(data, title="long"), encoding="utf-8")
    page = open_page(f"#task={named()[0]}&with={named()[1]}", path=path)
    count = case.N_NODES + len(more)
    heading = page.locator("#pair-nodes h3").first.inner_text()
    assert heading == f"In both circuits: {count} nodes; the first 100 are shown"
    assert page.locator("#pair-nodes tbody tr").count() == 100
    assert len(saved(page, page.locator("#pair-nodes .csv"))[1]) == 1 + count
    assert page.locator("#pair-note").inner_text().count("the 5,000 largest are drawn") == 2
    page = open_page(f"#task={named()[0]}&node={ends(data, named()[0])[0][0]}", path=path)
    assert re.search(r"Out \(\d+; the first 200 are shown\)", page.locator("#panel").inner_text())


def named() -> list[str]:
    return [f"{run}/{case.TASK}" for run in ("first", "again")]


def test_names_that_a_person_gives_do_not_enter_the_tables_of_edges(open_page, data):
    source, target = ends(data)[0]
    page = open_page(f"{OPEN}&node={source}")
    page.get_by_role("textbox", name=f"Name of {source}").fill(LABEL)
    page.keyboard.press("Escape")
    group(page, [target]).click()
    _, rows = saved(page, page.locator("table.edges .csv").first)
    into = [edge for edge in ends(data) if edge[1] == target]
    assert rows[0] == ["source", "target", "weight"] and [tuple(row[:2]) for row in rows[1:]] == into


def test_a_name_can_be_read_in_the_files_of_the_graph_whatever_is_in_it(open_page, names):
    page = open_page(f"{OPEN}&node={names[0]}")
    page.get_by_role("textbox", name=f"Name of {names[0]}").fill(LABEL)
    with page.expect_download() as download:
        page.locator("#save-svg").click()
    root = ElementTree.fromstring(pathlib.Path(download.value.path()).read_bytes())
    [label] = [
        each for each in root.iter() if each.text == LABEL.replace("\u0001", "\N{REPLACEMENT CHARACTER}")
    ]
    # Its edge in the color of the ground lies behind the letters.
    assert label.get("stroke") and label.get("paint-order") == "stroke"


def test_a_task_without_a_circuit_on_the_page_has_no_curve_that_would_open_it(open_page, data, tmp_path):
    other = copy.deepcopy(data)
    other["tasks"].append(dict(other["tasks"][0], task="elsewhere"))
    path = tmp_path / "page.html"
    path.write_text(page_lib.render(other, title="a run"), encoding="utf-8")
    page = open_page(path=path)
    page.wait_for_selector("#panel .curve")
    tasks = page.locator("#panel .curve").evaluate_all("all => all.map((each) => each.dataset.task)")
    assert tasks == [case.TASK]


# ---- Colors, letters and paper ----


# The contrast of the letters of an element with what is behind them, a color that may let a ground through.
CONTRAST = f"""(all) => all.map(([letters, color, ground]) => {{
  const paint = document.createElement('canvas').getContext('2d', {{ willReadFrequently: true }});
  for (const each of [ground, color]) {{
    paint.fillStyle = each;
    paint.fillRect(0, 0, 1, 1);
  }}
  const luminance = {browser_case.LUMINANCE};
  const [r, g, b] = paint.getImageData(0, 0, 1, 1).data;
  return [luminance(letters), luminance(`rgb(${{r}},${{g}},${{b}})`)];
}})"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_can_be_read_on_every_node_and_every_value(open_page, data, names, written, theme):
    grown = copy.deepcopy(data)
    nodes = grown["circuits"][case.TASK]["nodes"]
    for i, each in enumerate(nodes):
        # All strengths that there are.
        each |= {"constant": False, "importance": ((len(nodes) - i) / len(nodes)) ** 2}
    page = open_page(f"{OPEN}&node={value_of(names)}&theme={theme}", path=written(grown))
    of_nodes = page.locator("#graph .node").evaluate_all(
        """all => all.map((e) => ['text', 'rect', 'rect'].map((part) => (
          getComputedStyle(e.querySelector(part)).fill)))"""
    )
    of_values = page.locator("#panel :is(.tokens span, .chip)").evaluate_all(
        """all => all.map((e) => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor,
          getComputedStyle(e.closest('.tokens') ?? document.getElementById('panel')).backgroundColor])"""
    )
    assert len({fill for _, fill, _ in of_nodes}) > 10 and len({color for _, color, _ in of_values}) > 10
    for luminances in page.evaluate(CONTRAST, of_nodes + of_values):
        assert browser_case.contrast(*luminances) > 4.5


def test_blanks_that_look_alike_are_told_apart(open_page, data, names, written):
    changed = copy.deepcopy(data)
    token = str(changed["circuits"][case.TASK]["rows"][0]["answer"])
    changed["tokens"][token] = " \N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}\N{IDEOGRAPHIC SPACE}é"
    page = open_page(f"{OPEN}&node={value_of(names)}", path=written(changed))
    answer = page.locator("#panel .prompt code").first.text_content()
    assert answer == r'" \u00a0\u200b\u3000é"'


@pytest.mark.parametrize("fragment", ["", f"{OPEN}&theme=dark"])
def test_all_of_the_page_is_printed_on_light_paper(open_page, names, fragment):
    """A landscape page of A4, without its margins."""
    if fragment:
        fragment += f"&node={value_of(names)}"
    page = open_page(fragment, viewport={"width": 1050, "height": 720})
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    cut = page.evaluate(
        """() => [...document.querySelectorAll('body, main, main :is(section, aside, .scroll)')]
          .filter((e) => e.scrollHeight > e.clientHeight + 2)
          .filter((e) => getComputedStyle(e).overflowY !== 'visible').length"""
    )
    assert cut == 0 and page.evaluate("document.documentElement.scrollHeight") > 720
