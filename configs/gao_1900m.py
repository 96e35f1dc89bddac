"""The 1.9B row of Gao et al. 2025: 8 layers, d_model 4096, context 256, vocabulary 2048.

Reproduces: the model shape of "Weight-sparse transformers have interpretable circuits". Counted by this
    code it has 1.63B parameters, the bigram table included; at the default density of 1/128 about 12.7M
    are nonzero. Any density down to 1/1000: `--config.sparsity.density=0.001`.
Hardware: a TPU v5e-64 slice, for which it compiles and fits (docs/scale.md); not run there by us.
    Mesh: parameters over 32 chips (128 columns of a matrix each, one
    TPU tile), batches over all; activations fit without rematerialization.
Minutes: not measured. The recipe sees 10 billion tokens.
Expected loss: not measured. Expected L0: exactly round(density * size) in every projected matrix, more
    only where 4 nonzeros per neuron do not fit into that.
Command: python -m wsparse.train --config=configs/gao_1900m.py --config.data.source=arrayrecord:DIR
    with DIR from `python -m wsparse.data.prepare`; the default source suits a smoke test only.
"""

import ml_collections

from wsparse.config import recipe


def get_config() -> ml_collections.ConfigDict:
    """The recipe; every key can be overridden with `--config.key=value`."""
    batch_size, context = 512, 256
    return recipe(
        model={
            "vocab_size": 2048,
            "context": context,
            "n_layer": 8,
            "d_model": 4096,
            "n_head": 256,
            "d_head": 16,
            "compute_dtype": "bfloat16",
            "remat": False,
        },
        sparsity={"density": 1 / 128, "anneal_end": 0.8},
        optimizer={"learning_rate": 2e-3},
        mesh={"data": -1, "fsdp": 32},
        steps=10_000_000_000 // (batch_size * context),
        batch_size=batch_size,
        log_every=100,
        eval_every=5000,
        checkpoint_every=5000,
    )
