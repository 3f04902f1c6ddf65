"""The optimizer: learning-rate schedules, which parameters decay, which are frozen.

Rules go by parameter *path* ("encoder/block_0/attn/qkv/kernel"), never by the number of dimensions. Official sources:
lr_scheduler.py, optimizer.py of microsoft/SimMIM and microsoft/Swin-Transformer; timm's CosineLRScheduler.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from simmim_jax.errors import ConfigError, check_minimum, check_options, choose
from simmim_jax.runtime.scanning import ScannedLayers, path_name, stack, unstack

# Names in a path that spare a parameter weight decay. Official code spares what has one dimension, and by name a Swin's
# mask token, positions and tables ("cpb" and "logit_scale" are Swin V2's); but of a ViT the mask token and the tables
# do decay there (microsoft/SimMIM#26): see `decay_mask_token` and `decay_bias_tables`. "mean" and "var" are measured.
NO_DECAY = (
    "bias", "scale", "gamma", "q_bias", "v_bias", "cls_token", "pos_embed", "mask_token", "table", "cpb", "logit_scale",
    "mean", "var",
)  # fmt: skip


def make_schedule(
    schedule: str,
    *,
    steps: int,
    steps_per_epoch: int,
    learning_rate: float,
    warmup_epochs: float = 0.0,
    warmup_learning_rate: float = 0.0,
    min_learning_rate: float = 0.0,
    milestones: tuple[float, ...] = (),
    gamma: float = 0.1,
    lr_step_offset: int = 0,
) -> optax.Schedule:
    """A function of the step (updates done before this one) to its learning rate.

    schedule: after a linear warm-up from `warmup_learning_rate` over `warmup_epochs`,
      "cosine"         to `min_learning_rate` over the steps that remain (Swin repository, WARMUP_PREFIX=True)
      "cosine_global"  the cosine of the *global* step: at the end of the warm-up the rate drops at once to where a
                       cosine over all steps would stand (official SimMIM; timm without `warmup_prefix`)
      "multistep"      constant, times `gamma` at each of the epochs in `milestones`
      "linear"         to `min_learning_rate` over the steps that remain
      "constant"       constant
    lr_step_offset: 1 for the official codes' habit of setting the rate after the update, so that each step uses the one before's.
    """
    if learning_rate < 0 or warmup_epochs < 0:
        raise ConfigError(f"learning rate {learning_rate}, {warmup_epochs} warm-up epochs", "optim", "give 0 or more")
    if not all(isinstance(epoch, int | float) for epoch in milestones):
        raise ConfigError(f"milestones {milestones}", "optim.milestones", "give epochs, like 700,750")
    warmup_steps = round(warmup_epochs * steps_per_epoch)
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
    shape = choose("schedule", schedule, shapes)

    def rate(step):
        t = jnp.maximum(jnp.asarray(step, jnp.float32) - lr_step_offset, 0)
        slope = (learning_rate - warmup_learning_rate) / max(warmup_steps, 1)
        return jnp.where(t < warmup_steps, warmup_learning_rate + t * slope, shape(t))

    return rate


def make_is_decayed(
    decayed_too: tuple[str, ...] = (),
    decay_mask_token: bool | None = None,
    decay_bias_tables: bool | None = None,
    no_decay: tuple[str, ...] = NO_DECAY,
) -> Callable[[str], bool]:
    """A function: parameter path -> whether weight decay applies to it.

    It applies to all paths without a name of `no_decay`. decay_mask_token, decay_bias_tables: override this for the mask
    token and the relative position bias tables; None: decay them if the official code does, which `decayed_too` says.
    """
    choices = {"mask_token": decay_mask_token, "table": decay_bias_tables}
    decayed = {name for name, choice in choices.items() if (name in decayed_too if choice is None else choice)}
    names = set(no_decay) - decayed
    return lambda path: names.isdisjoint(path.split("/"))


def decayed(params: PyTree, is_decayed: Callable[[str], bool]) -> PyTree:
    """True for each parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path_name(path)), params)


