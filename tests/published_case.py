"""Two small circuits in the layout of the published ones, with numbers by the NumPy reference.

`python tests/published_case.py`, where PyTorch is installed, writes them to tests/published_circuits. The
model is tests/golden/sink_bigram, nodes and means are random; nothing of the library's own ablation or
scoring is used.
"""

import json
import pathlib

import numpy as np
import reference

from wsparse.interop import openai
from wsparse.nodes import CONNECTIONS, NODES

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE / "golden" / "sink_bigram"
FOLDER = HERE / "published_circuits"
SWEEP = FOLDER / "viz" / "sink_bigram" / "two_tokens" / "prune_v0"
ANSWERS = (17, 40)
SITES = {kind.site: name for name, kind in NODES.items()}
CONFIG, PARAMS = openai.load(GOLDEN)
WIDTHS = {f"{i}.{name}": kind.width(CONFIG) for i in range(CONFIG.n_layer) for name, kind in NODES.items()}
WIDTHS["final_resid"] = CONFIG.d_model


class Masked(reference.Model):
    """The reference with closed nodes at their means; `kept` and `means` are by "3.attn.q"."""

    def __init__(self, params, kept, means):
        super().__init__(CONFIG, params)
        self.kept, self.means, self.layer = kept, means, -1

    def masked(self, name, value):
        if self.kept is None:
            return value
        closed = np.ones(value.shape[-1], bool)
        closed[self.kept[name]] = False
        return np.where(closed, self.means[name], value)

    def run(self, tokens):
        self.layer = -1
        logits, seen = super().run(tokens)
        return logits, seen | {"final_resid": self.masked("final_resid", seen["final_resid"])}

    def block(self, *args):
        self.layer += 1
        return super().block(*args)

    def sparse(self, site, value):
        value = super().sparse(site, value)
        return self.masked(f"{self.layer}.{SITES[site]}", value) if site in SITES else value

    def norm(self, x, p):
        return super().norm(self.masked("final_resid", x) if p is self.params["head"]["norm"] else x, p)


def runs_of(params, kept, means, prompts):
    """The sum of both prompts' cross-entropies, its mean over pairs, and what each prompt's run saw."""
    results = [Masked(params, kept, means).run(prompt) for prompt in prompts]
    total = 0.0
    for i, (logits, _) in enumerate(results):
        pair = logits[-1, list(ANSWERS)]
        total += np.log(np.sum(np.exp(pair))) - pair[i // (len(prompts) // 2)]
    return total / (len(prompts) // 2), [seen for _, seen in results]


def prompts_of(rng):
    lengths = rng.integers(4, 9, 4)
    first = [rng.integers(1, CONFIG.vocab_size, n) for n in lengths]
    second = [prompt.copy() for prompt in first]
    for prompt in second:
        prompt[[1, -1]] = rng.integers(1, CONFIG.vocab_size, 2)
    return [*first, *second]


def viz_data(k, rng, params, means, prompts):
    """The tree of one `viz_data.pt`, of NumPy arrays."""
    names = [(name, channel) for name, width in WIDTHS.items() for channel in range(width)]
    chosen = [names[i] for i in sorted(rng.choice(len(names), k, replace=False))]
    # Most of a layer, so that there are edges, and of the final stream, so that what it does is seen.
    chosen += [(name, c) for name in WIDTHS if name.startswith("2.") for c in range(k // 4)]
    chosen += [("final_resid", c) for c in range(k // 2)]
    kept = {name: sorted({c for n, c in chosen if n == name}) for name in WIDTHS}
    loss, _ = runs_of(params, None, means, prompts)
    circuit_loss, seen = runs_of(params, kept, means, prompts)

    def without(*gone):
        less = {n: [c for c in channels if (n, c) not in gone] for n, channels in kept.items()}
        return float(runs_of(params, less, means, prompts)[0])

    def values(name, channel):
        layer, _, location = name.partition(".")
        table = np.zeros((len(prompts), max(map(len, prompts))), np.float32)
        for row, acts in zip(table, seen, strict=True):
            of_place = acts[name] if name == "final_resid" else acts[location][int(layer)]
            row[: len(of_place)] = of_place[:, channel]
        return table

    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    blocks = [f"{i}.{part}" for i in range(CONFIG.n_layer) for part in ("attn", "mlp")]
    return {
        "circuit_data": {name: np.array(channels, np.int64) for name, channels in kept.items()},
        "samples": {"0.mlp.post_act": {3: {0.1: ([(tokens[0], values("0.mlp.post_act", 3)[0], 2)], [])}}},
        "importances": {
            "loss": float(loss),
            "interv_loss": float(circuit_loss),
            "layer_interv_losses": {
                block: without(*((n, c) for n in kept if n.startswith(f"{block}.") for c in kept[n])) / 2
                for block in blocks
            },
            "ch_interv_losses": {n: [without((n, c)) for c in channels] for n, channels in kept.items()},
            "pair_data": [],
            "pair_data_connections": list(connections(params, kept)),
            "task_samples": (
                tokens,
                {name: {c: values(name, c) for c in channels} for name, channels in kept.items()},
            ),
            "beeg_model_config": json.loads((GOLDEN / "beeg_config.json").read_text()),
        },
        "all_loss": [(0, 1.5), (1, float(circuit_loss))],
        "num_total_nodes": sum(WIDTHS.values()),
        "prune_config": {"k_coef": 1e-4, "target": None, "seeds": [0, 1]},
    }


def connections(params, kept):
    """Weights between kept nodes, the bias in a last row, as the published viewer names the parts."""
    for c in CONNECTIONS:
        part, name = c.kernel.split("/")[1:3]
        for i in range(CONFIG.n_layer):
            source, target = f"{i}.{c.source}", f"{i}.{c.target}"
            of_layer = params["blocks"][part][name]
            weights = of_layer["kernel"][i][np.ix_(kept[source], kept[target])]
            rows = [weights, of_layer["bias"][i][None, kept[target]]]
            yield [np.concatenate(rows), [*kept[source], "bias"], list(kept[target]), (source, target)]


def trees():
    """Path below `FOLDER` -> tree, of every file."""
    rng = np.random.default_rng(0)
    params = as_numpy(PARAMS)
    means = {name: rng.normal(size=width).astype(np.float32) * 0.1 for name, width in WIDTHS.items()}
    means |= {
        f"{i}.attn.y": rng.normal(size=CONFIG.attention_width).astype(np.float32)
        for i in range(CONFIG.n_layer)
    }
    prompts = prompts_of(rng)
    sweep = SWEEP.relative_to(FOLDER)
    return {
        "viz/sink_bigram/mean_baseline_pretrain.pt": means,
        **{f"{sweep}/{k}/viz_data.pt": viz_data(k, rng, params, means, prompts) for k in (12, 60)},
    }


def as_numpy(tree):
    return {k: as_numpy(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items()}


def with_tensors(torch, tree):
    """The tree with PyTorch's tensors in place of arrays."""
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree.copy())
    if isinstance(tree, dict):
        return {key: with_tensors(torch, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_tensors(torch, value) for value in tree)
    return tree


def write():
    import torch

    for name, tree in trees().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(with_tensors(torch, tree), path)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    write()
