"""Bytes of device memory that kernels and what XLA makes of plain JAX move: `python benchmarks/kernels.py`.

Everything is compiled for one TPU chip (no TPU is needed, only the extra `aot`) at the sizes of one chip's
share of `configs/gao.py:475m`: 1024 tokens, 2048 channels, 128 heads. "Floor" is every argument read and
every result written once. Searches of plain JAX stop when their data say so: theirs are upper bounds. jax's
splash attention stands beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import os
from typing import Any

from absl import flags
import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from wsparse import aot, hlo
from wsparse.command import run_command
from wsparse.ops import top_k
from wsparse.ops.attention import attend

B, T, D, H, K = 4, 256, 2048, 128, 16
BF16 = jnp.bfloat16
MEBI = 2**20


def splash(q_BTHK, k_BTHK, v_BTHK, sink_H, *, seq_minor: bool):
    """jax's splash attention with sinks, causal; its layout of q, k and v may put time last."""
    layout = splash_attention_kernel.QKVLayout
    sizes = splash_attention_kernel.BlockSizes(
        block_q=T, block_kv=T, block_kv_compute=T,
        block_q_dkv=T, block_kv_dkv=T, block_kv_dkv_compute=T, use_fused_bwd_kernel=True,
        **dict.fromkeys(
            ("q_layout", "k_layout", "v_layout"),
            layout.SEQ_MINOR if seq_minor else layout.HEAD_DIM_MINOR,
        ),
    )  # fmt: skip
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * H)
    kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q_BHTK, k_BHTK, v_BHTK = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    scaled = (q_BHTK / K**0.5).astype(q_BTHK.dtype)
    run = jax.vmap(lambda q, k, v: kernel(q, k, v, sinks=sink_H))
    return jnp.swapaxes(run(scaled, k_BHTK, v_BHTK), 1, 2)


def of_channels(attend, q_BTE, k_BTE, v_BTE, sink_H):
    """Attention of what products leave and take, all heads' channels side by side."""
    q, k, v = (jnp.reshape(each, (B, T, H, K)) for each in (q_BTE, k_BTE, v_BTE))
    return jnp.reshape(attend(q, k, v, sink_H), q_BTE.shape)


def pulled(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward and backward pass: `(gradient, *arguments) -> (value, gradients)`."""

    def both(gradient, *arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(gradient)

    return both


def cases() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> function, shapes of its arguments."""
    rows = ((B, T, D), BF16)
    wide = ((B, T, 4 * D), BF16)
    attention = (*(rows,) * 3, ((H,), jnp.float32))
    stack = ((8, 1024, 2048), jnp.float32)

    def project(w, k):
        (selection,) = top_k.select([(w, k, 1)], min_per_neuron=4, replicated=True)
        return selection

    found = {
        "AbsTopK of 2048, forward": (lambda x: top_k.abs_top_k(x, D // 4), (rows,)),
        "AbsTopK of 8192, forward": (lambda x: top_k.abs_top_k(x, D), (wide,)),
        "AbsTopK of 2048, both ways": (pulled(lambda x: top_k.abs_top_k(x, D // 4)), (rows, rows)),
        "projection of 8 matrices 1024 x 2048": (project, (stack, ((8,), jnp.int32))),
    }
    ways = {
        "": attend,
        ", splash, channels last": functools.partial(splash, seq_minor=False),
        ", splash, time last": functools.partial(splash, seq_minor=True),
    }
    for name, way in ways.items():
        function = functools.partial(of_channels, way)
        found[f"attention forward{name}"] = (function, attention)
        found[f"attention both ways{name}"] = (pulled(function), (rows, *attention))
    return found


def measured(target: aot.Target, function: Callable[..., Any], shapes: Sequence[Any]) -> str:
    """`floor, HBM traffic, temporaries` of a function compiled for one chip, in MiB."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=target.devices[:1])

    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    place = NamedSharding(mesh, P())
    abstract = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    results = jax.tree.leaves(jax.eval_shape(function, *abstract))
    floor = sum(leaf.size * leaf.dtype.itemsize for leaf in (*abstract, *results))
    try:
        compiled = jax.jit(traced).lower(*abstract).compile()
    except Exception as error:  # a kernel of jax's that does not take these shapes
        return f"{floor / MEBI:.1f} | does not compile: {str(error).splitlines()[0][:80]} |"
    traffic = hlo.parse(compiled.as_text()).hbm_bytes()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return f"{floor / MEBI:.1f} | {traffic / MEBI:.1f} | {temporaries / MEBI:.1f}"


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    del argv
    options: Any = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    target = aot.find_target(options.topology)
    print("| what | kernels | floor, MiB | HBM traffic, MiB | temporaries, MiB |\n|---|---|---|---|---|")
    for name, (function, shapes) in cases().items():
        for kernels in ("0", "1") if "splash" not in name else ("0",):
            os.environ["WSPARSE_TPU_KERNELS"] = kernels
            line = measured(target, function, shapes)
            print(f"| {name} | {'yes' if kernels == '1' else 'no'} | {line} |", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("topology", "v5e-1", "The kind of chip.")
    run_command(main)
