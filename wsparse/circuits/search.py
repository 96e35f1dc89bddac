"""Hyperparameters of pruning: a Bayesian search in batches of vmapped trials, and a random one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optuna

from wsparse import files, model
from wsparse.circuits import masks
from wsparse.circuits.mask_learning import HParams, prune
from wsparse.circuits.pairs import HasPairs, arrays
from wsparse.circuits.workers import ElsewhereError, Pieces
from wsparse.config import ModelConfig
from wsparse.errors import UserError

Sampler = Literal["tpe", "random"]

# Each hyperparameter is searched on a logarithmic scale between these; the paper's centers are inside.
_BETWEEN = HParams(
    k_coef=(1e-4, 1e-2),
    noise=(3e-3, 1e-1),
    bias=(3e-2, 3e-1),
    weight_decay=(1e-4, 1e-2),
    learning_rate=(3e-3, 3e-2),
    one_minus_b2=(2e-2, 2e-1),
    warmup=(2e-2, 2e-1),
    temperature=(0.3, 3.0),
)

# Where a search starts beside the paper's centers: for runs of a hundred steps instead of thousands.
FAST = HParams(k_coef=1e-3, learning_rate=1e-2)
# With fewer trials than this the paper's centers are not tried.
_FEW = 8


class Trial(NamedTuple):
    """One pruning run of a search.

    Attributes:
      number: from 0; the first is at `FAST`, in longer searches the second at the paper's centers.
      hparams: floats.
      tau: float32 `(U,)`.
      value: what the search minimizes.
      result: gives whatever the objective found beside the value, computed anew for a trial of another
        process.
    """

    number: int
    hparams: HParams
    tau: np.ndarray
    value: float
    result: Callable[[], Any]


class Pruner:
    """`prune` of one model, vmapped over trials and compiled once for all tasks and trials.

    Over several devices the trials are spread as evenly as they divide; the rest is replicated.

    Attributes:
      parallel: trials in one call.
      devices: over how many devices they are spread.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        steps: int,
        pairs_per_step: int,
        tie_qk: bool = True,
        parallel: int = 4,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Settings are static.

        Args:
          config: of the model.
          steps: of each trial.
          pairs_per_step: drawn for each step.
          tie_qk: see `prune`.
          parallel: trials in one call.
          devices: to spread trials over; None is all there are.
        """
        self.parallel = parallel
        run = functools.partial(
            prune, config=config, steps=steps, pairs_per_step=pairs_per_step, tie_qk=tie_qk
        )

        def trials(params, pairs, means, hparams, keys):
            def one(hparams, key):
                learned = run(params, task_batch=pairs, means=means, hparams=hparams, key=key)
                return masks.flatten(learned.tau)

            return jax.vmap(one)(hparams, keys)

        there = jax.devices() if devices is None else list(devices)
        self.devices = math.gcd(parallel, len(there))
        self._sharding = None
        if self.devices > 1 or devices is not None:
            mesh = jax.sharding.Mesh(np.asarray(there[: self.devices]), ("trials",))
            self._sharding = NamedSharding(mesh, P("trials")), NamedSharding(mesh, P())
            # Trials have nothing to say to each other: each device runs its own, kernels included.
            spread, everywhere = P("trials"), P()
            trials = jax.shard_map(
                trials,
                mesh=mesh,
                in_specs=(everywhere, everywhere, everywhere, spread, spread),
                out_specs=spread,
                check_vma=False,
            )
        self._run = jax.jit(trials)

    def __call__(
        self,
        params: model.Params,
        pairs: HasPairs,
        means: dict[str, jax.Array],
        hparams: Sequence[HParams],
        seeds: Sequence[int],
    ) -> np.ndarray:
        """Tau of every trial, `(trials, U)`; fewer than `parallel` are padded with the first."""
        wanted = len(hparams)
        padding = self.parallel - wanted
        columns = HParams(
            *(
                np.asarray([*column, *[column[0]] * padding], np.float32)
                for column in zip(*hparams, strict=True)
            )
        )
        keys = jax.vmap(jax.random.key)(np.asarray([*seeds, *[seeds[0]] * padding], np.uint32))
        shared = (params, arrays(pairs), means)
        if self._sharding is not None:
            spread, everywhere = self._sharding
            columns, keys = jax.device_put((columns, keys), spread)
            shared = jax.device_put(shared, everywhere)
        return np.asarray(self._run(*shared, columns, keys))[:wanted]

    def lower(
        self, params: model.Params, pairs: Any, means: Mapping[str, Any]
    ) -> jax.stages.Lowered:
        """The call for trees of shapes and dtypes, for compiling ahead of time."""
        spread, everywhere = self._sharding or (None, None)

        def place(tree, where):
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
            )

        number = jax.ShapeDtypeStruct((self.parallel,), np.float32)
        keys = jax.eval_shape(jax.vmap(jax.random.key), np.zeros(self.parallel, np.uint32))
        each = HParams(*[number] * len(HParams._fields)), keys
        return self._run.lower(*place((params, pairs, means), everywhere), *place(each, spread))


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """Where several processes search for one task's circuit together.

    Attributes:
      storage: who does what.
      name: of this search in the storage; model, task and settings must decide it.
      folder: of what trials learned, seen by all.
      lease: seconds after which a silent process counts as dead.
      mine: trials of this process, so that it need not score them again.
    """

    storage: optuna.storages.BaseStorage
    name: str
    folder: pathlib.Path
    lease: float
    mine: dict[int, Trial] = dataclasses.field(default_factory=dict)

    def keep(self, number: int, tau_U: np.ndarray) -> None:
        """Write what a trial learned, before it is said to be done."""
        files.make_folder(self.folder)
        with files.replacing(self.folder / f"{number}.npy") as part:
            np.save(part, tau_U)

    def tau(self, number: int) -> np.ndarray:
        """What a trial learned, in whichever process."""
        path = self.folder / f"{number}.npy"
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read, though the storage says that the trial is done: all workers must "
                "see one folder; if it was deleted, begin again with another --storage"
            ) from error


def search(
    pruner: Pruner,
    params: model.Params,
    pairs: HasPairs,
    means: dict[str, jax.Array],
    objective: Callable[[np.ndarray], tuple[float, Any]],
    *,
    trials: int,
    sampler: Sampler = "tpe",
    seed: int = 0,
    said: Callable[[Trial], None] = lambda trial: None,
    shared: Shared | None = None,
) -> list[Trial]:
    """Run trials, `pruner.parallel` at a time, and score each.

    Args:
      pruner: runs them.
      params: of the model.
      pairs: of the search split.
      means: see `prune`.
      objective: `tau_U -> (value to minimize, result)`, a pure function.
      trials: how many.
      sampler: "tpe" (Optuna's tree-structured Parzen estimator) or "random" (the same ranges).
      seed: of the sampler and of the trials; where the search is shared the sampler's is random.
      said: called with every trial that is finished here.
      shared: with which other processes; None is alone.

    Returns:
      All trials, in order.

    Raises:
      ElsewhereError: all trials are taken, and other processes have not finished theirs.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warm = max(pruner.parallel, min(8, trials // 3))
    # Processes with the same seed would all try the same.
    chosen = seed if shared is None else None
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=chosen, n_startup_trials=warm, constant_liar=True
        ),
        "random": lambda: optuna.samplers.RandomSampler(seed=chosen),
    }
    starts = (FAST, HParams()) if trials >= _FEW else (FAST,)
    options: dict[str, Any] = {}
    if shared is not None:
        options = {"storage": shared.storage, "name": shared.name, "lease": shared.lease}
    pieces = Pieces(
        trials, sampler=samplers[sampler](), first=[start._asdict() for start in starts], **options
    )
    done = {} if shared is None else shared.mine
    while pieces.begin():
        with pieces.claim(pruner.parallel) as asked:
            if not asked:
                break
            hparams = [_suggest(trial) for trial in asked]
            seeds = [seed * 100_003 + trial.number for trial in asked]
            for trial, values, tau_U in zip(
                asked, hparams, pruner(params, pairs, means, hparams, seeds), strict=True
            ):
                value, result = objective(tau_U)
                if shared is not None:
                    shared.keep(trial.number, tau_U)
                pieces.tell(trial, value)
                done[trial.number] = Trial(
                    trial.number, values, tau_U, value, lambda result=result: result
                )
                said(done[trial.number])
    finished = pieces.done()
    if len(finished) < trials:
        raise ElsewhereError
    for trial in finished:
        if trial.number not in done:
            assert shared is not None and trial.value is not None
            tau_U = shared.tau(trial.number)
            result = functools.cache(lambda tau_U=tau_U: objective(tau_U)[1])
            done[trial.number] = Trial(
                trial.number, HParams(**trial.params), tau_U, trial.value, result
            )
    return [done[trial.number] for trial in finished]


def _suggest(trial: optuna.Trial) -> HParams:
    return HParams(
        **{
            name: trial.suggest_float(name, low, high, log=True)
            for name, (low, high) in _BETWEEN._asdict().items()
        }
    )


def log_size(edges: int | None, least_loss: float) -> float:
    """What a search minimizes: the logarithm of the edges, or, where the target was missed, by how much.

    Any miss (`edges` None) is worse than any circuit.
    """
    return 100.0 + least_loss if edges is None else math.log1p(edges)
