"""Try it, in Chromium: a prompt of one's own, edits of nodes and edges, and what they change."""

import dataclasses
import json
import pathlib
import re
import shutil

import browser_case
from browser_case import address, state
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import viewer_case as case

from wsparse import model, taps
from wsparse.circuits.evidence_file import Evidence
from wsparse.viewer import contents
from wsparse.viewer import page as page_lib

browser = pytest.fixture(scope="module")(browser_case.chromium)
folder = pytest.fixture(scope="module")(case.live_folder)
circuit = pytest.fixture(scope="module")(case.live_circuit)
TRY = f"#task={case.TASK}&try=true"
MINUS = "\N{MINUS SIGN}"
PROMPT = "f('abc"
# Those of the task, in the order in which the page has them.
ANSWERS = "'\""


@pytest.fixture(scope="module")
def data(folder) -> dict:
    return json.loads(page_lib.embedded(contents.read_run(folder, contents.Options())))


@pytest.fixture(scope="module")
def path(data, folder) -> pathlib.Path:
    path = folder / "report.html"
    path.write_text(page_lib.render(data, title="a run"), encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser, path):
    with browser_case.opening(browser, path, TRY) as opened:
        yield opened


def settled(page) -> None:
    """Waits until what is shown is of the prompt and the edits that the page has."""
    page.wait_for_timeout(50)
    page.wait_for_selector(".losses:not(.waiting)")


def shares(page) -> list[str]:
    """The answers' shares: the first in the model and in the circuit, then the second."""
    return page.locator(".bars").first.locator("td .number").all_inner_texts()


def losses(page) -> list[str]:
    return page.locator(".losses td.number").all_inner_texts()


def in_jax(circuit, text: str, held: dict[str, float] | None = None):
    """The whole model's logits and activations, with nodes held at values."""
    tokens = np.array([case.run().tokenizer.encode(text)], np.int32)
    gates = {name: jnp.ones(mean.shape) for name, mean in circuit.means.items() if name != "attn.y"}
    constants = {name: jnp.zeros(gate.shape) for name, gate in gates.items()}
    for name, value in (held or {}).items():
        layer, location, channel = name.split(".", 1)[0], *name.split(".", 1)[1].rsplit(".", 1)
        gates[location] = gates[location].at[int(layer), int(channel)].set(0)
        constants[location] = constants[location].at[int(layer), int(channel)].set(value)
    return model.forward(case.run().params, tokens, case.CONFIG, tap=taps.NodeAblation(gates, constants))


def share_in_jax(logits_BTV, text: str) -> str:
    answer, other = (case.run().tokenizer.token_id(each) for each in text)
    share = float(jax.nn.sigmoid(logits_BTV[0, -1, answer] - logits_BTV[0, -1, other]))
    digits = 2 if share > 0.9995 else 1 if share > 0.995 or share < 0.0995 else 0
    return f"{round(100 * share, digits):g}%"


def effective(circuit, kind: str = "mlp.resid_delta") -> str:
    """A node of the last layer's end, which nothing after it can hide."""
    return next(node.name for node in circuit.nodes if node.name.startswith(f"1.{kind}"))


def test_the_losses_over_the_pairs_are_those_of_the_circuits_file(open_page, circuit):
    page = open_page(f"#task={case.TASK}")
    page.get_by_role("button", name="Try it").click()
    settled(page)
    assert state(page)["try"] == "true"
    model_loss, circuit_loss = losses(page)
    assert circuit_loss.startswith(f"{circuit.loss:.3f} ({100 * circuit.scores.sufficiency.accuracy:.0f}%")
    assert model_loss != circuit_loss
    assert "4 pairs of the report split" in page.locator(".losses caption").inner_text()


