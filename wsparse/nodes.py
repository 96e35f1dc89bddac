"""The one table of node locations, and `Node`, the name of one node.

Whatever depends on where nodes are derives from the tables of this file: the floor per neuron, sharding,
weight decay, hooks' names, the edges of circuits, the page. They need no jax; the taps that look at or
change what happens at a location are in `wsparse.taps`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, NamedTuple

from wsparse.config import ModelConfig
from wsparse.errors import UserError, closest

Channels = Literal["residual", "read", "heads", "neurons"]
_WIDTHS = {"residual": "d_model", "read": "read_width", "heads": "attention_width", "neurons": "mlp_width"}


@dataclasses.dataclass(frozen=True)
class NodeKind:
    """One row of the table of locations.

    Attributes:
      channels: What the last axis holds: "residual" channels; what a block "read"s, which are residual
        channels and then concatenated positions; those of all "heads" side by side; MLP "neurons".
      site: AbsTopK site that acts here; None where there are no nodes.
      incoming: Paths of the kernels whose output side is this location.
      outgoing: Paths of the kernels whose input side is this location.
      hook: TransformerLens's name of the place, after "blocks.{i}."; empty where there is none.
      meaning: What a channel is, in the words of the page.
    """

    channels: Channels
    site: str | None = None
    incoming: tuple[str, ...] = ()
    outgoing: tuple[str, ...] = ()
    hook: str = ""
    meaning: str = ""

    def width(self, config: ModelConfig) -> int:
        """Returns the number of channels."""
        return getattr(config, _WIDTHS[self.channels])


_Q, _K, _V = (f"blocks/attn/{name}/kernel" for name in "qkv")
_OUT, _FC, _PROJ = "blocks/attn/out/kernel", "blocks/mlp/fc/kernel", "blocks/mlp/proj/kernel"

# Every location of a layer, in the order of the forward pass, and the end of the residual stream.
LOCATIONS: dict[str, NodeKind] = {
    "attn.resid_in": NodeKind("residual", hook="hook_resid_pre"),
    "attn.act_in": NodeKind("read", "attn_in", (), (_Q, _K, _V), "ln1.hook_normalized", "read by attention"),
    "attn.q": NodeKind("heads", "attn_q", (_Q,), (), "attn.hook_q", "query"),
    "attn.k": NodeKind("heads", "attn_k", (_K,), (), "attn.hook_k", "key"),
    "attn.v": NodeKind("heads", "attn_v", (_V,), (_OUT,), "attn.hook_v", "value"),
    "attn.y": NodeKind("heads", hook="attn.hook_z"),
    "attn.resid_delta": NodeKind(
        "residual", "attn_out", (_OUT,), (), "hook_attn_out", "written by attention"
    ),
    "mlp.resid_mid": NodeKind("residual", hook="hook_resid_mid"),
    "mlp.act_in": NodeKind("read", "mlp_in", (), (_FC,), "ln2.hook_normalized", "read by the MLP"),
    "mlp.post_act": NodeKind("neurons", "mlp_neuron", (_FC,), (_PROJ,), "mlp.hook_post", "neuron"),
    "mlp.resid_delta": NodeKind("residual", "mlp_out", (_PROJ,), (), "hook_mlp_out", "written by the MLP"),
    "final_resid": NodeKind("residual"),
}

# Locations whose channels are nodes. The others are recorded and can be tapped; "final_resid" has no layer.
NODES = {name: kind for name, kind in LOCATIONS.items() if kind.site is not None}
OTHER_LOCATIONS = tuple(name for name in LOCATIONS if name not in NODES)

# Norms of the residual stream, in the order of the forward pass; see `wsparse.taps` for their scales.
NORMS = ("attn_norm", "mlp_norm", "final_norm")


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns `(n_layer, N)` for every node location."""
    return {name: (config.n_layer, kind.width(config)) for name, kind in NODES.items()}


class Connection(NamedTuple):
    """A weight matrix `(in, out)` of a block, between the node locations `source` and `target`.

    `kernel` is its parameter path; layers are stacked on a leading axis there. `neuron_axis` is the axis of
    one layer's matrix that indexes neurons or attention channels, the side that is not the residual stream's.
    """

    source: str
    target: str
    kernel: str
    neuron_axis: int

    @property
    def bias(self) -> str:
        """Parameter path of the bias beside the kernel."""
        return f"{self.kernel.removesuffix('kernel')}bias"


_TARGET_OF = {path: name for name, kind in NODES.items() for path in kind.incoming}
# Gao et al. 2025: act_in to q, k, v; v to resid_delta; act_in to post_act; post_act to resid_delta.
CONNECTIONS = tuple(
    Connection(name, _TARGET_OF[path], path, 1 if kind.channels == "read" else 0)
    for name, kind in NODES.items()
    for path in kind.outgoing
)

_NAME = re.compile(r"(0|[1-9]\d*)\.(\w+\.\w+)\.(0|[1-9]\d*)", re.ASCII)


class Node(NamedTuple):
    """One node of a model; it prints as its name, e.g. "3.attn.q.17"."""

    layer: int
    location: str
    channel: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.location}.{self.channel}"

    @classmethod
    def parse(cls, name: str, config: ModelConfig | None = None) -> Node:
        """Returns the node of a name as `str(node)` gives it, "layer.location.channel".

        Raises:
          UserError: The name has another form, an unknown location, or is not in the model of `config`.
        """
        match = _NAME.fullmatch(name) if len(name) < 80 else None
        if match is None:
            raise UserError(
                f"a node is written layer.location.channel, such as '0.attn.q.17', got {name[:80]!r}"
            )
        layer, location, channel = int(match[1]), match[2], int(match[3])
        if location not in NODES:
            raise UserError(
                f"node {name!r}: there is no node location {location!r}{closest(location, NODES)}; "
                f"locations are {', '.join(NODES)}"
            )
        if config is not None:
            width = NODES[location].width(config)
            if layer >= config.n_layer or channel >= width:
                raise UserError(
                    f"node {name!r} is not in this model: it has {config.n_layer} layers and "
                    f"{width} channels at {location}, both counted from 0"
                )
        return cls(layer, location, channel)

    def order(self) -> tuple[int, int, int]:
        """Returns a key that sorts nodes by layer, then in the order of the forward pass."""
        return self.layer, _ORDER[self.location], self.channel


_ORDER = {location: i for i, location in enumerate(NODES)}


def __getattr__(name: str) -> Any:
    """Finds taps, which lived here before; they need jax, which reading a circuit does not."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wsparse import taps

    return getattr(taps, name)
