"""The step: independence of the split, sharding, one compilation, non-finite steps, running statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import relative_difference, tiny_batch, tiny_encoder, tiny_objective

from simmim_jax.errors import ConfigError
from simmim_jax.optim import make_frozen, make_optimizer, train_labels
from simmim_jax.runtime import sharding
from simmim_jax.runtime.compilation import compile_step
from simmim_jax.runtime.costs import collectives
from simmim_jax.runtime.scanning import stack, unstack
from simmim_jax.train_step import hash_samples, init_state, train_step

KEY = jax.random.key(0)
# Wide enough for fsdp to split something; with stochastic depth, whose draws must not depend on the split.
OPTIONS = {"width": 128, "num_heads": 4, "drop_path": 0.3}
ENCODER = tiny_encoder(**OPTIONS)
OBJECTIVE = tiny_objective(ENCODER)
# SGD, because Adam would enlarge gradients that are only rounding errors.
SGD = {"steps": 100, "steps_per_epoch": 10, "schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.05}
SGD |= {"layer_decay": 0.5, "depth": 2, "layer_id": ENCODER.layer_id}
TX, _ = make_optimizer("sgd", **SGD)


def run(devices=1, fsdp=1, tensor=1, microbatches=1, steps=3, **options):
    """The losses of some steps, and (parameters, their average) after each, on `devices` of the eight devices."""
    shape = (devices // fsdp // tensor, fsdp, tensor)
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices])
    encoder = tiny_encoder(**OPTIONS, **options)
    objective, (tx, _) = tiny_objective(encoder), make_optimizer("sgd", **SGD, scanned_layers=encoder.scanned_layers)
    make_state = partial(init_state, init=objective.init, tx=tx, ema_decay=0.9)
    abstract = sharding.shard_state(jax.eval_shape(make_state, KEY), mesh, tuple(encoder.scanned_layers))
    state = jax.jit(make_state, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(KEY)
    step = partial(train_step, loss_fn=objective.loss_fn, tx=tx, microbatches=microbatches, ema_decay=0.9)
    abstract_batch = jax.eval_shape(partial(tiny_batch, 32))
    key = jax.device_put(KEY, sharding.replicated(mesh))
    compiled = compile_step(step, abstract, abstract_batch, key, mesh)
    losses, states = [], []
    for n in range(steps):
        batch = sharding.to_global(jax.tree.map(np.asarray, tiny_batch(32, seed=n)), mesh)
        state, metrics = compiled(state, batch, key)
        losses.append(float(metrics["loss"]))
        states.append(unstack(jax.device_get((state.params, state.ema)), encoder.scanned_layers))
    return losses, states


@pytest.fixture(scope="module")
def one_device():
    return run()


@pytest.mark.parametrize(
    "split",
    [
        pytest.param({"devices": 2}, marks=pytest.mark.slow),
        pytest.param({"devices": 8}, marks=pytest.mark.slow),
        {"devices": 8, "fsdp": 8, "scan": True},
        {"devices": 8, "fsdp": 2, "tensor": 2},
        pytest.param({"devices": 4, "tensor": 4, "remat": "full"}, marks=pytest.mark.slow),
        {"microbatches": 4, "scan": True, "remat": "dots"},
        pytest.param({"devices": 2, "microbatches": 4}, marks=pytest.mark.slow),
        pytest.param({"devices": 8, "fsdp": 4, "microbatches": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_and_parameters_do_not_depend_on_the_split(one_device, split):
    losses, states = run(**split)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-6)
    # 1e-4: the order of float32 sums over 32 images
    assert relative_difference(states, one_device[1]) < 1e-4


def test_tensor_splits_heads_and_hidden_units_and_fsdp_splits_the_rest():
    tx, _ = make_optimizer("adamw", steps=1, steps_per_epoch=1, schedule="constant", learning_rate=0.1)
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    make_state = partial(init_state, init=OBJECTIVE.init, tx=tx, ema_decay=0.9)
    state = sharding.shard_state(jax.eval_shape(make_state, KEY), mesh)
    place = lambda x: x.sharding.spec  # noqa: E731
    params = jax.tree.map(place, state.params)
    moments = state.opt_state[1]
    assert jax.tree.map(place, state.ema) == params
    assert jax.tree.map(place, moments.mu) == jax.tree.map(place, moments.nu) == params
    block = params["encoder"]["block_1"]
    assert block["attn"]["qkv"]["kernel"] == P(None, None, "tensor", None)
    assert block["attn"]["q_bias"] == P("tensor", None)
    assert block["attn"]["proj"]["kernel"] == P("tensor", None, None)
    assert block["mlp"]["fc1"] == {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
    assert block["mlp"]["fc2"] == {"kernel": P("tensor", "fsdp"), "bias": P(None)}
    assert params["encoder"]["rel_pos_bias"]["table"] == P(None, "tensor")
    assert params["encoder"]["norm"]["scale"] == P(None)


def test_axis_of_stacked_blocks_is_not_split():
    shapes = {"encoder": {f"block_{n}": {"mlp": {"fc1": {"kernel": np.zeros((512, 256))}}} for n in range(8)}}
    scanned_layers = {"blocks": tuple(shapes["encoder"])}
    abstract = jax.eval_shape(lambda: stack(shapes, scanned_layers))
    placed = sharding.shard_state(abstract, sharding.make_mesh(fsdp=4, tensor=2), tuple(scanned_layers))
    assert placed["encoder"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    one = unstack(placed, scanned_layers)["encoder"]["block_3"]["mlp"]["fc1"]["kernel"]
    assert (one.shape, one.sharding.spec) == ((512, 256), P("fsdp", "tensor"))


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fsdp_communicates_weights_and_gradients_but_no_activations(scan):
    encoder = tiny_encoder(**OPTIONS, scan=scan)
    objective = tiny_objective(encoder)
    mesh = sharding.make_mesh(fsdp=-1)
    make_state = partial(init_state, init=objective.init, tx=TX)
    abstract = sharding.shard_state(jax.eval_shape(make_state, KEY), mesh, tuple(encoder.scanned_layers))
    step = partial(train_step, loss_fn=objective.loss_fn, tx=TX)
    batch = jax.eval_shape(partial(tiny_batch, 512))  # large enough that activations are larger than all weights
    sent = collectives.collectives(compile_step(step, abstract, batch, KEY, mesh))
    weights = sum(4 * x.size for x in jax.tree.leaves(abstract.params))
    # gathered in the forward and the backward pass, and their gradients summed once
    assert 0 < sum(each.size for each in sent) < 3.5 * weights


def test_tensor_sizes_that_do_not_divide_the_heads_are_refused_with_valid_ones():
    state = jax.eval_shape(partial(init_state, init=OBJECTIVE.init, tx=TX), KEY)
    with pytest.raises(ConfigError, match=r"tensor=8 does not divide the 4 of .*attn.* - give 1 or 2 or 4"):
        sharding.check_tensor(state.params, sharding.make_mesh(tensor=8))
    with pytest.raises(ConfigError, match="without attention"):
        sharding.check_tensor({"conv": {"kernel": np.zeros((3, 3))}}, sharding.make_mesh(tensor=8))


def test_unstack_inverts_stack_in_any_tree():
    params = jax.jit(OBJECTIVE.init)(KEY)
    tx, _ = make_optimizer("adamw", steps=1, steps_per_epoch=1, schedule="constant", learning_rate=0.1)
    tree = {"params": params, "moments": tx.init(params)}
    scanned_layers = {"blocks": ("block_0", "block_1")}
    stacked = stack(tree, scanned_layers)
    assert "block_0" not in stacked["params"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, unstack(stacked, scanned_layers), tree)


def test_part_of_a_stack_cannot_be_frozen():
    encoder = tiny_encoder(**OPTIONS, scan=True)
    params = jax.eval_shape(tiny_objective(encoder).init, KEY)
    with pytest.raises(ConfigError, match=r"--config.encoder.scan=false"):
        train_labels(params, make_frozen("encoder/block_0/"), encoder.scanned_layers)
    labels = train_labels(params, make_frozen("encoder/"), encoder.scanned_layers)
    assert set(jax.tree.leaves(labels["encoder"])) == {"frozen"}
    assert labels["head"]["kernel"] == "trained"


def test_average_follows_the_parameters_and_does_not_change_in_a_skipped_step(one_device):
    params, ema = one_device[1][0]
    before = jax.jit(OBJECTIVE.init)(KEY)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before, params)
    assert relative_difference(ema, expected) < 1e-5
    state = init_state(KEY, init=lambda key: before, tx=TX, ema_decay=0.9)
    loss_fn = lambda *_: (jnp.nan * state.params["mask_token"].sum(), {})  # noqa: E731
    after, _ = jax.jit(partial(train_step, loss_fn=loss_fn, tx=TX, ema_decay=0.9))(state, tiny_batch(), KEY)
    jax.tree.map(np.testing.assert_array_equal, after.ema, state.ema)


@pytest.fixture(scope="module")
def state():
    return jax.jit(partial(init_state, init=OBJECTIVE.init, tx=TX))(KEY)


@pytest.fixture(scope="module")
def step():
    return jax.jit(partial(train_step, loss_fn=OBJECTIVE.loss_fn, tx=TX))


def test_step_compiles_once(state, step):
    compiled = 0

    def count(event, duration, **_):
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    batches = [tiny_batch(seed=n) for n in range(4)]
    jax.monitoring.register_event_duration_secs_listener(count)
    for batch in batches:
        state, _ = step(state, batch, KEY)
    jax.monitoring.unregister_event_duration_listener(count)
    assert compiled <= 1  # 0 if another test compiled the same step
    assert state.step == 4


def test_masks_differ_between_steps_and_a_repeated_step_draws_the_same(state, step):
    first, again = (step(state, tiny_batch(), KEY)[1]["loss"] for _ in range(2))
    later = step(state.replace(step=jnp.int32(7)), tiny_batch(), KEY)[1]["loss"]
    assert first == again != later


def test_rate_depends_on_the_step_and_not_on_skipped_steps():
    tx, rate = make_optimizer("adamw", steps=10, steps_per_epoch=10, schedule="linear", learning_rate=1.0)
    params = {"kernel": jnp.ones((2, 2))}
    for step in (0, 3, 9):
        updates, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params, step=jnp.int32(step))
        # Adam's first step is the gradient's sign; decay adds 0.05 of the parameter
        np.testing.assert_allclose(updates["kernel"], -1.05 * float(rate(step)), rtol=1e-5)


def test_nonfinite_step_only_advances_the_step(state, step):
    head = {**state.params["head"], "bias": jnp.full_like(state.params["head"]["bias"], jnp.inf)}
    bad = state.replace(params={**state.params, "head": head})
    after, metrics = step(bad, tiny_batch(), KEY)
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=bad.step), bad)
    assert (int(after.step), float(metrics["skipped"])) == (1, 1.0)
    assert float(step(state, tiny_batch(), KEY)[1]["skipped"]) == 0.0


@pytest.mark.parametrize("microbatches", [1, 4])
def test_batch_stats_replace_parameters_except_in_a_skipped_step(microbatches):
    """A running mean of the labels, averaged over microbatches."""

    def loss_fn(params, batch, key, train):
        labels = batch["label"].astype(jnp.float32)
        new = 0.9 * params["encoder"]["norm"]["mean"] + 0.1 * labels.mean()
        loss = (params["kernel"] * labels).sum() / jnp.where(batch["label"][0] == 99, 0.0, 1.0)
        return loss, {"batch_stats": {"encoder": {"norm": {"mean": new}}}}

    params = {"encoder": {"norm": {"mean": jnp.ones(()), "scale": jnp.ones(())}}, "kernel": jnp.ones(())}
    state = init_state(KEY, init=lambda key: params, tx=TX)
    step = jax.jit(partial(train_step, loss_fn=loss_fn, tx=TX, microbatches=microbatches))
    batch = tiny_batch()
    after, metrics = step(state, batch, KEY)
    np.testing.assert_allclose(after.params["encoder"]["norm"]["mean"], 0.9 + 0.1 * batch["label"].mean(), rtol=1e-6)
    assert after.params["encoder"]["norm"]["scale"] == 1.0
    assert after.params["kernel"] < 1.0
    assert "batch_stats" not in metrics
    failed, _ = step(state, batch | {"label": batch["label"].at[0].set(99)}, KEY)
    assert failed.params["encoder"]["norm"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("batch_size", "devices", "microbatches", "hint"),
    [(100, 8, 1, "try 96 or 104"), (4, 8, 1, "try 8"), (36, 8, 4, "try 32 or 64")],
)
def test_batch_sizes_that_do_not_divide_are_refused_with_valid_ones(batch_size, devices, microbatches, hint):
    with pytest.raises(ConfigError, match=hint):
        sharding.check_batch_size("batch_size", batch_size, devices, microbatches)


@pytest.mark.parametrize("sizes", [(3, 1), (-1, 0), (-2, 4), (1, 8, 2)])
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ConfigError, match="1, 2, 4, 8"):
        sharding.make_mesh(*sizes)


def test_hash_of_samples_depends_on_images_and_positions_but_not_on_the_split():
    index, batch_index = jnp.arange(32, dtype=jnp.uint32) * 7, jnp.arange(32, dtype=jnp.int32)
    digest = int(hash_samples(index, batch_index))
    order = np.random.default_rng(0).permutation(32)
    assert int(hash_samples(index[order], batch_index[order])) == digest
    assert int(hash_samples(index[order], batch_index)) != digest
    assert int(hash_samples(index.at[3].add(1), batch_index)) != digest
    mesh = sharding.make_mesh()
    placed = sharding.to_global({"index": np.asarray(index), "batch_index": np.asarray(batch_index)}, mesh)
    assert int(jax.jit(hash_samples)(placed["index"], placed["batch_index"])) == digest