def layers(
    params: PyTree, layer_id: Callable[[str], int], depth: int, scanned_layers: ScannedLayers | None = None
) -> PyTree:
    """The layer of each parameter: 0 what embeds and the mask token, 1 to `depth` the blocks, `depth` + 1 the rest.

    Of a stack's leaves it is an array, [blocks, 1, ...]. layer_id: the encoder's, of paths below "encoder/". Official
    `get_swin_layer` and `get_vit_layer`.
    """

    def layer(key_path, _):
        part, _, rest = path_name(key_path).partition("/")
        if part == "encoder":
            return layer_id(rest)
        return 0 if part == "mask_token" else depth + 1

    return of_each_block(layer, params, scanned_layers or {})


def of_each_block(rule: Callable, params: PyTree, scanned_layers: ScannedLayers) -> PyTree:
    """`rule` (key path, shape) of each parameter; of a stack's leaves an array of those of its blocks, [blocks, 1, ..].

    So rules need to know the paths of blocks alone.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    blocks = unstack(shapes, scanned_layers)
    if jax.tree.structure(blocks) == jax.tree.structure(shapes):  # nothing is stacked
        return jax.tree_util.tree_map_with_path(rule, params)
    of_blocks = jax.tree_util.tree_map_with_path(lambda path, x: np.asarray(rule(path, x)), blocks)
    together = stack(of_blocks, scanned_layers, np.stack)
    return jax.tree.map(lambda value, x: _along(value, x.ndim), together, shapes)


def _along(value: np.ndarray, dimensions: int):
    return value.reshape(-1, *[1] * (dimensions - 1)) if value.ndim else value[()]


def make_frozen(
    frozen: str = "", frozen_layers: int = 0, layer_id: Callable[[str], int] | None = None
) -> Callable[[str], bool] | None:
    """Whether the parameter of a path is frozen; None where none is.

    frozen: a regular expression that matches the path from its start. frozen_layers: so many of the encoder's lowest
    layers too, as `layer_id` counts them: 1 what embeds, n that and n - 1 blocks; and with them what they read, though
    its rate is that of the last layer: positions, and a bias table that all blocks share. Raises ConfigError.
    """
    try:
        pattern = re.compile(frozen)
    except re.error as error:
        raise ConfigError(f"no regular expression: {error}", f"optim.frozen={frozen}", "like encoder/") from error
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


def train_labels(
    params: PyTree, is_frozen: Callable[[str], bool], scanned_layers: ScannedLayers | None = None
) -> PyTree:
    """For each parameter "frozen" or "trained". Raises ConfigError if some of the blocks of a stack are frozen."""

    def label(value) -> str:
        if np.ndim(value) and np.any(value) != np.all(value):
            raise ConfigError(
                "some blocks are frozen and others not, in one stack", "optim.frozen, encoder.scan",
                "give --config.encoder.scan=false",
            )  # fmt: skip
        return "frozen" if np.all(value) else "trained"

    matches = of_each_block(lambda path, _: is_frozen(path_name(path)), params, scanned_layers or {})
    return jax.tree.map(label, matches)


def freeze(
    loss_fn: Callable, is_frozen: Callable[[str], bool] | None, scanned_layers: ScannedLayers | None = None
) -> Callable:
    """`loss_fn` with no gradient, and so no backward pass, for the parameters that are frozen (see `make_frozen`).

    Nor are those measured anew: frozen running statistics stay as they are.
    """
    if is_frozen is None:
        return loss_fn

    def frozen_loss_fn(params, batch, key, train):
        stop = lambda label, x: jax.lax.stop_gradient(x) if label == "frozen" else x  # noqa: E731
        loss, metrics = loss_fn(
            jax.tree.map(stop, train_labels(params, is_frozen, scanned_layers), params), batch, key, train
        )
        old = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
        keep = lambda path, new: old[path_name(path)] if is_frozen(path_name(path)) else new  # noqa: E731
        kept = jax.tree_util.tree_map_with_path(keep, metrics.get("batch_stats", {}))
        return loss, {**metrics, "batch_stats": kept}

    return frozen_loss_fn


def scale_by_rate(rates: list[optax.Schedule], layer_of_each: Callable[[PyTree], PyTree]):
    """Times minus the rate of the parameter's layer at the `step` that `update` is given.

    optax's own count would fall behind at a skipped step.
    """

    def update(updates, state, params=None, *, step, **_):
        factors = [-rate(step) for rate in rates]
        factor_of = lambda layer: jnp.stack(factors)[layer] if np.ndim(layer) else factors[layer]  # noqa: E731
        return jax.tree.map(lambda x, layer: factor_of(layer) * x, updates, layer_of_each(updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    name: str,
    *,
    steps: int,
    steps_per_epoch: int,
    schedule: str,
    learning_rate: float,
    layer_id: Callable[[str], int] | None = None,
    depth: int = 0,
    layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.05,
    no_decay: tuple[str, ...] = NO_DECAY,
    decay_mask_token: bool | None = None,
    decay_bias_tables: bool | None = None,
    decayed_too: tuple[str, ...] = (),
    grad_clip_norm: float = 5.0,
    frozen: str = "",
    frozen_layers: int = 0,
    scanned_layers: ScannedLayers | None = None,
    **schedule_options,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(tx, schedule). Gradients are clipped to the global norm `clip` (0: not), then AdamW or SGD with momentum.

    `tx.update` takes the step as a keyword argument, `step`. `schedule` is that of the last layer.

    layer_decay: below 1, the peak rate of layer n is `learning_rate` * layer_decay ** (depth + 1 - n), with the layers
        of `layer_id` (see `layers`); the rates that warm-up starts from and that the schedule ends at are the same for
        all, as official code has it.
    Weight decay is times the learning rate; of AdamW it is decoupled, of SGD it is part of the gradient that momentum
    sums up, as torch.optim has both. `no_decay` lists the names in paths that it spares. decay_mask_token,
    decay_bias_tables: whether these decay nonetheless; None: if `decayed_too`, what official code decays of this
    encoder, has "mask_token" or "table".
    frozen, frozen_layers: parameters that get no update and no moments (see `make_frozen`).
    scanned_layers: the encoder's (see `simmim_jax.runtime.scanning`).
    """
    check_options("optimizer", make_schedule, schedule_options)
    is_frozen = make_frozen(frozen, frozen_layers, layer_id)
    check_minimum("optim.layer_decay", layer_decay, 0, strict=True)
    scales = [1.0] if layer_decay == 1 else [layer_decay ** (depth + 1 - layer) for layer in range(depth + 2)]
    rates = [
        make_schedule(
            schedule,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            learning_rate=learning_rate * scale,
            **schedule_options,
        )
        for scale in scales
    ]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas {betas}", "optim.betas", "give two numbers in [0, 1), like 0.9,0.999")
    check_minimum("optim.epsilon", epsilon, 0, strict=True)
    check_minimum("optim.weight_decay", weight_decay, 0)
    check_minimum("optim.grad_clip_norm", grad_clip_norm, 0)
    is_decayed = make_is_decayed(decayed_too, decay_mask_token, decay_bias_tables, no_decay)
    decay = optax.add_decayed_weights(weight_decay, lambda params: decayed(params, is_decayed))
    rules = {
        "adamw": (optax.scale_by_adam(*betas, eps=epsilon), decay),
        "sgd": (decay, optax.trace(betas[0])),
    }
    clips = (optax.clip_by_global_norm(grad_clip_norm),) if grad_clip_norm else ()

    def layer_of_each(params):
        return jax.tree.map(lambda _: 0, params) if len(rates) == 1 else layers(params, layer_id, depth, scanned_layers)

    tx = optax.chain(*clips, *choose("optimizer", name, rules), scale_by_rate(rates, layer_of_each))
    if is_frozen:
        tx = optax.partition(
            {"frozen": optax.set_to_zero(), "trained": tx},
            lambda params: train_labels(params, is_frozen, scanned_layers),
        )
    return tx, rates[-1]
