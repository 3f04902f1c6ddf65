"""How far Swin V2's float32 parameters are from a float64 run after some official training steps, and why.

    python benchmarks/swinv2_drift.py --out=swinv2_drift.json
    python benchmarks/swinv2_drift.py --steps=2 --seeds=1      # a quick try

A small Swin V2 is trained from the same initial weights on the same images and masks, with the official optimizer, by

    torch64     PyTorch in float64: the yardstick
    torch32     PyTorch in float32
    jax32       our code in float32
    rounded64   PyTorch in float64, from initial weights that are rounded once more to float32 precision
    optax32     our code in float32 with optax's Adam, whose bias corrections are less accurate
    intended32  our code in float32 with `optim.decay_rule="intended"`: a difference that is not rounding

The PyTorch model is written here on an official state dict, and compared with the official reference arrays in
tests/golden first. A number is the distance of a group of parameters to torch64, divided by the distance that they
moved. If jax32 is about torch32 and rounded64, its differences are float32 rounding.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from step import ROOT, describe, markdown

from simmim_jax import interop, optim
from simmim_jax.config import load
from simmim_jax.interop.rules import to_theirs
from simmim_jax.models import make_encoder
from simmim_jax.models.layers import relative_position_index
from simmim_jax.models.swinv2 import log_displacements
from simmim_jax.models.windows import shift_mask, window_and_shift
from simmim_jax.objectives import make_objective
from simmim_jax.objectives.pixels import local_moments
from simmim_jax.objectives.simmim import make_forward, masked_l1

GOLDEN = ROOT / "tests" / "golden" / "official_swinv2_pretrain_normtarget47"
SIDE, PATCH, BATCH = 64, 4, 8
SHAPE = {"depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window": 4}
RATES = {"learning_rate": 4e-4, "warmup_learning_rate": 2e-6, "warmup_epochs": 10.0}  # epochs of one step
SIDES = ("torch32", "rounded64", "jax32", "optax32", "intended32")


def torch_loss(torch, params: dict, images, mask, norm_window: int, shape: dict = SHAPE):
    """SimMIM's loss of a Swin V2 with an official state dict, for tensors: images [b, 3, y, x], mask [b, i, j]."""
    F = torch.nn.functional
    like = lambda array: torch.as_tensor(array).to(images.dtype)  # noqa: E731

    def linear(name, x, bias=True):
        return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"] if bias else None)

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], 1e-5)

    def attention(name, x, heads, side, masked):  # x: [b, windows, tokens, d]
        qkv = x @ params[f"{name}.qkv.weight"].T
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        q = q + params[f"{name}.q_bias"].view(heads, 1, -1)
        v = v + params[f"{name}.v_bias"].view(heads, 1, -1)
        scale = params[f"{name}.logit_scale"].clamp(max=math.log(100)).exp()
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale
        table = linear(f"{name}.cpb_mlp.0", like(log_displacements(side, 0))).relu()
        table = linear(f"{name}.cpb_mlp.2", table, bias=False)
        index = torch.as_tensor(relative_position_index((side, side), class_token=False))
        logits = logits + 16 * table[index].permute(2, 0, 1).sigmoid()
        logits = logits if masked is None else logits + like(masked)[:, None]
        return linear(f"{name}.proj", (logits.softmax(-1) @ v).transpose(2, 3).flatten(-2))

    def block(name, x, heads, is_shifted):
        grid = tuple(x.shape[1:3])
        side, shift = window_and_shift(grid, shape["window"], is_shifted)
        rolled = x.roll((-shift, -shift), (1, 2))
        tiles = rolled.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        masked = shift_mask(grid, side, shift) if shift else None
        out = attention(f"{name}.attn", tiles.flatten(3, 4).flatten(1, 2), heads, side, masked)
        out = out.view(tiles.shape).transpose(2, 3).reshape(x.shape).roll((shift, shift), (1, 2))
        x = x + norm(f"{name}.norm1", out)
        return x + norm(f"{name}.norm2", linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", x))))

    x = F.conv2d(images, params["encoder.patch_embed.proj.weight"], params["encoder.patch_embed.proj.bias"], PATCH)
    x = norm("encoder.patch_embed.norm", x.permute(0, 2, 3, 1))
    x = torch.where(mask[..., None], params["encoder.mask_token"].view(-1), x)
    for stage, depth in enumerate(shape["depths"]):
        for n in range(depth):
            x = block(f"encoder.layers.{stage}.blocks.{n}", x, shape["num_heads"][stage], n % 2 == 1)
        if stage < len(shape["depths"]) - 1:
            name = f"encoder.layers.{stage}.downsample"
            squares = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
            x = norm(f"{name}.norm", linear(f"{name}.reduction", squares, bias=False))
    x = norm("encoder.norm", x).permute(0, 3, 1, 2)
    prediction = F.pixel_shuffle(F.conv2d(x, params["decoder.0.weight"], params["decoder.0.bias"]), 8 * PATCH)

    def sums(x):
        return F.avg_pool2d(x, norm_window, 1, norm_window // 2) * norm_window**2

    count = sums(torch.ones_like(images))
    mean = sums(images) / count
    variance = (sums(images**2) / count - mean**2) * count / (count - 1)
    target = (images - mean) / (variance.clamp(min=0) + 1e-6).sqrt()
    hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    return ((prediction - target).abs() * hidden).sum() / (hidden.sum() + 1e-5) / 3


def golden_errors(torch) -> dict[str, float]:
    """The largest relative errors of the PyTorch model here against the official loss and gradients, in float32."""
    arrays = {}
    for path in GOLDEN.parent.glob(f"{GOLDEN.name}.*npz"):
        arrays |= np.load(path)
    config = json.loads(str(arrays["config"]))
    shape = {"depths": config["depths"], "num_heads": config["num_heads"], "window": config["window_size"]}
    params = {name[7:]: torch.tensor(x, requires_grad=True) for name, x in arrays.items() if name[:7] == "params/"}
    images, mask = torch.tensor(arrays["images"]), torch.tensor(arrays["mask"] == 1)
    loss = torch_loss(torch, params, images, mask, config["norm_target"], shape)
    loss.backward()
    errors = [
        float((x.grad - torch.tensor(arrays[f"grad/{name}"])).abs().max() / np.abs(arrays[f"grad/{name}"]).max())
        for name, x in params.items()
    ]
    return {"loss": abs(loss.item() / float(arrays["loss"]) - 1), "gradients": max(errors)}


def draw(seed: int, steps: int) -> list[tuple]:
    """(normalized images [b, y, x, c], mask [b, i, j]) of each step: noise on smooth random colors."""
    rng, data = np.random.default_rng(seed), []
    for _ in range(steps):
        colors = rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8)
        smooth = np.stack([np.asarray(Image.fromarray(x).resize((SIDE, SIDE), Image.BICUBIC)) for x in colors])
        images = (smooth / 255 + rng.normal(0, 0.02, smooth.shape) - 0.45) / 0.225
        cells = np.stack([rng.permutation(4) < 3 for _ in range(BATCH)]).reshape(BATCH, 2, 2)  # of 32 pixels
        data.append((images.astype(np.float32), cells.repeat(8, axis=1).repeat(8, axis=2)))
    return data


def train_torch(torch, start: dict, groups: dict, rate, data: list, dtype, norm_window: int, rounded: bool = False):
    """The parameters after one step of official AdamW for each batch. groups: weight decay by name."""
    params = {name: torch.tensor(np.array(x), dtype=dtype) for name, x in start.items()}
    if rounded:
        noise = torch.Generator().manual_seed(1)
        params = {name: x * (1 + 2**-24 * torch.randn(x.shape, generator=noise)) for name, x in params.items()}
    params = {name: x.requires_grad_() for name, x in params.items()}
    optimizer = torch.optim.AdamW([{"params": [x], "weight_decay": groups[name]} for name, x in params.items()])
    for step, (images, mask) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = float(rate(step))
        optimizer.zero_grad()
        images = torch.tensor(images.transpose(0, 3, 1, 2).copy(), dtype=dtype)
        torch_loss(torch, params, images, torch.tensor(mask), norm_window).backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), 5.0)
        optimizer.step()
    return {name: x.detach().double().numpy() for name, x in params.items()}


