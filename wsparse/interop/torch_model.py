"""The model in PyTorch, for tools that take PyTorch modules: the same function as `wsparse.model.forward`.

Needs PyTorch, and no jax. Modules lie where `wsparse.interop.lens_adapter` looks for them, and AbsTopK acts
inside the module whose output is the node, so that a hook on a module's output sees the node's value.

Shapes: B batch, T time, D d_model, R what a block reads, H head, K d_head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from wsparse.config import ModelConfig
from wsparse.errors import UserError

Hook = Callable[[torch.Tensor], torch.Tensor]


def load(config: ModelConfig, leaves: Mapping[str, torch.Tensor]) -> Model:
    """Returns the model of parameters by path, as `interop.pretrained` stores them, in evaluation mode."""
    model = Model(config)
    model.load_state_dict(_state(config, leaves), strict=True)
    return model.eval()


class Model(nn.Module):
    """Tokens to logits; in float32, whatever the config's `compute_dtype` is."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.shape = config
        self.tok_embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.position != "none":
            self.positions = nn.Embedding(config.context, config.d_pos or config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = Norm(config, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.logits_bias)
        if config.tied_embeddings:
            self.head.weight = self.tok_embed.weight
        if config.bigram != "none":
            self.bigram_table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Returns logits `(B, T, V)`.

        Args:
          input_ids: Tokens, `(B, T)`.
          attention_mask: Must be all ones: the model has no padding on the left.
          inputs_embeds: The residual stream `(B, T, D)` in place of tokens, where there is no bigram table.
          **unused: What callers pass to every model, such as `use_cache`.

        Raises:
          UserError: The tokens are more than the context, a mask masks, or a bigram table has no tokens.
        """
        del unused
        config = self.shape
        if attention_mask is not None and not bool(torch.all(attention_mask == 1)):
            raise UserError("the model has no padding: give prompts of one length, or one at a time")
        if input_ids is None and config.bigram != "none":
            raise UserError("the model has a bigram table, which needs tokens: it cannot start at a layer")
        x_BTD = self.tok_embed(input_ids) if inputs_embeds is None else inputs_embeds
        time = x_BTD.shape[1]
        if time > config.context:
            raise UserError(f"the model sees at most {config.context} tokens, got {time}")
        positions = None
        if config.position != "none":
            positions = self.positions(torch.arange(time, device=x_BTD.device)[None])
        if config.position == "added":
            x_BTD, positions = x_BTD + positions, None
        for layer in self.layers:
            (x_BTD,) = layer(x_BTD, positions)
        logits_BTV = self.head(self.final_norm(x_BTD))
        return logits_BTV if config.bigram == "none" else logits_BTV + self.bigram_table(input_ids)


class Block(nn.Module):
    """One layer; returns a tuple of the residual stream, as blocks of the `transformers` library do."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.shape = config
        self.ln1 = Read(config, "attn_in")
        self.attn = Attention(config)
        self.ln2 = Read(config, "mlp_in")
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor, positions: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        x_BTD = self._added(x_BTD, self.attn(self.ln1(x_BTD, positions)), "resid_post_attn")
        return (self._added(x_BTD, self.mlp(self.ln2(x_BTD, positions)), "resid_post_mlp"),)

    def _added(self, x_BTD: torch.Tensor, delta_BTD: torch.Tensor, site: str) -> torch.Tensor:
        x_BTD = x_BTD + delta_BTD
        x_BTD = functional.relu(x_BTD) if self.shape.residual_activation == "relu" else x_BTD
        return _sparse(x_BTD, self.shape, site)


class Norm(nn.Module):
    """RMS or layer norm, in two steps: `scale` says what the stream is divided by, `scaled` does it."""

    def __init__(self, config: ModelConfig, width: int):
        super().__init__()
        self.shape = config
        self.weight = nn.Parameter(torch.ones(width))
        has_bias = config.norm == "layer" and config.norm_bias
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(self._centered(x).square().mean(-1, keepdim=True) + self.shape.eps)

    def scaled(self, x: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor | None = None):
        del positions
        y = self._centered(x) / scale * self.weight
        return y if self.bias is None else y + self.bias

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.scaled(x, self.scale(x), positions)

    def _centered(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.shape.norm == "layer" else x


class Read(Norm):
    """What a block reads: the normed stream, the normed positions beside it, and AbsTopK of both."""

    def __init__(self, config: ModelConfig, site: str):
        super().__init__(config, config.d_model)
        self.site = site
        self.positions = Norm(config, config.d_pos) if config.concatenates_positions else None

    def scaled(self, x: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor | None = None):
        y_BTR = super().scaled(x, scale)
        if self.positions is not None:
            position = self.positions(positions).expand(*x.shape[:2], -1)
            y_BTR = torch.cat([y_BTR, position], dim=-1)
        return _sparse(y_BTR, self.shape, self.site)


class Linear(nn.Linear):
    """A linear layer whose output AbsTopK acts on."""

    def __init__(self, config: ModelConfig, inputs: int, outputs: int, site: str | None = None):
        super().__init__(inputs, outputs, bias=config.bias)
        self.shape, self.site = config, site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _sparse(super().forward(x), self.shape, self.site)


class Attention(nn.Module):
    """Causal attention; `scores_fn` and `pattern_fn` see, and may change, the scores and the pattern."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.shape = config
        width, read = config.attention_width, config.read_width
        self.q, self.k, self.v = (Linear(config, read, width, f"attn_{name}") for name in "qkv")
        self.o = Linear(config, width, config.d_model, "attn_out")
        self.sink = nn.Parameter(torch.zeros(config.n_head)) if config.sink else None

    def forward(
        self, x_BTR: torch.Tensor, scores_fn: Hook | None = None, pattern_fn: Hook | None = None
    ) -> torch.Tensor:
        config, (batch, time, _) = self.shape, x_BTR.shape
        heads = batch, time, config.n_head, config.d_head
        q, k, v = (linear(x_BTR).view(heads).transpose(1, 2) for linear in (self.q, self.k, self.v))
        scores_BHTT = q @ k.transpose(-1, -2) / math.sqrt(config.d_head)
        future_TT = torch.ones(time, time, dtype=torch.bool, device=x_BTR.device).triu(1)
        scores_BHTT = scores_BHTT.masked_fill(future_TT, -math.inf)
        scores_BHTT = scores_BHTT if scores_fn is None else scores_fn(scores_BHTT)
        if self.sink is None:
            pattern_BHTT = scores_BHTT.softmax(-1)
        else:
            # The sink is a key whose value is 0: it joins the denominator alone.
            sink = self.sink[None, :, None, None].expand(batch, -1, time, 1)
            pattern_BHTT = torch.cat([sink, scores_BHTT], dim=-1).softmax(-1)[..., 1:]
        pattern_BHTT = pattern_BHTT if pattern_fn is None else pattern_fn(pattern_BHTT)
        return self.o((pattern_BHTT @ v).transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    """Two linear layers with the nonlinearity, and AbsTopK of the neurons, between."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.shape = config
        self.fc_in = Linear(config, config.read_width, config.mlp_width)
        self.fc_out = Linear(config, config.mlp_width, config.d_model, "mlp_out")

    def forward(self, x_BTR: torch.Tensor) -> torch.Tensor:
        nonlinearity = functional.gelu if self.shape.activation == "gelu" else functional.relu
        return self.fc_out(_sparse(nonlinearity(self.fc_in(x_BTR)), self.shape, "mlp_neuron"))


def _sparse(x: torch.Tensor, config: ModelConfig, site: str | None) -> torch.Tensor:
    """Returns AbsTopK of a site's value, the first of equal magnitudes first; where it is off, the value."""
    if config.abs_top_k_fraction is None or site not in config.abs_top_k_sites:
        return x
    k = int(config.abs_top_k_fraction * x.shape[-1])
    kept = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


def _state(config: ModelConfig, leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the state dict of `Model` for parameters by path; kernels are transposed, layers unstacked."""
    state = {}
    for path, leaf in leaves.items():
        if path.startswith("blocks/"):
            for layer, part in enumerate(leaf):
                state[f"layers.{layer}.{_block_key(path)}"] = part.T if path.endswith("kernel") else part
        else:
            state[_KEYS[path]] = leaf.T if path == "head/unembed" else leaf
    if config.tied_embeddings:
        state["head.weight"] = state["tok_embed.weight"]
    return state


_KEYS = {
    "embed/tokens": "tok_embed.weight",
    "embed/positions": "positions.weight",
    "embed/sinusoids": "positions.weight",
    "head/norm/gain": "final_norm.weight",
    "head/norm/bias": "final_norm.bias",
    "head/unembed": "head.weight",
    "head/bigram": "bigram_table.weight",
    "head/logits_bias": "head.bias",
}
_BLOCK_MODULES = {
    "attn_norm": "ln1", "mlp_norm": "ln2", "attn_pos_norm": "ln1.positions", "mlp_pos_norm": "ln2.positions",
    "attn/q": "attn.q", "attn/k": "attn.k", "attn/v": "attn.v", "attn/out": "attn.o",
    "mlp/fc": "mlp.fc_in", "mlp/proj": "mlp.fc_out",
}  # fmt: skip


def _block_key(path: str) -> str:
    if path == "blocks/attn/sink":
        return "attn.sink"
    module, _, kind = path.removeprefix("blocks/").rpartition("/")
    return f"{_BLOCK_MODULES[module]}.{'bias' if kind == 'bias' else 'weight'}"
