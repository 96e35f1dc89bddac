"""The page in a real headless Chromium: it draws, answers, and runs and fetches nothing of its data."""

import base64
import copy
import json
import pathlib

import browser_case
from browser_case import address, state
import jax
import numpy as np
import pytest
import viewer_case as case

from wsparse.circuits.circuit import FOUND, NOT_CONFIRMED
from wsparse.viewer import page as page_lib

browser = pytest.fixture(scope="module")(browser_case.chromium)
# What the page writes for a hyphen.
MINUS = "\N{MINUS SIGN}"
HOSTILE = [
    "</script><script>window.ran = 1</script>",
    "<img src=http://127.0.0.1:9/x onerror='window.ran = 2'>",
    "<!--<script>",
    '"><b onmouseover=window.ran=3>',
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """The small run's data, with tokens and names that would do harm as HTML, and a second task."""
    jax.config.update("jax_disable_most_optimizations", True)
    found = json.loads(case.data_text(tmp_path_factory.mktemp("viewer")))
    jax.config.update("jax_disable_most_optimizations", False)
    shown = found["circuits"][case.TASK]
    for token, text in zip(dict.fromkeys(shown["rows"][0]["tokens"]), HOSTILE, strict=False):
        found["tokens"][str(token)] = text
    found["run"]["name"] = HOSTILE[0]
    for row in found["tasks"]:
        row["summary"] = HOSTILE[1]
    other = dict(found["tasks"][0], task="<b>other</b>", edges=1, sufficiency=0.9)
    found["tasks"].append(other)
    found["circuits"]["<b>other</b>"] = copy.deepcopy(shown)
    return found


@pytest.fixture(scope="module")
def path(data, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_lib.render(data, title=HOSTILE[0]), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser, path):
    with browser_case.opening(browser, path) as opened:
        yield opened


def names(page) -> list[str]:
    return page.locator("#tasks tbody th a").all_text_contents()


def node_of(data: dict, kind: str) -> str:
    nodes = data["circuits"][case.TASK]["nodes"]
    return next(node["name"] for node in nodes if f".{kind}." in node["name"])


def test_the_table_sorts_both_ways_and_keeps_what_has_no_circuit_last(open_page):
    page = open_page()
    assert names(page) == ["<b>other</b>", case.TASK]
    header = page.get_by_role("columnheader", name="edges", exact=True)
    assert header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert header.get_by_role("button").evaluate("e => e === document.activeElement")
    assert names(page) == [case.TASK, "<b>other</b>"]
    page.get_by_role("columnheader", name="loss", exact=True).get_by_role("button").click()
    rows = page.locator("#tasks tbody tr")
    assert state(page)["sort"] == "loss" and "hard" in rows.last.inner_text()
    assert "not found" in rows.last.inner_text()


def test_all_columns_of_the_table_are_in_sight_on_a_laptop(open_page):
    page = open_page()
    page.set_viewport_size({"width": 1280, "height": 800})
    hidden = "e => e.scrollWidth - e.clientWidth"
    assert page.locator("#overview .scroll").first.evaluate(hidden) <= 0


def test_a_row_opens_its_circuit_and_back_returns(open_page, data):
    page = open_page()
    page.get_by_role("link", name=case.TASK, exact=True).click()
    assert page.locator("#circuit-title").inner_text() == case.TASK
    assert page.locator(".node").count() == len(data["circuits"][case.TASK]["nodes"])
    assert page.locator("path.edge").count() == len(data["circuits"][case.TASK]["edges"])
    page.locator("#task").select_option("<b>other</b>")
    assert page.locator("#circuit-title").inner_text() == "<b>other</b>"
    page.go_back()
    assert page.locator("#circuit-title").inner_text() == case.TASK
    page.go_back()
    assert page.locator("#overview").is_visible() and page.locator("#circuit").is_hidden()


def test_an_audit_is_shown_by_its_verdicts_and_only_where_there_is_one(open_page, data, tmp_path):
    page = open_page(f"#task={case.TASK}")
    assert page.locator("#panel .audit").count() == 0
    audited = copy.deepcopy(data)
    test = {"title": HOSTILE[1], "verdict": "not run", "mark": "○", "meaning": HOSTILE[3]}
    failed = test | {"title": "Attention", "verdict": "failed", "mark": "✗"}
    audited["circuits"][case.TASK]["audit"] = {"file": "audit.html", "tests": [test, failed]}
    file = tmp_path / "audited.html"
    file.write_text(page_lib.render(audited, title="audited"), encoding="utf-8")
    panel = open_page(f"#task={case.TASK}", file).locator("#panel")
    rows = panel.locator(".audit tr")
    assert rows.locator("th").all_text_contents() == [HOSTILE[1], "Attention"]
    assert rows.locator("td").all_text_contents() == ["○ not run", "✗ failed"]
    assert rows.first.get_attribute("title") == HOSTILE[3]
    # Told apart by color as well, which the policy lets the page's own style give.
    colors = rows.locator("td").evaluate_all("cells => cells.map((c) => getComputedStyle(c).color)")
    assert len(set(colors)) == 2
    assert panel.locator("a").count() == 0 and "audit.html" in panel.inner_text()


def test_a_clicked_node_shows_its_numbers(open_page, data):
    page = open_page(f"#task={case.TASK}")
    shown = data["circuits"][case.TASK]
    index, node = next(
        (i, n) for i, n in enumerate(shown["nodes"]) if any(i in edge[:2] for edge in shown["edges"])
    )
    page.locator(f'.node[data-name="{node["name"]}"]').click()
    panel = page.locator("#panel")
    assert panel.locator("h2").inner_text() == node["name"]
    weights = [edge[2] for edge in shown["edges"] if index in edge[:2]]
    text = panel.locator("table.edges").all_inner_texts()
    for weight in weights:
        assert str(weight).replace("-", MINUS) in "\n".join(text)
    assert page.locator("path.edge.lit").count() == len(weights)
    assert panel.locator(".excerpt").count() == sum(
        len(data["texts"][0]["nodes"][node["name"]][k]) for k in ("highest", "lowest", "sampled")
    )
    assert state(page)["node"] == node["name"]


def test_token_colors_and_values_are_those_of_the_data(open_page, data):
    name = node_of(data, "v")
    page = open_page(f"#task={case.TASK}&node={name}&pair=1")
    shown = data["circuits"][case.TASK]
    packed = shown["values"][name]["model"]
    values = np.frombuffer(base64.b64decode(packed["data"]), "<i2") * packed["scale"]
    starts = np.cumsum([0, *(len(row["tokens"]) for row in shown["rows"])])
    row = values[starts[2] : starts[3]]
    spans = page.locator("#panel .prompt").first.get_by_role("group").locator("span")
    assert spans.count() == len(row)
    strongest = int(np.abs(row).argmax())
    color = spans.nth(strongest).evaluate("e => e.style.background")
    # Colors are relative to the largest value of both prompts.
    share = abs(row[strongest]) / np.abs(values[starts[2] : starts[4]]).max()
    assert ("--negative" in color) == (row[strongest] < 0)
    assert f"calc({0.1 + 0.9 * share:.2f} * var(--deepest))" in color
    spans.nth(strongest).hover()
    shown_value = page.locator("#tip").inner_text().splitlines()[-1].replace(MINUS, "-")
    assert float(shown_value) == pytest.approx(row[strongest], rel=1e-3)


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_queries_keys_and_values_show_attention(open_page, data, kind):
    page = open_page(f"#task={case.TASK}&node={node_of(data, kind)}")
    squares = page.locator("#panel canvas")
    assert squares.count() == 2
    drawn = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    assert all(squares.nth(i).evaluate(drawn) > 8 for i in range(2))
    squares.first.hover(position={"x": 76, "y": 76})
    assert page.locator("#tip").inner_text().startswith("from ")
    assert open_page(f"#task={case.TASK}&node={node_of(data, 'act_in')}").locator("canvas").count() == 0


def test_a_link_shows_the_same_thing(open_page, data):
    page = open_page(f"#task={case.TASK}")
    page.locator("#zoom-in").click()
    page.locator(".node").nth(3).click()
    page.get_by_role("button", name="circuit alone").click()
    page.get_by_role("button", name="Next pair").click()
    page.locator("#keep").fill("20")
    page.locator("#residual").uncheck()
    page.locator("#theme").click()
    copy_of = open_page(address(page))
    for what in ("#panel", "#kept", "#prefix"):
        assert copy_of.locator(what).inner_text() == page.locator(what).inner_text()
    place = "document.querySelector('#graph > g').transform.baseVal.consolidate().matrix"
    numbers = [p.evaluate(f"(({{a, e, f}}) => [a, e, f])({place})") for p in (page, copy_of)]
    assert numbers[1] == pytest.approx(numbers[0], rel=2e-2, abs=2)
    assert copy_of.locator("html").get_attribute("data-theme") == "light"
    assert page.locator(".node.gone").count() == len(data["circuits"][case.TASK]["nodes"]) - 20
    assert copy_of.locator("path.stream:not(.gone)").count() == 0
    assert open_page(f"#task={case.TASK}").locator("path.stream:not(.gone)").count() > 0
    assert state(copy_of) == state(page)


@pytest.mark.parametrize(
    "fragment", ["#task=nothing", "#task=__proto__", f"#task={case.TASK}&node=9.x.y.z&keep=-1&pair=99&view=a"]
)
def test_a_link_to_what_is_not_there_opens_what_is(open_page, fragment):
    page = open_page(fragment)
    assert page.locator("#overview" if "closing" not in fragment else "#circuit").is_visible()
    assert page.locator(".node.selected").count() == 0


def test_keys_reach_select_and_leave_nodes(open_page):
    page = open_page(f"#task={case.TASK}")
    page.locator('.node[tabindex="0"]').focus()
    focused = "document.activeElement.dataset?.name"
    page.keyboard.press("Home")
    first = page.evaluate(focused)
    page.keyboard.press("ArrowRight")
    second = page.evaluate(focused)
    assert second and second != first
    assert page.locator("#tip").inner_text().startswith(second)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    chosen = state(page)["node"]
    assert page.locator("#panel h2").inner_text() == chosen
    assert page.evaluate("document.activeElement.id") == "panel"
    assert page.locator(f'.node[data-name="{chosen}"]').get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert "node" not in state(page) and page.evaluate(focused) == chosen
    assert page.locator('.node[tabindex="0"]').count() == 1
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()


def test_a_control_that_a_key_has_used_keeps_the_focus_and_where_it_is_gone_the_panel_has_it(open_page, data):
    page = open_page(f"#task={case.TASK}&node={node_of(data, 'q')}")
    focused = "[document.activeElement.id, document.activeElement.textContent]"
    page.get_by_role("button", name="circuit alone").press("Enter")
    assert state(page)["side"] == "circuit" and page.evaluate(focused) == ["", "circuit alone"]
    page.get_by_role("button", name="second prompt").press("Enter")
    assert page.evaluate(focused) == ["", "second prompt"]
    # There are two pairs: the button of the next one can do nothing after this.
    page.get_by_role("button", name="Next pair").press("Enter")
    assert state(page)["pair"] == "1" and page.evaluate(focused)[0] == "panel"
    page.get_by_role("button", name="Close").press("Enter")
    assert "node" not in state(page) and page.evaluate(focused)[0] == "panel"


def test_a_node_that_can_be_seen_is_reached_after_the_slider_has_hidden_the_one_before(open_page, data):
    page = open_page(f"#task={case.TASK}")
    names = [node["name"] for node in data["circuits"][case.TASK]["nodes"]]
    page.locator(f'.node[data-name="{names[-1]}"]').focus()
    reached = page.locator('.node[tabindex="0"]')
    assert reached.get_attribute("data-name") == names[-1]
    page.locator("#keep").fill("3")
    assert reached.get_attribute("data-name") == names[0]


def test_the_address_is_written_when_changes_pause_and_before_a_step(open_page):
    page = open_page(f"#task={case.TASK}")
    page.evaluate("""() => {
      window.written = 0;
      const replace = history.replaceState.bind(history);
      history.replaceState = (...given) => { window.written += 1; replace(...given); };
      window.slide = (keep) => {
        document.getElementById('keep').value = keep;
        document.getElementById('keep').dispatchEvent(new Event('input'));
      };
    }""")
    slide = "() => { for (let keep = 20; keep >= 5; keep -= 1) window.slide(keep); return window.written; }"
    assert page.evaluate(slide) == 0
    page.wait_for_function("() => location.hash.includes('keep=5')")
    assert page.evaluate("window.written") == 1
    page.evaluate("""() => {
      window.slide(7);
      document.querySelector('.node:not(.gone)').dispatchEvent(new MouseEvent('click', { bubbles: true }));
    }""")
    assert "node" in state(page)
    page.go_back()
    assert state(page)["keep"] == "7" and "node" not in state(page)


def test_a_click_beside_everything_is_a_step_only_where_something_was_selected(open_page):
    page = open_page(f"#task={case.TASK}")
    length = page.evaluate("history.length")
    beside = {"position": {"x": 3, "y": 3}}
    page.locator("#graph").click(**beside)
    assert page.evaluate("history.length") == length
    page.locator(".node").first.click()
    page.locator("#graph").click(**beside)
    assert page.evaluate("history.length") == length + 2 and "node" not in state(page)


def test_what_is_painted_follows_the_colors_of_the_system(open_page, data):
    page = open_page(f"#task={case.TASK}&node={node_of(data, 'q')}", color_scheme="light")
    painted = "document.querySelector('#panel canvas').toDataURL()"
    light = page.evaluate(painted)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"light => {painted} !== light", arg=light)
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"light => {painted} === light", arg=light)


