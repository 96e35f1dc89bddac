"""The model file: what a page needs to run a run's model, beside its circuits; reading it needs no jax.

`circuits/model.npz` holds the tokenizer and every parameter: the nonzeros of matrices row by row, the bigram
table in 16 bits, each row with a middle and a scale of its own, and everything else as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from wsparse.circuits.circuit import read_arrays, write_arrays
from wsparse.config import ModelConfig, from_dict, to_dict
from wsparse.errors import UserError
from wsparse.nodes import NODES, Connection

SCHEMA = 1
FILE = "model.npz"
BIGRAM = "head/bigram"
# Numbers of a model that is not stored: a page of it would have some hundred megabytes.
MAX_NUMBERS = 20_000_000

_ABOUT = "about"
_MATRICES = ("embed/tokens", "head/unembed")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredModel:
    """A model and its tokenizer.

    Attributes:
      digest: `trees.digest` of the parameters.
      tokenizer: Content of its `tokenizer.json`.
      arrays: By path and part. A matrix, whose leading axes count as rows, has "PATH:counts", nonzeros of
        each row, "PATH:columns" and "PATH:values" of them in order; the bigram table "PATH:rounded", int16,
        with "PATH:middles" and "PATH:scales" of its rows; other parameters are "PATH", float32.
    """

    digest: str
    config: ModelConfig
    tokenizer: str
    arrays: dict[str, np.ndarray]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it beside the circuits of a run, into its folder `circuits`."""
        about = {
            "schema": SCHEMA,
            "digest": self.digest,
            "config": to_dict(self.config),
            "tokenizer": self.tokenizer,
            "content": _content(self.arrays),
        }
        stored = np.frombuffer(json.dumps(about).encode(), np.uint8)
        write_arrays(pathlib.Path(folder) / FILE, {_ABOUT: stored, **self.arrays})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> StoredModel | None:
        """Returns the model in a folder `circuits`, None where there is none.

        Raises:
          UserError: The file is damaged, or of another version.
        """
        path = pathlib.Path(folder) / FILE
        if not path.exists():
            return None
        try:
            arrays = read_arrays(path)
            if _ABOUT not in arrays:
                raise UserError(f"it has no {_ABOUT!r}")
            about = json.loads(arrays.pop(_ABOUT).tobytes())
            if about.pop("schema", None) != SCHEMA:
                raise UserError(f"it is not of schema {SCHEMA}")
            if about.pop("content", None) != _content(arrays):
                raise UserError("its arrays are not those that were written")
            return from_dict(cls, about | {"arrays": arrays})
        except (UserError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error

    def places(self, connection: Connection) -> np.ndarray:
        """Returns the flat indices of a matrix's nonzeros, in the order in which they are stored."""
        counts, columns = (self.arrays[f"{connection.kernel}:{part}"] for part in ("counts", "columns"))
        rows = np.repeat(np.arange(len(counts)), counts)
        return rows * NODES[connection.target].width(self.config) + columns


def stored(
    parameters: Mapping[str, np.ndarray], config: ModelConfig, *, tokenizer: str, digest: str
) -> StoredModel | None:
    """Returns what is stored of a model; None where it is too large.

    Args:
      parameters: Float32 parameters by path.
      tokenizer: Content of its `tokenizer.json`.
      digest: `trees.digest` of the parameters.
    """
    if sum(map(np.count_nonzero, parameters.values())) > MAX_NUMBERS:
        return None
    arrays: dict[str, np.ndarray] = {}
    for path, array in parameters.items():
        array = np.asarray(array, np.float32)
        if path == BIGRAM:
            parts = zip(("rounded", "middles", "scales"), rounded_rows(array), strict=True)
            arrays |= {f"{path}:{part}": values for part, values in parts}
        elif path.endswith("/kernel") or path in _MATRICES:
            rows = array.reshape(-1, array.shape[-1])
            at = np.nonzero(rows)
            counts, columns = np.count_nonzero(rows, axis=1), at[1]
            arrays |= {
                f"{path}:counts": counts.astype(np.min_scalar_type(rows.shape[1])),
                f"{path}:columns": columns.astype(np.min_scalar_type(rows.shape[1])),
                f"{path}:values": rows[at],
            }
        else:
            arrays[path] = array
    return StoredModel(digest=digest, config=config, tokenizer=tokenizer, arrays=arrays)


def rounded_rows(table_VV: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns int16 numbers, and a middle and a scale of each row: the table is middle + scale * number.

    An entry is off by about 1/131068 of what its row spans, in half precision by up to 1/4096 of itself.
    """
    high_V, low_V = np.max(table_VV, axis=1, initial=0), np.min(table_VV, axis=1, initial=0)
    middles_V = ((high_V + low_V) / 2).astype(np.float32)
    # A little more than half of the span, which may have been rounded down.
    scales_V = ((high_V - low_V) / 65533).astype(np.float32)
    safe_V = np.where(scales_V > 0, scales_V, 1)
    return np.rint((table_VV - middles_V[:, None]) / safe_V[:, None]).astype(np.int16), middles_V, scales_V


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of arrays, their names and shapes."""
    content = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        content.update(f"{name} {array.dtype} {array.shape}\0".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()
