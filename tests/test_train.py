"""What a run refuses before it compiles anything, and what it keeps of what it has compiled."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from simmim_jax import train
from simmim_jax.config import load
from simmim_jax.errors import ConfigError, Preempted
from simmim_jax.models import make_encoder
from simmim_jax.runs.checkpoint import StopSignal
from simmim_jax.runtime import compilation, costs


def digits(**changes):
    c = load("configs/digits_vit_tiny.py")
    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 32, 1, 2
    c.probe_block, c.evals, c.batch_size = 1, {}, 32
    for name, value in changes.items():
        c[name] = value
    return c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay is 1.0 - ema_decay - give a number below 1"),
        ({"ema_decay": -0.1}, "ema_decay is -0.1"),
        ({"profile_steps": (5,)}, r"profile_steps \(5,\) - profile_steps - give first,last"),
        ({"profile_steps": (9, 5)}, "profile_steps"),
        ({"init_parts": ("encoder",)}, "init_parts encoder, and nothing to take them from - init_from"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        train.check_numbers(digits(**changes))


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_refused_with_settings_that_do():
    config = digits(steps=3)
    built = train.build(config, 3, 1)
    needed = costs.memory(train.compile_to_measure(config, built, 3, 1))
    train.check_memory(config, built["encoder"], needed, needed, 3, 1)
    train.check_memory(config, built["encoder"], needed, 0, 3, 1)  # not known
    with pytest.raises(ConfigError, match=r"a step needs .* GiB of each device, .* - give --config\.\S+=\S+ \("):
        train.check_memory(config, built["encoder"], needed, needed - 1, 3, 1)


def test_probes_join_the_evaluators_where_both_sides_have_the_same_classes():
    images = lambda *classes: SimpleNamespace(classes=classes)  # noqa: E731
    config = digits(evals={"reconstruction": {"pictures": 2}, "knn": {"k": 5}})
    names = lambda *sides: set(train.resolve_evals(config, *sides))  # noqa: E731
    assert train.resolve_evals(config, images("a", "b"), images("a", "b"))["knn"] == {"k": 5}
    assert names(images("a", "b"), images("a", "b")) == {"reconstruction", "knn", "linear"}
    config.evals = {"reconstruction": {}}
    for sides in ((images(), images()), (images("a"), images("a")), (images("a", "b"), images("a"))):
        assert names(*sides) == {"reconstruction"}
    config.objective.name = "segment"
    assert names(images("a", "b"), images("a", "b")) == {"reconstruction"}
    config.objective.name, config.online_probes = "simmim", False
    assert names(images("a", "b"), images("a", "b")) == {"reconstruction"}


def test_frozen_layers_that_are_not_there_or_would_not_be_still_are_refused():
    config = load("configs/digits_finetune.py")
    encoder = make_encoder("resnet", None, width=4, depths=(1, 1, 1, 1))
    params = {"encoder": jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]}
    train.check_frozen(config, encoder, params)
    refusals = {6: "frozen_layers is 6, of an encoder of 4 blocks", 1: "would still use each batch's own"}
    for layers, message in refusals.items():
        config.optim.frozen_layers = layers
        with pytest.raises(ConfigError, match=message):
            train.check_frozen(config, encoder, params)
    config.objective.train_encoder = False
    train.check_frozen(config, encoder, params)


@pytest.mark.parametrize(
    ("frozen", "train_encoder", "drop_path", "message"),
    [
        ("", False, 0.0, "train_encoder=false keeps no parameter as it is"),
        ("encoder/block_0", False, 0.0, "train_encoder=false keeps no parameter as it is"),
        ("encoder/", True, 0.1, "still drops paths"),
        ("encoder/", True, 0.0, ""), ("encoder/", False, 0.1, ""), ("", True, 0.1, ""),
    ],
)  # fmt: skip
def test_an_encoder_that_is_half_frozen_is_told_of(monkeypatch, frozen, train_encoder, drop_path, message):
    told = []
    monkeypatch.setattr(train.logging, "warning", lambda what, *values: told.append(what % values))
    config = load("configs/digits_finetune.py")
    config.optim.frozen, config.objective.train_encoder = frozen, train_encoder
    params = {"encoder": {"block_0": jnp.zeros(1), "block_1": jnp.zeros(1)}, "head": jnp.zeros(1)}
    train.check_frozen(config, make_encoder("vit", "s", drop_path=drop_path), params)
    assert [message in each for each in told] == [True] * bool(message)


@pytest.mark.parametrize(
    ("frozen", "message"), [("encodr/", "begins with 'encodr/'"), (".*", "all parameters are frozen")]
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(frozen, message):
    config = load("configs/digits_finetune.py")
    encoder = make_encoder(**{"size": None, **load("configs/digits_vit_tiny.py").encoder})
    images = jnp.zeros((1, 16, 16, 1))
    params = {"encoder": jax.eval_shape(encoder.init, jax.random.key(0), images)["params"], "head": {"bias": images}}
    config.optim.frozen = "encoder/"
    train.check_frozen(config, encoder, params)
    everything, trained = train.parameters_of(config, encoder, params)
    assert trained == images.size < everything
    config.optim.frozen = frozen
    with pytest.raises(ConfigError, match=message):
        train.check_frozen(config, encoder, params)


def test_an_average_that_would_be_of_the_start_is_told_of(monkeypatch):
    told = []
    monkeypatch.setattr(train.logging, "warning", lambda what, *values: told.append(what % values))
    train.warn_about_length(digits(ema_decay=0.9999), 100_000, 100)
    train.warn_about_length(digits(ema_decay=0.0), 660, 100)
    assert told == []
    train.warn_about_length(digits(ema_decay=0.9999), 660, 100)
    assert len(told) == 1
    assert "94 % those at the start" in told[0]


@pytest.mark.parametrize("name", ["finetune", "vit_tiny"])
def test_images_that_are_trained_on_do_not_judge(name):
    """Nor where probes join in; how well they are reconstructed may be looked at."""
    config = load(f"configs/digits_{name}.py")
    if name == "vit_tiny":
        config.evals = {"reconstruction": {}}
    train.make_sources(config)
    config.data.heldout_split = "train"
    with pytest.raises(ConfigError, match="held-out images are among those trained on"):
        train.make_sources(config)
    if name == "vit_tiny":
        config.online_probes = False
        train.make_sources(config)


def test_an_evaluation_heeds_a_signal_at_its_next_batch():
    stop, seen = StopSignal(), []
    read = train.stoppable(lambda *batch: seen.append(batch), stop)
    read("params", 1)
    stop.number = 15
    with pytest.raises(Preempted) as cut:
        read("params", 2)
    assert (seen, cut.value.number) == ([("params", 1)], 15)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"name": "classify"}, {"name": "classify", "block": 1}, "objective.block is 0"),
        ({"name": "classify", "pool": "both"}, {"name": "classify"}, 'objective.pool is "both"'),
        ({"name": "segment", "head": "linear"}, {"name": "segment", "head": "upernet"}, 'objective.head is "linear"'),
        ({"name": "segment", "blocks": [1, 2]}, {"name": "segment", "blocks": (1, 3)}, r"objective.blocks is \[1, 2\]"),
        ({"name": "segment", "blocks": [1, 2]}, {"name": "segment", "blocks": (1, 2)}, ""),
        ({"name": "simmim"}, {"name": "simmim"}, ""),
    ],
)
def test_a_head_that_reads_other_features_is_another(there, here, message):
    told = train.other_head({"objective": there}, ConfigDict({"objective": here}), ())
    assert re.fullmatch(message, told)


def test_a_head_of_other_classes_is_another():
    config = ConfigDict({"objective": {"name": "classify"}})
    saved = {"objective": {"name": "classify"}, "classes": ["ant", "bee"]}
    assert train.other_head(saved, config, ("ant", "bee")) == ""
    assert train.other_head(saved | {"classes": []}, config, ("ant", "bee")) == ""  # of an import that tells none
    assert train.other_head(saved, config, ()) == ""  # as without classes.txt
    assert train.other_head(saved, config, ("ant", "cat")) == "it knows 2 classes, ant, bee and so on"


def test_a_size_that_is_not_that_of_the_weights_is_refused(tmp_path):
    config = load("configs/folder_finetune.py")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"encoder": {"name": "vit", "size": "b"}}')
    for size in (None, "", "b"):
        config.encoder.size = size
        assert train.resolve_encoder(config, str(tmp_path))["size"] == "b"
    config.encoder.size = "s"
    with pytest.raises(ConfigError, match=r"encoder\.size is 's', and init_from has 'b' - encoder.size - leave it out"):
        train.resolve_encoder(config, str(tmp_path))


def test_what_a_config_sets_for_pretrained_weights_is_told_of_random_ones():
    config = load("configs/digits_finetune.py")
    assert "optim.layer_decay 0.75 slows the low layers" in train.made_for_pretrained(config)
    config.optim.layer_decay = 1.0
    assert train.made_for_pretrained(config) == ""
    assert "what optim.frozen keeps" in train.made_for_pretrained(load("configs/digits_linear.py"))


def test_memory_with_frozen_layers_is_measured_without_a_scan():
    config = digits(steps=1)
    config.encoder.depth, config.encoder.remat, config.optim.frozen_layers = 2, "full", 2
    assert costs.memory(train.compile_to_measure(config, train.build(config, 1, 1), 1, 1)) > 0


@pytest.mark.parametrize("heldout", [0, 100, 5000])
@pytest.mark.parametrize("steps", [5, 880, 100_000])
@pytest.mark.parametrize("names", [("reconstruction",), ("knn", "linear"), ("reconstruction", "linear")])
def test_evaluations_cost_less_than_the_share_that_is_theirs(names, steps, heldout):
    config = digits(eval_every=-1, eval_images=2000)
    period = train.evaluation_period(config, {name: {} for name in names}, steps, 50_000, heldout)
    if period == 0:  # none but those at start and end
        return
    forward = min(heldout, 2000) * ("reconstruction" in names)
    forward += (2000 + min(heldout, 2000)) * bool({"knn", "linear"} & set(names))
    count = (steps - 1) // period
    assert 1 <= count <= train.MAX_EVALUATIONS
    assert (count + 2) * forward / 3 <= train.MAX_EVALUATION_FRACTION * steps * config.batch_size
    if steps == 100_000:
        assert count == train.MAX_EVALUATIONS


def test_a_period_that_is_given_is_kept():
    evals = {"reconstruction": {}}
    assert train.evaluation_period(digits(eval_every=7), evals, 100, 1000, 100) == 7
    assert train.evaluation_period(digits(eval_every=0), evals, 10**6, 1000, 100) == 0
    assert train.evaluation_period(digits(eval_every=-1), {}, 10**6, 1000, 100) == 0


@pytest.fixture
def no_cache(monkeypatch):
    """JAX as it is where nobody has named a folder for compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_the_users_cache_folder(no_cache, tmp_path):
    no_cache.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation.enable_cache()
    assert folder.is_dir()
    assert folder.parent == tmp_path / "simmim_jax" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert compilation.enable_cache() == folder  # now that it is named, it stays


def test_a_folder_that_the_user_names_is_left_alone(no_cache, tmp_path):
    no_cache.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    assert str(compilation.enable_cache()) == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", "")
    assert compilation.enable_cache() is None
    assert not (tmp_path / "simmim_jax").exists()


def test_where_nothing_can_be_written_nothing_is_kept(no_cache, tmp_path):
    (tmp_path / "file").write_text("")
    no_cache.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation.enable_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
