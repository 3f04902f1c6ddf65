"""experiment.py: what a config is refused for before anything compiles, and what it becomes."""

import re

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from source_files import write_images

from simmim_jax import evaluation, experiment, memory, optim
from simmim_jax.config import load
from simmim_jax.errors import ConfigError, Preempted, UserError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import Objective
from simmim_jax.runs import pretrained
from simmim_jax.runtime import compilation
from simmim_jax.runtime.costs import devices
from simmim_jax.runtime.processes import StopSignal

SIMMIM = Objective(max, max, max, online_probes=("knn", "linear"))


def digits(**changes):
    c = load("configs/digits_vit_tiny.py")
    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 32, 1, (2,)
    c.probe_block, c.evals, c.batch_size = 1, {}, 32
    for name, value in changes.items():
        c[name] = value
    return c


def check_frozen(config, encoder, is_frozen, params):
    optim.check_frozen(
        params, is_frozen, frozen=config.optim.frozen, frozen_layers=config.optim.frozen_layers, depth=encoder.depth,
        drop_path=encoder.drop_path, train_encoder=config.objective.train_encoder,
    )  # fmt: skip


def overview(made):
    return optim.parameter_overview(made.state.params, made.is_frozen, made.is_decayed)


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that `experiment` logs."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: lines.append(line % values))
    return lines


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"profile_steps": (5,)}, "profile_steps"),
        ({"profile_steps": (9, 5)}, "profile_steps"),
        ({"init_parts": ("encoder",)}, "init_from"),
        ({"image_size": (0, 16)}, "image_size"),
        ({"std": (0.0,)}, "mean, std"),
    ],
)
def test_impossible_numbers_are_refused(changes, where):
    with pytest.raises(ConfigError) as refused:
        experiment.check_config(digits(**changes))
    assert refused.value.where == where


def test_config_becomes_one_value():
    made = experiment.make_experiment(digits(online_probes=True, eval_every=3))
    assert (made.steps, made.steps_per_epoch) == (40 * (1437 // 32), 1437 // 32)
    assert set(made.evals.options) == {"knn", "linear"}
    assert made.evals.every == 3
    assert made.record["encoder"]["depth"] == 1
    assert all(x.sharding is not None for x in jax.tree.leaves(made.state))
    line = overview(made)
    count = sum(x.size for x in jax.tree.leaves(made.state.params))
    assert line.startswith(f"{optim.format_count(count)} parameters: encoder ")
    assert "trained all" in line
    assert made.variant({"microbatches": 2}).microbatches == 2


def test_frozen_parameters_are_not_counted_as_trained():
    config = load("configs/digits_linear.py")
    config.init_from = ""
    config.batch_size = 32
    made = experiment.make_experiment(config)
    head = sum(x.size for x in jax.tree.leaves(made.state.params["head"]))
    assert f"trained {optim.format_count(head)}" in overview(made)


def test_probes_join_if_both_splits_have_the_same_classes():
    class Split(list):
        classes = ()

    def split(*classes, images=10):
        made = Split(range(images))
        made.classes = classes
        return made

    config = digits(evals={"reconstruction": {"pictures": 2}, "knn": {"k": 5}})
    resolve = lambda *splits: experiment.resolve_evals(config, SIMMIM, *splits)  # noqa: E731
    assert resolve(split("a", "b"), split("a", "b"))["knn"] == {"k": 5}
    assert set(resolve(split("a", "b"), split("a", "b"))) == {"reconstruction", "knn", "linear"}
    config.evals = {"reconstruction": {}}
    few = split("a", "b", images=3)  # not two of each
    for splits in ((split(), split()), (split("a"), split("a")), (split("a", "b"), split("a")), (few, few)):
        assert set(resolve(*splits)) == {"reconstruction"}
    config.online_probes = False
    assert set(resolve(split("a", "b"), split("a", "b"))) == {"reconstruction"}


def write_folders(root, files):
    """Write the images, and thirty images into each of the other names."""
    return write_images(
        root, *(name if name.endswith(".png") else f"{name}{n}.png" for name in files for n in range(30))
    )


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["", ""], "no image is in a folder"),
        (["a/", "b/", "figure.png"], "figure.png"),
        (["train/a/", "train/b/", "test/"], "no image is in a folder"),
    ],
)
def test_run_without_probes_says_why(files, says, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(experiment, "log0", lines.append)
    config = digits(online_probes=True, batch_size=8, steps=1)
    config.data.source, config.data.path, config.data.heldout_fraction = "auto", write_folders(tmp_path, files), 0.5
    experiment.make_experiment(config)
    assert [says in line for line in lines if "probes" in line] == [True]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([""], "images without classes .* no image is in a folder"),
        (["train/a/", "train/b/", "val/images/"], "have no classes, .* data.path=.*/train"),
        (["train/a/", "train/b/", "val/a/", "val/B/"], "has 3 classes .of 'B' it has no training"),
        (["train/a/", "train/b/", "val/c/", "val/d/"], "has 4 classes .of 'c', 'd' it has no"),
        (["train/a/", "train/b/", "val/b/"], ""),
    ],
)
def test_classifier_of_images_without_fitting_labels_is_refused_with_the_cause(files, says, tmp_path):
    config = load("configs/digits_finetune.py")
    config.encoder.name, config.encoder.size, config.init_from, config.objective.num_classes = "vit", "ti", "", 2
    config.data.source, config.data.path = "auto", write_folders(tmp_path, files)
    config.batch_size, config.steps, config.optim.layer_decay = 8, 1, 1.0
    if says.startswith("images without"):
        config.objective.num_classes = None  # chosen from the data
    if not says:
        assert experiment.make_experiment(config).record["untrained_classes"] == []
        return
    with pytest.raises(UserError, match=says):
        experiment.make_experiment(config)


