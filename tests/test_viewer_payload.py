"""The model in a run's folder and in its page: what was stored, or a word why there is none."""

import base64
import dataclasses
import json
import logging
import pathlib
import shutil
import zlib

import jax
import numpy as np
import pytest
import viewer_case as case

from wsparse import model, recipes, trees
from wsparse.circuits import Circuit, evidence, model_file
from wsparse.circuits.evidence_file import Evidence
from wsparse.circuits.model_file import StoredModel
from wsparse.config import ModelConfig, from_dict
from wsparse.errors import UserError
from wsparse.nodes import CONNECTIONS
from wsparse.viewer import contents, live


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A run with a circuit, its evidence and its model."""
    folder = tmp_path_factory.mktemp("viewer")
    case.write_live_run(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> pathlib.Path:
    return shutil.copytree(folder, tmp_path / "run")


def read(folder: pathlib.Path) -> dict:
    return contents.read_run(folder, contents.Options())


def unpacked(blob: str, arrays: list) -> dict[str, np.ndarray]:
    data, at, found = zlib.decompress(base64.b64decode(blob)), 0, {}
    for name, dtype, size in arrays:
        found[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), size, at)
        at += -(-found[name].nbytes // 4) * 4
    assert at == len(data)
    return found


def test_the_page_has_every_parameter_of_the_model_to_the_bit_and_the_bigram_table_in_16_bits(folder):
    live_data = read(folder)["live"]
    arrays = unpacked(live_data["blob"], live_data["arrays"])
    for path, leaf in trees.flatten(case.run().params).items():
        leaf = np.asarray(leaf)
        if path == model_file.BIGRAM:
            parts = (arrays.pop(f"{path}:{part}") for part in ("rounded", "middles", "scales"))
            rounded, middles, scales = parts
            table_VV = middles[:, None] + scales[:, None] * rounded.reshape(leaf.shape).astype(float)
            np.testing.assert_allclose(table_VV, leaf, rtol=0, atol=np.ptp(leaf, axis=1).max() / 130000)
            assert not np.array_equal(table_VV, leaf)
        elif f"{path}:values" in arrays:
            counts, columns, values = (
                arrays.pop(f"{path}:{part}") for part in ("counts", "columns", "values")
            )
            rows = np.zeros((len(counts), leaf.shape[-1]), np.float32)
            rows[np.repeat(np.arange(len(counts)), counts), columns] = values
            np.testing.assert_array_equal(rows.reshape(leaf.shape), leaf)
        else:
            np.testing.assert_array_equal(arrays.pop(path).reshape(leaf.shape), leaf)
    assert not arrays


def test_the_page_has_closed_nodes_cut_edges_and_pairs_of_the_circuit(folder):
    data = read(folder)
    circuit = Circuit.load(folder / "circuits" / case.TASK)
    own = data["circuits"][case.TASK]["live"]
    arrays = unpacked(own["blob"], own["arrays"])
    for name, mask_LN in circuit.mask().items():
        closed = np.unpackbits(arrays[f"closed:{name}"], count=mask_LN.size).reshape(mask_LN.shape)
        np.testing.assert_array_equal(closed, ~mask_LN)
    flat = trees.flatten(case.run().params)
    for c in CONNECTIONS:
        stored = np.flatnonzero(flat[c.kernel])
        removed = np.unpackbits(arrays[f"removed:{c.kernel}"], count=len(stored))
        np.testing.assert_array_equal(stored[removed == 1], np.flatnonzero(circuit.removed[c.kernel]))
    assert sum(array.sum() for array in circuit.removed.values()) == 1
    means = data["live"]["means"][own["means"]]
    for name, mean in unpacked(means["blob"], means["arrays"]).items():
        np.testing.assert_array_equal(mean, circuit.means[name].ravel())
    found = Evidence.load(folder / "circuits" / case.TASK, circuit)
    assert found is not None and len(arrays["positions"]) == 2 * found.ablation_pairs
    np.testing.assert_array_equal(arrays["tokens"], found.pair_tokens_RT.ravel())
    np.testing.assert_array_equal(arrays["answers"], found.pair_answers_R)


def remove(folder):
    (folder / model_file.FILE).unlink()


def cut_short(folder):
    path = folder / model_file.FILE
    path.write_bytes(path.read_bytes()[:-2000])


def change_a_weight(folder):
    with np.load(folder / model_file.FILE) as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    arrays["blocks/mlp/fc/kernel:values"][0] += 1
    np.savez(folder / model_file.FILE, **arrays)


def of_another_model(folder):
    stored = StoredModel.load(folder)
    assert stored is not None
    dataclasses.replace(stored, digest="0" * 64).save(folder)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (remove, "is not stored beside the circuits"),
        (cut_short, r"model\.npz is damaged"),
        (change_a_weight, "arrays are not those that were written"),
        (of_another_model, "is another one"),
    ],
)
def test_without_the_model_of_its_circuits_the_page_is_static_and_says_why_in_a_line(
    copied, caplog, damage, word
):
    caplog.set_level(logging.INFO, "wsparse")
    assert read(copied)["static"] == "" and "cannot run" not in caplog.text
    damage(copied / "circuits")
    data = read(copied)
    assert data["live"] is None and data["circuits"][case.TASK]["live"] is None
    with pytest.raises(live.NotLive, match=word):
        live.read(copied / "circuits", [Circuit.load(copied / "circuits" / case.TASK)])
    assert "\n" not in data["static"] and "--evidence" in data["static"]
    assert f"the page cannot run the model: {data['static']}" in caplog.text
    assert data["circuits"][case.TASK]["nodes"]


def test_a_model_too_large_for_a_page_leaves_it_static(folder, monkeypatch):
    monkeypatch.setattr(live, "MAX_CHARACTERS", 1000)
    data = read(folder)
    assert data["live"] is None and "too large for a page" in data["static"]


def test_a_model_of_too_many_numbers_is_not_stored_and_an_earlier_file_goes(copied, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "wsparse")
    monkeypatch.setattr(model_file, "MAX_NUMBERS", 1000)
    evidence.store_model(dataclasses.replace(case.run(), folder=copied))
    assert not (copied / "circuits" / model_file.FILE).exists()
    assert "too large for a page" in caplog.text


def test_evidence_of_an_older_version_is_read_and_its_circuit_is_not_run(copied):
    where = copied / "circuits" / case.TASK
    with np.load(where / "evidence.npz") as stored:
        older = {name: stored[name] for name in stored.files if not name.startswith("pair_")}
    np.savez(where / "evidence.npz", **older)
    data = read(copied)
    assert data["circuits"][case.TASK]["live"] is None and data["circuits"][case.TASK]["rows"]
    assert data["live"] is not None


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a + 1000, lambda a: a.astype(float)])
def test_pairs_that_do_not_fit_are_refused(copied, change):
    where = copied / "circuits" / case.TASK
    with np.load(where / "evidence.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["pair_positions_R"] = change(arrays["pair_positions_R"])
    np.savez(where / "evidence.npz", **arrays)
    with pytest.raises(UserError, match=r"evidence in .* is damaged"):
        read(copied)


def test_the_model_of_tiny_takes_less_than_4_megabytes_of_a_page():
    """With weights at random, which nothing compresses."""
    config = from_dict(ModelConfig, recipes.load("tiny").model.to_dict())
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))

    def draw(path, leaf):
        sparse = path.endswith("kernel") or path in ("embed/tokens", "head/unembed")
        kept = random.random(leaf.shape) < (1 / 16 if sparse else 1)
        return (random.normal(size=leaf.shape) * kept).astype(np.float32)

    params = trees.flatten(trees.map_with_path(draw, shapes))
    tokenizer = case.run().tokenizer.to_json()
    stored = model_file.stored(params, config, tokenizer=tokenizer, digest="0")
    assert stored is not None
    assert 2e6 < len(json.dumps(live.contents(stored))) < 4e6
