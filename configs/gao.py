"""The sizes of Gao et al. 2025: 8 layers, context 256, vocabulary 2048, d_model 256 to 4096.

Reproduces: the model shapes of "Weight-sparse transformers have interpretable circuits", one variant for
    each row of its table. Any density down to 1/1000: `--config.sparsity.density=0.001`. Counted by this
    code, the bigram table included, and at the default density:

    | variant | parameters | d_model | density | nonzero | slice |
    |---|---|---|---|---|---|
    | 7m | 11.6M | 256 | 1/8 | 0.92M | TPU v5e-8 |
    | 30m | 31.5M | 512 | 1/16 | 1.71M | TPU v5e-8 |
    | 119m | 109M | 1024 | 1/32 | 3.28M | TPU v5e-16 |
    | 475m | 415M | 2048 | 1/64 | 6.42M | TPU v5e-32 |
    | 1900m | 1.63B | 4096 | 1/128 | 12.7M | TPU v5e-64 |

Hardware: the slice named above, for which the variant compiles and fits (docs/scale.md); not run there by us.
    Mesh: 7m and 30m keep all parameters on every chip. In the others parameters are sharded so that a chip
    holds 128 columns of a matrix, one TPU tile; batches are sharded over all chips, and activations fit
    without rematerialization.
Minutes: not measured. Every variant sees 10 billion tokens.
Expected loss: not measured. Expected L0: exactly round(density * size) in every projected matrix, more
    only where 4 nonzeros per neuron do not fit into that.
Command: python -m wsparse.train --config=configs/gao.py:475m --config.data.source=arrayrecord:DIR
    with DIR from `python -m wsparse.data.prepare`; the default source suits a smoke test only.
"""

from typing import NamedTuple

import ml_collections

from wsparse.config import recipe


class Size(NamedTuple):
    """What differs between the rows of the table."""

    d_model: int
    density: float
    batch_size: int
    fsdp: int
    anneal_end: float = 0.5


VARIANTS = {
    "7m": Size(d_model=256, density=1 / 8, batch_size=64, fsdp=1),
    "30m": Size(d_model=512, density=1 / 16, batch_size=64, fsdp=1),
    "119m": Size(d_model=1024, density=1 / 32, batch_size=128, fsdp=8),
    "475m": Size(d_model=2048, density=1 / 64, batch_size=256, fsdp=16),
    "1900m": Size(d_model=4096, density=1 / 128, batch_size=512, fsdp=32, anneal_end=0.8),
}


def get_config(variant: str) -> ml_collections.ConfigDict:
    """Returns the recipe of a size; every key can be overridden with `--config.key=value`."""
    size = VARIANTS[variant]
    context = 256
    return recipe(
        model={
            "vocab_size": 2048,
            "context": context,
            "n_layer": 8,
            "d_model": size.d_model,
            "n_head": size.d_model // 16,
            "d_head": 16,
            "compute_dtype": "bfloat16",
            "remat": False,
        },
        sparsity={"density": size.density, "anneal_end": size.anneal_end},
        optimizer={"learning_rate": 2e-3},
        mesh={"data": -1, "fsdp": size.fsdp},
        steps=10_000_000_000 // (size.batch_size * context),
        batch_size=size.batch_size,
        log_every=100,
        eval_every=5000,
        checkpoint_every=5000,
    )
