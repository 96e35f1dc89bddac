"""What helps to read a circuit, in Chromium: ends, constants, dense blocks, edges, files, a phone."""

import copy
import csv
import decimal
import io
import json
import pathlib
import re
from xml.etree import ElementTree

import browser_case
from browser_case import address, state
import jax
import numpy as np
from PIL import Image
import pytest
import viewer_case as case

from wsparse.circuits import Circuit
from wsparse.circuits.evidence_file import Evidence
from wsparse.viewer import page as page_lib

browser = pytest.fixture(scope="module")(browser_case.chromium)
CIRCUIT = f"#task={case.TASK}"
MINUS = "\N{MINUS SIGN}"
# The two sides' first answers and quotes, as the page has the pairs.
FIRST, SECOND = ('"\'"', '"\\""')
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("viewer")


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads(case.data_text(folder))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a page; the file's path is returned."""
    folder = tmp_path_factory.mktemp("pages")

    def write(data: dict, name: str) -> pathlib.Path:
        path = folder / f"{name}.html"
        path.write_text(page_lib.render(data, title="a run"), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def path(data, written) -> pathlib.Path:
    return written(data, "report")


@pytest.fixture
def open_page(browser, path):
    with browser_case.opening(browser, path, CIRCUIT) as opened:
        yield opened


def shown_circuit(data: dict) -> dict:
    return data["circuits"][case.TASK]


def edges_into(data: dict, head: int) -> int:
    names = [node["name"] for node in shown_circuit(data)["nodes"]]
    channels = [int(names[target].rsplit(".", 1)[1]) for _, target, _ in shown_circuit(data)["edges"]]
    return sum(channel // case.CONFIG.d_head == head for channel in channels)


# ---- The ends ----


def test_a_read_shows_the_tokens_that_tell_the_sides_apart_before_the_largest_others(open_page, data):
    shown = shown_circuit(data)
    name = next(n["name"] for n in shown["nodes"] if ".act_in." in n["name"])
    panel = open_page(f"{CIRCUIT}&node={name}").locator("#panel")
    rows = panel.locator("table.contrast tbody tr")
    assert rows.locator("th code").all_text_contents() == [
        data_text(data, t) for t in shown["contrast"]["tokens"]
    ]
    assert rows.locator("td").all_text_contents() == [
        f"{side} prompt, answer to the {side}" for side in sides(shown)
    ]
    embedding = np.asarray(case.run().params["embed"]["tokens"])[:, int(name.rsplit(".", 1)[1])]
    entries = [float(t.split()[-1].replace(MINUS, "-")) for t in rows.locator("th").all_text_contents()]
    np.testing.assert_allclose(entries, embedding[shown["contrast"]["tokens"]], rtol=6e-3)
    chips = panel.locator(".chips .chip code").all_text_contents()
    assert chips and not set(chips) & {FIRST, SECOND}
    boxes = [panel.locator(part).first.bounding_box() for part in ("table.contrast", ".chips")]
    assert boxes[0]["y"] < boxes[1]["y"]


def data_text(data: dict, token: int) -> str:
    return json.dumps(data["tokens"][str(token)])


def sides(shown: dict) -> list[str]:
    return ["first" if counts[0] else "second" for counts in shown["contrast"]["counts"]]


def test_the_ends_can_be_selected_shared_and_left(open_page, data):
    shown = shown_circuit(data)
    page = open_page()
    page.locator('.end[data-end="unembedding"]').click(position={"x": 7, "y": 12})
    assert state(page)["end"] == "unembedding"
    writes = [n["name"] for n in shown["nodes"] if ".resid_delta." in n["name"]]
    params = jax.tree.map(np.asarray, case.run().params)
    unembed = params["head"]["norm"]["gain"][:, None] * params["head"]["unembed"]
    for opened in (page, open_page(address(page))):
        rows = opened.locator("table.ends tbody tr")
        assert rows.locator("th").all_text_contents() == writes
        cells = rows.locator("td").evaluate_all("cells => cells.map((cell) => +cell.dataset.value)")
        tokens = shown["contrast"]["tokens"]
        expected = [unembed[int(name.rsplit(".", 1)[1]), token] for name in writes for token in tokens]
        np.testing.assert_allclose(cells, expected, rtol=1e-6)
        assert opened.locator(".node:not(.dim)").count() == len(writes)
        assert opened.locator('.end[aria-pressed="true"]').get_attribute("data-end") == "unembedding"
    page.locator("table.ends tbody button").first.click()
    assert state(page)["node"] == writes[0] and "end" not in state(page)
    page.locator('.end[data-end="embedding"]').focus()
    page.keyboard.press("Enter")
    assert state(page)["end"] == "embedding" and page.locator("#panel h2").inner_text() == "embedding"
    page.keyboard.press("Escape")
    assert "end" not in state(page) and page.locator(".dim").count() == 0


def test_of_many_tokens_an_end_shows_those_of_the_most_pairs_and_says_that_there_are_more(
    open_page, data, written
):
    changed = copy.deepcopy(data)
    contrast = shown_circuit(changed)["contrast"]
    n = 8
    counts = np.random.default_rng(0).permutation(n) + 1
    contrast["tokens"] = list(range(65, 65 + n))
    changed["tokens"] |= {str(token): chr(token) for token in contrast["tokens"]}
    contrast["counts"] = [[int(count), 0, int(count), 0] for count in counts]
    contrast["weights"] = {name: [0.5] * n for name in contrast["weights"]}
    for end in ("embedding", "unembedding"):
        panel = open_page(f"{CIRCUIT}&end={end}", written(changed, "many")).locator("#panel")
        shown = panel.locator("table.ends thead code").all_text_contents()
        assert shown == [json.dumps(chr(65 + i)) for i in np.argsort(-counts)[:6]]
        assert "the first 6 are shown" in panel.inner_text()


def test_channels_that_say_nothing_of_the_tasks_tokens_are_named_below_the_table(open_page, data, written):
    changed = copy.deepcopy(data)
    weights = shown_circuit(changed)["contrast"]["weights"]
    silent, *others = [name for name in weights if ".act_in." in name]
    weights[silent] = [0] * len(weights[silent])
    panel = open_page(f"{CIRCUIT}&end=embedding", written(changed, "silent")).locator("#panel")
    assert panel.locator("table.ends tbody th").all_text_contents() == others
    assert f"No entry for these tokens: {silent}" in panel.inner_text()


def test_evidence_of_an_older_version_still_shows_the_largest_entries(open_page, data, written):
    older = copy.deepcopy(data)
    shown_circuit(older)["contrast"] = None
    file = written(older, "older")
    name = next(n["name"] for n in shown_circuit(data)["nodes"] if ".act_in." in n["name"])
    panel = open_page(f"{CIRCUIT}&node={name}", file).locator("#panel")
    largest = data["texts"][0]["nodes"][name]["tokens"]
    assert panel.locator(".chips .chip").count() == len(largest) and panel.locator(".contrast").count() == 0
    assert (
        "--evidence measures it" in open_page(f"{CIRCUIT}&end=embedding", file).locator("#panel").inner_text()
    )


# ---- Constants ----


def without_edges(data: dict) -> set[str]:
    shown = shown_circuit(data)
    ends = {end for edge in shown["edges"] for end in edge[:2]}
    return {node["name"] for i, node in enumerate(shown["nodes"]) if i not in ends}


def test_constants_are_hollow_and_what_varies_is_filled(open_page, data):
    page = open_page()
    constant = {node["name"] for node in shown_circuit(data)["nodes"] if node["constant"]}
    varying = {node["name"] for node in shown_circuit(data)["nodes"]} - constant - without_edges(data)
    assert constant and varying
    hollow = page.locator(".node.constant").evaluate_all("nodes => nodes.map((n) => n.dataset.name)")
    assert set(hollow) == constant | without_edges(data)
    fill = 'name => getComputedStyle(document.querySelector(`[data-name="${name}"] rect`)).fill'
    card = page.evaluate("getComputedStyle(document.querySelector('.graph')).backgroundColor")
    assert {page.evaluate(fill, name) for name in hollow} == {card}
    assert card not in {page.evaluate(fill, name) for name in varying}
    page.locator(f'.node[data-name="{min(constant)}"]').hover()
    assert "constant: the same at every token" in page.locator("#tip").inner_text()


def test_nodes_without_lines_are_in_a_tray_below_and_keys_reach_them(open_page, data):
    page = open_page()
    lined = page.evaluate("[...document.querySelectorAll('.node')].map((n) => n.dataset.name)")
    in_tray = {n for n in without_edges(data) if n.split(".")[2] not in ("act_in", "resid_delta")}
    assert in_tray
    top = page.locator("rect.tray").bounding_box()["y"]
    height = {name: page.locator(f'.node[data-name="{name}"]').bounding_box()["y"] for name in lined}
    assert {name for name in lined if height[name] > top} == in_tray
    last = max(in_tray, key=lambda name: height[name])
    column = [name for name in lined if name.split(".")[0] == last.split(".")[0] and name in height]
    above = [n for n in column if n.split(".")[2] in "qkv" and n not in in_tray]
    assert above, "the column has nodes with edges too"
    page.locator(f'.node[data-name="{above[0]}"]').focus()
    for _ in range(len(column)):
        page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.name") in in_tray


# ---- Dense blocks ----


def test_a_dense_block_is_a_band_until_it_is_opened(open_page, data, written):
    grown = case.dense(data)
    many, few = edges_into(grown, 0), edges_into(grown, 1)
    assert many > 60 >= few > 20
    page = open_page(file=written(grown, "dense"))
    seen = page.locator("path.edge:visible")
    assert page.locator(".band:visible").count() == 1 and seen.count() == few
    handle = page.locator(".handle")
    assert handle.get_attribute("aria-label") == f"{many} edges, layer 0, read by attention → layer 0, head 0"
    handle.click()
    assert page.locator(".band:visible").count() == 0 and seen.count() == many + few
    linked = open_page(address(page), written(grown, "dense"))
    assert linked.locator("path.edge:visible").count() == many + few
    handle.focus()
    page.keyboard.press("Enter")
    assert seen.count() == few and handle.get_attribute("aria-expanded") == "false"
    page.go_back()
    assert seen.count() == many + few


def test_the_edges_of_what_is_selected_are_seen_in_a_closed_block(open_page, data, written):
    grown = case.dense(data)
    page = open_page(f"{CIRCUIT}&node=0.attn.q.1", written(grown, "dense"))
    names = [node["name"] for node in shown_circuit(grown)["nodes"]]
    own = sum(names[target] == "0.attn.q.1" for _, target, _ in shown_circuit(grown)["edges"])
    assert page.locator("path.edge.lit:visible").count() == own > 5
    assert page.locator("path.edge.bundled:visible").count() == own
    # With fewer nodes the block is no longer dense, and each edge is drawn.
    page.locator("#keep").fill("18")
    assert page.locator(".band:visible, .handle:visible, path.edge.bundled").count() == 0


# ---- Values ----

POINT = """(all) => all.map((each) => {
  each.dispatchEvent(new PointerEvent('pointermove'));
  return document.getElementById('tip').lastChild.textContent;
})"""


def shown_as(text: str, value: float, largest: float) -> int:
    """Asserts that a value is shown to within one of the last digit; returns how many digits."""
    number = decimal.Decimal(text.replace(MINUS, "-"))
    # A 0 is what is too small to be told from it.
    last = decimal.Decimal(10) ** number.as_tuple().exponent if number else largest / 3000
    assert abs(float(number) - value) <= 1.001 * float(last)
    return len(number.as_tuple().digits)


def test_values_are_shown_with_the_digits_that_the_page_knows(open_page, data, folder):
    where = folder / "circuits" / case.TASK
    found = Evidence.load(where, Circuit.load(where))
    ends = np.cumsum(found.excerpts_E6[:, 4] - found.excerpts_E6[:, 3])
    length = found.prompts[0].length
    digits = set()
    for name in (shown_circuit(data)["nodes"][0]["name"], head_node(data, "q")):
        panel = open_page(f"{CIRCUIT}&node={name}").locator("#panel")
        at = [node.name for node in found.nodes].index(name)
        own = np.flatnonzero(found.excerpts_E6[:, 0] == at)
        values = [
            found.excerpt_values_Z[ends[e] - (row[4] - row[3]) : ends[e]]
            for e in own
            for row in [found.excerpts_E6[e]]
        ]
        largest = np.abs(np.concatenate(values)).max()
        for e, texts, each in zip(own, panel.locator(".excerpt").all(), values, strict=True):
            token = found.excerpts_E6[e, 5] - found.excerpts_E6[e, 3]
            shown_as(texts.locator(".number").inner_text(), each[token], largest)
            for text, value in zip(texts.locator(".tokens span").evaluate_all(POINT), each, strict=True):
                digits.add(shown_as(text, value, largest))
        on_task = found.model_values_PX[list(found.places).index(name)]
        for text, value in zip(
            panel.locator(".prompt .tokens").first.locator("span").evaluate_all(POINT),
            on_task[:length],
            strict=True,
        ):
            digits.add(shown_as(text, value, np.abs(on_task).max()))
    assert max(digits) == 4 and min(digits) < 4


def head_node(data: dict, kind: str) -> str:
    return next(n["name"] for n in shown_circuit(data)["nodes"] if f".attn.{kind}." in n["name"])


def test_attention_is_shown_with_two_digits_and_not_below_the_steps_in_which_it_is_stored(
    open_page, data, folder
):
    where = folder / "circuits" / case.TASK
    found = Evidence.load(where, Circuit.load(where))
    name = head_node(data, "q")
    layer, channel = int(name[0]), int(name.rsplit(".", 1)[1])
    at = [(head.layer, head.head) for head in found.heads].index((layer, channel // case.CONFIG.d_head))
    pattern = found.model_patterns_HY[at]
    page = open_page(f"{CIRCUIT}&node={name}")
    square = page.locator("#panel canvas").first
    size = found.prompts[0].length
    for t in range(size):
        for s in range(t + 1):
            square.hover(position={"x": 74 + 18 * s + 9, "y": 74 + 18 * t + 9})
            text = page.locator("#tip").inner_text().splitlines()[-1]
            shown = decimal.Decimal(text)
            assert shown.as_tuple().exponent >= -2 and len(shown.as_tuple().digits) <= 2
            assert abs(float(shown) - pattern[t * (t + 1) // 2 + s]) <= 0.01


# ---- Edges ----


def place_on(page, edge: str, share: float) -> dict[str, float]:
    """Where a share of an edge's way is on the screen."""
    return page.evaluate(
        """([edge, share]) => {
          const line = document.querySelector(`path[data-edge="${edge}"]`);
          const at = line.getPointAtLength(share * line.getTotalLength());
          const { x, y } = at.matrixTransform(line.getScreenCTM());
          return { x, y };
        }""",
        [edge, share],
    )


def flattest(page) -> str:
    """The edge whose middle is furthest from all other lines."""
    return page.evaluate(
        """() => {
          const edges = [...document.querySelectorAll('path.edge')];
          const middle = (line) => {
            const at = line.getPointAtLength(line.getTotalLength() / 2).matrixTransform(line.getScreenCTM());
            return [at.x, at.y];
          };
          const room = (line) => Math.min(...edges.filter((each) => each !== line).map((each) => (
            Math.hypot(...middle(line).map((x, i) => x - middle(each)[i])))));
          return edges.sort((a, b) => room(b) - room(a))[0].dataset.edge;
        }"""
    )


@pytest.mark.parametrize(("beside", "selected"), [(0, True), (6, True), (25, False)])
def test_a_click_close_to_an_edge_selects_it_and_one_further_away_does_not(open_page, beside, selected):
    page = open_page()
    edge = flattest(page)
    at = place_on(page, edge, 0.5)
    page.mouse.move(at["x"], at["y"] + beside)
    assert page.locator("path.edge.near").count() == selected
    page.mouse.click(at["x"], at["y"] + beside)
    assert state(page).get("edge") == (edge if selected else None)


def test_a_finger_reaches_further_than_a_mouse(open_page):
    page = open_page(has_touch=True)
    edge = flattest(page)
    at = place_on(page, edge, 0.5)
    page.touchscreen.tap(at["x"], at["y"] - 13)
    assert state(page).get("edge") == edge
    page.keyboard.press("Escape")
    page.mouse.click(at["x"], at["y"] - 13)
    assert "edge" not in state(page)


def test_keys_go_through_the_edges_of_a_node_and_along_them(open_page, data):
    shown = shown_circuit(data)
    names = [node["name"] for node in shown["nodes"]]
    ends = [(names[s], names[t], abs(w)) for s, t, w in shown["edges"]]
    name = max(names, key=lambda n: sum(n in edge[:2] for edge in ends))
    own = sorted((edge for edge in ends if name in edge[:2]), key=lambda edge: -edge[2])
    assert len(own) > 1
    page = open_page()
    page.locator(f'.node[data-name="{name}"]').focus()
    found = []
    for _ in range(len(own) + 1):
        page.keyboard.press("e")
        found.append(state(page)["edge"])
    expected = [f"{source}>{target}" for source, target, _ in own]
    assert found == [*expected, expected[0]]
    page.keyboard.press("E")
    assert state(page)["edge"] == expected[-1]
    assert re.search(r"to .*, weight", page.locator("#said").inner_text())
    page.keyboard.press("f")
    other = next(end for end in own[-1][:2] if end != name)
    assert page.evaluate("document.activeElement.dataset.name") == other
    page.keyboard.press("Escape")
    assert "edge" not in state(page)


def test_an_edge_can_be_selected_in_the_lists_of_a_node(open_page, data):
    shown = shown_circuit(data)
    source, target, weight = shown["edges"][0]
    names = [shown["nodes"][i]["name"] for i in (source, target)]
    page = open_page(f"{CIRCUIT}&node={names[0]}")
    page.locator("table.edges").get_by_role("button", name=str(weight).replace("-", MINUS)).press("Enter")
    assert state(page)["edge"] == ">".join(names)


# ---- Files ----


def saved(page, click) -> tuple[str, bytes]:
    with page.expect_download() as download:
        click()
    return download.value.suggested_filename, pathlib.Path(download.value.path()).read_bytes()


def rendered(browser, svg: pathlib.Path, size: tuple[int, int], tmp_path) -> np.ndarray:
    """An SVG file as a browser shows it by itself."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, device_scale_factor=1)
    page = context.new_page()
    page.goto(svg.as_uri())
    page.screenshot(path=tmp_path / "svg.png")
    context.close()
    return pixels(tmp_path / "svg.png", size)


def pixels(file, size: tuple[int, int]) -> np.ndarray:
    # Half as large, so that edges of shapes that are smoothed otherwise count little.
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((size[0] // 2, size[1] // 2)), np.float64)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_graph_is_saved_as_an_svg_that_needs_nothing_else_and_as_the_same_png(
    open_page, browser, data, written, tmp_path, scheme
):
    grown = case.dense(data)
    page = open_page(file=written(grown, "dense"), color_scheme=scheme)
    name, text = saved(page, page.locator("#save-svg").click)
    assert name.endswith(f"-{case.TASK}.svg")
    root = ElementTree.fromstring(text)
    used = {key for element in root.iter() for key in element.attrib}
    assert not used & {"class", "style", "href", "id"} and not re.search(
        rb"var\(|color-mix|url\(|@import", text
    )
    words = [each.text for each in root.iter(f"{SVG}text")]
    for node in shown_circuit(grown)["nodes"]:
        kind, channel = node["name"].split(".")[2:]
        assert (kind if len(kind) == 1 else "") + channel in words
    assert {case.TASK, "embedding", "read", "head 1"} <= set(words)
    # Every edge that is not in a closed block, and two lines of the legend.
    curves = [p for p in root.iter(f"{SVG}path") if p.get("fill") == "none" and not p.get("stroke-dasharray")]
    assert len(curves) == edges_into(grown, 1) + 2
    size = int(root.attrib["width"]), int(root.attrib["height"])
    (tmp_path / "graph.svg").write_bytes(text)
    name, image = saved(page, page.locator("#save-png").click)
    assert name.endswith(f"-{case.TASK}.png")
    (tmp_path / "graph.png").write_bytes(image)
    with Image.open(tmp_path / "graph.png") as painted:
        assert painted.size == (2 * size[0], 2 * size[1])
    painted = pixels(tmp_path / "graph.png", size)
    difference = np.abs(rendered(browser, tmp_path / "graph.svg", size, tmp_path) - painted).mean()
    # What a selection changes is far more.
    page.locator(".node").first.click()
    (tmp_path / "other.png").write_bytes(saved(page, page.locator("#save-png").click)[1])
    changed = np.abs(pixels(tmp_path / "other.png", size) - painted).mean()
    assert difference < 1.5 and changed > 4 * difference
    assert (painted.mean() > 128) == (scheme == "light")


def table(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode())))


def test_every_table_has_a_button_that_saves_it(open_page, data):
    node = shown_circuit(data)["nodes"][0]["name"]
    read = next(n["name"] for n in shown_circuit(data)["nodes"] if ".act_in." in n["name"])
    for fragment in (
        "#",
        CIRCUIT,
        f"{CIRCUIT}&node={node}",
        f"{CIRCUIT}&node={read}",
        f"{CIRCUIT}&end=embedding",
    ):
        page = open_page(fragment)
        tables = page.locator("main table:visible")
        assert tables.count() == tables.locator("caption button.csv").count()
        for button in tables.locator("caption button.csv").all():
            name, content = saved(page, button.click)
            assert name.endswith(".csv") and len({len(row) for row in table(content)}) == 1


def test_saved_tables_hold_every_digit(open_page, data):
    shown = shown_circuit(data)
    page = open_page("#")
    _, content = saved(page, page.locator("#tasks caption button").click)
    header, *rows = table(content)
    row = next(row for row in rows if row[0] == case.TASK)
    given = next(row for row in data["tasks"] if row["task"] == case.TASK)
    assert float(row[header.index("loss")]) == given["sufficiency"]
    assert [row[0] for row in rows] == [case.TASK, "hard"]
    page = open_page()
    _, content = saved(page, page.get_by_text("nodes as CSV").click)
    header, *rows = table(content)
    column = header.index("loss without it in the circuit")
    assert [(row[0], float(row[column])) for row in rows] == [
        (n["name"], n["importance"]) for n in shown["nodes"]
    ]
    _, content = saved(page, page.get_by_text("edges as CSV").click)
    names = [node["name"] for node in shown["nodes"]]
    assert [(s, t, float(w)) for s, t, w in table(content)[1:]] == [
        (names[s], names[t], w) for s, t, w in shown["edges"]
    ]
    target = names[shown["edges"][0][1]]
    page = open_page(f"{CIRCUIT}&node={target}")
    _, content = saved(page, page.locator("table.edges caption button").first.click)
    own = [(names[s], names[t], w) for s, t, w in shown["edges"] if names[t] == target]
    assert [(s, t, float(w)) for s, t, w in table(content)[1:]] == own
    _, content = saved(page, page.get_by_text("values as CSV").click)
    tokens = [token for row in shown["rows"] for token in row["tokens"]]
    assert [json.loads(row[3]) for row in table(content)[1:]] == [data["tokens"][str(t)] for t in tokens]


# ---- A phone ----

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


def test_on_a_phone_the_page_is_scrolled_to_the_beginning_of_what_was_chosen(open_page, data):
    page = open_page(**PHONE)
    title = page.locator("#panel h2")
    source = shown_circuit(data)["nodes"][shown_circuit(data)["edges"][0][0]]["name"]
    node = page.locator(f'.node[data-name="{source}"]')
    node.evaluate("e => e.dispatchEvent(new MouseEvent('click', { bubbles: true }))")
    box = title.bounding_box()
    assert 0 <= box["y"] < 0.65 * 844
    page.evaluate("window.scrollBy(0, 900)")
    assert title.bounding_box()["y"] < 0
    page.locator("#panel table.edges button").last.evaluate("e => e.click()")
    assert 0 <= title.bounding_box()["y"] < 0.65 * 844


def test_a_phone_opens_at_the_selected_nodes_neighbors_with_labels_that_can_be_read(open_page, data):
    shown = shown_circuit(data)
    names = [node["name"] for node in shown["nodes"]]
    ends = [(names[s], names[t]) for s, t, _ in shown["edges"]]
    inside = """(names) => names.every((name) => {
      const box = document.querySelector(`.node[data-name="${name}"]`).getBoundingClientRect();
      const { left, right, top, bottom } = document.getElementById('graph').getBoundingClientRect();
      return box.left >= left && box.right <= right && box.top >= top && box.bottom <= bottom;
    })"""
    for name in {ends[0][0], ends[-1][1], names[0]}:
        page = open_page(f"{CIRCUIT}&node={name}", **PHONE)
        assert (
            page.locator(f'.node[data-name="{name}"] text').evaluate("t => t.getBoundingClientRect().height")
            >= 11
        )
        assert page.evaluate(inside, [name])
    source, target = ends[0]
    page = open_page(f"{CIRCUIT}&edge={source}>{target}", **PHONE)
    assert page.evaluate(inside, [source, target])
    # On a wide screen everything is in sight.
    assert open_page(f"{CIRCUIT}&node={names[0]}").evaluate(inside, names)


@pytest.mark.parametrize("width", [390, 1024])
def test_nothing_is_wider_than_a_narrow_screen(open_page, data, written, width):
    read = next(n["name"] for n in shown_circuit(data)["nodes"] if ".act_in." in n["name"])
    narrow = {"viewport": {"width": width, "height": 800}}
    for fragment in (
        "#",
        CIRCUIT,
        f"{CIRCUIT}&node={read}",
        f"{CIRCUIT}&end=unembedding",
        f"{CIRCUIT}&edge=a",
    ):
        page = open_page(fragment, **narrow)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        panel = page.locator("#panel")
        assert not state(page).get("task") or panel.evaluate("p => p.scrollWidth - p.clientWidth") <= 0
