"""The text files of a Hugging Face folder: config.json, preprocessor_config.json and the model card."""

import json
import math

from simmim_jax.errors import choose
from simmim_jax.interop.huggingface import model_type

ARCHITECTURES = {
    "none": {"vit": "ViTModel", "beit": "BeitModel", "swin": "SwinModel", "swinv2": "Swinv2Model"},
    "simmim": {kind: f"{cls}ForMaskedImageModeling" for kind, cls in
               (("vit", "ViT"), ("swin", "Swin"), ("swinv2", "Swinv2"))},
    "classify": {kind: f"{cls}ForImageClassification" for kind, cls in
                 (("beit", "Beit"), ("swin", "Swin"), ("swinv2", "Swinv2"), ("vit", "ViT"))},
}  # fmt: skip
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers
KINDS = {"simmim": "pretrained by masked image modeling", "classify": "an image classifier", "none": "an encoder"}
RECIPE = ("objective", "encoder", "optim", "epochs", "steps", "batch_size", "image_size", "mean", "std")
HEADER = "---\nlibrary_name: transformers\ntags:\n- simmim\n- masked-image-modeling\n---\n"


def make_config(encoder, objective: dict, image_size: tuple[int, int], channels: int) -> dict:
    """config.json."""
    kind = model_type(encoder)
    config = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[objective["name"]][kind]],
        "dtype": "float32",
        "image_size": image_size[0] if image_size[0] == image_size[1] else list(image_size),
        "patch_size": encoder.patch_size,
        "num_channels": channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": encoder.norm_epsilon,
    }
    if kind in ("vit", "beit"):
        config |= {
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "intermediate_size": int(encoder.width * encoder.mlp_ratio),
        }
    if kind == "vit":
        config |= {"qkv_bias": encoder.qkv_bias == "qkv", "encoder_stride": encoder.feature_stride}
    elif kind == "beit":
        config |= {
            "layer_scale_init_value": encoder.layer_scale,
            "use_absolute_position_embeddings": encoder.absolute_position != "none",
            "use_relative_position_bias": encoder.relative_position == "per_block",
            "use_shared_relative_position_bias": encoder.relative_position == "shared",
            "use_mask_token": False,
            "use_mean_pooling": not encoder.final_norm,
            "drop_path_rate": encoder.drop_path,
        }
    else:
        config |= {
            "embed_dim": encoder.width,
            "depths": list(encoder.depths),
            "num_heads": list(encoder.num_heads),
            "window_size": encoder.window,
            "mlp_ratio": encoder.mlp_ratio,
            "qkv_bias": encoder.qkv_bias != "none",
            "use_absolute_embeddings": encoder.absolute_position == "learned",
            "drop_path_rate": encoder.drop_path,
            "encoder_stride": encoder.feature_stride,
            "hidden_size": encoder.width * 2 ** (len(encoder.depths) - 1),
        }
    if kind == "swinv2":
        config["pretrained_window_sizes"] = list(encoder.pretrained_windows or [0] * len(encoder.depths))
    if objective["name"] == "classify":
        labels = range(objective["num_classes"])
        config |= {"id2label": {str(n): f"LABEL_{n}" for n in labels}, "label2id": {f"LABEL_{n}": n for n in labels}}
    return config


def make_preprocessor_config(
    image_size: tuple[int, int], mean: tuple, std: tuple, interpolation: str, crop_fraction: int | float = 1.0
) -> dict:
    """preprocessor_config.json, which gives the pixels of our `resize_and_center_crop`, normalized.

    The pixels can differ in three ways:

    - by rounding: by 1 of 255. With nearest another pixel may be taken. An older torchvision resizes by bicubic
      instead of lanczos.
    - by a shift of one pixel, if 1.5, 3.5, ... pixels are cropped on a side: transformers rounds down, we round up.
    - for image sizes that are not square: transformers crops to squares only, so the whole image is resized; see
      `squash_note`.

    BitImageProcessor supports all of this in transformers 4 and 5. The ViTImageProcessor of 4 has no shortest edge.
    """
    height, width = image_size
    is_square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / crop_fraction)}
        if is_square
        else {"height": height, "width": width},
        "resample": choose("interpolation", interpolation, RESAMPLE),
        "do_center_crop": is_square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def squash_note(image_size: tuple[int, int]) -> tuple[str, ...]:
    """A note if `make_preprocessor_config` changes the aspect ratio of images and the run does not."""
    height, width = image_size
    if height == width:
        return ()
    return (
        f"preprocessor_config.json squashes images to {height} x {width}, because transformers crops to squares only; "
        "the run kept their aspect ratio and cropped",
    )


def model_card(
    title: str,
    objective: dict,
    config: dict,
    *,
    step: int | None,
    summary: dict,
    left_out: dict[str, list[str]],
    notes: tuple[str, ...] = (),
) -> str:
    """README.md: what the model is, how it was trained, and its metrics.

    config, summary: the run's config.json and summary.json ({} if it has none). Metrics are shown only if they belong
    to `step`, the step of the weights. left_out: names of heads by the reason why they are left out.
    """
    imported, parts = config.get("imported"), [f"A {title}, {KINDS[objective['name']]}, exported by simmim_jax."]
    if isinstance(imported, dict):
        parts.append(
            f"Its weights were imported from `{imported.get('from')}` ({imported.get('format')}, sha256 "
            f"`{imported.get('sha256')}`). How they were trained is not known here."
        )
    elif step is not None:
        parts.append(f"These are its weights after {step} steps of training.")
    if config.get("init_from"):
        parts.append(f"Training started from the weights of `{config['init_from']}`.")
    parts += [f"Without parts that {reason}: {', '.join(names)}." for reason, names in left_out.items() if names]
    parts += [f"Note: {note}." for note in notes]
    data = [(name, config.get("data", {}).get(name)) for name in ("source", "name", "split")]
    if lines := [f"- {name}: `{value}`" for name, value in data if value]:
        parts += ["## Data", "\n".join(lines)]
    if "optim" in config:
        recipe = {name: config[name] for name in RECIPE if name in config}
        parts += ["## Recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```"]
    others = ("step", "images_per_second")
    metrics = {name: value for name, value in summary.items() if isinstance(value, int | float) and name not in others}
    if metrics and step is not None and summary.get("step") == step:
        parts += ["## Metrics", f"On held-out images, measured by the run at step {step}:"]
        parts.append("\n".join(f"- {name}: {value}" for name, value in metrics.items()))
    return f"{HEADER}\n# {title}\n\n" + "\n\n".join(parts) + "\n"
