"""Parity with transformers and timm in both directions, with random weights. Nothing is downloaded.

Needs tests/requirements-parity.txt and is skipped without it. All weights pass through `convert` and through files, as
for a user. Tolerances cover float32 rounding: 1e-5 of the largest value. One case per format and encoder, with options
that differ from the defaults; test_interop.py covers the names of all options.
"""

import functools
import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_sample_image
from tiny_trained import random_weights

from simmim_jax.data.decode import Picture
from simmim_jax.data.transforms import resize_and_center_crop
from simmim_jax.errors import CheckpointError
from simmim_jax.interop.rules import flatten
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.objectives.pixels import from_patches
from simmim_jax.objectives.simmim import make_forward, masked_l1
from simmim_jax.runs import checkpoint
from simmim_jax.tools.convert import __main__ as convert
from simmim_jax.tools.convert.weights import abstract_model
from simmim_jax.tools.evaluate import __main__ as evaluate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = {"mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def timm():
    """timm, with a stand-in for torchvision, which its unused models and transforms import."""
    transformers.utils.is_torchvision_available()  # cached, so that transformers does not see the stand-in

    class Anything(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return name

    def placeholder(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *_, **__: None})

    folders = ("transforms", "transforms.functional", "transforms.v2", "ops", "ops.misc", "models", "utils",
               "models.feature_extraction", "datasets", "datasets.folder")  # fmt: skip
    for name in ("torchvision", *(f"torchvision.{folder}" for folder in folders)):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__, module.__version__, module.__getattr__ = [], "0", placeholder
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield pytest.importorskip("timm")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def images_of(size, batch=2):
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def normalized(images):
    """Images as our encoders receive them."""
    return ((images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)


def to_torch(images):
    return torch.from_numpy(normalized(images).transpose(0, 3, 1, 2).copy())


def with_random_weights(model, seed=0):
    """The model in evaluation mode with random weights and statistics, so that no bias is 0 and no scale 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            spread = 0.05 * torch.randn(x.shape, generator=generator)
            is_scale = x.ndim == 1 and name.endswith("weight")
            base = 1.0 if is_scale else float(np.log(10)) if name.endswith("logit_scale") else 0.0
            x.copy_(base + spread)
        for name, x in model.named_buffers():
            if name.endswith("running_var"):
                x.copy_(0.5 + torch.rand(x.shape, generator=generator))
            elif name.endswith("running_mean"):
                x.copy_(0.1 * torch.randn(x.shape, generator=generator))
    return model.eval()


def load(folder):
    """(encoder, parameters, config) of a workdir."""
    params, config = checkpoint.read_params(str(folder))
    encoder = make_encoder(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["encoder"].items()})
    return encoder, jax.tree.map(jnp.asarray, params), config


def imported(folder, source, *flags):
    convert.run([str(source), str(folder / "workdir"), *flags])
    return load(folder / "workdir")


def write_workdir(folder, options, objective, size, **data):
    """Write a workdir with random weights; (encoder, parameters). data: config.data."""
    encoder, abstract = abstract_model(options, objective, (size, size), PIXELS)
    params = random_weights(abstract)
    config = {"encoder": {**options, "depths": list(options["depths"])} if "depths" in options else options}
    config |= {"objective": objective, "image_size": [size, size], "mean": list(MEAN), "std": list(STD)}
    checkpoint.write_params(str(folder / "workdir"), params, config | ({"data": data} if data else {}))
    return encoder, jax.tree.map(jnp.asarray, params)


def features_of(encoder, params, images):
    return np.asarray(encoder.apply({"params": params["encoder"]}, jnp.asarray(normalized(images))))


def logits_of(encoder, params, config, images):
    objective = {**config["objective"], **PIXELS, "image_size": images.shape[1:3]}
    predict = make_objective(encoder=encoder, **objective).predict
    batch = {"image": jnp.asarray(images), "batch_index": jnp.arange(len(images))}
    return np.asarray(predict(params, batch, jax.random.key(0))["logits"])


def assert_close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs.detach(), np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1e-3  # not a comparison of zeros
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def as_map(tokens, features):
    """Their tokens [b, n, d] in the shape of our features [b, k, l, d], without a class token."""
    b, k, n, d = features.shape
    return tokens[:, -k * n :].reshape(b, k, n, d)


VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 64,
           "patch_size": 16, "encoder_stride": 16}  # fmt: skip
SWIN = {"embed_dim": 8, "depths": [2, 1, 2, 1], "num_heads": [1, 1, 2, 2], "drop_path_rate": 0.0}


def hugging_face_models():
    """(name, model). 96 pixels: windows of 2 and 4 pad the feature maps, and those of Swin V2 shrink to them."""
    t = transformers
    absolute = {"use_absolute_embeddings": True, "qkv_bias": False}
    pretrained = {"pretrained_window_sizes": [3, 3, 3, 2]}
    yield "vit", t.ViTForMaskedImageModeling(t.ViTConfig(**VIT))
    yield "swin", t.SwinForMaskedImageModeling(t.SwinConfig(**SWIN, image_size=96, window_size=2, **absolute))
    yield "swinv2", t.Swinv2ForMaskedImageModeling(t.Swinv2Config(**SWIN, image_size=96, window_size=4, **pretrained))


@pytest.mark.parametrize(("name", "model"), list(hugging_face_models()), ids=lambda x: x if isinstance(x, str) else "")
def test_masked_image_model_of_transformers_gives_the_same_features_reconstruction_and_loss(tmp_path, name, model):
    model = with_random_weights(model)
    model.save_pretrained(tmp_path / "hf")
    encoder, params, config = imported(tmp_path, tmp_path / "hf")
    assert config["objective"] == {"name": "simmim"}

    images = images_of(model.config.image_size)
    base = getattr(model, model.base_model_prefix)
    features = features_of(encoder, params, images)
    assert_close(features, as_map(base(to_torch(images)).last_hidden_state, features))

    grid = images.shape[1] // encoder.token_stride
    mask = np.random.default_rng(1).random((len(images), grid, grid)) < 0.6
    theirs = model(to_torch(images), bool_masked_pos=torch.from_numpy(mask.reshape(len(images), -1)))
    forward = make_forward(encoder, channels=3)
    pixels = jnp.asarray(normalized(images))
    prediction = forward(params, pixels, jnp.asarray(mask), jax.random.key(0), False)[1]
    reconstruction = from_patches(prediction, encoder.feature_stride)
    assert_close(reconstruction, theirs.reconstruction.permute(0, 2, 3, 1))
    hidden = jnp.asarray(mask.repeat(encoder.token_stride, 1).repeat(encoder.token_stride, 2))
    assert_close(masked_l1(prediction, pixels, hidden, encoder.feature_stride), theirs.loss)


def test_odd_feature_maps_give_the_same_features(tmp_path):
    """72 pixels: maps of 18, 9, 5 and 3."""
    config = transformers.SwinConfig(**SWIN, image_size=72, window_size=2)
    model = with_random_weights(transformers.SwinModel(config))
    model.save_pretrained(tmp_path / "hf")
    encoder, params, _ = imported(tmp_path, tmp_path / "hf")
    images = images_of(72)
    features = features_of(encoder, params, images)
    assert features.shape[1:3] == (3, 3)
    assert_close(features, as_map(model(to_torch(images)).last_hidden_state, features))


def test_windows_of_transformers_from_rounded_down_maps_are_refused(tmp_path):
    """Its Swinv2 computes windows for maps of 18, 9, 4 and 2, and runs on maps of 18, 9, 5 and 3."""
    config = transformers.Swinv2Config(**SWIN, image_size=72, window_size=4)
    transformers.Swinv2Model(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="rounded down"):
        imported(tmp_path, tmp_path / "hf")


def test_swin_of_transformers_fails_on_a_map_smaller_than_its_window():
    """The reason why we refuse to export such a model."""
    model = transformers.SwinModel(transformers.SwinConfig(**SWIN, image_size=64, window_size=4))
    with pytest.raises(RuntimeError):
        model(to_torch(images_of(64)))


def test_classifier_of_transformers_gives_the_same_logits(tmp_path):
    config = transformers.Swinv2Config(**SWIN, image_size=64, window_size=2, num_labels=7)
    model = with_random_weights(transformers.Swinv2ForImageClassification(config))
    model.save_pretrained(tmp_path / "hf")
    encoder, params, config = imported(tmp_path, tmp_path / "hf")
    assert_close(logits_of(encoder, params, config, images_of(64)), model(to_torch(images_of(64))).logits)


BEIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 64,
            "patch_size": 16, "layer_norm_eps": 1e-6, "drop_path_rate": 0.0}  # fmt: skip


@pytest.mark.parametrize(("shared", "absolute"), [(True, True), (False, False)])
def test_beit_of_transformers_gives_the_same_features(tmp_path, shared, absolute):
    config = transformers.BeitConfig(
        **BEIT, use_shared_relative_position_bias=shared, use_relative_position_bias=not shared,
        use_absolute_position_embeddings=absolute, use_mean_pooling=False,
    )  # fmt: skip
    model = with_random_weights(transformers.BeitModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path / "hf")
    encoder, params, _ = imported(tmp_path, tmp_path / "hf")
    images = images_of(64)
    features = features_of(encoder, params, images)
    assert_close(features, as_map(model(to_torch(images)).last_hidden_state, features))


def test_beit_classifier_of_transformers_gives_the_same_logits(tmp_path):
    config = transformers.BeitConfig(**BEIT, use_relative_position_bias=True, num_labels=7)
    model = with_random_weights(transformers.BeitForImageClassification(config))
    model.save_pretrained(tmp_path / "hf")
    encoder, params, config = imported(tmp_path, tmp_path / "hf")
    assert_close(logits_of(encoder, params, config, images_of(64)), model(to_torch(images_of(64))).logits)


def test_classifier_of_the_class_token_gives_the_same_logits_in_both_directions(tmp_path):
    config = transformers.BeitConfig(**BEIT, use_relative_position_bias=True, use_mean_pooling=False, num_labels=7)
    model = with_random_weights(transformers.BeitForImageClassification(config))
    model.save_pretrained(tmp_path / "hf")
    encoder, params, config = imported(tmp_path, tmp_path / "hf")
    theirs = model(to_torch(images_of(64))).logits
    assert_close(logits_of(encoder, params, config, images_of(64)), theirs)
    convert.run([str(tmp_path / "workdir"), str(tmp_path / "back")])
    back, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(back.eval()(to_torch(images_of(64))).logits.detach(), theirs)


def test_imported_classifier_has_the_accuracy_that_transformers_measures(tmp_path, capsys):
    """Images have the size of the model, so that both receive the same pixels."""
    config = transformers.ViTConfig(**VIT, num_labels=7)
    model = with_random_weights(transformers.ViTForImageClassification(config))
    with torch.no_grad():
        model.vit.layernorm.weight.mul_(8)
    model.save_pretrained(tmp_path / "hf")
    convert.run([str(tmp_path / "hf"), str(tmp_path / "workdir")])
    images, labels = images_of(64, batch=35), np.arange(35) % 7
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        image[:] = image // 4 + np.random.default_rng(n).integers(0, 190, 3, dtype=np.uint8)
        (tmp_path / "images" / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"class{label}" / f"{n:02}.png")
    logits = model(to_torch(images)).logits.detach().numpy()
    ranks = (logits >= logits[np.arange(35), labels][:, None]).sum(axis=1)
    top1, top5 = (100 * (ranks <= k).mean() for k in (1, 5))
    assert 0 < top1 < top5 < 100

    capsys.readouterr()
    evaluate.run([str(tmp_path / "workdir"), f"--data={tmp_path / 'images'}", "--batch-size=16", "--crop-fraction=1",
                  f"--results={tmp_path / 'results.csv'}"])  # fmt: skip
    assert f"top-1 {top1:.2f} %  top-5 {top5:.2f} %  of 35 images" in capsys.readouterr().out


OUR_VIT = {"name": "vit", "size": "ti", "width": 32, "depth": 2, "num_heads": 4, "patch_size": 16}
PLAIN = {"relative_position": "none", "qkv_bias": "qkv", "layer_scale": 0.0}
OUR_SWIN = {"size": "t", "width": 8, "depths": (2, 1, 2, 1), "num_heads": (1, 1, 2, 2), "window": 2}
SIMMIM, BARE = {"name": "simmim"}, {"name": "none"}
CLASSIFY = {"name": "classify", "num_classes": 7, "fc_norm": False}


@pytest.mark.parametrize(
    ("options", "objective", "kind"),
    [
        ({**OUR_VIT, **PLAIN, "absolute_position": "sincos"}, BARE, "ViTModel"),
        (OUR_VIT, SIMMIM, "BeitModel"),
        ({"name": "swin", **OUR_SWIN, "absolute_position": "learned", "qkv_bias": "none"}, CLASSIFY, "SwinModel"),
        ({"name": "swinv2", **OUR_SWIN, "window": 4, "pretrained_windows": (4, 4, 4, 2)}, SIMMIM, "Swinv2Model"),
    ],
)  # fmt: skip
def test_transformers_loads_our_export_and_gives_the_same_features(tmp_path, options, objective, kind):
    encoder, params = write_workdir(tmp_path, options, objective, 64)
    convert.run([str(tmp_path / "workdir"), str(tmp_path / "hf")])
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model).__name__ == kind
    assert all(name.startswith("pooler.") for name in info["missing_keys"])
    assert not info["mismatched_keys"]
    images = images_of(64)
    features = features_of(encoder, params, images)
    assert_close(features, as_map(model.eval()(to_torch(images)).last_hidden_state, features))


@pytest.mark.parametrize(
    "options",
    [
        {**OUR_VIT, **PLAIN, "absolute_position": "learned"},
        {"name": "swinv2", **OUR_SWIN},
    ],
    ids=lambda options: options["name"],
)
def test_exported_masked_image_model_has_every_parameter(tmp_path, options):
    write_workdir(tmp_path, options, SIMMIM, 64, crop_fraction=1.0)
    convert.run([str(tmp_path / "workdir"), str(tmp_path / "hf")])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    kind = getattr(transformers, config.architectures[0])
    _, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    images = images_of(64)
    pixels = processor(list(images), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixels.numpy().transpose(0, 2, 3, 1), normalized(images), atol=1e-5)


@pytest.mark.parametrize(("interpolation", "crop_fraction", "shift"), [("bicubic", 0.875, 0), ("bilinear", 0.9, 1)])
def test_exported_processor_makes_the_pixels_of_our_evaluation(tmp_path, interpolation, crop_fraction, shift):
    """For a photograph of 427 x 640 pixels, and transposed: up to rounding by 1 of 255, and the documented shift."""
    how = {"crop_fraction": crop_fraction, "interpolation": interpolation}
    write_workdir(tmp_path, {"name": "swin", **OUR_SWIN}, BARE, 64, **how)
    convert.run([str(tmp_path / "workdir"), str(tmp_path / "hf")])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    photograph = load_sample_image("china.jpg")
    for axis, image in enumerate((photograph, photograph.swapaxes(0, 1).copy())):
        theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0].numpy()
        theirs = ((theirs.transpose(1, 2, 0) * STD + MEAN) * 255).astype(np.float64)
        ours = resize_and_center_crop(Picture(image, 3), (64, 64), **how).astype(np.float64)
        theirs, ours = (np.moveaxis(pixels, axis, 0) for pixels in (theirs, ours))
        difference = np.abs(theirs[shift:] - ours[: 64 - shift])
        assert difference.max() <= 1 + 1e-3
        assert difference.mean() < 0.01


def timm_models(timm):
    """(flags for `convert`, image size, maker of the model) by name."""
    from timm.models import beit, convnext, resnet, swin_transformer, swin_transformer_v2, vision_transformer

    vit = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
    swin = {"img_size": 64, "embed_dim": 8, "depths": (2, 1, 2, 1), "num_heads": (1, 1, 2, 2), "num_classes": 7}
    heads = ("--encoder.num_heads=4",)
    return {
        "vit_average": (heads, 64, lambda: vision_transformer.VisionTransformer(
            **vit, global_pool="avg", class_token=False, init_values=1e-5)),
        "vit_registers": (heads, 64, lambda: vision_transformer.VisionTransformer(
            **vit, reg_tokens=4, no_embed_class=True, init_values=1e-5)),
        "vit_registers_average": (heads, 64, lambda: vision_transformer.VisionTransformer(
            **vit, reg_tokens=1, no_embed_class=True, class_token=False, global_pool="avg")),
        "deit3": (heads, 64, lambda: vision_transformer.VisionTransformer(
            **vit, no_embed_class=True, init_values=1e-6)),
        "beit_shared": ((), 64, lambda: beit.Beit(**vit, use_shared_rel_pos_bias=True, init_values=0.1)),
        "swin_shrunk": ((), 64, lambda: swin_transformer.SwinTransformer(**swin, window_size=4)),
        "swinv2_pretrained": (
            ("--image_size=64", "--encoder.window=4", "--encoder.pretrained_windows=3,3,3,2"), 64,
            lambda: swin_transformer_v2.SwinTransformerV2(**swin, window_size=4, pretrained_window_sizes=(3, 3, 3, 2))),
        "resnet": ((), 64, lambda: resnet.ResNet(resnet.Bottleneck, (2, 1, 2, 1), num_classes=7)),
        "convnext": ((), 64, lambda: convnext.ConvNeXt(depths=(2, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=7)),
    }  # fmt: skip


TIMM = (
    "vit_average", "vit_registers", "vit_registers_average", "deit3", "beit_shared", "swin_shrunk", "swinv2_pretrained",
    "resnet", "convnext",
)  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm_model_gives_the_same_features_and_logits_and_is_exported_exactly(tmp_path, timm, name):
    flags, size, make = timm_models(timm)[name]
    model = with_random_weights(make())
    state = {key: x.numpy() for key, x in model.state_dict().items()}
    if name in ("resnet", "beit_shared"):
        file = tmp_path / "timm.pth.tar"
        torch.save({"epoch": 3, "state_dict": model.state_dict()}, file)
    else:
        file = tmp_path / "timm.safetensors"
        save_file(state, file)
    encoder, params, config = imported(tmp_path, file, *flags)

    images = images_of(size)
    features = features_of(encoder, params, images)
    theirs = model.forward_features(to_torch(images))
    if name in ("resnet", "convnext"):
        theirs = theirs.permute(0, 2, 3, 1)
    assert_close(features, as_map(theirs, features) if theirs.ndim == 3 else theirs)
    assert_close(logits_of(encoder, params, config, images), model(to_torch(images)))

    convert.run([str(tmp_path / "workdir"), str(tmp_path / "back.safetensors"), "--format=timm"])
    back = {key: torch.from_numpy(x) for key, x in load_file(tmp_path / "back.safetensors").items()}
    fresh = with_random_weights(make(), seed=1)
    fresh.load_state_dict(back, strict=True)
    weights = {key: x for key, x in fresh.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert [key for key, x in weights.items() if x.numpy().tobytes() != state[key].tobytes()] == []


def test_dinov2_with_registers_gives_the_features_of_timm(tmp_path, timm):
    """Its own file has a position of the class token and none of the registers; timm adds the former to the token."""
    from timm.models.vision_transformer import VisionTransformer, _convert_dinov2

    model = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=4, num_classes=0, reg_tokens=4,
        no_embed_class=True, init_values=1e-5,
    )  # fmt: skip
    state = with_random_weights(model).state_dict()
    file = {"register_tokens" if name == "reg_token" else name: x.clone() for name, x in state.items()}
    own = 0.05 * torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(5))
    file |= {"pos_embed": torch.cat([own, file["pos_embed"]], dim=1), "mask_token": torch.zeros(1, 32)}
    torch.save(file, tmp_path / "dinov2_reg4.pth")
    model.load_state_dict(_convert_dinov2(dict(file), model))
    encoder, params, _ = imported(tmp_path, tmp_path / "dinov2_reg4.pth", "--encoder.num_heads=4", "--allow=mask_token")
    assert (encoder.num_registers, encoder.class_position) == (4, True)
    features = features_of(encoder, params, images_of(56))
    assert_close(features, as_map(model.forward_features(to_torch(images_of(56))), features))


def test_model_with_another_epsilon_is_exported_to_timm_if_that_is_allowed(tmp_path, timm):
    from timm.models.vision_transformer import VisionTransformer

    options = {**OUR_VIT, **PLAIN, "absolute_position": "learned", "norm_epsilon": 1e-2}
    encoder, params = write_workdir(tmp_path, options, BARE, 64)
    to = (str(tmp_path / "workdir"), str(tmp_path / "timm.safetensors"), "--format=timm")
    with pytest.raises(CheckpointError, match=r"norm_epsilon is 0.01.*--allow norm_epsilon"):
        convert.run([*to])
    convert.run([*to, "--allow=norm_epsilon"])
    model = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=0,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-2),
    )  # fmt: skip
    state = {name: torch.from_numpy(x) for name, x in load_file(tmp_path / "timm.safetensors").items()}
    model.eval().load_state_dict(state)
    features = features_of(encoder, params, images_of(64))
    assert_close(features, as_map(model.forward_features(to_torch(images_of(64))), features))


COUNTS = {
    "vit_base_patch16_224": 86_567_656,
    "resnet50": 25_557_032,
    "convnext_tiny": 28_589_128,
    "swin_base_patch4_window7_224": 87_768_224,
}


@pytest.mark.parametrize(("size", "count"), COUNTS.items())
def test_parameter_counts_equal_timm(timm, size, count):
    with torch.device("meta"):
        model = timm.create_model(size, pretrained=False)
    assert sum(x.numel() for x in model.parameters()) == count
    classify = {"name": "classify", "num_classes": 1000}
    options, pooled = {
        "vit_base_patch16_224": ({"name": "vit", "size": "b", **PLAIN, "absolute_position": "learned"}, False),
        "resnet50": ({"name": "resnet", "size": "50"}, False),
        "convnext_tiny": ({"name": "convnext", "size": "t"}, True),
        "swin_base_patch4_window7_224": ({"name": "swin", "size": "b", "window": 7}, False),
    }[size]
    _, abstract = abstract_model(options, {**classify, "fc_norm": pooled}, (224, 224), PIXELS)
    leaves = flatten(abstract).items()
    assert sum(x.size for path, x in leaves if path.rpartition("/")[2] not in ("mean", "var")) == count
