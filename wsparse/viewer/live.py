"""The part of a page's data that lets it run the model: the model, and of each circuit what running it takes.

What a browser cannot run is no error: the page is then as it is without it, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any
import zlib

import numpy as np

from wsparse.circuits.circuit import Circuit
from wsparse.circuits.evidence_file import Evidence
from wsparse.circuits.model_file import StoredModel
from wsparse.config import to_dict
from wsparse.data.tokenizer import PATTERN
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS, NODES
from wsparse.viewer.page import raw

# Characters that the model of a page may have; small models have some megabytes.
MAX_CHARACTERS = 12_000_000

_MEASURE = "python -m wsparse.prune --run=RUN --evidence"


class NotLive(Exception):
    """Why a page cannot run the model, in a sentence without its end."""


def read(folder: pathlib.Path, circuits: Sequence[Circuit]) -> StoredModel:
    """Returns the model beside circuits.

    Args:
      folder: A run's folder `circuits`.
      circuits: Those that are shown.

    Raises:
      NotLive: There is none, it is not theirs, or it cannot be read.
    """
    try:
        model = StoredModel.load(folder)
    except UserError as error:
        raise NotLive(f"{error}; {_MEASURE} writes it again") from error
    if model is None:
        raise NotLive(f"the model is not stored beside the circuits: {_MEASURE} stores it")
    if {circuit.model_digest for circuit in circuits} != {model.digest}:
        raise NotLive(f"the model stored beside the circuits is another one: {_MEASURE} stores theirs")
    return model


def contents(model: StoredModel) -> dict[str, Any]:
    """Returns the model as the page has it.

    Raises:
      NotLive: It is too large, or its tokenizer is of another kind.
    """
    blob, arrays = blob_of(model.arrays)
    if len(blob) > MAX_CHARACTERS:
        raise NotLive(
            f"the model is too large for a page: {len(blob) / 1e6:.0f} MB, at most {MAX_CHARACTERS / 1e6:.0f}"
        )
    return {
        "config": to_dict(model.config)
        | {"d_mlp": model.config.mlp_width, "eps": model.config.eps, "read_width": model.config.read_width},
        "sites": {location: kind.site for location, kind in NODES.items()},
        "connections": [[c.source, c.target, c.kernel] for c in CONNECTIONS],
        "arrays": arrays,
        "blob": blob,
        "tokenizer": tokenizer(model.tokenizer),
        # Of each distinct set of means; circuits of one run share theirs.
        "means": [],
    }


def of_circuit(
    model: StoredModel, circuit: Circuit, evidence: Evidence, live: dict[str, Any]
) -> dict[str, Any] | None:
    """Returns what it takes to run a circuit, None where an older file does not say it.

    Args:
      live: `contents` of the model, whose means are added to.
    """
    if "attn.y" not in circuit.means or not evidence.pair_tokens_RT.size:
        return None
    blob, arrays = blob_of({name: circuit.means[name].astype(np.float32) for name in [*NODES, "attn.y"]})
    means = {"blob": blob, "arrays": arrays}
    if means not in live["means"]:
        live["means"].append(means)
    own = {f"closed:{name}": np.packbits(~mask_LN) for name, mask_LN in circuit.mask().items()}
    for c in CONNECTIONS:
        own[f"removed:{c.kernel}"] = np.packbits(circuit.removed[c.kernel].ravel()[model.places(c)])
    own |= {
        "tokens": evidence.pair_tokens_RT.astype(np.int32),
        "positions": evidence.pair_positions_R.astype(np.int32),
        "answers": evidence.pair_answers_R.astype(np.int32),
    }
    blob, arrays = blob_of(own)
    return {"means": live["means"].index(means), "blob": blob, "arrays": arrays}


def blob_of(arrays: Mapping[str, np.ndarray]) -> tuple[str, list[list[Any]]]:
    """Returns arrays one after the other, compressed (zlib) and in base64, and `[name, dtype, size]` of each.

    Each begins at a multiple of four bytes, as typed arrays of browsers must.
    """
    parts, index = [], []
    for name, array in arrays.items():
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
        parts.append(little.tobytes() + b"\0" * (-little.nbytes % 4))
        index.append([name, array.dtype.name, array.size])
    compressed = zlib.compress(b"".join(parts), 9)
    return raw(np.frombuffer(compressed, np.uint8), "uint8"), index


def tokenizer(text: str) -> dict[str, Any]:
    """Returns the tokens by id, their merges as pairs of ids, and the special ones, of a `tokenizer.json`.

    Raises:
      NotLive: It is not the byte-level BPE with the package's own way to split.
    """
    values = json.loads(text)
    model, added = values["model"], values["added_tokens"]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    steps = (values["pre_tokenizer"] or {}).get("pretokenizers", [])
    same = len(steps) == 2 and steps[0] == split and steps[1]["type"] == "ByteLevel"
    same = same and not steps[1]["add_prefix_space"] and not steps[1]["use_regex"]
    same = same and values["normalizer"] is None and all(token["special"] for token in added)
    plain = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    if not same or model.get("type", "BPE") != "BPE" or any(model.get(key) for key in plain):
        raise NotLive("the model's tokenizer is of a kind that the page cannot be")
    ids = model["vocab"]
    special = {token["id"]: token["content"] for token in added}
    token_of = {number: token for token, number in ids.items()} | special
    tokens = [token_of[number] for number in range(len(token_of))]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [[ids[first], ids[second], ids[first + second]] for first, second in pairs]
    return {"tokens": tokens, "special": sorted(special), "merges": merges}