def test_colors_follow_the_system_and_the_button(open_page):
    ink = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(ink) != dark.evaluate(ink)
    button = dark.locator("#theme")
    assert button.get_attribute("aria-label") == "Colors: auto"
    dark.locator("#tasks tbody th a").first.click()
    button.click()
    assert dark.evaluate(ink) == light.evaluate(ink)
    assert button.get_attribute("aria-label") == "Colors: light"
    dark.go_back()
    assert dark.locator("#overview").is_visible() and dark.evaluate(ink) == light.evaluate(ink)
    assert state(dark)["theme"] == "light"


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page(f"#task={case.TASK}&pair=0")
    assert page.locator("#home").inner_text() == HOSTILE[0]
    page.locator(".node").first.click()
    tokens = page.locator("#panel .prompt").first.locator(".tokens").text_content()
    assert all(text in tokens for text in HOSTILE)
    assert page.locator("img, main b").count() == 0
    # Even code that did get in would not run.
    ran = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 4';"
        " document.body.append(s); return window.ran ?? null; }"
    )
    assert ran is None
    [refused] = open_page.trouble
    assert "Content Security Policy" in refused
    open_page.trouble.clear()


def large(data: dict, n_nodes: int) -> dict:
    """The same page with a circuit of many nodes, each like one of the small run's."""
    rng = np.random.default_rng(0)
    grown = copy.deepcopy(data)
    shown = grown["circuits"][case.TASK]
    kinds = [n for n in shown["nodes"] if n["name"].split(".")[2] in ("act_in", "post_act", "resid_delta")]
    nodes = []
    for i in range(n_nodes):
        like = kinds[i % len(kinds)]
        name = f"{like['name'].rsplit('.', 1)[0]}.{1000 + i}"
        nodes.append(dict(like, name=name, importance=1 / (1 + i)))
        shown["values"][name] = shown["values"][like["name"]]
        grown["texts"][0]["nodes"][name] = grown["texts"][0]["nodes"][like["name"]]
    by_kind = {}
    for i, node in enumerate(nodes):
        by_kind.setdefault(node["name"].split(".", 1)[1].rsplit(".", 1)[0], []).append(i)
    ends = ("mlp.act_in", "mlp.post_act"), ("mlp.post_act", "mlp.resid_delta")
    edges = [
        [int(rng.choice(by_kind[a])), int(rng.choice(by_kind[b])), float(rng.normal())]
        for a, b in ends
        for _ in range(4000)
    ]
    shown |= {
        "nodes": nodes,
        "edges": sorted(edges, key=lambda e: -abs(e[2])),
        "total_nodes": n_nodes,
        "prefix": [[1, 0.6], [n_nodes, 0.1]],
        "answer_weights": None,
    }
    return grown


