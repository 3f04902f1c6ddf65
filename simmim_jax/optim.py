"""The optimizer: learning-rate schedules, weight decay, layer-wise rates, frozen parameters.

Rules depend on a parameter's *path* ("encoder/block_0/attn/qkv/kernel"), never on its number of dimensions. Sources:
lr_scheduler.py and optimizer.py of microsoft/SimMIM and microsoft/Swin-Transformer; timm's CosineLRScheduler.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import PyTree

from simmim_jax.errors import ConfigError, check_minimum, check_options, choose
from simmim_jax.runtime.scanning import ScannedLayers, path_name, stack, unstack

# Parameters with one of these names in their path get no weight decay: those of one dimension, as in the official code,
# and token and position embeddings. "mean" and "var" are running statistics.
NO_DECAY = ("bias", "scale", "gamma", "q_bias", "v_bias", "cls_token", "pos_embed", "registers", "mean", "var")
# Further names that some official encoders exclude, in some phases: see `Encoder.no_decay`.
NO_DECAY_BY_ENCODER = ("mask_token", "table", "cpb", "logit_scale")
DEFAULT_RULES = dict.fromkeys(("official", "intended"), NO_DECAY_BY_ENCODER)


class ScheduleOptions(NamedTuple):
    """Options of a learning-rate schedule. It starts with a linear warm-up from `warmup_learning_rate`.

    learning_rate: the peak.
    schedule: what follows the warm-up:
      "cosine"         cosine to `min_learning_rate` over the remaining steps (Swin repository, WARMUP_PREFIX=True)
      "cosine_global"  cosine of the *global* step: after the warm-up, the rate drops to the value of a cosine over all
                       steps (official SimMIM; timm without `warmup_prefix`)
      "multistep"      constant, times `gamma` at each epoch in `milestones`
      "linear"         linear to `min_learning_rate` over the remaining steps
      "constant"       constant
    warmup_epochs: length of the warm-up; None: `warmup_fraction` of the steps.
    lr_step_offset: 1 to use the rate of the previous step, as the official code does by updating it after the step.
    """

    learning_rate: float
    schedule: str
    warmup_epochs: float | None = None
    warmup_fraction: float = 0.0
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    lr_step_offset: int = 0


class OptimizerOptions(NamedTuple):
    """Options of the optimizer, except those of its schedule.

    layer_decay: the peak rate of layer n is `learning_rate` * layer_decay ** (depth + 1 - n). The initial rate of the
        warm-up and the final rate are the same for all layers, as in the official code.
    betas, epsilon: of AdamW; SGD uses betas[0] as momentum.
    weight_decay: times the learning rate. It is decoupled in AdamW, and part of the gradient in SGD, as in torch.optim.
    decay_rule: which of the encoder's parameters get no weight decay (`Encoder.no_decay`).
    grad_clip_norm: maximum global norm of the gradients; 0 disables clipping.
    frozen, frozen_layers: parameters that get no update and no moments (see `make_frozen`).
    """

    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    decay_rule: str = "official"
    grad_clip_norm: float = 5.0
    frozen: str = ""
    frozen_layers: int = 0


def make_schedule(options: ScheduleOptions, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """A function from the step (the number of earlier updates) to the learning rate. Raises ConfigError."""
    learning_rate, min_learning_rate = options.learning_rate, options.min_learning_rate
    warmup_learning_rate = options.warmup_learning_rate
    milestones, gamma = options.milestones, options.gamma
    for name in ("learning_rate", "warmup_epochs", "warmup_fraction"):
        check_minimum(f"optim.{name}", getattr(options, name) or 0, 0)
    if not all(isinstance(epoch, int | float) for epoch in milestones):
        raise ConfigError(f"milestones {milestones}", "optim.milestones", "give epochs, like 700,750")
    in_epochs = options.warmup_epochs is not None
    warmup_steps = round(options.warmup_epochs * steps_per_epoch if in_epochs else options.warmup_fraction * steps)
    rest = max(steps - warmup_steps, 1)

    def cosine(progress):
        return min_learning_rate + 0.5 * (learning_rate - min_learning_rate) * (
            1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1))
        )

    def multistep(t):
        return learning_rate * gamma ** sum(
            jnp.where(t >= round(epoch * steps_per_epoch), 1.0, 0.0) for epoch in milestones
        )

    shapes = {
        "cosine": lambda t: cosine((t - warmup_steps) / rest),
        "cosine_global": lambda t: cosine(t / steps),
        "multistep": multistep,
        "linear": lambda t: (
            learning_rate + (min_learning_rate - learning_rate) * jnp.minimum((t - warmup_steps) / rest, 1)
        ),
        "constant": lambda t: learning_rate,
    }
    shape = choose("schedule", options.schedule, shapes)

    def rate(step):
        t = jnp.maximum(jnp.asarray(step, jnp.float32) - options.lr_step_offset, 0)
        slope = (learning_rate - warmup_learning_rate) / max(warmup_steps, 1)
        return jnp.where(t < warmup_steps, warmup_learning_rate + t * slope, shape(t))

    return rate


def make_is_decayed(no_decay: tuple[str, ...] = NO_DECAY_BY_ENCODER) -> Callable[[str], bool]:
    """A function from a parameter's path to whether weight decay applies to it.

    It applies to all paths without a name of `NO_DECAY` or `no_decay`.
    """
    names = {*NO_DECAY, *no_decay}
    return lambda path: names.isdisjoint(path.split("/"))


def decayed(params: PyTree, is_decayed: Callable[[str], bool]) -> PyTree:
    """True for each parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path_name(path)), params)


