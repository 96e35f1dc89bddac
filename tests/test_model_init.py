"""Initial parameters: the method's deviations, and numbers that depend on a name and a layer alone."""

import dataclasses

from model_case import SMALL, fresh
import numpy as np
import pytest


def test_initial_parameters_have_the_deviations_of_the_method():
    config = dataclasses.replace(SMALL, position="added")
    seeds = [fresh(config, seed) for seed in range(12)]
    written = {"blocks/attn/out/kernel", "blocks/mlp/proj/kernel"}
    for path in seeds[0]:
        leaf = np.stack([flat[path] for flat in seeds])
        assert leaf.dtype == np.float32
        if path.endswith("gain"):
            assert (leaf == 1).all(), path
        elif path.endswith("kernel") or path in ("embed/tokens", "embed/positions", "head/unembed"):
            std = 0.02 / np.sqrt(2 * config.n_layer) if path in written else 0.02
            scaled, error = leaf.ravel() / std, 1 / np.sqrt(leaf.size)
            np.testing.assert_allclose(scaled.std(), 1, atol=5 * error, err_msg=path)
            np.testing.assert_allclose(scaled.mean(), 0, atol=5 * error, err_msg=path)
            np.testing.assert_allclose((scaled**4).mean(), 3, atol=50 * error, err_msg=path)
        else:
            assert path.endswith("bias") or path in ("blocks/attn/sink", "head/bigram")
            assert (leaf == 0).all(), path


def test_no_two_initial_parameters_share_numbers():
    flat = {path: leaf.ravel() for path, leaf in fresh(SMALL).items() if leaf.std() > 0}
    starts = np.array([leaf[:64] for leaf in flat.values()])
    assert np.abs(np.corrcoef(starts) - np.eye(len(flat))).max() < 0.6


def test_layers_and_seeds_differ_and_a_seed_repeats():
    first, other = fresh(SMALL, 0), fresh(SMALL, 1)
    again = fresh.__wrapped__(SMALL, 0)
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        if leaf.std() > 0:
            assert (leaf != other[path]).mean() > 0.99, path
            assert not path.startswith("blocks/") or (leaf[0] != leaf[1]).mean() > 0.99, path


@pytest.mark.parametrize(
    "change",
    [
        {"sink": False},
        {"bias": False},
        {"bigram": "none"},
        {"position": "added"},
        {"position": "none", "norm": "layer"},
        {"tied_embeddings": True, "logits_bias": True},
        {"n_layer": 3},
    ],
    ids=str,
)
def test_switching_a_part_leaves_the_other_initial_parameters_as_they_were(change):
    before = fresh(SMALL)
    changed = dataclasses.replace(SMALL, **change)
    after = fresh(changed)
    shared = set(before) & set(after)
    assert len(shared) >= 12
    assert "blocks/mlp/fc/kernel" in shared
    for path in shared:
        old, new = before[path], after[path]
        if path.startswith("blocks/"):
            new = new[: len(old)]
        if "n_layer" in change and path.endswith(("out/kernel", "proj/kernel")):
            np.testing.assert_allclose(new * np.sqrt(3 / 2), old, rtol=1e-6)
        else:
            np.testing.assert_array_equal(new, old, err_msg=path)


def test_fixed_sinusoids_do_not_depend_on_the_seed():
    config = dataclasses.replace(SMALL, position="concat_sinusoid", d_pos=5)
    tables = [fresh(config, s)["embed/sinusoids"] for s in (0, 1)]
    np.testing.assert_array_equal(*tables)
    assert tables[0].shape == (8, 5)
    assert (np.abs(tables[0]) <= 1).all()
    assert len({row.tobytes() for row in tables[0]}) == 8  # every position is told apart