def test_a_typed_prompt_moves_tokens_bars_and_the_next_tokens(open_page, circuit):
    page = open_page()
    settled(page)
    first = shares(page)
    page.get_by_role("textbox", name="Prompt").fill(PROMPT)
    settled(page)
    assert page.locator(".pick span").all_inner_texts() == list(PROMPT)
    assert shares(page) != first and state(page)["prompt"] == PROMPT
    logits_BTV, _ = in_jax(circuit, PROMPT)
    assert shares(page)[0] == share_in_jax(logits_BTV, ANSWERS)
    best = case.run().tokenizer.decode([int(logits_BTV[0, -1].argmax())])
    shown = page.locator(".next table").first.locator("th").first.inner_text()
    assert json.loads(shown) == best
    assert page.locator(".next tr").count() == 20
    page.get_by_role("textbox", name="Prompt").fill("")
    page.get_by_text("Type a prompt.").wait_for()
    assert page.locator(".bars").count() == 0


def test_the_prompt_is_that_of_the_pair_that_is_shown_until_one_is_typed(open_page, data):
    rows = data["circuits"][case.TASK]["rows"]
    first, second = rows[0]["text"], rows[2]["text"]
    page = open_page(f"{TRY}&pair=1")
    prompt = page.get_by_role("textbox", name="Prompt")
    assert prompt.input_value() == second != first
    page.keyboard.press("[")
    assert prompt.input_value() == first and "pair" not in state(page)
    prompt.fill(PROMPT)
    page.locator("#panel").focus()
    page.keyboard.press("]")
    assert prompt.input_value() == second and state(page)["pair"] == "1"
    assert page.get_by_role("combobox", name="Prompt of the task").input_value() == "2"


def test_a_prompt_whose_tokens_are_parts_of_characters_is_whole(open_page, circuit, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "run")
    where = copied / "circuits" / case.TASK
    found = Evidence.load(where, circuit)
    text = "f('é"
    tokens = case.run().tokenizer.encode(text)
    assert len(tokens) == found.prompts[0].length > len(text)
    changed = found.prompt_tokens_X.copy()
    changed[: len(tokens)] = tokens
    dataclasses.replace(found, prompt_tokens_X=changed).save(where)
    file = tmp_path / "whole.html"
    data = contents.read_run(copied, contents.Options())
    file.write_text(page_lib.render(data, title="x"), encoding="utf-8")
    page = open_page(TRY, file)
    settled(page)
    assert page.get_by_role("textbox", name="Prompt").input_value() == text
    assert page.locator(".pick span").count() == len(tokens)


def test_the_next_token_is_shown_after_the_token_that_is_picked_by_click_or_by_key(open_page, circuit):
    page = open_page(f"{TRY}&prompt={PROMPT}")
    settled(page)
    logits_BTV, _ = in_jax(circuit, PROMPT)
    best = [case.run().tokenizer.decode([int(i)]) for i in logits_BTV[0].argmax(-1)]
    top = page.locator(".next table").first.locator("th").first
    page.locator(".pick span").nth(1).click()
    assert json.loads(top.inner_text()) == best[1]
    page.get_by_role("slider", name="Token after which").press("ArrowRight")
    assert json.loads(top.inner_text()) == best[2]
    assert page.locator(".pick .focus").inner_text() == PROMPT[2]
    page.keyboard.press("End")
    assert json.loads(top.inner_text()) == best[-1]


def test_the_picked_token_stays_while_nodes_are_edited_and_not_when_the_prompt_changes(open_page, circuit):
    page = open_page(f"{TRY}&prompt={PROMPT}&node={effective(circuit)}")
    settled(page)
    page.locator(".pick span").nth(2).click()
    page.get_by_role("button", name="zero", exact=True).click()
    settled(page)
    assert page.locator(".pick .focus").inner_text() == PROMPT[2]
    page.get_by_role("textbox", name="Prompt").fill(PROMPT + "de")
    settled(page)
    assert page.locator(".pick .focus").inner_text() == "e"


