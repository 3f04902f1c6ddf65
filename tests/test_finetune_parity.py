"""Three fine-tuning updates of a small ViT with `configs/simmim_vit_b_finetune.py` equal those of PyTorch.

The PyTorch side is transformers' BEiT, which is the official model, with torch.optim.AdamW, the parameter groups of the
official optimizer.py, the rates of its lr_scheduler.py (timm's CosineLRScheduler per group), and gradient clipping by
torch. Both train on the same erased and mixed images. Needs torch and transformers.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from simmim_jax.config import load
from simmim_jax.experiment import make_tx
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective, mixing
from simmim_jax.objectives.pixels import normalize
from simmim_jax.runs import checkpoint
from simmim_jax.runs.pretrained import architecture
from simmim_jax.runtime.scanning import path_name
from simmim_jax.tools.convert import __main__ as convert
from simmim_jax.train_step import TrainState, train_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIDE, BATCH, CLASSES, DEPTH = 32, 8, 5, 3
STEPS, STEPS_PER_EPOCH = 12, 2  # warm-up of one epoch instead of 20: it ends before the last update
BEIT = {
    "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 128, "patch_size": 8,
    "image_size": SIDE, "layer_norm_eps": 1e-6, "drop_path_rate": 0.0, "use_relative_position_bias": True,
    "use_mean_pooling": True, "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def official_layer(name: str) -> int:
    """`get_vit_layer` of optimizer.py, for parameter names of transformers."""
    if name.startswith("beit.embeddings."):
        return 0
    block = re.search(r"\.layers?\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else DEPTH + 1


def official_groups(model, config) -> list[dict]:
    """`get_finetune_param_groups`: parameters of one dimension, biases and the class token do not decay."""
    groups = []
    for name, x in model.named_parameters():
        spared = x.ndim == 1 or name.endswith(".bias") or name.endswith("cls_token")
        scale = config.optim.layer_decay ** (DEPTH + 1 - official_layer(name))
        decay = 0.0 if spared else config.optim.weight_decay
        groups.append({"params": [x], "weight_decay": decay, "peak": config.optim.learning_rate * scale})
    return groups


def official_rate(config, peak: float, step: int) -> float:
    """timm's CosineLRScheduler, set after each update: the first two updates have the initial warm-up rate."""
    t, warmup = max(step - 1, 0), STEPS_PER_EPOCH
    low, start = config.optim.min_learning_rate, config.optim.warmup_learning_rate
    if t < warmup:
        return start + t * (peak - start) / warmup
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * t / STEPS))


def draw_batch(step: int) -> dict:
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    return {"image": images, "label": labels, "batch_index": np.arange(BATCH, dtype=np.int32)}


def peers_batch(batch: dict, key, config) -> tuple:
    """(images, targets, whether each process uses CutMix) for a step, as timm's Mixup makes them from our draws.

    In the official run, each process mixes its own batch.
    """
    objective = config.objective
    erase_key, mix_key = random.split(random.fold_in(key, 1))
    images = normalize(jnp.asarray(batch["image"]), config.mean, config.std)
    batch_index = jnp.asarray(batch["batch_index"])
    erased = np.asarray(mixing.erase(images, erase_key, batch_index, mixing.Erasing(objective.reprob)))
    options = mixing.Mixing(*(objective[name] for name in mixing.Mixing._fields))
    drawn = mixing.draw_mix(mix_key, batch_index, batch_index, (SIDE, SIDE), options)
    smoothing = objective.label_smoothing
    hot = torch.nn.functional.one_hot(torch.from_numpy(batch["label"]).long(), CLASSES).float()
    hot = hot * (1 - smoothing) + smoothing / CLASSES
    mixed = []
    for first in range(0, BATCH, objective.mixup_group):
        own = slice(first, first + objective.mixup_group)
        weight, (top, left, bottom, right) = float(drawn.weight[first]), np.asarray(drawn.box[first])
        x, targets = torch.from_numpy(erased[own].transpose(0, 3, 1, 2).copy()), hot[own]
        if drawn.use_cutmix[first]:
            x[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
        else:
            x = weight * x + (1 - weight) * x.flip(0)
        mixed.append((x, weight * targets + (1 - weight) * targets.flip(0), bool(drawn.use_cutmix[first])))
    images, targets, is_cut = zip(*mixed, strict=True)
    return torch.cat(images), torch.cat(targets), is_cut


def imported(model, folder):
    model.save_pretrained(folder / "hf")
    convert.run([str(folder / "hf"), str(folder / "workdir")])
    return checkpoint.read_params(str(folder / "workdir"))


def test_three_fine_tuning_updates_equal_pytorch(tmp_path):
    torch.manual_seed(0)
    model = transformers.BeitForImageClassification(transformers.BeitConfig(**BEIT)).train()
    with torch.no_grad():
        for x in model.parameters():
            x += 0.02 * torch.randn(x.shape)
    params, record = imported(model, tmp_path / "before")

    config = load("configs/simmim_vit_b_finetune.py")
    config.batch_size, config.image_size, config.base_learning_rate = BATCH, (SIDE, SIDE), 5e-3 * 512 / BATCH
    config.mean, config.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.optim.warmup_epochs, config.objective.num_classes = 1.0, CLASSES
    config.objective.mixup_group = BATCH // 2  # two processes
    encoder = make_encoder(**architecture(record["encoder"]))
    assert (encoder.relative_position, encoder.final_norm) == ("per_block", False)
    pixels = {"image_size": config.image_size, "mean": config.mean, "std": config.std}
    objective = make_objective(encoder=encoder, **pixels, **config.objective)
    tx, _ = make_tx(config, encoder, encoder.no_decay(pretraining=False), 0, STEPS, STEPS_PER_EPOCH)
    key = random.key(3)
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))
    step = jax.jit(
        lambda state, batch: train_step(
            state, batch, key, loss_fn=objective.loss_fn, prepare=objective.prepare, tx=tx, microbatches=2
        )
    )

    optimizer = torch.optim.AdamW(official_groups(model, config), betas=(0.9, 0.999), eps=1e-8)
    cut = []
    for n in range(3):
        batch = draw_batch(n)
        state, metrics = step(state, batch)
        images, targets, is_cut = peers_batch(batch, random.fold_in(key, n), config)
        cut += is_cut
        for group in optimizer.param_groups:
            group["lr"] = official_rate(config, group["peak"], n)
        loss = torch.sum(-targets * torch.log_softmax(model(images).logits, dim=-1), dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip_norm)
        optimizer.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    assert set(cut) == {True, False}  # both CutMix and Mixup are used

    theirs, _ = imported(model, tmp_path / "after")
    theirs = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(theirs)}
    before = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        name = path_name(path)
        np.testing.assert_allclose(x, theirs[name], rtol=0, atol=1e-5, err_msg=name)
        moved = np.abs(theirs[name] - before[name]).max()
        assert moved > 1e-4, f"{name} has hardly changed"
