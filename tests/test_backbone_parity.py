"""Exported backbones give the same feature maps in transformers, and have exactly its names.

Needs tests/requirements-parity.txt, else it is skipped. Weights are random; nothing is downloaded. Tolerances cover
float32 rounding: 1e-5 of the largest value.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_trained import random_weights

from simmim_jax.interop import backbone
from simmim_jax.runs import checkpoint
from simmim_jax.tools.convert import __main__ as convert
from simmim_jax.tools.convert.weights import abstract_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 64
SWIN = {"size": "t", "width": 8, "depths": (2, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window": 2}
VIT = {"name": "vit", "size": "ti", "width": 32, "depth": 5, "num_heads": 4, "patch_size": 16}
PLAIN = {"relative_position": "none", "layer_scale": 0.0, "qkv_bias": "qkv"}
ENCODERS = {
    "swin": {"name": "swin", **SWIN, "absolute_position": "learned", "qkv_bias": "none"},
    "swinv2": {"name": "swinv2", **SWIN, "window": 4, "pretrained_windows": (4, 4, 4, 2)},
    "convnext": {"name": "convnext", "size": "t", "depths": (2, 1, 2, 1), "widths": (8, 16, 24, 32)},
    "resnet": {"name": "resnet", "size": "50", "depths": (2, 1, 2, 1), "width": 8},
    "beit_shared": VIT,
    "beit_per_block": {
        **VIT, "relative_position": "per_block", "absolute_position": "learned", "final_norm": False,
        "layer_scale": 0.0,
    },
    "plain": {**VIT, **PLAIN, "absolute_position": "learned"},
    "plain_sincos": {**VIT, **PLAIN, "absolute_position": "sincos", "qkv_bias": "none", "final_norm": False},
    "plain_scaled": {**VIT, **PLAIN, "absolute_position": "none", "qkv_bias": "qv", "layer_scale": 0.1},
}  # fmt: skip


def exported(folder, options, objective=None):
    """(encoder, its parameters) of a workdir with random weights, exported to FOLDER/backbone."""
    objective = objective or {"name": "none"}
    pixels = {"mean": MEAN, "std": STD}
    encoder, abstract = abstract_model(options, objective, (SIZE, SIZE), pixels)
    params = random_weights(abstract)
    config = {"encoder": options, "objective": objective, "image_size": (SIZE, SIZE), **pixels}
    checkpoint.write_params(str(folder / "workdir"), params, json.loads(json.dumps(config)))
    convert.run([str(folder / "workdir"), str(folder / "backbone"), "--format=backbone"])
    return encoder, jax.tree.map(jnp.asarray, params["encoder"])


@pytest.fixture
def auto_backbone(monkeypatch):
    """AutoBackbone.from_pretrained for a folder. Version 5.23 asks the hub whether the model exists."""
    factory = transformers.models.auto.auto_factory
    if hasattr(factory, "hf_api"):
        hub = type("Hub", (), {"repo_exists": lambda self, name: True})
        monkeypatch.setattr(factory, "hf_api", hub)
    return lambda folder, **options: transformers.AutoBackbone.from_pretrained(
        str(folder), output_loading_info=True, **options
    )


def unscaled_norm(x, epsilon):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)


def our_maps(encoder, params, images) -> dict[str, np.ndarray]:
    """The expected map of each stage, by its name."""
    out, seen = encoder.apply({"params": params}, jnp.asarray(images), mutable=["intermediates"])
    blocks = seen["intermediates"]["blocks"]
    maps = {f"stage{n + 1}": blocks[end - 1] for n, end in enumerate(backbone.stage_ends(encoder))}
    kind = backbone.backbone_type(encoder)
    if kind in ("swin", "convnext"):
        maps = {name: unscaled_norm(x, {"swin": 1e-5, "convnext": 1e-6}[kind]) for name, x in maps.items()}
    if kind == "swin":
        maps["stage4"] = out
    return maps


def assert_close(ours, theirs):
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1).astype(np.float64)
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1e-2
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ENCODERS)
def test_auto_backbone_gives_the_maps_of_our_stages_and_has_exactly_our_names(tmp_path, auto_backbone, name):
    encoder, params = exported(tmp_path, ENCODERS[name])
    images = np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    model, info = auto_backbone(tmp_path / "backbone")
    assert type(model).__name__ == backbone.CLASSES[backbone.backbone_type(encoder)]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.out_features == backbone.out_features(encoder)
    assert len(model.out_features) == 4

    ours = our_maps(encoder, params, images)
    theirs = model.eval()(pixels).feature_maps
    for stage, channels, feature_map in zip(model.out_features, model.channels, theirs, strict=True):
        assert channels == ours[stage].shape[-1]
        assert_close(ours[stage], feature_map)

    fewer, info = auto_backbone(tmp_path / "backbone", out_indices=[1, 3])
    assert all(key.startswith("hidden_states_norms.") for key in info["unexpected_keys"])
    assert not info["missing_keys"]
    for stage, feature_map in zip(("stage1", "stage3"), fewer.eval()(pixels).feature_maps, strict=True):
        assert_close(ours[stage], feature_map)


def test_backbone_class_loads_a_folder(tmp_path):
    encoder, params = exported(tmp_path, ENCODERS["swin"])
    images = np.random.default_rng(1).standard_normal((1, SIZE, SIZE, 3)).astype(np.float32)
    model = transformers.SwinBackbone.from_pretrained(tmp_path / "backbone", out_features=["stage4"])
    (last,) = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).feature_maps
    assert_close(encoder.apply({"params": params}, jnp.asarray(images)), last)
    assert "LayerNorm" in (tmp_path / "backbone" / "README.md").read_text()


def test_dinov2_with_its_norm_gives_our_output(tmp_path):
    encoder, params = exported(tmp_path, ENCODERS["plain"])
    images = np.random.default_rng(1).standard_normal((1, SIZE, SIZE, 3)).astype(np.float32)
    model = transformers.Dinov2Backbone.from_pretrained(
        tmp_path / "backbone", out_indices=[encoder.depth], apply_layernorm=True
    )
    (last,) = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).feature_maps
    assert_close(encoder.apply({"params": params}, jnp.asarray(images)), last)


@pytest.mark.parametrize(
    ("objective", "heads"), [({"name": "simmim"}, "head, mask_token"), ({"name": "segment", "num_classes": 5}, "head")]
)
def test_heads_of_a_run_are_left_out(tmp_path, auto_backbone, capsys, objective, heads):
    exported(tmp_path, ENCODERS["swinv2"], objective)
    assert f"backbone has no place for it: {heads}\n" in capsys.readouterr().out
    _, info = auto_backbone(tmp_path / "backbone")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_segmenter_of_transformers_trains_on_an_exported_backbone(tmp_path):
    """UperNet with the config and the weights of the backbone."""
    exported(tmp_path, ENCODERS["swin"])
    weights = transformers.SwinBackbone.from_pretrained(tmp_path / "backbone")
    config = transformers.UperNetConfig(
        backbone_config=weights.config, hidden_size=16, auxiliary_in_channels=32, num_labels=5,
    )  # fmt: skip
    model = transformers.UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(weights.state_dict())
    labels = torch.randint(0, 5, (2, SIZE, SIZE))
    out = model(torch.randn(2, 3, SIZE, SIZE), labels=labels)
    out.loss.backward()
    assert out.logits.shape == (2, 5, SIZE, SIZE)
    assert float(next(model.backbone.parameters()).grad.abs().max()) > 0
