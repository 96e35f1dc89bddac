"""How TransformerLens sees the model: the adapter behind its entry point `transformer_lens.architectures`.

Needs TransformerLens 4 and PyTorch. `wsparse.interop.transformer_lens` makes bridges with it. Hooks have the
names of docs/hooks.md and see the same values as `wsparse.hooks`: nodes after AbsTopK, what a block reads
with the gain and the concatenated positions.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from wsparse.config import ModelConfig

ARCHITECTURE = "WsparseForCausalLM"


def bridge_config(config: ModelConfig) -> TransformerBridgeConfig:
    """Returns TransformerLens's config of a model."""
    cfg = TransformerBridgeConfig(
        d_model=config.d_model,
        d_head=config.d_head,
        n_heads=config.n_head,
        n_layers=config.n_layer,
        n_ctx=config.context,
        d_vocab=config.vocab_size,
        d_mlp=config.mlp_width,
        architecture=ARCHITECTURE,
        act_fn=config.activation,
        eps=config.eps,
        normalization_type="RMS" if config.norm == "rms" else "LN",
        uses_rms_norm=config.norm == "rms",
        positional_embedding_type="standard" if config.position == "added" else "none",
        tie_word_embeddings=config.tied_embeddings,
        default_prepend_bos=False,
        tokenizer_prepends_bos=False,
    )
    cfg.has_bigram_table = config.bigram != "none"
    return cfg


class WsparseAdapter(ArchitectureAdapter):
    """Places of `wsparse.interop.torch_model.Model` under TransformerLens's names."""

    # Folding a norm's gain, or centering what is written, would change what AbsTopK keeps.
    supports_fold_ln = False
    supports_center_writing_weights = False
    supports_compatibility_mode = False
    supports_kv_cache = False
    supports_batched_generation = False
    supports_hf_output_attentions = False

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        self.supports_fold_ln = self.supports_center_writing_weights = False
        self.component_mapping = {"embed": EmbeddingBridge(name="tok_embed")}
        if cfg.positional_embedding_type == "standard":
            self.component_mapping["pos_embed"] = PosEmbedBridge(name="positions")
        self.component_mapping["blocks"] = _Block(
            name="layers",
            config=cfg,
            submodules={
                "ln1": _Read("ln1"),
                "attn": _Attention(
                    "attn", cfg, submodules={name: LinearBridge(name=name) for name in "qkvo"}
                ),
                "ln2": _Read("ln2"),
                "mlp": MLPBridge(
                    "mlp", submodules={"in": LinearBridge(name="fc_in"), "out": LinearBridge(name="fc_out")}
                ),
            },
        )
        self.component_mapping["ln_final"] = _Read("final_norm")
        self.component_mapping["unembed"] = UnembeddingBridge(name="head")
        if getattr(cfg, "has_bigram_table", False):
            self.component_mapping["bigram"] = EmbeddingBridge(name="bigram_table")


class _Block(BlockBridge):
    """A layer. There are no separate inputs of q, k and v to hook: they read one, after the norm."""

    hook_aliases = {  # noqa: RUF012
        alias: place
        for alias, place in BlockBridge.hook_aliases.items()
        if alias not in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
    }


class _Read(GeneralizedComponent):
    """A norm with hooks on its scale and on its result."""

    def __init__(self, name: str):
        super().__init__(name)
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def forward(self, x: Any, positions: Any = None) -> Any:
        norm: Any = self.original_component
        x = self.hook_in(x)
        y = norm.scaled(x, self.hook_scale(norm.scale(x)), positions)
        return self.hook_out(self.hook_normalized(y))


class _Attention(AttentionBridge):
    """Attention whose scores and pattern pass their hooks on the way, so that changes have an effect."""

    supports_split_qkv_fork = False

    def forward(self, x: Any) -> Any:
        attention: Any = self.original_component
        x = self.hook_in(x)
        return self.hook_out(attention(x, self.hook_attn_scores, self.hook_pattern))