def test_a_circuit_of_2000_nodes_stays_usable(open_page, data, tmp_path):
    """In seconds of the page's own thread, whatever else the machine does."""
    path = tmp_path / "large.html"
    path.write_text(page_lib.render(large(data, 2000), title="large"), encoding="utf-8")
    page = open_page(file=path)
    session = page.context.new_cdp_session(page)
    session.send("Performance.setTimeDomain", {"timeDomain": "threadTicks"})
    session.send("Performance.enable")

    def seconds() -> float:
        page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        metrics = session.send("Performance.getMetrics")["metrics"]
        return {each["name"]: each["value"] for each in metrics}["TaskDuration"]

    def cost(action) -> float:
        before = seconds()
        action()
        return seconds() - before

    assert cost(lambda: page.locator("#task").select_option(case.TASK)) < 2
    assert page.locator(".node").count() == 250
    assert "250 most important nodes of 2,000" in page.locator("#notes").inner_text()
    move = "k => { k.value = 2000; k.dispatchEvent(new Event('change')); }"
    assert cost(lambda: page.locator("#keep").evaluate(move)) < 6
    assert page.locator(".node").count() == 2000
    assert "5,000 largest edges of 8,000" in page.locator("#notes").inner_text()
    select = "n => n.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    assert cost(lambda: page.locator(".node").nth(5).evaluate(select)) < 2
    assert cost(lambda: page.locator("#zoom-in").click()) < 2