def test_the_token_of_a_pairs_first_prompt_is_kept_in_the_address_and_in_a_step_of_a_tour(open_page, data):
    page = open_page()
    settled(page)
    page.locator(".pick span").nth(2).click()
    assert state(page)["token"] == "2"
    page.keyboard.press("n")
    page.get_by_role("button", name="Add what is shown as a step").click()
    step = page.locator(".steps li").count() - 1
    again = open_page(f"{address(page).replace('&notes=true', '')}&try=true")
    settled(again)
    focused = "all => all.map((e) => e.className === 'focus').indexOf(true)"
    assert again.locator(".pick span").evaluate_all(focused) == 2
    # What has been typed has tokens of its own.
    again.get_by_role("textbox", name="Prompt").fill(PROMPT)
    settled(again)
    assert again.locator(".pick span").evaluate_all(focused) == len(PROMPT) - 1
    again.keyboard.press("Escape")
    again.get_by_role("button", name="Close").click()
    again.keyboard.press("n")
    again.get_by_role("button", name=f"Show step {step + 1}", exact=True).click()
    assert state(again)["token"] == "2" and state(again)["tour"] == str(step)


def test_what_is_edited_is_outlined_in_an_open_group_too(open_page, circuit):
    name = effective(circuit)
    page = open_page(f"{TRY}&edits={name}=zero&node={name}")
    settled(page)
    page.locator(f'.node[data-name="{name}"]').click(modifiers=["Shift"])
    page.keyboard.press("n")
    page.get_by_role("button", name="Group them").click()
    page.get_by_role("button", name="1 node", exact=True).click()
    page.get_by_role("button", name="Draw as one box").click()
    page.keyboard.press("t")
    settled(page)
    item = page.locator(f'.node.member.edited[data-name="{name}"] rect').first
    assert item.evaluate("e => getComputedStyle(e).strokeDasharray") == "4px, 3px"


def test_a_key_opens_and_closes_it_and_the_graph_has_the_colors_of_the_side_that_is_chosen(open_page):
    page = open_page(f"#task={case.TASK}")
    page.keyboard.press("t")
    settled(page)
    colors = "() => [...document.querySelectorAll('.node rect')].map((e) => getComputedStyle(e).fill)"
    in_model = page.evaluate(colors)
    page.get_by_role("button", name="circuit alone").click()
    assert state(page)["side"] == "circuit" and page.evaluate(colors) != in_model
    page.get_by_role("button", name="Try it").focus()
    page.keyboard.press("t")
    assert page.locator(".node.live").count() == 0 and "try" not in state(page)


def test_a_selected_node_shows_its_values_on_the_prompt_and_heads_their_pattern(open_page, circuit):
    name = next(node.name for node in circuit.nodes if node.name.startswith("0.attn.q"))
    page = open_page(f"{TRY}&prompt={PROMPT}")
    settled(page)
    page.locator(f'.node[data-name="{name}"]').click()
    page.wait_for_selector(".try canvas")
    _, acts = in_jax(circuit, PROMPT)
    values = np.asarray(acts["attn.q"])[0, 0, :, int(name.rsplit(".", 1)[1])]
    spans = page.locator(".try .prompt").first.locator(".tokens span")
    assert spans.count() == len(PROMPT)
    for at in (0, 3):
        spans.nth(at).hover()
        shown = page.locator("#tip").inner_text().splitlines()[-1].replace(MINUS, "-")
        assert float(shown) == pytest.approx(values[at], rel=2e-3)
    page.locator(".node:not(.live)").first.wait_for(state="detached")


