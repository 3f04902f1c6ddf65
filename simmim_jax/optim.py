"""The optimizer: learning-rate schedules, which parameters decay, which are frozen.

Rules go by parameter *path* ("encoder/block_0/attn/qkv/kernel"), never by the number of dimensions. Official sources:
lr_scheduler.py, optimizer.py of microsoft/SimMIM and microsoft/Swin-Transformer; timm's CosineLRScheduler.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from simmim_jax.errors import ConfigError, check_minimum, check_options, choose

# What official SimMIM leaves undecayed for a ViT. Its mask token and relative-position tables do decay
# (microsoft/SimMIM#26).
NO_DECAY = ("bias", "scale", "gamma", "q_bias", "v_bias", "cls_token", "pos_embed")


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
    late: int = 0,
) -> optax.Schedule:
    """A function of the step (updates done before this one) to its learning rate.

    schedule: after a linear warm-up from `warmup_learning_rate` over `warmup_epochs`,
      "cosine"         to `min_learning_rate` over the steps that remain (Swin repository, WARMUP_PREFIX=True)
      "cosine_global"  the cosine of the *global* step: at the end of the warm-up the rate drops at once to where a
                       cosine over all steps would stand (official SimMIM; timm without `warmup_prefix`)
      "multistep"      constant, times `gamma` at each of the epochs in `milestones`
      "linear"         to `min_learning_rate` over the steps that remain
      "constant"       constant
    late: 1 for the official codes' habit of setting the rate after the update, so that each step uses the one before's.
    """
    if learning_rate < 0 or warmup_epochs < 0:
        raise ConfigError(f"learning rate {learning_rate}, {warmup_epochs} warm-up epochs", "optim", "give 0 or more")
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
        t = jnp.maximum(jnp.asarray(step, jnp.float32) - late, 0)
        slope = (learning_rate - warmup_learning_rate) / max(warmup_steps, 1)
        return jnp.where(t < warmup_steps, warmup_learning_rate + t * slope, shape(t))

    return rate


def path_of(key_path) -> str:
    """The names of a parameter's path, joined by slashes."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def decayed(params: PyTree, no_decay: tuple[str, ...]) -> PyTree:
    """True for each parameter that weight decay applies to: all but those whose last name is in `no_decay`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path).split("/")[-1] not in no_decay, params)


def train_labels(params: PyTree, frozen: str) -> PyTree:
    """For each parameter "frozen", if the regular expression matches its path from the start, or else "trained"."""
    label = lambda path, _: "frozen" if re.match(frozen, path_of(path)) else "trained"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, params)


def freeze(loss_fn: Callable, frozen: str) -> Callable:
    """`loss_fn` with no gradient, and so no backward pass, for the parameters that `frozen` names."""
    if not frozen:
        return loss_fn

    def frozen_loss_fn(params, batch, key, train):
        stop = lambda label, x: jax.lax.stop_gradient(x) if label == "frozen" else x  # noqa: E731
        return loss_fn(jax.tree.map(stop, train_labels(params, frozen), params), batch, key, train)

    return frozen_loss_fn


def scale_by_rate(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Times minus the rate of the `step` that `update` is given: optax's own count falls behind a skipped step."""

    def update(updates, state, params=None, *, step, **_):
        factor = -rate(step)
        return jax.tree.map(lambda x: factor * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    name: str,
    *,
    steps: int,
    steps_per_epoch: int,
    schedule: str,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.05,
    no_decay: tuple[str, ...] = NO_DECAY,
    clip: float = 5.0,
    frozen: str = "",
    **schedule_options,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """(tx, schedule). Gradients are clipped to the global norm `clip` (0: not), then AdamW or SGD with momentum.

    `tx.update` takes the step as a keyword argument, `step`.

    Weight decay is decoupled and times the learning rate, as torch.optim.AdamW has it; `no_decay` lists the last names
    of paths that it spares. `frozen` parameters get no update and no moments.
    """
    check_options("optimizer", make_schedule, schedule_options)
    rate = make_schedule(
        schedule, steps=steps, steps_per_epoch=steps_per_epoch, learning_rate=learning_rate, **schedule_options
    )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas {betas}", "optim.betas", "give two numbers in [0, 1), like 0.9,0.999")
    check_minimum("optim.epsilon", epsilon, 0, strict=True)
    check_minimum("optim.weight_decay", weight_decay, 0)
    check_minimum("optim.clip", clip, 0)
    decay = optax.add_decayed_weights(weight_decay, lambda params: decayed(params, no_decay))
    rules = {
        "adamw": (optax.scale_by_adam(*betas, eps=epsilon), decay),
        "sgd": (decay, optax.trace(betas[0])),
    }
    clips = (optax.clip_by_global_norm(clip),) if clip else ()
    tx = optax.chain(*clips, *choose("optimizer", name, rules), scale_by_rate(rate))
    if frozen:
        tx = optax.partition(
            {"frozen": optax.set_to_zero(), "trained": tx}, lambda params: train_labels(params, frozen)
        )
    return tx, rate
