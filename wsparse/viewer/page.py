"""One self-contained HTML page from JSON data and the files of `static/`.

The page fetches nothing: a Content-Security-Policy forbids all requests, and lets exactly the two scripts
and the one style sheet that are written here run, each named by its hash. They start one worker, from a third
text of the page, to which the same policy applies.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
import hashlib
import html
from importlib import resources
import json
import math
import string
from typing import Any

import numpy as np

LIBRARY = "d3.min.js"
# In the order in which they are joined; a later one uses what an earlier one defines.
ENGINE = ("arrays.js", "numerics.js", "forward.js", "tokenizer.js", "plan.js", "worker.js")
SCRIPTS = (
    "data.js", "notes.js", "runs.js", "constants.js", "layout.js", "edges.js", "bundles.js", "graph.js",
    "groups.js", "charts.js", "tables.js", "panel.js", "ends.js", "notes_panel.js", "live.js", "try.js",
    "try_node.js", "tour.js", "picture.js", "whole.js", "overview.js", "pair_graph.js", "pair.js", "main.js",
)  # fmt: skip

_QUANTIZED = {"int16": 32767, "uint8": 255}
_PLAIN = (int, str, bool, type(None))


def render(data: dict[str, Any], *, title: str) -> str:
    """Returns the page of JSON values, as `contents` has them; what is not finite becomes null."""
    style, library = static("style.css"), static(LIBRARY)
    script, worker = _joined(SCRIPTS), engine()
    for code in (library, script, worker):
        assert "</script" not in code.lower() and "<!--" not in code
    policy = (
        f"default-src 'none'; script-src {_source(library)} {_source(script)}; "
        f"style-src {_source(style)}; worker-src blob:; base-uri 'none'; form-action 'none'"
    )
    return string.Template(static("page.html")).substitute(
        policy=policy,
        title=html.escape(title),
        style=style,
        library=library,
        script=script,
        engine=worker,
        data=embedded(data),
    )


def engine() -> str:
    """Returns the code of the worker that runs the model."""
    return _joined([f"engine/{name}" for name in ENGINE])


def embedded(data: Any) -> str:
    """Returns JSON that can stand in a `<script>` element: nothing in it can end the element."""
    text = json.dumps(_plain(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(values: np.ndarray, dtype: str) -> dict[str, Any]:
    """Returns an array in few bytes: `scale * q` with integers q, little-endian, in base64.

    Args:
      values: Floats of any shape; non-negative for "uint8".
      dtype: "int16" or "uint8".

    Returns:
      `{"dtype", "scale", "data"}`; an entry is off by at most half of `scale`.
    """
    values = np.asarray(values, np.float64).ravel()
    scale = float(np.max(np.abs(values), initial=0.0)) / _QUANTIZED[dtype]
    integers = np.rint(values / scale) if scale else np.zeros_like(values)
    return {"dtype": dtype, "scale": scale, "data": raw(integers, dtype)}


def raw(values: np.ndarray, dtype: str) -> str:
    """Returns integers, little-endian, in base64."""
    little = np.asarray(values).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()


def _plain(value: Any) -> Any:
    """Returns JSON's own types: floats of 9 digits (a float32 to the bit), null for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        items = value.items()
        return {str(key): item if type(item) in _PLAIN else _plain(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [item if type(item) in _PLAIN else _plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist() if value.dtype.kind in "biu" else _plain(value.tolist())
    return value


def static(name: str) -> str:
    """Returns the text of a file of `static/`."""
    return (resources.files("wsparse.viewer") / "static" / name).read_text(encoding="utf-8")


def _joined(names: Sequence[str]) -> str:
    """Returns files of scripts as one."""
    return f"(() => {{\n'use strict';\n{''.join(map(static, names))}}})();\n"


def _source(code: str) -> str:
    digest = hashlib.sha256(code.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
