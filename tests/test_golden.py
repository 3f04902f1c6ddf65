"""Parity with the official implementation on its own reference arrays (tests/golden/README.md)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simmim_jax.models import make_encoder
from simmim_jax.objectives.pixels import from_patches
from simmim_jax.objectives.simmim import make_forward, masked_l1

RUNS = ("official_vit_pretrain_ape", "official_vit_pretrain_shared_rpb")


def from_official(state: dict, heads: int) -> dict:
    """Our parameters from an official ViT's state dict, or from its gradients."""

    def linear(name):
        return {
            "kernel": state[f"{name}.weight"].T,
            **({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {}),
        }

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(name):
        width = state[f"{name}.norm1.weight"].shape[0]
        proj = linear(f"{name}.attn.proj")
        return {
            "norm1": norm(f"{name}.norm1"),
            "attn": {
                "qkv": {"kernel": state[f"{name}.attn.qkv.weight"].T.reshape(width, 3, heads, -1)},
                "q_bias": state[f"{name}.attn.q_bias"].reshape(heads, -1),
                "v_bias": state[f"{name}.attn.v_bias"].reshape(heads, -1),
                "proj": {"kernel": proj["kernel"].reshape(heads, -1, width), "bias": proj["bias"]},
            },
            "scale_attn": {"gamma": state[f"{name}.gamma_1"]},
            "norm2": norm(f"{name}.norm2"),
            "mlp": {"fc1": linear(f"{name}.mlp.fc1"), "fc2": linear(f"{name}.mlp.fc2")},
            "scale_mlp": {"gamma": state[f"{name}.gamma_2"]},
        }

    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks."))
    encoder = {
        "patch_embed": {
            "kernel": state["encoder.patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": state["encoder.patch_embed.proj.bias"],
        },
        "cls_token": state["encoder.cls_token"].reshape(-1),
        "norm": norm("encoder.norm"),
        **{f"block_{n}": block(f"encoder.blocks.{n}") for n in range(depth)},
    }
    if "encoder.pos_embed" in state:
        encoder["pos_embed"] = state["encoder.pos_embed"][0]
    if "encoder.rel_pos_bias.relative_position_bias_table" in state:
        encoder["rel_pos_bias"] = {"table": state["encoder.rel_pos_bias.relative_position_bias_table"]}
    head = {"kernel": state["decoder.0.weight"][:, :, 0, 0].T, "bias": state["decoder.0.bias"]}
    return {"encoder": encoder, "mask_token": state["encoder.mask_token"].reshape(-1), "head": head}


def part(arrays: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


@pytest.fixture(params=RUNS)
def reference(request, golden):
    """(forward, params, images, mask, arrays) of one reference run, in our layout."""
    arrays = golden(request.param)
    config = json.loads(str(arrays["config"]))
    encoder = make_encoder(
        "vit",
        "ti",
        width=config["dim"],
        depth=config["depth"],
        heads=config["heads"],
        patch_size=config["patch_size"],
        absolute_position="learned" if config["use_abs_pos_emb"] else "none",
        relative_position="shared" if config["use_shared_rel_pos_bias"] else "none",
        layer_scale=config["init_values"],
    )
    params = jax.tree.map(jnp.asarray, from_official(part(arrays, "params/"), config["heads"]))
    images = jnp.asarray(arrays["images"].transpose(0, 2, 3, 1))
    return make_forward(encoder, channels=3), params, images, jnp.asarray(arrays["mask"] == 1), arrays


def relative_error(ours, theirs) -> float:
    """The largest difference, as a share of the reference's largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def loss_of(forward, params, images, mask):
    _, prediction = forward(params, images, mask, jax.random.key(0), False)
    return masked_l1(prediction, images, jnp.repeat(jnp.repeat(mask, 16, axis=1), 16, axis=2), 16)


def test_features_reconstruction_and_loss_equal_the_official_ones(reference):
    forward, params, images, mask, arrays = reference
    features, prediction = forward(params, images, mask, jax.random.key(0), False)
    reconstruction = from_patches(prediction, 16)
    assert relative_error(features.transpose(0, 3, 1, 2), arrays["features"]) < 1e-5
    assert relative_error(reconstruction.transpose(0, 3, 1, 2), arrays["reconstruction"]) < 1e-5
    assert relative_error(loss_of(forward, params, images, mask), arrays["loss"]) < 1e-5


def test_every_gradient_equals_the_official_one(reference):
    forward, params, images, mask, arrays = reference
    ours = jax.grad(lambda params: loss_of(forward, params, images, mask))(params)
    theirs = from_official(part(arrays, "grad/"), heads=3)
    errors = jax.tree_util.tree_map(relative_error, ours, theirs)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_every_official_parameter_is_compared(reference):
    _, params, _, _, arrays = reference
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in part(arrays, "params/").values())