def test_frozen_layers_that_do_not_exist_or_keep_batch_statistics_are_refused():
    config = load("configs/digits_finetune.py")
    encoder = make_encoder("resnet", None, width=4, depths=(1, 1, 1, 1))
    params = {"encoder": jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]}

    def check(frozen_layers: int) -> None:
        config.optim.frozen_layers = frozen_layers
        is_frozen = optim.make_frozen("", frozen_layers, encoder.layer_id)
        check_frozen(config, encoder, is_frozen, params)

    check(0)
    for layers, decisive in {6: "encoder has 4 blocks", 1: "batch norm"}.items():
        with pytest.raises(ConfigError, match=decisive):
            check(layers)
    config.objective.train_encoder = False
    check(1)


@pytest.mark.parametrize(
    ("frozen", "train_encoder", "drop_path", "decisive"),
    [
        ("encoder/block_0", False, 0.0, "train_encoder=false freezes nothing"),
        ("encoder/", True, 0.1, "stochastic depth"),
        ("encoder/", True, 0.0, ""),
        ("encoder/", False, 0.1, ""),
        ("", True, 0.1, ""),
    ],
)
def test_partly_frozen_encoder_is_warned_about(warnings, frozen, train_encoder, drop_path, decisive):
    config = load("configs/digits_finetune.py")
    config.optim.frozen, config.objective.train_encoder = frozen, train_encoder
    params = {"encoder": {"block_0": jnp.zeros(1), "block_1": jnp.zeros(1)}, "head": jnp.zeros(1)}
    encoder = make_encoder("vit", "s", drop_path=drop_path)
    check_frozen(config, encoder, optim.make_frozen(frozen), params)
    assert [decisive in line for line in warnings] == [True] * bool(decisive)


@pytest.mark.parametrize(("frozen", "decisive"), [("encodr/", "'encodr/'"), (".*", "all parameters are frozen")])
def test_pattern_that_freezes_nothing_or_everything_is_refused(frozen, decisive):
    config = load("configs/digits_finetune.py")
    config.optim.frozen = frozen
    params = {"encoder": {"block_0": jnp.zeros(1)}, "head": jnp.zeros(1)}
    with pytest.raises(ConfigError, match=re.escape(decisive)):
        check_frozen(config, make_encoder("vit", "s"), optim.make_frozen(frozen), params)


def test_ema_horizon_longer_than_the_run_is_warned_about(warnings):
    experiment.warn_about_fit(digits(ema_decay=0.9999), 100_000, 100)
    experiment.warn_about_fit(digits(ema_decay=0.0), 660, 100)
    assert warnings == []
    experiment.warn_about_fit(digits(ema_decay=0.9999), 660, 100)
    assert len(warnings) == 1
    assert "94 %" in warnings[0]


@pytest.mark.parametrize("name", ["finetune", "vit_tiny"])
def test_training_images_do_not_serve_as_held_out_images(name):
    """Online probes count too. Only reconstruction may look at training images."""
    config = load(f"configs/digits_{name}.py")
    config.init_from, config.batch_size, config.encoder = "", 32, digits().encoder
    config.probe_block = 0
    if name == "vit_tiny":
        config.evals = {"reconstruction": {}}
    config.data.heldout_split = "train"
    with pytest.raises(ConfigError, match=r"data\.heldout_split=train"):
        experiment.make_experiment(config)
    if name == "vit_tiny":
        config.online_probes = False
        experiment.make_experiment(config)


def test_evaluators_that_do_not_fit_the_objective_are_refused():
    with pytest.raises(ConfigError, match="segmentation"):
        experiment.make_experiment(digits(evals={"segmentation": {}}))


def test_encoder_size_that_is_not_that_of_the_weights_is_refused(tmp_path):
    config = load("configs/folder_finetune.py")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"encoder": {"name": "vit", "size": "b"}}')
    for size in (None, "", "b"):
        config.encoder.size = size
        assert experiment.resolve_encoder(config, str(tmp_path))["size"] == "b"
    config.encoder.size = "s"
    with pytest.raises(ConfigError, match=r"'s', but init_from has 'b'"):
        experiment.resolve_encoder(config, str(tmp_path))


