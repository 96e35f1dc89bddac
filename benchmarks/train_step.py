"""What sparsity costs in a training step: `python benchmarks/train_step.py [--config=configs/tiny.py]`.

In one process, on one batch, the step of a config is timed beside the same step without the projection,
without AbsTopK, and without both. The variants take turns, so that a machine whose speed drifts slows
all of them, and the ratios of the medians are what to read. The floor is the matmul FLOPs of the step at
the rate this machine reaches on a large matmul in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json

from absl import flags
import timing

from wsparse import model, recipes, sharding
from wsparse.command import run_command
from wsparse.config import TrainConfig
from wsparse.ops import cpu
from wsparse.step import make_program


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """The config with its parts switched off."""
    no_top_k = dataclasses.replace(config.model, abs_top_k_fraction=None)
    dense = dataclasses.replace(config.sparsity, density=1.0, overrides="")
    return {
        "all": config,
        "no projection": dataclasses.replace(config, sparsity=dense),
        "no AbsTopK": dataclasses.replace(config, model=no_top_k),
        "neither": dataclasses.replace(config, model=no_top_k, sparsity=dense),
    }


def main(argv) -> None:
    """Time the variants and print a table and one JSON line."""
    cpu.enable()
    _, config = recipes.from_flag()
    # The projection is timed where it works hardest, at the final density.
    steps = {name: _stepper(variant) for name, variant in variants(_at_the_end(config)).items()}
    medians = timing.medians_in_turns(steps, flags.FLAGS.rounds)
    rate = timing.matmul_rate()
    tokens = config.batch_size * config.model.context
    floor = 3 * model.forward_flops(config.model, tokens) / rate
    for name, value in medians.items():
        print(f"{name:14} {value:8.3f} s  {tokens / value:8.0f} tokens/s  {value / floor:5.2f}x the floor")
    print(f"{'floor':14} {floor:8.3f} s  at {rate / 1e9:.0f} GFLOP/s")
    ratios = {
        "projection": medians["all"] / medians["no projection"],
        "AbsTopK": medians["all"] / medians["no AbsTopK"],
    }
    for name, ratio in ratios.items():
        share = max(1 - 1 / ratio, 0.0)
        print(f"the step with {name} takes {ratio:.2f} times the step without: {share:.1%} of it")
    print(json.dumps({"seconds": medians, "floor": floor, "ratios": ratios}))


def _at_the_end(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        config, sparsity=dataclasses.replace(config.sparsity, anneal_start=0.0, anneal_end=1e-9)
    )


def _stepper(config: TrainConfig) -> Callable[[], object]:
    """A call that runs one step of the config on a fixed batch."""
    program = make_program(config, sharding.make_mesh(config.mesh))
    return timing.stepper(program, config)[0]


if __name__ == "__main__":
    recipes.define_flag("tiny", text="Recipe to time")
    flags.DEFINE_integer("rounds", 12, "Timed steps of each variant.")
    run_command(main)
