"""One step of training, without input or output: the optimizer, the loss, the step, and all of it compiled.

`make_program` jits pure functions over a mesh, `(state, batch) -> (state, metrics)`; `wsparse.loop` loops
over them. What an experiment changes (another loss, another optimizer) is changed here.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from wsparse import model, sharding, sparsity, trees
from wsparse.config import ModelConfig, TrainConfig
from wsparse.nodes import CONNECTIONS
from wsparse.ops import cpu
from wsparse.sparsity import frozen

# The sharding of a batch of held-out windows.
EVAL_BATCH = P(sharding.BATCH[1], None)

# Weight decay acts on matrices of weights, not on biases, gains, sinks or tables of logits.
DECAY_RULES: trees.Rules[bool] = (
    *((connection.kernel, True) for connection in CONNECTIONS),
    (r"embed/(tokens|positions)|head/unembed", True),
    (r".*/(bias|gain|sink)|embed/sinusoids|head/(bigram|logits_bias)", False),
)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    params: model.Params
    optimizer: optax.OptState


def make_optimizer(config: TrainConfig, *, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Returns gradient scaling, AdamW and the projection, in that order (Gao et al. 2025), in support phases.

    The projection needs to know whether the parameters are replicated over the mesh.
    """
    settings, explores = config.optimizer, sparsity.exploration_steps(config.sparsity, config.steps)
    in_phases = not explores.all()
    density = sparsity.density_schedule(config.sparsity, config.steps)
    rate = sparsity.learning_rate_schedule(settings, config.steps, density=density)
    scale, form = [], settings.gradient_rms
    if form != "none":
        scale = [sparsity.scale_by_gradient_rms(form, phases=in_phases)]
    transform = optax.chain(
        *scale,
        sparsity.resting_moments(optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps)),
        optax.add_decayed_weights(
            settings.weight_decay,
            mask=lambda params: trees.map_with_path(lambda path, _: trees.match(DECAY_RULES, path), params),
        ),
        optax.scale_by_learning_rate(rate),
        _projection(config, mesh),
    )
    if not in_phases:
        return transform
    every = lambda count: jnp.asarray(explores)[count]
    return sparsity.support_phases(transform, every, rules=sparsity.MODEL_RULES)


def _projection(
    config: TrainConfig, mesh: Mesh | None, *, final: bool = False
) -> optax.GradientTransformation:
    """Returns the projection, to the densities of the schedule or to the final ones."""
    settings = config.sparsity

    def density(target: float) -> float | optax.Schedule:
        return target if final else sparsity.density_schedule(settings, config.steps, target)

    return sparsity.project_top_k(
        density(settings.density) if settings.sparse else 1.0,
        # At full density there is nothing to protect.
        min_per_neuron=settings.min_per_neuron if settings.sparse else 0,
        overrides=[(pattern, density(target)) for pattern, target in settings.targets],
        rules=sparsity.MODEL_RULES,
        replicated=mesh is None or mesh.shape["fsdp"] * mesh.shape["tensor"] == 1,
    )


def init_state(config: TrainConfig) -> TrainState:
    """Returns the state before the first step."""
    params = model.init(config.model, jax.random.key(config.seed))
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params))