def layers(
    params: PyTree, layer_id: Callable[[str], int], depth: int, scanned_layers: ScannedLayers | None = None
) -> PyTree:
    """The layer of each parameter: 0 embedding and mask token, 1 to `depth` blocks, `depth` + 1 the rest.

    For stacked parameters it is an array [blocks, 1, ...]. layer_id: the encoder's, for paths below "encoder/".
    Official `get_swin_layer` and `get_vit_layer`.
    """

    def layer(key_path, _):
        part, _, rest = path_name(key_path).partition("/")
        if part == "encoder":
            return layer_id(rest)
        return 0 if part == "mask_token" else depth + 1

    return map_blocks(layer, params, scanned_layers or {})


def map_blocks(rule: Callable, params: PyTree, scanned_layers: ScannedLayers) -> PyTree:
    """`rule`(key path, shape) for each parameter. For stacked parameters, an array [blocks, 1, ...] of the blocks'
    values.

    Rules therefore only need to know the paths of single blocks.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    blocks = unstack(shapes, scanned_layers)
    if jax.tree.structure(blocks) == jax.tree.structure(shapes):  # nothing is stacked
        return jax.tree_util.tree_map_with_path(rule, params)
    values = jax.tree_util.tree_map_with_path(lambda path, x: np.asarray(rule(path, x)), blocks)
    stacked = stack(values, scanned_layers, np.stack)
    return jax.tree.map(lambda value, x: _expand(value, x.ndim), stacked, shapes)


def _expand(value: np.ndarray, dimensions: int):
    return value.reshape(-1, *[1] * (dimensions - 1)) if value.ndim else value[()]


def make_frozen(
    frozen: str = "", frozen_layers: int = 0, layer_id: Callable[[str], int] | None = None
) -> Callable[[str], bool] | None:
    """A function from a path to whether the parameter is frozen; None if no parameter is.

    frozen: a regular expression that matches the path from its start.
    frozen_layers: number of the encoder's lowest layers that are frozen too: 1 the embedding, n also n - 1 blocks.
        Position embeddings and a shared bias table, which these layers read, are then frozen as well. Raises
        ConfigError.
    """
    try:
        pattern = re.compile(frozen)
    except re.error as error:
        raise ConfigError(f"not a regular expression: {error}", f"optim.frozen={frozen}", "like encoder/") from error
    check_minimum("optim.frozen_layers", frozen_layers, 0)
    if not frozen and not frozen_layers:
        return None
    read = ("pos_embed", "rel_pos_bias")[:frozen_layers]

    def is_frozen(path: str) -> bool:
        part, _, rest = path.partition("/")
        in_encoder = frozen_layers and part == "encoder"
        low = in_encoder and (layer_id(rest) < frozen_layers or rest.split("/")[0] in read)
        return bool(low or (frozen and pattern.match(path)))

    return is_frozen


def check_frozen(
    params: PyTree,
    is_frozen: Callable[[str], bool] | None,
    *,
    frozen: str,
    frozen_layers: int,
    depth: int,
    drop_path: int | float,
    train_encoder: bool | None,
) -> None:
    """Raise ConfigError if `frozen` or `frozen_layers` freeze nothing, everything, or a live batch norm.

    depth, drop_path: of the encoder. train_encoder: option of the objective; None if it has none.
    """
    if frozen_layers > depth + 1:
        raise ConfigError(
            f"frozen_layers is {frozen_layers}, but the encoder has {depth} blocks",
            "optim.frozen_layers",
            f"give 1 for the patch embedding, up to {depth + 1} for all blocks",
        )
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    named = make_frozen(frozen)
    if named and not any(map(named, paths)):
        raise ConfigError(
            f"no parameter path matches {frozen!r}",
            "optim.frozen",
            f"paths are like {paths[0]} and {paths[-1]}",
        )
    found = [path for path in paths if is_frozen and is_frozen(path)]
    if found == paths:
        raise ConfigError("all parameters are frozen: nothing would be trained", "optim.frozen", "freeze less")
    measured = [path for path in found if path.endswith(("/mean", "/var"))]
    if measured and train_encoder is not False:
        raise ConfigError(
            f"{measured[0]} is frozen, but its batch norm would still use the statistics of each batch",
            "optim.frozen",
            "freeze the whole encoder with objective.train_encoder=false, or none of it",
        )
    all_frozen = all(path in found for path in paths if path.startswith("encoder/"))
    if not all_frozen and train_encoder is False:
        logging.warning(
            "objective.train_encoder=false freezes nothing, it only turns stochastic depth off: freeze the encoder "
            "with --config.optim.frozen=encoder/"
        )
    if all_frozen and train_encoder and drop_path:
        logging.warning("the encoder is frozen but uses stochastic depth: give --config.objective.train_encoder=false")


def train_labels(
    params: PyTree, is_frozen: Callable[[str], bool], scanned_layers: ScannedLayers | None = None
) -> PyTree:
    """ "frozen" or "trained" for each parameter. Raises ConfigError if only some blocks of a stack are frozen."""

    def label(value) -> str:
        if np.ndim(value) and np.any(value) != np.all(value):
            what = "only some blocks of a stack are frozen"
            raise ConfigError(what, "optim.frozen, encoder.scan", "give --config.encoder.scan=false")
        return "frozen" if np.all(value) else "trained"

    matches = map_blocks(lambda path, _: is_frozen(path_name(path)), params, scanned_layers or {})
    return jax.tree.map(label, matches)


def freeze(
    loss_fn: Callable, is_frozen: Callable[[str], bool] | None, scanned_layers: ScannedLayers | None = None
) -> Callable:
    """`loss_fn` without gradient, and so without backward pass, for frozen parameters (see `make_frozen`).

    Frozen running statistics are not updated either.
    """
    if is_frozen is None:
        return loss_fn

    def frozen_loss_fn(params, batch, key, train):
        stop = lambda label, x: jax.lax.stop_gradient(x) if label == "frozen" else x  # noqa: E731
        labels = train_labels(params, is_frozen, scanned_layers)
        loss, metrics = loss_fn(jax.tree.map(stop, labels, params), batch, key, train)
        old = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
        keep = lambda path, new: old[path_name(path)] if is_frozen(path_name(path)) else new  # noqa: E731
        kept = jax.tree_util.tree_map_with_path(keep, metrics.get("batch_stats", {}))
        return loss, {**metrics, "batch_stats": kept}

    return frozen_loss_fn


def scale_by_rate(rates: list[optax.Schedule], layer_ids: Callable[[PyTree], PyTree]):
    """Multiply updates by minus the rate of the parameter's layer at `step`, an argument of `update`.

    The count that optax keeps would fall behind at a skipped step.
    """

    def update(updates, state, params=None, *, step, **_):
        factors = [-rate(step) for rate in rates]
        factor_of = lambda layer: jnp.stack(factors)[layer] if np.ndim(layer) else factors[layer]  # noqa: E731
        return jax.tree.map(lambda x, layer: factor_of(layer) * x, updates, layer_ids(updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with accurate bias corrections, as PyTorch computes them.

    optax computes 1 - b2**n from b2 in float32, which is off by 1.3e-5 for 0.999 in the first hundreds of steps. The
    training of Swin V2 amplifies this, because its first gradients are tiny (benchmarks/swinv2_drift.py).
    """

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        first, second = (-jnp.expm1(count * np.float32(math.log(b))) if b else 1.0 for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: m / first / (jnp.sqrt(v / second) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def make_optimizer(
    name: str,
    *,
    steps: int,
    steps_per_epoch: int,
    layer_id: Callable[[str], int] | None = None,
    depth: int = 0,
    no_decay: dict[str, tuple[str, ...]] | None = None,
    scanned_layers: ScannedLayers | None = None,
    **options,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(tx, schedule): gradient clipping by the global norm, then AdamW or SGD with momentum.

    `tx.update` takes the step as a keyword argument, `step`. `schedule` is that of the last layer.

    layer_id, depth, scanned_layers: of the encoder. no_decay: result of its `no_decay`; None: `NO_DECAY_BY_ENCODER`.
    options: fields of `OptimizerOptions` and `ScheduleOptions`. Raises ConfigError for options that cannot work.
    """
    own = {key: options[key] for key in OptimizerOptions._fields if key in options}
    rest = {key: value for key, value in options.items() if key not in own}
    check_options("optimizer", ScheduleOptions, rest)
    schedule, options = ScheduleOptions(**rest), OptimizerOptions(**own)
    check_minimum("optim.layer_decay", options.layer_decay, 0, strict=True)
    if len(options.betas) != 2 or not all(0 <= beta < 1 for beta in options.betas):
        raise ConfigError(f"betas {options.betas}", "optim.betas", "give two numbers in [0, 1), like 0.9,0.999")
    check_minimum("optim.epsilon", options.epsilon, 0, strict=True)
    check_minimum("optim.weight_decay", options.weight_decay, 0)
    check_minimum("optim.grad_clip_norm", options.grad_clip_norm, 0)

    def rate(layer):
        peak = schedule.learning_rate * options.layer_decay ** (depth + 1 - layer)
        return make_schedule(schedule._replace(learning_rate=peak), steps, steps_per_epoch)

    one_rate = options.layer_decay == 1
    rates = [rate(layer) for layer in ((depth + 1,) if one_rate else range(depth + 2))]

    def layer_ids(params):
        return jax.tree.map(lambda _: 0, params) if one_rate else layers(params, layer_id, depth, scanned_layers)

    is_decayed = make_is_decayed(choose("decay rule", options.decay_rule, no_decay or DEFAULT_RULES))
    decay = optax.add_decayed_weights(options.weight_decay, lambda params: decayed(params, is_decayed))
    rules = {
        "adamw": (scale_by_adam(*options.betas, options.epsilon), decay),
        "sgd": (decay, optax.trace(options.betas[0])),
    }
    clips = (optax.clip_by_global_norm(options.grad_clip_norm),) if options.grad_clip_norm else ()
    tx = optax.chain(*clips, *choose("optimizer", name, rules), scale_by_rate(rates, layer_ids))
    if is_frozen := make_frozen(options.frozen, options.frozen_layers, layer_id):
        tx = optax.partition(
            {"frozen": optax.set_to_zero(), "trained": tx},
            lambda params: train_labels(params, is_frozen, scanned_layers),
        )
    return tx, rates[-1]


def parameter_overview(
    params: PyTree, is_frozen: Callable[[str], bool] | None, is_decayed: Callable[[str], bool]
) -> str:
    """One line with the number of parameters by top-level group, and of trained, decayed and sharded ones.

    params: abstract and sharded.
    """
    leaves = [(path_name(path), math.prod(x.shape), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    total = sum(size for _, size, _ in leaves)
    trained = [(path, size) for path, size, _ in leaves if not (is_frozen and is_frozen(path))]
    groups = {}
    for path, size, _ in leaves:
        group = path.split("/")[0]
        groups[group] = groups.get(group, 0) + size
    counts = groups | {
        "trained": sum(size for _, size in trained),
        "decayed": sum(size for path, size in trained if is_decayed(path)),
        "sharded": sum(size for _, size, x in leaves if not x.sharding.is_fully_replicated),
    }
    parts = [f"{name} {'all' if size == total else format_count(size)}" for name, size in counts.items()]
    return f"{format_count(total)} parameters: {', '.join(parts)}"


def format_count(number: int) -> str:
    """A count with three digits: 12.3 M, 4.56 k, 789."""
    for unit, name in ((1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
