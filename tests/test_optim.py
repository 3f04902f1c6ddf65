"""Schedules in closed form, lists of decayed parameters, layer-wise rates, and frozen parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import PIXELS, tiny_batch, tiny_encoder, tiny_objective

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.optim import ScheduleOptions, freeze, make_frozen, make_optimizer, make_schedule, path_name
from simmim_jax.train_step import init_state, train_step

KEY = jax.random.key(0)


def rates(schedule, steps=100, **options):
    warmup = {"warmup_epochs": 1.0, "warmup_learning_rate": 2e-6}
    options = {"learning_rate": 4e-4, "min_learning_rate": 4e-5, **warmup, **options}
    rate = make_schedule(ScheduleOptions(schedule=schedule, **options), steps, steps_per_epoch=10)
    return np.array([float(rate(step)) for step in range(steps)])


def warmup(t):
    return 2e-6 + t * (4e-4 - 2e-6) / 10


def closed_form(schedule, t):
    """The official lr_scheduler.py and timm's CosineLRScheduler._get_lr."""
    if t < 10:
        return warmup(t)
    cosine = lambda progress: 4e-5 + 0.5 * (4e-4 - 4e-5) * (1 + math.cos(math.pi * progress))  # noqa: E731
    return {
        "cosine": lambda: cosine((t - 10) / 90),
        "cosine_global": lambda: cosine(t / 100),
        "multistep": lambda: 4e-4 * 0.1 ** (t >= 70),
        "linear": lambda: 4e-4 + (4e-5 - 4e-4) * (t - 10) / 90,
        "constant": lambda: 4e-4,
    }[schedule]()


@pytest.mark.parametrize("lr_step_offset", [0, 1])
@pytest.mark.parametrize("schedule", ["cosine", "cosine_global", "multistep", "linear", "constant"])
def test_rate_of_every_step_equals_the_closed_form(schedule, lr_step_offset):
    expected = [closed_form(schedule, max(step - lr_step_offset, 0)) for step in range(100)]
    actual = rates(schedule, milestones=(7.0,), lr_step_offset=lr_step_offset)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)  # float32


def test_cosine_global_drops_at_the_end_of_the_warm_up():
    """In SimMIM's 100-epoch recipe it drops to 0.976 of the peak. "cosine" continues smoothly."""
    drop = rates("cosine_global", learning_rate=1.0, warmup_learning_rate=0.0)
    assert 0.975 < drop[10] < 0.977
    assert rates("cosine")[10] == pytest.approx(4e-4)


def test_run_shorter_than_its_warm_up_only_warms_up():
    assert (np.diff(rates("cosine", steps=5)) > 0).all()


def names_of_decayed(params, **options) -> set[str]:
    """The paths of all parameters that an update with zero gradients changes."""
    tx, _ = make_optimizer("adamw", steps=1, steps_per_epoch=1, schedule="constant", learning_rate=1.0, **options)

    @jax.jit
    def update():
        ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
        return tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones, step=0)[0]

    updates = update()
    return {path_name(path) for path, x in jax.tree_util.tree_leaves_with_path(updates) if (x != 0).any()}


def test_decayed_parameters_of_vit():
    params = jax.eval_shape(tiny_objective(tiny_encoder(absolute_position="learned")).init, KEY)
    layers = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    kernels = {f"encoder/block_{n}/{name}/kernel" for n in range(2) for name in layers}
    kernels |= {"encoder/patch_embed/kernel", "head/kernel"}
    assert names_of_decayed(params) == kernels
    no_decay = tiny_encoder().no_decay(pretraining=True)
    for rule in no_decay:  # microsoft/SimMIM#26
        decayed = names_of_decayed(params, no_decay=no_decay, decay_rule=rule)
        assert decayed == kernels | {"mask_token", "encoder/rel_pos_bias/table"}


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_decayed_parameters_of_swin(name):
    encoder = make_encoder(name, "t", width=8, depths=(1, 1), num_heads=(1, 2), absolute_position="learned")
    params = jax.eval_shape(make_objective("simmim", encoder, **PIXELS, mask_patch_size=16).init, KEY)
    layers = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    kernels = {f"encoder/stage_{n}_block_0/{name}/kernel" for n in range(2) for name in layers}
    kernels |= {"encoder/patch_embed/kernel", "encoder/stage_0_merge/reduction/kernel", "head/kernel"}
    assert names_of_decayed(params) == kernels


def test_each_layer_has_its_own_peak_and_the_same_first_and_last_rate():
    """As in official fine-tuning. A factor on the whole schedule would also scale the first and last rate."""
    encoder = tiny_encoder()
    params = jax.eval_shape(tiny_objective(encoder).init, KEY)
    tx, schedule = make_optimizer(
        "sgd", steps=100, steps_per_epoch=10, schedule="cosine", learning_rate=1.0, warmup_epochs=2.0,
        warmup_learning_rate=0.1, min_learning_rate=0.01, weight_decay=0.0, betas=(0.0, 0.0), grad_clip_norm=0.0,
        layer_decay=0.5, layer_id=encoder.layer_id, depth=encoder.depth,
    )  # fmt: skip
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)

    @jax.jit
    def update(step):
        return tx.update(ones, tx.init(ones), ones, step=step)[0]

    def rates(step):
        updates = update(step)
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        return {path_name(path): -float(x.ravel()[0]) for path, x in leaves}

    scales = {"mask_token": 1 / 8, "encoder/patch_embed/kernel": 1 / 8, "encoder/cls_token": 1 / 8,
              "encoder/block_0/norm1/scale": 1 / 4, "encoder/block_1/mlp/fc2/bias": 1 / 2,
              "encoder/norm/bias": 1.0, "encoder/rel_pos_bias/table": 1.0, "head/kernel": 1.0}  # fmt: skip
    assert set(rates(0).values()) == {np.float32(0.1)}
    assert set(rates(100).values()) == {np.float32(0.01)}
    assert {name: rates(20)[name] for name in scales} == pytest.approx(scales)
    assert schedule(20) == pytest.approx(1.0)


