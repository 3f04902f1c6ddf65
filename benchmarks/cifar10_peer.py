"""SimMIM pretraining of the ViT of `transformers` in PyTorch, with a config of ours: the peer in benchmarks/cifar10.py.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/cifar10_peer.py --config configs/cifar10_vit_tiny.py --workdir runs/cifar10_peer

It takes the flags of `simmim_jax.main`. Run the same command again to resume after any interruption, even kill -9.

The images, crops and their order, the masks, the learning rate and the kinds of decayed parameters come from our code,
with the same config and seed. Depth, width, heads, patch, batch, AdamW, clipping, loss and precision follow the config.
The model is ViTForMaskedImageModeling with the initialization of `transformers`. It has a class token, learned
positions and biases on queries, keys and values. It has no LayerScale, relative positions or sine-cosine positions.

The workdir holds the files of our runs: metrics.jsonl (loss of each step), evaluations.jsonl (loss on held-out images
under the masks of our evaluations) and summary.json. It also holds checkpoint.pt, which is written atomically, and at
the end `huggingface/`, which `python -m simmim_jax.tools.convert` imports.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's spinning threads stall on a busy machine
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the GPU memory; JAX only draws masks

import jax
import numpy as np
from absl import app, flags, logging
from step import CORES, ROOT, describe

sys.path.insert(0, str(ROOT))
from simmim_jax import data
from simmim_jax.config import refuse_change
from simmim_jax.errors import ConfigError, NonFiniteError, Preempted, exit_with_message
from simmim_jax.experiment import make_experiment
from simmim_jax.files import lock_folder, read_json, write_json
from simmim_jax.flags import define_config_flag, parse_flags
from simmim_jax.interop.folder import make_preprocessor_config
from simmim_jax.runs.records import Clock, Records, duration
from simmim_jax.runtime.processes import StopSignal
from simmim_jax.train_step import hash_samples

NO_DECAY = ("bias", "cls_token", "position_embeddings")  # suffixes of parameters without weight decay, next to norms


class Settings(NamedTuple):
    """The part of our run that the peer shares.

    record: content of config.json.
    model: arguments of ViTConfig.
    rates: learning rate of each step.
    batches: first step -> iterator over batches.
    masks: (batch, step) -> bool [b, i, j].
    heldout: batches to evaluate on.
    heldout_masks: batch -> bool [b, i, j].
    evaluation_every: steps between two evaluations; 0: only at the start and the end.
    decays: name of a parameter of the peer -> whether weight decay applies to it.
    """

    record: dict
    model: dict
    steps: int
    rates: list[float]
    batches: Callable[[int], Iterator[dict]]
    masks: Callable[[dict, int], np.ndarray]
    heldout: data.Epoch
    heldout_masks: Callable[[dict], np.ndarray]
    evaluation_every: int
    decays: Callable[[str], bool]


def make_settings(config) -> Settings:
    """The settings of our run of `config`. Raises ConfigError for a feature that the peer does not have."""
    experiment = make_experiment(config)
    encoder = experiment.encoder
    check_peer_has(config, encoder)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), experiment.state.params)

    @jax.jit
    def masks(params, batch, key):  # XLA keeps only the masks, which depend on no parameter
        pixels = experiment.objective.predict(params, batch, key)["mask"]
        return pixels[:, :: encoder.token_stride, :: encoder.token_stride]

    def make_masks(batch, key):
        return np.asarray(masks(zeros, {name: batch[name] for name in ("image", "label", "batch_index")}, key))

    no_decay = NO_DECAY if experiment.is_decayed("mask_token") else (*NO_DECAY, "mask_token")
    return Settings(
        record=experiment.record,
        model={
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "intermediate_size": int(encoder.width * encoder.mlp_ratio),
            "image_size": config.image_size[0],
            "patch_size": encoder.patch_size,
            "encoder_stride": encoder.patch_size,
            "num_channels": len(config.mean),
            "layer_norm_eps": encoder.norm_epsilon,
        },
        steps=experiment.steps,
        rates=np.asarray(jax.jit(jax.vmap(experiment.schedule))(np.arange(experiment.steps))).tolist(),
        batches=lambda start: data.make_batches(
            experiment.source, experiment.batches, start_step=start, loading=experiment.loading
        ),
        masks=lambda batch, step: make_masks(batch, jax.random.fold_in(experiment.keys.step, step)),
        heldout=data.make_epoch(
            experiment.heldout,
            experiment.evals.crop,
            batch_size=experiment.evals.batch_size,
            limit=experiment.evals.images,
            loading=experiment.loading._replace(max_bad_fraction=1.0),
        ),
        heldout_masks=lambda batch: make_masks(batch, experiment.keys.eval),
        evaluation_every=experiment.evals.every,
        decays=lambda name: not name.endswith(no_decay) and "norm" not in name,
    )


def check_peer_has(config, encoder) -> None:
    """Raise ConfigError for a feature that the peer does not have."""
    expected = {
        "encoder.name": (type(encoder).__name__, "ViT"), "encoder.drop_path": (encoder.drop_path, 0.0),
        "objective.name": (config.objective.name, "simmim"), "objective.norm_window": (config.objective.norm_window, 0),
        "optim.name": (config.optim.name, "adamw"), "optim.layer_decay": (config.optim.layer_decay, 1.0),
        "optim.frozen": (config.optim.frozen, ""), "optim.frozen_layers": (config.optim.frozen_layers, 0),
        "microbatches": (config.microbatches, 1),
        "init_from": (config.init_from, ""), "ema_decay": (config.ema_decay, 0.0),
        "image_size": (tuple(config.image_size), (config.image_size[0],) * 2),
    }  # fmt: skip
    for name, (given, supported) in expected.items():
        if given != supported:
            raise ConfigError(f"the peer has no {name}={given!r}", name, f"give {supported!r}")


def make_model(config, settings: Settings, device: str) -> tuple:
    """(model with the initialization of `transformers`, AdamW with one group of decayed and one of other
    parameters)."""
    import torch
    import transformers

    torch.manual_seed(config.seed)
    model_config = transformers.ViTConfig(**settings.model, attn_implementation="sdpa")
    model = transformers.ViTForMaskedImageModeling(model_config).to(device)
    groups = []
    for decays, weight_decay in ((True, config.optim.weight_decay), (False, 0.0)):
        parameters = [x for name, x in model.named_parameters() if settings.decays(name) == decays]
        groups.append({"params": parameters, "weight_decay": weight_decay})
    constants = {"betas": tuple(config.optim.betas), "eps": config.optim.epsilon}
    return model, torch.optim.AdamW(groups, lr=settings.rates[0], fused=True, **constants)


def pretrain(config, workdir: str) -> dict:
    """Pretrain the peer in `workdir`, or resume there; return the content of summary.json.

    Raises the same UserErrors as our own runs, and Preempted after SIGTERM or SIGINT, with the state saved.
    """
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(f"no {' and '.join(missing)}", "Python", "pip install -r benchmarks/requirements.txt")
    settings = make_settings(config)
    import torch

    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(Path(workdir)), StopSignal() as stop:
        saved = read_json(folder / "config.json")
        if saved and (folder / "checkpoint.pt").exists():
            refuse_change(saved, settings.record, workdir)
        write_json(folder / "config.json", settings.record)
        summary = read_json(folder / "summary.json")
        if summary.get("step") == settings.steps:
            print(f"nothing to do: {workdir} is finished, {settings.steps} of {settings.steps} steps")
            return summary

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(CORES)
        model, optimizer = make_model(config, settings, device)
        mean, std = (torch.tensor(x, device=device).reshape(1, -1, 1, 1) for x in (config.mean, config.std))
        half, patch_size = config.encoder.dtype == "bfloat16", settings.model["patch_size"]

        def forward(batch: dict, mask: np.ndarray):
            pixels = torch.from_numpy(np.asarray(batch["image"])).to(device).permute(0, 3, 1, 2)
            hidden = torch.from_numpy(np.array(mask)).to(device).flatten(1)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                normalized = (pixels / 255 - mean) / std
                return normalized, model(pixel_values=normalized.contiguous(), bool_masked_pos=hidden)

        def evaluate() -> dict[str, float]:
            model.eval()
            losses = []
            for batch in settings.heldout:
                mask = settings.heldout_masks(batch)
                with torch.no_grad():
                    images, out = forward(batch, mask)
                hidden = torch.from_numpy(mask.repeat(patch_size, 1).repeat(patch_size, 2)).to(device)[:, None]
                error = ((out.reconstruction.float() - images).abs() * hidden).sum((1, 2, 3))
                each = error / (hidden.sum((1, 2, 3)) + 1e-5) / images.shape[1]
                losses += each.cpu().numpy()[batch["valid"]].tolist()
            model.train()
            return {"masked_loss": float(np.mean(losses))}

        start = step = restore(folder, model, optimizer, partial(torch.load, weights_only=True, map_location=device))
        save = partial(save_atomically, folder, model, optimizer, torch.save)
        records = Records(workdir, step)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{'resuming at' if start else 'starting'} step {start} of {settings.steps} in {workdir}: batch "
            f"{config.batch_size}, {parameters / 1e6:.2f} M parameters, {device}, {torch.get_num_threads()} threads"
        )
        batches, clock, saved_step = settings.batches(start), Clock(), start
        every = settings.evaluation_every
        model.train()
        while True:
            due = step in (0, settings.steps) or bool(every and step % every == 0)
            if step > saved_step and (step == settings.steps or step % config.save_every == 0 or stop.number):
                with clock.measure("save"):
                    save(step)
                saved_step = step
            if stop.number:
                records.close()
                raise Preempted(stop.number, saved_step)
            if due and step not in records.evaluations:
                with clock.measure("evaluation"):
                    records.write_evaluation(step, evaluate())
                print(f"evaluation at step {step}: {records.evaluations[step]}", flush=True)
            if step == settings.steps:
                break
            with clock.measure("data"):
                batch = next(batches)
                mask = settings.masks(batch, step)
            with clock.measure("step"):
                for group in optimizer.param_groups:
                    group["lr"] = settings.rates[step]
                optimizer.zero_grad(set_to_none=True)
                loss = forward(batch, mask)[1].loss
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip_norm or math.inf)
                if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                    raise NonFiniteError(f"loss {loss.item()}, gradient norm {norm.item()} at step {step + 1}", workdir)
                optimizer.step()
            step += 1
            samples = int(hash_samples(batch["index"].astype(np.uint32), batch["batch_index"]))
            row = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": settings.rates[step - 1]}
            records.write_metrics(step, row | {"samples": f"{samples:08x}"}, {})
            if step % config.log_every == 0 or step in (1, settings.steps):
                rate = (step - start) * config.batch_size / (clock.seconds["step"] + clock.seconds["data"])
                left = duration((settings.steps - step) * config.batch_size / rate)
                line = f"step {step}/{settings.steps}  loss {row['loss']:.4f}  {rate:.0f} images/s  ETA {left}"
                print(line, flush=True)

        evaluations = [{k: v for k, v in records.evaluations[n].items() if k != "step"} for n in (0, settings.steps)]
        records.close()
        model.save_pretrained(folder / "huggingface")
        pixels = make_preprocessor_config(
            tuple(config.image_size), tuple(config.mean), tuple(config.std), config.data.interpolation
        )
        write_json(folder / "huggingface" / "preprocessor_config.json", pixels)
        busy = max(clock.seconds["step"] + clock.seconds["data"], 1e-9)
        summary = {
            "step": step, **evaluations[1], "start": evaluations[0], "parameters": parameters,
            "images_per_second": round((step - start) * config.batch_size / busy, 1), "seconds": clock.summary(),
            "threads": torch.get_num_threads(), "device": device, "describe": describe(),
        }  # fmt: skip
        write_json(folder / "summary.json", summary)
        return summary


def save_atomically(folder: Path, model, optimizer, write: Callable, step: int) -> None:
    """Replace `checkpoint.pt` of `folder` by the complete state of this step, atomically."""
    partial_file = folder / ".checkpoint.pt.partial"
    write({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial_file)
    partial_file.replace(folder / "checkpoint.pt")


def restore(folder: Path, model, optimizer, read: Callable) -> int:
    """Load what `save_atomically` has written into model and optimizer; return its step, or 0 if there is nothing."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    saved = read(folder / "checkpoint.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def main(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    summary = pretrain(flags.FLAGS.config, flags.FLAGS.workdir)
    print(json.dumps({name: value for name, value in summary.items() if name != "describe"}))


if __name__ == "__main__":
    define_config_flag()
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    with exit_with_message():
        app.run(main, argv=sys.argv, flags_parser=parse_flags)