def test_settings_for_pretrained_weights_are_noted():
    note = lambda name: experiment.pretrained_settings(load(f"configs/{name}.py").to_dict())  # noqa: E731
    assert "optim.layer_decay 0.75" in note("digits_finetune")
    assert "optim.frozen" in note("digits_linear")
    assert note("digits_vit_tiny") == ""


@pytest.mark.parametrize("heldout", [0, 100, 5000])
@pytest.mark.parametrize("steps", [5, 880, 100_000])
@pytest.mark.parametrize("names", [("reconstruction",), ("knn", "linear"), ("reconstruction", "linear")])
def test_evaluations_stay_within_their_share_of_the_work(names, steps, heldout):
    config = digits(eval_every=-1, eval_images=2000)
    period = experiment.evaluation_period(config, {name: {} for name in names}, steps, 50_000, heldout)
    if period == 0 or steps < config.log_every:  # only at the start and the end
        return
    forward = min(heldout, 2000) * ("reconstruction" in names)
    forward += (2000 + min(heldout, 2000)) * bool({"knn", "linear"} & set(names))
    count = (steps - 1) // period
    assert 1 <= count <= experiment.MAX_EVALUATIONS
    assert (count + 2) * forward / 3 <= experiment.MAX_EVALUATION_FRACTION * steps * config.batch_size
    if steps == 100_000:
        assert count == experiment.MAX_EVALUATIONS


def test_given_evaluation_period_is_kept():
    period = lambda every, evals: experiment.evaluation_period(  # noqa: E731
        digits(eval_every=every), evals, 10**6, 1000, 100
    )
    assert (period(7, {"reconstruction": {}}), period(0, {"reconstruction": {}}), period(-1, {})) == (7, 0, 0)


def test_signal_ends_an_evaluation_at_its_next_batch():
    stop, seen = StopSignal(), []
    read = evaluation.stoppable(lambda *batch: seen.append(batch), stop)
    read("params", 1)
    stop.number = 15
    with pytest.raises(Preempted) as stopped:
        read("params", 2)
    assert (seen, stopped.value.number) == ([("params", 1)], 15)


@pytest.mark.parametrize(
    ("saved", "now", "decisive"),
    [
        ({"name": "classify"}, {"name": "classify", "block": 1}, "objective.block is 0"),
        ({"name": "classify", "pool": "both"}, {"name": "classify"}, 'objective.pool is "both"'),
        ({"name": "segment", "head": "linear"}, {"name": "segment", "head": "upernet"}, 'objective.head is "linear"'),
        ({"name": "segment", "blocks": [1, 2]}, {"name": "segment", "blocks": (1, 3)}, "objective.blocks is [1, 2]"),
        ({"name": "segment", "blocks": [1, 2]}, {"name": "segment", "blocks": (1, 2)}, ""),
        ({"name": "simmim"}, {"name": "simmim"}, ""),
    ],
)
def test_head_that_reads_other_features_does_not_fit(saved, now, decisive):
    assert pretrained.other_head({"objective": saved}, {"objective": now}) == decisive


def test_head_of_other_classes_does_not_fit():
    config = {"objective": {"name": "classify"}}
    saved = config | {"classes": ["ant", "bee"]}
    for names in (["ant", "bee"], []):  # [] if there is no classes.txt
        assert pretrained.other_head(saved, config | {"classes": names}) == ""
    assert pretrained.other_head(config, saved) == ""  # an import without class names
    assert "ant, bee" in pretrained.other_head(saved, config | {"classes": ["ant", "cat"]})


@pytest.mark.slow
def test_step_that_does_not_fit_is_refused_with_settings_that_do():
    made = experiment.make_experiment(digits(steps=3, evals={}, online_probes=False))
    needed = devices.memory(memory.compile_to_measure(made))
    memory.check_memory(made, needed, needed)
    memory.check_memory(made, needed, 0)  # 0: unknown
    with pytest.raises(ConfigError, match=r"--config\.\S+=\S+ \("):
        memory.check_memory(made, needed, needed - 1)


def test_memory_with_frozen_layers_is_measured_without_a_scan():
    config = digits(steps=1, online_probes=False)
    config.encoder.depth, config.encoder.remat, config.optim.frozen_layers = 2, "full", 2
    assert devices.memory(memory.compile_to_measure(experiment.make_experiment(config))) > 0


@pytest.fixture
def no_cache(monkeypatch):
    """JAX without a folder for compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_cached_in_the_users_cache_folder(no_cache, tmp_path):
    no_cache.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation.enable_cache()
    assert folder.is_dir()
    assert folder.parent == tmp_path / "simmim_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert compilation.enable_cache() == folder


def test_cache_folder_given_by_the_user_is_kept(no_cache, tmp_path):
    no_cache.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    assert str(compilation.enable_cache()) == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", "")
    assert compilation.enable_cache() is None
    assert not (tmp_path / "simmim_jax").exists()


def test_without_a_writable_folder_nothing_is_cached(no_cache, tmp_path):
    (tmp_path / "file").write_text("")
    no_cache.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation.enable_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