def loss(
    params: model.Params, window_BT: jax.Array, config: ModelConfig, *, mesh: Mesh | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean next-token cross-entropy in nats of windows `(B, T+1)`, and the activations."""
    tap = None if mesh is None else sharding.activation_tap(mesh)
    logits_BTV, acts = model.forward(params, window_BT[:, :-1], config, tap=tap)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, window_BT[:, 1:])
    return jnp.mean(loss_BT), acts


def train_step(
    state: TrainState, batch_ABT: jax.Array, *, config: TrainConfig, mesh: Mesh | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Make one optimizer step on `(accumulate, B, T+1)` windows, over the devices of a mesh or on one.

    Returns:
      The next state, and float32 scalars "loss", "gradient_rms", "kurtosis" (of the final residual,
      averaged over tokens), "turnover" (`sparsity.turnover`; 0 between exploration steps), and "finite":
      for each projected parameter a bool per matrix, false where it holds NaN or infinity.
    """

    gradients, report = _gradients(state.params, lambda params: params, batch_ABT, config, mesh)
    updates, optimizer = make_optimizer(config, mesh=mesh).update(gradients, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    projection = sparsity.find_state(optimizer)
    turnover = _turnover(state, updates, projection.nonzeros, config)
    report |= {"finite": projection.finite, "turnover": turnover}
    return TrainState(state.step + 1, params, optimizer), report


def frozen_step(
    state: TrainState, places: frozen.Places, batch_ABT: jax.Array, *, config: TrainConfig
) -> tuple[TrainState, dict[str, Any]]:
    """`train_step` where the support rests, at the cost of the nonzeros; "gradient_rms" is over those.

    Args:
      state: As for `train_step`.
      places: Where the nonzeros of its parameters are, from `frozen.find_places`.
      batch_ABT: As for `train_step`.
      config: Of a run for which `sparsity.frozen_steps` says that this is such a step.
    """
    packed = frozen.pack(state.params, places)
    assemble = lambda packed: frozen.for_model(packed, state.params, places)
    gradients, report = _gradients(packed, assemble, batch_ABT, config, None)
    moments = frozen.pack_moments(state.optimizer, places)
    optimizer: Any = make_optimizer(config)
    updates, moments = optimizer.update(gradients, moments, packed, frozen=True)
    packed = optax.apply_updates(packed, updates)
    report |= {"finite": sparsity.find_state(moments).finite, "turnover": jnp.float32(0)}
    params = frozen.unpack(packed, state.params, places)
    optimizer_state = frozen.unpack_moments(moments, state.optimizer, places)
    return TrainState(state.step + 1, params, optimizer_state), report


def _gradients(
    trained: Any,
    assemble: Callable[[Any], model.Params],
    batch_ABT: jax.Array,
    config: TrainConfig,
    mesh: Mesh | None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the gradients of what `assemble` makes parameters of, and what a step reports of them."""

    def microbatch(gradients, window_BT):
        def objective(trained):
            value, acts = loss(assemble(trained), window_BT, config.model, mesh=mesh)
            return value, sparsity.kurtosis(lax.stop_gradient(acts["final_resid"]))

        (value, kurtosis), new = jax.value_and_grad(objective, has_aux=True)(trained)
        return jax.tree.map(jnp.add, gradients, new), (value, kurtosis)

    if config.accumulate == 1:
        zeros = jax.tree.map(lambda p: jnp.zeros((), p.dtype), trained)
        gradients, (value, kurtosis) = microbatch(zeros, batch_ABT[0])
    else:
        total, means = lax.scan(microbatch, jax.tree.map(jnp.zeros_like, trained), batch_ABT)
        gradients = jax.tree.map(lambda g: g / config.accumulate, total)
        value, kurtosis = map(jnp.mean, means)
    return gradients, {"loss": value, "kurtosis": kurtosis, "gradient_rms": sparsity.gradient_rms(gradients)}


def _turnover(
    state: TrainState, updates: Any, nonzeros: dict[str, jax.Array], config: TrainConfig
) -> jax.Array:
    def count():
        return sparsity.turnover(state.params, updates, nonzeros)

    explores = sparsity.exploration_steps(config.sparsity, config.steps)
    if not config.sparsity.sparse:
        return jnp.float32(0)
    if explores.all():
        return count()
    return lax.cond(jnp.asarray(explores)[state.step], count, lambda: jnp.float32(0))


def project(params: model.Params, *, config: TrainConfig, mesh: Mesh | None = None) -> model.Params:
    """Returns updates that only project, at the final density; used to time the projection."""
    transform = _projection(config, mesh, final=True)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = transform.update(zeros, transform.init(params), params)[0]
    return updates


def eval_step(
    params: model.Params, window_BT: jax.Array, *, config: ModelConfig, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss of windows `(B, T+1)`, and bool `(n_layer, d_mlp)`: which neurons fired."""
    value, acts = loss(params, window_BT, config, mesh=mesh)
    return value, jnp.any(acts["mlp.post_act"] != 0, axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run, and where their arrays live.

    Attributes:
      abstract_state: Shapes, dtypes and shardings of the state.
      init: `() -> state`.
      step: `(state, batch) -> (state, metrics)`, donates the state.
      frozen_step: `(state, places, batch) -> (state, metrics)`, the same for steps of `frozen_steps`; None
        where the CPU kernels are off.
      find_places: `params -> (places, whether all fit)`.
      evaluate: `(params, windows) -> (loss, fired)`.
      project: `params -> updates` that project them; part of `step`, here on its own to be timed.
      alive: `(params, fired or None) -> alive neurons per layer`.
    """

    mesh: Mesh
    abstract_state: TrainState
    init: Callable[[], TrainState]
    step: jax.stages.Wrapped
    frozen_step: jax.stages.Wrapped | None
    find_places: Callable[[model.Params], tuple[frozen.Places, jax.Array]]
    evaluate: Callable[[model.Params, jax.Array], tuple[jax.Array, jax.Array]]
    project: jax.stages.Wrapped
    alive: Callable[..., jax.Array]


def _over_nonzeros(config: TrainConfig) -> bool:
    """Returns whether frozen steps are computed over the nonzeros."""
    few = (
        max(config.sparsity.density, *(target for _, target in config.sparsity.targets), 0)
        < cpu.DENSITY_LIMIT
    )
    single = config.model.compute_dtype == "float32"
    return (
        few and single and cpu.enabled() and bool(sparsity.frozen_steps(config.sparsity, config.steps).any())
    )


def make_program(config: TrainConfig, mesh: Mesh) -> Program:
    """Jit the functions of a run over a mesh; nothing is compiled yet.

    Raises:
      UserError: The batch does not divide over the mesh.
    """
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    init = functools.partial(init_state, config)
    shapes = jax.eval_shape(init)
    shardings = sharding.tree_shardings(shapes, mesh)
    replicated = NamedSharding(mesh, P())
    capacities = frozen.capacities(config.sparsity, shapes.params)

    def on_mesh(function, config):
        # Kernels see in this context which devices their arrays are sharded over.
        def traced(*arguments):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments, config=config, mesh=mesh)

        traced.__name__ = function.__name__
        return traced

    return Program(
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, shardings
        ),
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            on_mesh(train_step, config),
            in_shardings=(shardings, NamedSharding(mesh, sharding.BATCH)),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        frozen_step=jax.jit(
            functools.partial(frozen_step, config=config),
            in_shardings=(shardings, replicated, NamedSharding(mesh, sharding.BATCH)),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        if _over_nonzeros(config)
        else None,
        find_places=jax.jit(
            functools.partial(frozen.find_places, capacities=capacities),
            in_shardings=(shardings.params,),
            out_shardings=replicated,
        ),
        evaluate=jax.jit(
            on_mesh(eval_step, config.model),
            in_shardings=(shardings.params, NamedSharding(mesh, EVAL_BATCH)),
            out_shardings=replicated,
        ),
        project=jax.jit(
            on_mesh(project, config), in_shardings=(shardings.params,), out_shardings=shardings.params
        ),
        alive=jax.jit(sparsity.alive_neurons, out_shardings=replicated),
    )
