"""runs/checkpoint.py: what is kept, damage, and parameters for other runs."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, arrays, run, run_until
from tiny import tiny_encoder, tiny_objective

from simmim_jax.errors import CheckpointError
from simmim_jax.optim import make_optimizer
from simmim_jax.runs import checkpoint
from simmim_jax.runtime import sharding
from simmim_jax.train_step import init_state

KEY = jax.random.key(0)
OBJECTIVE = tiny_objective(tiny_encoder(width=128))
TX, _ = make_optimizer("adamw", steps=10, steps_per_epoch=10, schedule="constant", learning_rate=0.1)


def make_state(step=1, objective=OBJECTIVE):
    state = init_state(KEY, init=objective.init, tx=TX)
    moments = jax.tree.map(lambda x: x + jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), state.opt_state)
    return state.replace(step=jnp.int32(step), opt_state=moments)


def sharded(state, **mesh):
    """The abstract state, sharded over a mesh of all devices."""
    return sharding.shard_state(jax.eval_shape(lambda: state), sharding.make_mesh(**mesh))


@pytest.fixture
def saved(tmp_path):
    """A workdir with steps 1 and 2 saved."""
    manager = checkpoint.make_manager(str(tmp_path))
    for step in (1, 2):
        checkpoint.save(manager, make_state(step), {"data": {}})
    checkpoint.finish(manager)
    manager.close()
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8"])
def test_any_flipped_bit_changes_the_checksum(dtype):
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.normal(size=(3, 5, 7)) * 100).astype(dtype))
    before = int(checkpoint.checksum(jnp.asarray(x)))
    for _ in range(300):
        raw = bytearray(x.tobytes())
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        flipped = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
        assert int(checkpoint.checksum(jnp.asarray(flipped))) != before


def test_checksum_depends_on_order_but_not_on_sharding():
    x = jax.random.normal(KEY, (16, 24))
    split = jax.device_put(x, sharding.batch_sharding(sharding.make_mesh()))
    assert int(checkpoint.checksum(split)) == int(checkpoint.checksum(x)) != int(checkpoint.checksum(x[::-1]))


def test_restored_state_is_bit_equal_on_any_mesh(saved):
    for mesh in ({"fsdp": 1}, {"fsdp": 2}):
        state, meta = checkpoint.restore(checkpoint.make_manager(str(saved)), sharded(make_state(), **mesh))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(make_state(2)))
        assert meta["step"] == 2
        assert state.params["encoder"]["block_0"]["mlp"]["fc1"]["kernel"].sharding.mesh.size == 8


def test_ema_is_saved_and_given_to_other_runs(tmp_path):
    state = make_state(3)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1.0, state.params))
    with checkpoint.make_manager(str(tmp_path)) as manager:
        checkpoint.save(manager, state, {"data": {}})
    restored, _ = checkpoint.restore(checkpoint.make_manager(str(tmp_path)), sharded(state))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    given, _ = checkpoint.read_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, given, jax.device_get(state.ema))


def test_missing_ema_starts_at_the_parameters(saved):
    wanted = make_state()
    wanted = wanted.replace(ema=wanted.params)
    restored, _ = checkpoint.restore(checkpoint.make_manager(str(saved)), sharded(wanted))
    jax.tree.map(np.testing.assert_array_equal, restored.ema, restored.params)


def test_newest_and_every_nth_checkpoints_are_kept(tmp_path):
    manager = checkpoint.make_manager(str(tmp_path), max_to_keep=2, keep_period=3)
    for step in range(1, 9):
        checkpoint.save(manager, make_state(step), {"data": {}})
    checkpoint.finish(manager)
    manager.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == [3, 6, 7, 8]


@pytest.mark.parametrize(
    ("item", "damage"),
    [("params", "flip"), ("opt_state", "cut"), ("meta", "flip"), ("meta", "remove")]
    + [
        pytest.param(item, damage, marks=pytest.mark.slow)
        for item, damage in [("params", "cut"), ("params", "remove"), ("opt_state", "flip"), ("opt_state", "remove")]
    ],
)
def test_damaged_newest_checkpoint_is_replaced_by_the_one_before(saved, item, damage):
    folder = saved / "checkpoints" / "2" / item
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = content.index(b'"mask_token"') - 3 if item == "meta" and b'"mask_token"' in content else len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    manager = checkpoint.make_manager(str(saved))
    state, meta = checkpoint.restore(manager, sharded(make_state()))
    assert int(state.step) == meta["step"] == 1
    checkpoint.save(manager, make_state(2), {"data": {}})  # the damaged step can be saved again
    checkpoint.finish(manager)
    assert manager.latest_step() == 2
    assert len(list((saved / "damaged").iterdir())) == 1


def test_restore_without_checkpoints_returns_none(tmp_path):
    assert checkpoint.restore(checkpoint.make_manager(str(tmp_path)), sharded(make_state())) is None


def test_checkpoint_of_another_model_is_refused_and_kept(saved):
    other = make_state(objective=tiny_objective(tiny_encoder(width=128, depth=3)))
    with pytest.raises(CheckpointError, match=r"encoder/block_2.*: absent saved.* and 12 more"):
        checkpoint.restore(checkpoint.make_manager(str(saved)), sharded(other))
    sgd, _ = make_optimizer("sgd", steps=10, steps_per_epoch=10, schedule="constant", learning_rate=0.1)
    other = sharded(init_state(KEY, init=OBJECTIVE.init, tx=sgd))
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(checkpoint.make_manager(str(saved)), other)
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), sharded(make_state())
    )
    with pytest.raises(CheckpointError, match=r"float32.* saved, bfloat16.* now"):
        checkpoint.restore(checkpoint.make_manager(str(saved)), half)
    assert not (saved / "damaged").exists()


def test_machine_error_does_not_set_a_checkpoint_aside(saved, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    manager = checkpoint.make_manager(str(saved))
    monkeypatch.setattr(manager, "restore", fail)
    with pytest.raises(CheckpointError, match=r"cannot read: .*Input/output error"):
        checkpoint.restore(manager, sharded(make_state()))
    assert not (saved / "damaged").exists()


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/2"])
def test_read_params_is_bit_equal(saved, part):
    shutil.rmtree(saved / "checkpoints" / "2" / "opt_state")  # not needed
    params, config = checkpoint.read_params(str(saved / part))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(make_state().params))
    assert config == {}


def test_workdir_with_only_parameters_continues_with_new_moments(tmp_path):
    state = make_state(0)
    checkpoint.write_params(str(tmp_path), jax.device_get(state.params), {"seed": 3}, step=7)
    params, config = checkpoint.read_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    assert config == {"seed": 3}
    with pytest.raises(CheckpointError, match="checkpoints already"):
        checkpoint.write_params(str(tmp_path), params, {})
    manager = checkpoint.make_manager(str(tmp_path))
    restored, _ = checkpoint.restore(manager, sharded(state, fsdp=-1), TX.init)
    assert restored.step == 7
    expected = (state.params, TX.init(state.params))
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, ((restored.params, restored.opt_state), expected)))


def test_damaged_parameters_are_refused(saved):
    folder = saved / "checkpoints" / "2" / "params"
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_params(str(saved))


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    flags = (*DIGITS, "--config.steps=10", "--config.evals={}", "--workdir", tmp_path)
    assert run_until("step:7", "SIGTERM", *flags).returncode == 143
    full = run(*flags, file_limit=20)  # less than an array
    assert full.returncode == 5, full.stderr
    assert "ERROR[checkpoint] could not save" in full.stderr.splitlines()[-1]
    assert "MiB free" in full.stderr.splitlines()[-1]
    resumed = run(*flags)
    assert resumed.stdout.startswith("resuming at step 7"), resumed.stderr
    assert resumed.returncode == 0


def test_too_little_free_space_is_refused_before_writing(saved, monkeypatch):
    manager = checkpoint.make_manager(str(saved))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(CheckpointError, match=r"could not save: \d.\d MiB needed, 1.0 MiB free"):
        checkpoint.save(manager, make_state(3), {"data": {}})
    assert manager.latest_step() == 2
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_linear_evaluation_does_not_change_the_encoder(tmp_path):
    """From a run split over eight devices, on one."""
    short = (*DIGITS, "--config.steps=6", "--config.evals={}")
    assert run(*short, "--config.mesh.fsdp=-1", "--workdir", tmp_path / "run", devices=8).returncode == 0
    encoder = [f for f in DIGITS if "encoder" in f]
    linear = ("--config=configs/digits_linear.py", *encoder, "--config.objective.block=2", "--config.steps=6")
    done = run(*linear, "--config.init_from", tmp_path / "run", "--workdir", tmp_path / "linear")
    assert done.returncode == 0, done.stderr
    before, after = arrays(tmp_path / "run", 6), arrays(tmp_path / "linear", 6)
    names = [name for name in after if name.startswith("params['encoder']")]
    assert len(names) > 20
    assert all(before[name].tobytes() == after[name].tobytes() for name in names)
    assert not [name for name in after if name.startswith("opt_state") and "encoder" in name]
    summary = json.loads((tmp_path / "linear" / "summary.json").read_text())
    assert 0 < summary["top1"] <= summary["top5"] <= 1
    assert summary["images"] == 360
    untrained = run(*linear, "--config.steps=1", "--config.init_from=", "--workdir", tmp_path / "untrained")
    assert untrained.returncode == 0, untrained.stderr


def test_find_step_finds_the_newest(saved):
    assert checkpoint.find_step(str(saved)).name == "2"
    assert checkpoint.find_step(str(saved / "checkpoints" / "1")).name == "1"
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find_step(str(saved / "nowhere"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find_step(str(saved / "checkpoints" / "2" / "meta"))


def test_state_can_be_donated_while_it_is_saved(tmp_path):
    """The step donates the state right after a save has begun."""
    manager = checkpoint.make_manager(str(tmp_path))
    state = jax.jit(make_state)()
    expected = jax.device_get(state)
    checkpoint.save(manager, state, {"data": {}})
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)(state)
    checkpoint.finish(manager)
    restored, _ = checkpoint.restore(manager, sharded(make_state()))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), expected)