def test_a_node_can_be_ablated_undone_and_reset_and_what_changed_is_told(open_page, circuit):
    name = effective(circuit)
    page = open_page(f"{TRY}&prompt={PROMPT}&node={name}")
    settled(page)
    before = shares(page), losses(page)
    page.get_by_role("button", name="zero", exact=True).click()
    settled(page)
    logits_BTV, _ = in_jax(circuit, PROMPT, {name: 0.0})
    assert shares(page)[0] == share_in_jax(logits_BTV, ANSWERS) != before[0][0]
    assert page.get_by_role("button", name="zero", exact=True).get_attribute("aria-pressed") == "true"
    assert state(page)["edits"] == f"{name}=zero"
    # As it is and with the edits, for model and circuit.
    was_model, now_model, was_circuit, _ = losses(page)
    assert [was_model, was_circuit] == before[1] and now_model != was_model
    row = page.locator(".changes tbody tr").first
    assert row.locator("button").inner_text() == name and row.locator("td").last.inner_text() == "0"
    assert page.locator(".node.edited").count() == 1
    page.get_by_role("button", name="mean", exact=True).click()
    settled(page)
    assert shares(page)[0] == share_in_jax(
        in_jax(circuit, PROMPT, {name: circuit.means["mlp.resid_delta"][1, int(name.rsplit(".", 1)[1])]})[0],
        ANSWERS,
    )
    page.get_by_role("button", name="Undo").click()
    settled(page)
    assert state(page)["edits"] == f"{name}=zero"
    page.get_by_role("button", name="Reset").click()
    settled(page)
    assert "edits" not in state(page) and (shares(page), losses(page)) == before
    assert page.locator(".changes").count() == 0 and page.get_by_role("button", name="Reset").is_disabled()
    page.get_by_role("button", name="Undo").click()
    assert state(page)["edits"] == f"{name}=zero"


def test_a_slider_holds_a_node_at_a_value_and_one_undo_takes_the_drag_back(open_page, circuit):
    name = effective(circuit)
    page = open_page(f"{TRY}&prompt={PROMPT}&node={name}")
    settled(page)
    slider = page.get_by_role("slider", name=f"Value of {name}")
    slider.evaluate("""e => { for (const value of [e.max / 4, e.max / 2, e.max]) {
        e.value = value; e.dispatchEvent(new Event('input')); } e.dispatchEvent(new Event('change')); }""")
    settled(page)
    value = float(re.search(r"=set:(.*)$", state(page)["edits"])[1])
    assert value == pytest.approx(float(slider.get_attribute("max")), rel=0.01)
    logits_BTV, _ = in_jax(circuit, PROMPT, {name: value})
    assert shares(page)[0] == share_in_jax(logits_BTV, ANSWERS)
    page.get_by_role("spinbutton", name=f"Value of {name}, exact").fill("-1.5")
    settled(page)
    assert state(page)["edits"] == f"{name}=set:-1.5"
    page.get_by_role("button", name="Undo").click()
    assert state(page)["edits"] == f"{name}=set:{value}"
    # A number beyond the slider's end is set as it is typed.
    page.get_by_role("spinbutton", name=f"Value of {name}, exact").fill("1234")
    page.get_by_role("button", name="set", exact=True).click()
    assert state(page)["edits"] == f"{name}=set:1234"
    for _ in range(2):
        page.get_by_role("button", name="Undo").click()
    assert state(page)["edits"] == f"{name}=set:{value}"
    page.get_by_role("button", name="Undo").click()
    assert "edits" not in state(page)


def test_an_edge_can_be_edited_and_a_link_shows_the_same_thing(open_page, data):
    shown = data["circuits"][case.TASK]
    name = next(
        f"{shown['nodes'][s]['name']}>{shown['nodes'][t]['name']}"
        for s, t, _ in shown["edges"] if shown["nodes"][t]["name"].startswith("1.mlp.resid_delta")
    )  # fmt: skip
    page = open_page(f"{TRY}&prompt={PROMPT}&edge={name}")
    settled(page)
    page.get_by_role("button", name="set", exact=True).click()
    page.get_by_role("spinbutton").fill("3.12345678")
    settled(page)
    assert state(page)["edits"] == f"{name}=set:3.12345678"
    assert page.locator("path.edge.edited").count() == 1
    other = open_page(address(page))
    settled(other)
    assert (shares(other), losses(other)) == (shares(page), losses(page))
    for parts in (".edits", ".changes tbody", ".next"):
        assert other.locator(parts).inner_text() == page.locator(parts).inner_text()
    other.get_by_role("button", name=f"Take back {name}").click()
    settled(other)
    assert "edits" not in state(other)


