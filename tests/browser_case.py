"""Pages in a headless Chromium, for the tests of the viewer."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import shutil
import urllib.parse

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> Iterator[sync_api.Browser]:
    """Yields a headless Chromium, or skips where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        assert "WSPARSE_NEEDS_BROWSER" not in os.environ, "there is no Chromium on the path"
        pytest.skip("there is no Chromium on the path: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield running
        running.close()


@contextlib.contextmanager
def opening(browser: sync_api.Browser, path: pathlib.Path, fragment: str = "") -> Iterator[Callable]:
    """Yields a function that opens a page, by default that at `path` with `fragment`.

    Nothing may be logged, raised or run (`window.ran`) while it is open, or fetched but by the page itself.
    Its `trouble` is the list of what was, which a test that expects some takes out.
    """
    contexts, trouble = [], []

    def opened(fragment=fragment, file=path, **options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: None if _is_own(request) else trouble.append(request.url))
        page.goto(f"{file.as_uri()}{fragment}")
        page.wait_for_selector("main:not([hidden])")
        return page

    opened.trouble = trouble
    yield opened
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.ran") is None
        context.close()
    assert trouble == []


@contextlib.contextmanager
def framing(
    browser: sync_api.Browser, path: pathlib.Path, folder: pathlib.Path, *, width: int
) -> Iterator[sync_api.FrameLocator]:
    """Yields the frame of a page in the `srcdoc` of an `iframe`, in which nothing may be raised.

    The page around it is written into `folder`.
    """
    outer = folder / "outer.html"
    outer.write_text(f"<iframe width={width} height=800></iframe>")
    page = browser.new_page()
    trouble = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(outer.as_uri())
    page.locator("iframe").evaluate("(e, text) => { e.srcdoc = text; }", path.read_text())
    yield page.frame_locator("iframe")
    assert trouble == []
    page.close()


def _is_own(request) -> bool:
    """Returns whether a request is for the page itself, or for what it has made."""
    return request.resource_type == "document" or request.url.startswith("blob:")


# A function of the page: how bright a color is, as the contrast of two is defined by.
LUMINANCE = """(color) => {
  const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  paint.fillStyle = color;
  paint.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)
    .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


def contrast(first: float, second: float) -> float:
    """Returns the contrast of two luminances; 4.5 is enough for text (WCAG 2, AA)."""
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def address(page) -> str:
    """Returns the fragment of a page's address, which the page writes when changes pause or it is left."""
    return page.evaluate("() => { window.dispatchEvent(new Event('pagehide')); return location.hash; }")


def state(page) -> dict[str, str]:
    """Returns what the address of a page says."""
    return dict(urllib.parse.parse_qsl(address(page).removeprefix("#"), keep_blank_values=True))