def train_jax(encoder, tx, params: dict, data: list, norm_window: int) -> dict:
    """The same by our code."""
    forward = make_forward(encoder, channels=3)

    def loss_fn(params, images, mask):
        center, deviation = local_moments(images, norm_window)
        hidden = mask.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
        _, prediction, _ = forward(params, images, mask, jax.random.key(0), False)
        return masked_l1(prediction, (images - center) / deviation, hidden, encoder.feature_stride)

    @jax.jit
    def update(params, opt_state, images, mask, step):
        updates, opt_state = tx.update(jax.grad(loss_fn)(params, images, mask), opt_state, params, step=step)
        return jax.tree.map(jnp.add, params, updates), opt_state

    params, opt_state = jax.tree.map(jnp.asarray, params), tx.init(params)
    for step, (images, mask) in enumerate(data):
        params, opt_state = update(params, opt_state, images, mask, step)
    return jax.device_get(params)


def measure(torch, seed: int, steps: int) -> dict[str, dict[str, float]]:
    """{group of parameters: {side: relative distance to torch64}}."""
    config = load(str(ROOT / "configs" / "simmim_swinv2_b_800ep.py"))
    encoder = make_encoder("swinv2", None, width=16, **SHAPE)
    pixels = {"image_size": (SIDE, SIDE), "mean": config.mean, "std": config.std}
    objective = make_objective("simmim", encoder, **pixels)
    rules = interop.make_rules("official", encoder, {"name": "simmim"}, "encoder.", (SIDE, SIDE))
    initial = jax.device_get(jax.jit(objective.init)(jax.random.key(seed)))
    start, data, window = to_theirs(rules, initial), draw(seed, steps), config.objective.norm_window

    def optimizer(rule):
        options = {**config.optim, **RATES, "decay_rule": rule}
        return optim.make_optimizer(
            steps=800, steps_per_epoch=1, no_decay=encoder.no_decay(pretraining=True), depth=encoder.depth, **options
        )

    official = json.loads((GOLDEN.parent / "official_pretrain_param_groups.json").read_text())
    (name,) = [name for name in official if "swinv2" in name]
    decays = {re.sub(r"blocks\.\d+", "blocks.0", name): group["weight_decay"] for name, group in official[name].items()}
    groups = {name: decays[re.sub(r"blocks\.\d+", "blocks.0", name)] for name in start}
    _, rate = optimizer("official")
    run = lambda dtype, **how: train_torch(torch, start, groups, rate, data, dtype, window, **how)  # noqa: E731
    exact = run(torch.float64)
    found = {"torch32": run(torch.float32), "rounded64": run(torch.float64, rounded=True)}
    optimizers = {"jax32": optimizer("official")[0], "intended32": optimizer("intended")[0]}
    with mock.patch.object(optim, "scale_by_adam", lambda b1, b2, epsilon: optax.scale_by_adam(b1, b2, epsilon)):
        optimizers["optax32"] = optimizer("official")[0]
    for side, tx in optimizers.items():
        found[side] = to_theirs(rules, train_jax(encoder, tx, initial, data, window))
    squares = {}
    for name, x in exact.items():
        row = squares.setdefault(name.rpartition(".attn.")[2].split(".")[0] if ".attn." in name else "others", {})
        for side, end in (*found.items(), ("moved", start)):
            row[side] = row.get(side, 0) + np.square(np.asarray(end[name], np.float64) - x).sum()
    ratios = {kind: {side: (row[side] / row["moved"]) ** 0.5 for side in SIDES} for kind, row in squares.items()}
    return {kind: {side: float(x) for side, x in ratios[kind].items()} for kind in sorted(ratios)}


def table(report: dict) -> str:
    """Mean over the seeds of each group's relative distance to torch64."""
    lines = [["parameters", *SIDES]]
    for kind, row in report["rows"].items():
        lines.append([kind, *(f"{np.mean([one[side] for one in row]):.1e}" for side in SIDES)])
    return markdown(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seeds < 1:
        parser.exit(2, "--steps and --seeds must be 1 or more\n")
    try:
        import torch
    except ImportError:
        parser.exit(2, "no torch: pip install -r benchmarks/requirements.txt\n")
    jax.config.update("jax_default_matmul_precision", "highest")
    report = {"command": f"python benchmarks/swinv2_drift.py {' '.join(arguments)}".strip(), **describe()}
    report |= {"steps": options.steps, "golden_errors": golden_errors(torch)}
    measured = [measure(torch, seed, options.steps) for seed in range(options.seeds)]
    report["rows"] = {kind: [one[kind] for one in measured] for kind in measured[0]}
    report["load_average_end"] = os.getloadavg()
    print(table(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