def test_adamw_equals_its_equations():
    """torch.optim.AdamW: decay times the rate, bias-corrected moments; after clipping to the global norm."""
    options = {"schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.05, "grad_clip_norm": 5.0}
    tx, _ = make_optimizer("adamw", steps=10, steps_per_epoch=1, **options)
    w, b = np.array([[3.0, -2.0]]), np.array([1.0])
    params = {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}
    opt_state = tx.init(params)
    moments = dict.fromkeys(params, (0.0, 0.0))
    expected = {"kernel": w, "bias": b}
    for step in range(1, 4):
        grads = {"kernel": np.array([[30.0, -4.0]]) * step, "bias": np.array([6.0])}
        updates, opt_state = tx.update(jax.tree.map(jnp.asarray, grads), opt_state, params, step=0)
        params = optax.apply_updates(params, updates)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, 5.0 / norm)
            m, v = 0.9 * moments[name][0] + 0.1 * g, 0.999 * moments[name][1] + 0.001 * g**2
            moments[name] = m, v
            step_size = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            decay = 0.05 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - 0.1 * (step_size + decay)
        for name in params:
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.9999)])
def test_constant_gradient_moves_by_the_learning_rate(betas):
    """Both moments are then the gradient's, if their bias is corrected exactly. optax's correction is off by 6e-6."""
    tx, _ = make_optimizer(
        "adamw", steps=10, steps_per_epoch=1, schedule="constant", learning_rate=0.1, weight_decay=0.0, betas=betas,
        grad_clip_norm=0.0,
    )  # fmt: skip
    grads = {"kernel": jnp.asarray([2.0, -0.5])}
    state = tx.init(grads)
    update = jax.jit(lambda state, step: tx.update(grads, state, grads, step=step))
    for step in range(50):
        updates, state = update(state, step)
        # float32 rounding of the moments, which grows with their number of steps
        np.testing.assert_allclose(updates["kernel"], [-0.1, 0.1], rtol=2e-6)


def test_frozen_parameters_keep_their_bits_and_have_no_moments():
    objective = tiny_objective()
    tx, _ = make_optimizer(
        "adamw", steps=10, steps_per_epoch=1, schedule="constant", learning_rate=0.1, frozen="encoder/"
    )
    state = init_state(KEY, init=objective.init, tx=tx)
    loss_fn = freeze(objective.loss_fn, make_frozen("encoder/"))
    new, metrics = jax.jit(lambda s, b: train_step(s, b, KEY, loss_fn=loss_fn, tx=tx))(state, tiny_batch())
    jax.tree.map(np.testing.assert_array_equal, new.params["encoder"], state.params["encoder"])
    assert not (new.params["head"]["kernel"] == state.params["head"]["kernel"]).all()
    trained = sum(x.size for name in ("head", "mask_token") for x in jax.tree.leaves(state.params[name]))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.size > 1) == 2 * trained
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    ("layers", "frozen"),
    [
        (0, set()), (1, {"patch_embed", "pos_embed"}), (2, {"patch_embed", "pos_embed", "rel_pos_bias", "block_0"}),
        (3, {"patch_embed", "pos_embed", "rel_pos_bias", "block_0", "block_1"}),
    ],
)  # fmt: skip
def test_position_parameters_are_frozen_with_the_layers_that_read_them(layers, frozen):
    """Otherwise the output of frozen layers would change."""
    layer_id = {"patch_embed": 0, "pos_embed": 3, "rel_pos_bias": 3, "block_0": 1, "block_1": 2, "norm": 3}
    is_frozen = make_frozen("", layers, lambda path: layer_id[path.split("/")[0]]) or (lambda path: False)
    assert {name for name in layer_id if is_frozen(f"encoder/{name}/kernel")} == frozen
    assert not is_frozen("head/kernel")


def test_frozen_running_statistics_do_not_change():
    def loss_fn(params, batch, key, train):
        return params["head"] * 1.0, {"batch_stats": {"encoder": {"mean": jnp.float32(5.0), "var": jnp.float32(6.0)}}}

    params = {"encoder": {"mean": jnp.float32(1.0), "var": jnp.float32(2.0)}, "head": jnp.float32(3.0)}
    _, metrics = freeze(loss_fn, make_frozen("encoder/mean"))(params, None, KEY, True)
    assert metrics["batch_stats"]["encoder"] == {"mean": 1.0, "var": 6.0}


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"frozen": "enc("}, "optim.frozen"),
        ({"betas": (2.0, 3.0)}, "optim.betas"),
        ({"grad_clip_norm": -5.0}, "optim.grad_clip_norm"),
        ({"weight_decay": -1.0}, "optim.weight_decay"),
        ({"lr": 1.0}, "learning_rate"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"name": "lars"}, "choose one of adamw, sgd"),
    ],
)
def test_invalid_options_are_refused(option, hint):
    options = {"name": "adamw", "schedule": "constant", "learning_rate": 1.0, **option}
    with pytest.raises(ConfigError, match=hint):
        make_optimizer(steps=1, steps_per_epoch=1, **options)