def test_a_link_with_edits_that_are_not_possible_leaves_them_out(open_page, circuit):
    name = effective(circuit)
    edits = f"9.x.y.z=zero;{name}=gone;{name}=set:;{name}=set:1e999;=zero;{name}=set:0.5;a>b=mean"
    page = open_page(f"{TRY}&edits={edits}")
    settled(page)
    assert page.locator(".edits li").count() == 1 and "0.5" in page.locator(".edits").inner_text()


def test_a_page_without_the_model_says_so_and_has_no_button(open_page, data, tmp_path):
    static = json.loads(json.dumps(data)) | {"live": None, "static": "the model is too large"}
    static["circuits"][case.TASK]["live"] = None
    file = tmp_path / "static.html"
    file.write_text(page_lib.render(static, title="x"), encoding="utf-8")
    page = open_page(TRY, file)
    assert page.get_by_role("button", name="Try it").count() == 0
    assert "does not run the model: the model is too large." in page.locator("#panel").inner_text()


def test_a_circuit_whose_evidence_has_no_pairs_is_not_run_and_says_so(open_page, data, tmp_path):
    older = json.loads(json.dumps(data))
    older["circuits"][case.TASK]["live"] = None
    file = tmp_path / "older.html"
    file.write_text(page_lib.render(older, title="x"), encoding="utf-8")
    page = open_page(TRY, file)
    assert page.get_by_role("button", name="Try it").count() == 0
    assert "does not run the model: the evidence of this circuit is of an older version" in (
        page.locator("#panel").inner_text()
    )


def test_a_damaged_model_in_a_page_is_told_and_the_rest_works(open_page, data, tmp_path):
    damaged = json.loads(json.dumps(data))
    damaged["live"]["blob"] = damaged["live"]["blob"][:400]
    file = tmp_path / "damaged.html"
    file.write_text(page_lib.render(damaged, title="x"), encoding="utf-8")
    page = open_page(TRY, file)
    page.get_by_text("The model could not be run:").wait_for()
    page.get_by_role("button", name="Close").click()
    page.locator(".node").first.click()
    assert page.locator("#panel .prompt").count() == 3


@pytest.mark.parametrize("width", [390, 1024])
def test_narrow_windows_do_not_scroll_sideways_and_controls_have_names(open_page, circuit, width):
    name = next(node.name for node in circuit.nodes if node.name.startswith("0.attn.v"))
    page = open_page(f"{TRY}&node={name}&edits={name}=zero")
    page.set_viewport_size({"width": width, "height": 800})
    settled(page)
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = (
        page.locator(".try")
        .locator("input, select, textarea, button, [tabindex]")
        .evaluate_all("all => all.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent)).length")
    )
    assert unnamed == 0


def test_the_worker_can_fetch_nothing(open_page):
    """The policy of the page is also that of what it starts."""
    page = open_page(f"#task={case.TASK}")
    answer = page.evaluate("""() => new Promise((done) => {
      const code = `addEventListener('securitypolicyviolation', (e) => postMessage(e.effectiveDirective));
        fetch('http://127.0.0.1:9/x').then(() => postMessage('fetched'), () => {});`;
      new Worker(URL.createObjectURL(new Blob([code]))).onmessage = ({ data }) => done(data);
    })""")
    assert answer == "connect-src"


def test_the_page_in_the_srcdoc_of_a_frame_runs_the_model(open_page, browser, path, tmp_path):
    outer = tmp_path / "outer.html"
    outer.write_text("<iframe width=1200 height=800></iframe>")
    page = browser.new_page()
    page.goto(outer.as_uri())
    page.locator("iframe").evaluate("(e, text) => { e.srcdoc = text; }", path.read_text())
    frame = page.frame_locator("iframe")
    frame.locator("#tasks tbody th a").get_by_text(case.TASK).click()
    frame.get_by_role("button", name="Try it").click()
    frame.locator(".losses:not(.waiting)").wait_for()
    page.close()