@pytest.mark.parametrize("width", [390, 1024])
def test_narrow_windows_do_not_scroll_sideways(open_page, data, width):
    for fragment in ("", f"#task={case.TASK}", f"#task={case.TASK}&node={node_of(data, 'v')}"):
        page = open_page(fragment)
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_edge_can_be_selected_shared_and_left(open_page, data):
    shown = data["circuits"][case.TASK]
    page = open_page(f"#task={case.TASK}")
    edge = page.locator("path.edge").last
    edge.evaluate("e => e.dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    source, target = edge.get_attribute("data-edge").split(">")
    [weight] = [
        weight
        for s, t, weight in shown["edges"]
        if (shown["nodes"][s]["name"], shown["nodes"][t]["name"]) == (source, target)
    ]
    for opened in (page, open_page(address(page))):
        assert opened.locator("#panel h2").inner_text() == f"{source} \N{RIGHTWARDS ARROW} {target}"
        assert str(weight).replace("-", MINUS) in opened.locator("#panel").inner_text()
        assert opened.locator("path.edge.lit").count() == 1
        assert opened.locator(".node:not(.dim)").count() == 2
    page.locator("#panel").get_by_role("button", name=source).click()
    assert state(page)["node"] == source and "edge" not in state(page)
    page.keyboard.press("Escape")
    assert page.locator("path.edge.dim").count() == 0


def test_a_selection_that_the_slider_hides_dims_nothing(open_page, data):
    last = data["circuits"][case.TASK]["nodes"][-1]["name"]
    page = open_page(f"#task={case.TASK}&node={last}")
    assert page.locator(".node.dim").count() > 0
    page.locator("#keep").fill("5")
    assert page.locator(".node.dim").count() == page.locator("path.dim").count() == 0
    assert page.locator("#panel h2").inner_text() == last


def test_numbers_name_their_split_and_count_the_same_nodes(open_page, data):
    page = open_page(f"#task={case.TASK}")
    pairs = data["circuits"][case.TASK]["ablation_pairs"]
    for keep in (3, 17, case.N_NODES - 1):
        page.locator("#keep").fill(str(keep))
        assert page.locator("#kept").inner_text() == f"{keep} of {case.N_NODES}"
        text = page.locator("#prefix").inner_text()
        assert f"the top {keep} alone: loss {dict(data['circuits'][case.TASK]['prefix'])[keep]:.3f}" in text
        assert f"{pairs} pairs of the report split" in text
    assert "report split" in page.locator("#panel").inner_text()
    page.locator(".node").first.click()
    assert "report split" in page.locator("#panel").inner_text()


def test_between_measured_sizes_the_loss_of_a_part_is_said_to_be_about(open_page, data, tmp_path):
    sparse = copy.deepcopy(data)
    sparse["circuits"][case.TASK]["prefix"] = [[1, 0.6], [case.N_NODES, 0.1]]
    file = tmp_path / "sparse.html"
    file.write_text(page_lib.render(sparse, title="x"), encoding="utf-8")
    page = open_page(f"#task={case.TASK}&keep={(1 + case.N_NODES) // 2}", file=file)
    assert "alone: loss about 0.3" in page.locator("#prefix").inner_text()
    page.locator("#keep").fill("1")
    assert "the top 1 alone: loss 0.600" in page.locator("#prefix").inner_text()


def test_answers_keep_their_white_space(open_page, data, tmp_path):
    spaced = copy.deepcopy(data)
    own = spaced["circuits"][case.TASK]
    first, second = own["answer_weights"]["tokens"]
    spaced["tokens"] |= {str(first): "    ", str(second): "        \n"}
    own["form"] = "'    ' or '        \\n'"
    file = tmp_path / "spaced.html"
    file.write_text(page_lib.render(spaced, title="x"), encoding="utf-8")
    page = open_page(f"#task={case.TASK}", file=file)
    chips = page.locator("#panel code.chip")
    assert chips.all_inner_texts() == ['"    "', '"        \\n"']
    assert page.locator("#panel code.form").count() == 0
    # What else the task says of its answers stays, and so do answers of each pair's own.
    own["form"] = "'    ' or '        \\n' after ':'"
    file.write_text(page_lib.render(spaced, title="x"), encoding="utf-8")
    page.reload()
    assert page.locator("#panel code.form").inner_text() == own["form"]
    own |= {"form": "each pair's own answers", "answer_weights": None}
    file.write_text(page_lib.render(spaced, title="x"), encoding="utf-8")
    page.reload()
    assert page.locator("#panel").get_by_text("each pair's own answers, such as").count() == 1
    assert chips.all_inner_texts() == ['"    "', '"        \\n"']


@pytest.mark.parametrize("misses", ["the target is 0.15", "the target under attack is 0.3"])
def test_a_circuit_that_is_not_confirmed_is_marked_in_table_and_panel(open_page, data, tmp_path, misses):
    missed = copy.deepcopy(data)
    status = NOT_CONFIRMED
    missed["circuits"][case.TASK] |= {"loss": 0.179, "target": 0.15, "status": status, "misses": misses}
    missed["circuits"]["<b>other</b>"] |= {"status": FOUND, "misses": ""}
    for row in missed["tasks"]:
        if row["task"] == case.TASK:
            row |= {"status": status, "sufficiency": 0.179, "target": 0.15}
        elif "edges" in row:
            row |= {"status": FOUND, "sufficiency": 0.1, "target": 0.15}
    file = tmp_path / "missed.html"
    file.write_text(page_lib.render(missed, title="x"), encoding="utf-8")
    page = open_page(file=file)
    marked = page.locator("#tasks tbody tr").filter(has_text=status)
    assert marked.count() == 1 and case.TASK in marked.inner_text()
    for scheme in ("light", "dark"):
        page = open_page(f"#task={case.TASK}", file=file, color_scheme=scheme)
        mark = page.locator("#panel .wrong")
        assert mark.inner_text() == f"Status: {status}; {misses}."
        colors = mark.evaluate(
            "e => [getComputedStyle(e).color, getComputedStyle(e.closest('#panel')).backgroundColor]"
        )
        assert browser_case.contrast(*(page.evaluate(browser_case.LUMINANCE, each) for each in colors)) > 4.5
    assert open_page("#task=<b>other</b>", file=file).locator("#panel .wrong").count() == 0


def test_the_page_works_in_the_srcdoc_of_a_frame(open_page, browser, path, tmp_path):
    """Where links to fragments would lead to the page around it, and the address cannot be written."""
    with browser_case.framing(browser, path, tmp_path, width=1200) as frame:
        frame.locator("#tasks tbody th a").get_by_text(case.TASK).click()
        frame.locator(".node").first.click()
        assert frame.locator("#panel .prompt").count() == 3
        frame.locator("#keep").fill("9")
        assert frame.locator(".node:not(.gone)").count() == 9
        frame.locator("#home").click()
        assert frame.locator("#overview").is_visible()


def test_labels_can_be_read_on_a_phone(open_page, data):
    page = open_page(f"#task={case.TASK}")
    tall = "e => e.getBoundingClientRect().height"
    page.set_viewport_size({"width": 390, "height": 800})
    page.reload()
    page.wait_for_selector(".node")
    first = data["circuits"][case.TASK]["nodes"][0]["name"]
    label = page.locator(f'.node[data-name="{first}"] text')
    assert label.evaluate(tall) >= 9
    box, graph = label.bounding_box(), page.locator("#graph").bounding_box()
    assert graph["x"] <= box["x"] <= graph["x"] + graph["width"]
    page.locator("#zoom-fit").click()
    assert label.evaluate(tall) < 9


def test_a_page_that_opens_with_a_circuit_shows_it_and_leads_to_the_table(open_page, data, tmp_path):
    file = tmp_path / "one.html"
    file.write_text(page_lib.render(data | {"opens": case.TASK}, title="x"), encoding="utf-8")
    page = open_page(file=file)
    assert page.locator("#circuit-title").inner_text() == case.TASK
    page.locator("#home").click()
    assert page.locator("#overview").is_visible()
