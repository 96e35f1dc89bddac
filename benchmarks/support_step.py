"""Tokens per second of a cycle: one exploration step, then frozen steps over the nonzeros.

`python benchmarks/support_step.py`. The step of `wsparse.train` explores, or is frozen by masks in dense
code; the frozen step touches the nonzeros. All are timed in one process, in turns, at the final density, and
the last line says how many times the tokens of dense code a cycle of `--every` steps makes. `--dump=FILE`
writes the compiled frozen step, to look for copies of whole matrices.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags
import jax
import timing

from wsparse import sharding, sparsity
from wsparse.command import run_command
from wsparse.config import ModelConfig, SparsityConfig, TrainConfig
from wsparse.ops import cpu
from wsparse.step import make_program

STEPS = 1000
# Name: d_model, layers, context, batch, density, overrides.
EMBEDDINGS = "embed/tokens=1/128,head/unembed=1/128"
SIZES = {
    "256": (256, 2, 128, 32, 1 / 64, ""),
    "512": (512, 4, 256, 16, 1 / 64, ""),
    "1024": (1024, 2, 128, 16, 1 / 1000, EMBEDDINGS),
}


def recipe(name: str, every: int) -> TrainConfig:
    """A run that is at its final density from the first step, and has no floor."""
    d_model, layers, context, batch, density, overrides = SIZES[name]
    return TrainConfig(
        model=ModelConfig(
            vocab_size=2048, context=context, n_layer=layers, d_model=d_model, n_head=d_model // 16
        ),
        sparsity=SparsityConfig(
            density=density,
            anneal_start=0.0,
            anneal_end=1e-9,
            min_per_neuron=0,
            explore_every=every,
            overrides=overrides,
        ),
        batch_size=batch,
        steps=STEPS,
    )


class Steps:
    """The steps of a run on a fixed batch, each of which can be called at any time."""

    def __init__(self, config: TrainConfig):
        self.program = make_program(config, sharding.make_mesh(config.mesh))
        self.explores = sparsity.exploration_steps(config.sparsity, STEPS)
        shape = (config.accumulate, config.batch_size // config.accumulate, config.model.context + 1)
        self.batch = jax.random.randint(jax.random.key(1), shape, 0, config.model.vocab_size)
        self.state = self.program.init()
        for _ in range(2):
            self._dense()
        self.find()

    def find(self):
        """Collect where the nonzeros are."""
        self.places, fits = self.program.find_places(self.state.params)
        if not fits:
            raise ValueError("there are more nonzeros than the budget allows")
        return self.places

    def _dense(self):
        self.state, report = self.program.step(self.state, self.batch)
        return jax.block_until_ready(report)

    def dense(self, *, explore: bool):
        """Make one step of dense code, at a count where it explores, or where it does not."""
        while self.explores[int(self.state.step)] != explore:
            self.over_nonzeros()
        return self._dense

    def over_nonzeros(self):
        """Make one frozen step over the nonzeros."""
        self.state, report = self.program.frozen_step(self.state, self.places, self.batch)
        return jax.block_until_ready(report)


def main(argv) -> None:
    """Time the steps of every size and print a table and one JSON line for each."""
    del argv
    cpu.enable()
    every = flags.FLAGS.every
    for name in flags.FLAGS.sizes:
        config = recipe(name, every)
        steps = Steps(config)
        if flags.FLAGS.dump:
            lowered = steps.program.frozen_step.lower(steps.state, steps.places, steps.batch)
            pathlib.Path(flags.FLAGS.dump).write_text(lowered.compile().as_text())
        times = {"exploration step": [], "masked frozen step": [], "frozen step": [], "find places": []}
        for _ in range(flags.FLAGS.rounds):
            # Not timed: what brings the run to a step that explores, or to one that does not.
            times["exploration step"].append(timing.seconds(steps.dense(explore=True)))
            times["find places"].append(timing.seconds(steps.find))
            times["masked frozen step"].append(timing.seconds(steps.dense(explore=False)))
            times["frozen step"].append(timing.seconds(steps.over_nonzeros))
        best = {kind: min(each) for kind, each in times.items()}
        explored = best["exploration step"]
        cycle = (explored + best["find places"] + (every - 1) * best["frozen step"]) / every
        masked = (explored + (every - 1) * best["masked frozen step"]) / every
        tokens = config.batch_size * config.model.context
        print(
            f"width {name}: {tokens / cycle:.0f} tokens/s, {masked / cycle:.2f} times those of masked steps"
        )
        for kind, value in best.items():
            print(f"  {kind:22}{value:8.3f} s")
        print(json.dumps({"width": name, "seconds": best, "tokens_per_s": tokens / cycle}))


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["256", "512", "1024"], "Names of sizes.")
    flags.DEFINE_integer("every", 8, "Steps from one exploration step to the next.")
    flags.DEFINE_integer("rounds", 3, "Timed calls of each step.")
    flags.DEFINE_string("dump", "", "File for the compiled frozen step of the last size.")
    run_command(main)
