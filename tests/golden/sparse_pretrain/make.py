"""Makes the checkpoints beside it, and the outputs that PyTorch gives: `python make.py FOLDER`.

Needs torch and numpy, which the package does not. The model follows the published architecture; it is written
plainly, to be a second opinion.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

SITES = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"
MODEL = {
    "n_layer": 2, "d_model": 32, "n_ctx": 24, "d_head": 8, "d_mlp": 64, "vocab_size": 80,
    "use_rms_norm": True, "tie_embeddings": False, "use_positional_embeddings": False,
    "use_bigram_table": True, "use_attention_sinks": True, "activation": "gelu", "dropout": 0.0,
    "use_bias": True,
}  # fmt: skip
SPARSITY = {
    "enable_weight_sparsity": True, "target_l0_fraction": 0.25, "enable_activation_sparsity": True,
    "activation_topk_fraction": 0.25,
}  # fmt: skip
TRAINING = {"total_tokens": 1000, "batch_size": 4, "dataset_name": "stories", "tokenizer_name": "words"}
DENSE = {"enable_weight_sparsity": False, "enable_activation_sparsity": False}
CASES = {
    "sinks_bigram": ({}, {}, "pytorch_model.bin"),
    "dense_positions_tied": (
        {
            "use_rms_norm": False, "tie_embeddings": True, "use_positional_embeddings": True,
            "use_bigram_table": False, "use_attention_sinks": False, "activation": "relu",
        },
        DENSE, "pytorch_model.bin",
    ),
    "no_bias_resid_mid": (
        {"use_bias": False, "use_bigram_table": False, "d_mlp": None},
        {"activation_sparsity_locations": f"{SITES},resid_mid"}, "sparse_model.bin",
    ),
}  # fmt: skip


class Sink(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.sink_logit = nn.Parameter(torch.zeros(heads))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_attn = nn.Linear(c["d_model"], 3 * c["d_model"], bias=c["use_bias"])
        self.c_proj = nn.Linear(c["d_model"], c["d_model"], bias=c["use_bias"])
        if c["use_attention_sinks"]:
            self.attn_fn = Sink(c["d_model"] // c["d_head"])


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c["d_model"], c["d_mlp"], bias=c["use_bias"])
        self.c_proj = nn.Linear(c["d_mlp"], c["d_model"], bias=c["use_bias"])


def norm(c):
    return (nn.RMSNorm if c["use_rms_norm"] else nn.LayerNorm)(c["d_model"])


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2, self.attn, self.mlp = norm(c), norm(c), Attention(c), Mlp(c)


class Model(nn.Module):
    def __init__(self, c, sparsity):
        super().__init__()
        self.c, self.fraction = c, sparsity.get("activation_topk_fraction")
        listed = sparsity.get("activation_sparsity_locations", SITES).split(",")
        self.sites = set(listed) if sparsity["enable_activation_sparsity"] else set()
        self.wte = nn.Embedding(c["vocab_size"], c["d_model"])
        if c["use_positional_embeddings"]:
            self.wpe = nn.Embedding(c["n_ctx"], c["d_model"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["n_layer"]))
        self.ln_f = norm(c)
        self.lm_head = nn.Linear(c["d_model"], c["vocab_size"], bias=False)
        if c["tie_embeddings"]:
            self.lm_head.weight = self.wte.weight
        if c["use_bigram_table"]:
            self.bigram_table = nn.Parameter(torch.zeros(c["vocab_size"], c["vocab_size"]))
        self.recorded = {}

    def put(self, name, value):
        self.recorded[f"act/{name}"] = value.detach().numpy()
        return value

    def sparse(self, value, site):
        if site not in self.sites:
            return value
        count = max(1, int(value.shape[-1] * self.fraction))
        order = value.abs().argsort(dim=-1, descending=True, stable=True)
        return value * torch.zeros_like(value).scatter_(-1, order[..., :count], 1.0)

    def attention(self, i, block, x):
        rows, length, width = x.shape
        d_head = self.c["d_head"]
        read = self.put(f"{i}.attn.act_in", self.sparse(block.ln_1(x), "attn_in"))
        parts = zip("qkv", block.attn.c_attn(read).chunk(3, -1), strict=True)
        parts = [self.put(f"{i}.attn.{name}", self.sparse(p, f"attn_{name}")) for name, p in parts]
        q, k, v = (p.reshape(rows, length, -1, d_head).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d_head)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        if self.c["use_attention_sinks"]:
            sink = block.attn.attn_fn.sink_logit.view(1, -1, 1, 1).expand(rows, -1, length, 1)
            scores = torch.cat([scores, sink], -1)
        pattern = scores.softmax(-1)[..., :length]
        y = self.put(f"{i}.attn.y", (pattern @ v).transpose(1, 2).reshape(rows, length, width))
        return self.put(f"{i}.attn.resid_delta", self.sparse(block.attn.c_proj(y), "attn_out"))

    def mlp(self, i, block, x):
        read = self.put(f"{i}.mlp.act_in", self.sparse(block.ln_2(x), "mlp_in"))
        activation = functional.gelu if self.c["activation"] == "gelu" else functional.relu
        hidden = self.sparse(activation(block.mlp.c_fc(read)), "mlp_neuron")
        written = block.mlp.c_proj(self.put(f"{i}.mlp.post_act", hidden))
        return self.put(f"{i}.mlp.resid_delta", self.sparse(written, "mlp_out"))

    def forward(self, tokens):
        x = self.wte(tokens)
        if self.c["use_positional_embeddings"]:
            x = x + self.wpe(torch.arange(tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            self.put(f"{i}.resid_in", x)
            x = self.put(f"{i}.resid_mid", self.sparse(x + self.attention(i, block, x), "resid_mid"))
            x = x + self.mlp(i, block, x)
        logits = self.lm_head(self.ln_f(self.put("final_resid", x)))
        return logits + self.bigram_table[tokens] if self.c["use_bigram_table"] else logits


def fill(model, sparse):
    """Gives every parameter random values, and matrices a quarter of nonzeros where weights are sparse."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            gain = "ln_" in key and key.endswith("weight")
            values = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2) + float(gain)
            if sparse and parameter.ndim > 1 and key != "bigram_table":
                values *= values.abs() >= values.abs().flatten().quantile(0.75)
            parameter.copy_(values)


def main(out):
    for seed, (name, (of_model, of_sparsity, weights)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = {"model_config": MODEL | of_model, "sparsity_config": SPARSITY | of_sparsity}
        config["training_config"] = TRAINING
        if weights == "sparse_model.bin":
            config["bridges_config"] = {
                "encoder_afrac": 0.25,
                "n_layers": 2,
                "d_dense": "dense",
                "d_sparse": 32,
            }
        sizes = config["model_config"]
        sizes = sizes | {"d_mlp": sizes["d_mlp"] or 4 * sizes["d_model"]}
        model = Model(sizes, config["sparsity_config"])
        fill(model, config["sparsity_config"]["enable_weight_sparsity"])
        tokens = torch.randint(sizes["vocab_size"], (2, 20))
        logits = model(tokens)
        targets = tokens.roll(-1, 1).reshape(-1)
        loss = functional.cross_entropy(logits.reshape(-1, sizes["vocab_size"]), targets)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / weights)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        np.savez_compressed(
            folder / "expected.npz", tokens=tokens.numpy().astype(np.int32),
            logits=logits.detach().numpy(), loss=loss.detach().numpy(), **model.recorded,
        )  # fmt: skip


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
