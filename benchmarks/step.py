"""Speed and memory of a SimMIM training step of ViT or Swin, compared with the same model of `transformers` in PyTorch.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/step.py --models=vit_ti,vit_s,swin_t --dtypes=float32,bfloat16 --batch=8 --out=step.json
    python benchmarks/step.py --models=cifar,vit_s --dtypes=float32 --batch=64,8 --peer=eager,compile
    python benchmarks/step.py --models=vit_l --dtypes=bfloat16 --batch=256 --remat=dots --scan --peer=none  # no PyTorch

A step: uint8 images on the device -> normalize -> mask 60 % of the patches (32 pixels; 8 for "cifar") -> forward ->
masked L1 -> backward -> clip the gradient to norm 5 -> AdamW. The sides:

    official   our SimMIM model: a ViT with a shared relative position bias, LayerScale, biases on q and v; or a Swin
    plain      our model in the form of the peer: a ViT with learned positions, biases on q, k and v, no LayerScale.
               For Swin there is no difference from `official`
    eager, compile   the peer without and with torch.compile: ...ForMaskedImageModeling of transformers, SDPA attention,
               torch.autocast for bfloat16, fused AdamW

Each side is its own process with all cores, so no memory or thread pool is shared. The sides start one after another,
which is when "first step" is timed. Then they measure one at a time, in an order that each round reverses. A ratio is
the median over the rounds of the ratios within a round, because machines drift. In each round a side also times a large
square matmul in its own framework and dtype. "of matmul" is the fraction of that rate that its step reaches.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RATIO, CLIP, LEARNING_RATE, WEIGHT_DECAY = 0.6, 5.0, 1e-4, 0.05
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MATMUL_SIZES = {"cpu": 2048}  # side of the square matmul by platform; default: 8192
PEERS = ("eager", "compile")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


class Family(NamedTuple):
    """Properties of a family of models."""

    encoder: str  # name for `make_encoder`
    image: int  # default side in pixels
    block: int  # side of a masked patch in pixels; divides the image
    ours: dict[str, dict]  # our sides: options of make_encoder
    fitted: Callable[[int], dict]  # options that follow from the image size
    shape: tuple[str, ...]  # attributes of our encoder for the peer and `flops`
    flops: Callable[..., int]  # of the matmuls in the forward pass of an image
    peer: str  # prefix of its classes in transformers
    peer_options: Callable[..., dict]  # options of its configuration in transformers
    peer_no_decay: tuple[str, ...]  # suffixes of parameters without weight decay, next to norms


def vit_flops(image: int, width: int, depth: int, patch_size: int, **_) -> int:
    """A block on n tokens of width d, including the class token: 24nd^2 (projections 8, MLP 16) + 4n^2 d (logits,
    values).

    Embedding and head: 2d(3 * 16^2) per patch each.
    """
    patches = (image // patch_size) ** 2
    tokens = patches + 1
    blocks = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    return blocks + 2 * 2 * patches * width * 3 * patch_size**2


def swin_flops(image: int, width: int, depths: list[int], window: int, patch_size: int, **_) -> int:
    """A block on n tokens of width d with w x w windows: 24nd^2 (projections 8, MLP 16) + 4nw^2 d (logits, values).

    Patch merging: 2(n/4)(4d)(2d). Embedding: 2d(3 * 4^2) per token of the first stage. Head: 2d(3 * 32^2) per token of
    the last stage.
    """
    tokens, stages = (image // patch_size) ** 2, len(depths)
    total = 2 * tokens * width * 3 * patch_size**2
    for stage, depth in enumerate(depths):
        total += depth * (24 * tokens * width**2 + 4 * tokens * window**2 * width)
        if stage < stages - 1:
            tokens, width = tokens // 4, 2 * width
            total += 2 * tokens * (2 * width) * width
    return total + 2 * tokens * width * 3 * (patch_size * 2 ** (stages - 1)) ** 2


def vit_peer(image: int, width: int, depth: int, heads: int, patch_size: int) -> dict:
    return {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width,
        "image_size": image, "patch_size": patch_size, "encoder_stride": patch_size, "layer_norm_eps": 1e-6,
    }  # fmt: skip


def swin_peer(image: int, width: int, depths: list[int], num_heads: list[int], window: int, patch_size: int) -> dict:
    return {
        "embed_dim": width, "depths": depths, "num_heads": num_heads, "window_size": window, "image_size": image,
        "patch_size": patch_size, "encoder_stride": patch_size * 2 ** (len(depths) - 1), "layer_norm_eps": 1e-5,
        "use_absolute_embeddings": False, "drop_path_rate": 0.0,  # default: 0.1; dropout is 0 by default
    }  # fmt: skip


VIT = Family(
    encoder="vit",
    image=224,
    block=32,
    ours={
        "plain": {
            "absolute_position": "learned", "relative_position": "none", "qkv_bias": "qkv", "layer_scale": 0.0,
        },
        "official": {
            "absolute_position": "none", "relative_position": "shared", "qkv_bias": "qv", "layer_scale": 0.1,
        },
    },
    fitted=lambda image: {"patch_size": 16},
    shape=("width", "depth", "num_heads", "patch_size"),
    flops=vit_flops,
    peer="ViT",
    peer_options=vit_peer,
    peer_no_decay=("bias", "cls_token", "position_embeddings", "mask_token"),
)  # fmt: skip
FAMILIES = {
    "vit": VIT,
    "swin": Family(
        encoder="swin",
        image=192,
        block=32,
        ours={"official": {}},
        # 6 tokens at 192 pixels, as in SimMIM. At any size, windows tile every feature map, and the last map is one
        # window. The peer fails on a map smaller than its window.
        fitted=lambda image: {"patch_size": 4, "window": image // 32},
        shape=("width", "depths", "num_heads", "window", "patch_size"),
        flops=swin_flops,
        peer="Swin",
        peer_options=swin_peer,
        peer_no_decay=("bias", "relative_position_bias_table", "mask_token"),
    ),
    "cifar": VIT._replace(  # one model, without sizes
        image=32, block=8, fitted=lambda image: {"width": 192, "depth": 6, "num_heads": 3, "patch_size": 4}
    ),
}  # fmt: skip


def step_flops(family: str, image: int, shape: dict, batch: int) -> int:
    """Multiplications and additions in the matmuls of a training step: three times those of its forward pass.

    See `vit_flops` and `swin_flops`. The backward pass has two matmuls for each: for the input and for the weight. The
    factor of 3 is slightly high, because the images need no gradient. Norms, softmax, GELU and the optimizer do not
    count.
    """
    return 3 * batch * FAMILIES[family].flops(image, **shape)


# A side is (step, matmul, matmul_size, wait, facts): two functions that start work, one that waits until all is done,
# and one that tells what there is to know after the first step. It calls `phase` with the name of what it has finished.


def ours(
    phase: Callable, family: str, side: str, size: str, dtype: str, batch: int, image: int, settings: dict, **_
) -> tuple:
    """The step of `simmim_jax`, compiled by the same function as in a run.

    settings: more encoder options than those of the side, and "microbatches".
    """
    import jax
    import jax.numpy as jnp

    from simmim_jax import optim
    from simmim_jax.models import make_encoder
    from simmim_jax.objectives import make_objective
    from simmim_jax.runtime import sharding
    from simmim_jax.runtime.compilation import compile_step
    from simmim_jax.train_step import init_state, train_step

    phase("import")
    mesh, key, device = sharding.make_mesh(), jax.random.key(0), jax.devices()[0]
    of_family = FAMILIES[family]
    settings = dict(settings)
    microbatches = settings.pop("microbatches", 1)
    fixed = of_family.ours[side] | of_family.fitted(image) | settings
    encoder = make_encoder(of_family.encoder, size or None, dtype=dtype, **fixed)
    masking = {"image_size": (image, image), "mask_patch_size": of_family.block, "mask_ratio": RATIO}
    objective = make_objective("simmim", encoder, mean=MEAN, std=STD, **masking)
    rate = {"schedule": "constant", "steps": 10**6, "steps_per_epoch": 1, "learning_rate": LEARNING_RATE}
    fields = {"weight_decay": WEIGHT_DECAY, "grad_clip_norm": CLIP, "scanned_layers": encoder.scanned_layers}
    tx, _ = optim.make_optimizer("adamw", **fields, **rate)
    make_state = functools.partial(init_state, init=objective.init, tx=tx)
    abstract = sharding.shard_state(jax.eval_shape(make_state, key), mesh, tuple(encoder.scanned_layers))
    newest = {"state": jax.jit(make_state, out_shardings=sharding.shardings(abstract))(key)}
    jax.block_until_ready(newest)
    phase("build")

    integers = np.arange(batch, dtype=np.int32)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, image, image, 3), dtype=np.uint8)
    images = sharding.to_global({"image": pixels, "label": integers, "batch_index": integers}, mesh)
    pure_step = functools.partial(train_step, loss_fn=objective.loss_fn, tx=tx, microbatches=microbatches)
    compiled = compile_step(pure_step, abstract, images, key, mesh)
    phase("compile")

    matmul_size = MATMUL_SIZES.get(device.platform, 8192)
    square = functools.cache(lambda: jax.random.normal(key, (matmul_size, matmul_size), dtype))
    multiply = jax.jit(jnp.matmul)

    def step() -> None:
        newest["state"], newest["metrics"] = compiled(newest["state"], images, key)

    def matmul() -> None:
        newest["product"] = multiply(square(), square())

    def facts() -> dict:
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(newest["state"].params)),
            "loss": float(newest["metrics"]["loss"]),
            "device": f"{jax.device_count()} x {device.device_kind}",
            "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            "shape": {name: getattr(encoder, name) for name in of_family.shape},
        }

    return step, matmul, matmul_size, lambda: jax.block_until_ready(newest), facts


def peer_model(transformers, family: str, image: int, shape: dict) -> tuple:
    """(masked image modeling model of `transformers`, parameter groups for AdamW)."""
    of_family = FAMILIES[family]
    make_config = getattr(transformers, f"{of_family.peer}Config")
    config = make_config(**of_family.peer_options(image, **shape), attn_implementation="sdpa")
    model = getattr(transformers, f"{of_family.peer}ForMaskedImageModeling")(config)
    groups = {0.0: [], WEIGHT_DECAY: []}
    for name, parameter in model.named_parameters():
        no_decay = name.endswith(of_family.peer_no_decay) or "norm" in name
        groups[0.0 if no_decay else WEIGHT_DECAY].append(parameter)
    return model, [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def peer(phase: Callable, family: str, side: str, shape: dict, dtype: str, batch: int, image: int, **_) -> tuple:
    """The step of the same model in `transformers`; `side` is "eager" or "compile"."""
    import torch
    import transformers

    phase("import")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(CORES)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, the default of JAX
    model, groups = peer_model(transformers, family, image, shape)
    model.to(device).train()
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
    mean, std = (torch.tensor(x, device=device).reshape(1, 3, 1, 1) for x in (MEAN, STD))
    images = torch.randint(0, 256, (batch, 3, image, image), dtype=torch.uint8, device=device)
    blocks, tokens = image // FAMILIES[family].block, FAMILIES[family].block // shape["patch_size"]

    def loss_fn(images, mask):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(pixel_values=(images / 255 - mean) / std, bool_masked_pos=mask).loss

    compute_loss = torch.compile(loss_fn) if side == "compile" else loss_fn
    newest = {}
    matmul_size = MATMUL_SIZES.get(device, 8192)
    square = functools.cache(lambda: torch.randn(matmul_size, matmul_size, device=device, dtype=getattr(torch, dtype)))

    def step() -> None:
        order = torch.rand(batch, blocks**2, device=device).argsort(dim=1)
        mask = (order < np.ceil(blocks**2 * RATIO)).reshape(batch, blocks, blocks)
        mask = mask.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2).flatten(1)
        optimizer.zero_grad(set_to_none=True)
        newest["loss"] = compute_loss(images, mask)
        newest["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def facts() -> dict:
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "loss": newest["loss"].item(),
            "device": f"1 x {torch.cuda.get_device_name() if device == 'cuda' else device}",
            "device_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }

    phase("build")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return step, lambda: torch.matmul(square(), square()), matmul_size, wait, facts


def serve() -> None:
    """The process of a side. Reads JSON lines: first what to build, then one request per round."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to stderr
    spec = json.loads(sys.stdin.readline())
    phases, begun = {}, time.perf_counter()

    def phase(name: str) -> None:
        phases[name] = time.perf_counter() - begun - sum(phases.values())

    step, matmul, matmul_size, wait, facts = (peer if spec["side"] in PEERS else ours)(phase, **spec)
    step()
    wait()
    phase("first step")
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    replies.write(json.dumps({"phases": phases, "host_peak_bytes": host_peak, **facts()}) + "\n")

    latest = {}  # seconds per call

    def seconds_per_call(start: Callable, seconds: float) -> float:
        """Seconds of a call, from enough consecutive calls to fill `seconds`, with one wait at the end."""
        calls = max(1, round(seconds / latest[start])) if start in latest else 1
        begun = time.perf_counter()
        for _ in range(calls):
            start()
        wait()
        latest[start] = (time.perf_counter() - begun) / calls
        return latest[start]

    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        rate = 2 * matmul_size**3 / seconds_per_call(matmul, seconds / 4)
        answer = {"matmul_flops_per_second": rate, "step_seconds": seconds_per_call(step, seconds)}
        replies.write(json.dumps(answer) + "\n")


def start(spec: dict) -> tuple[subprocess.Popen, dict]:
    """(process of a side, its facts after the first step)."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    environment.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch's spinning threads stall on a busy machine
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other sides need GPU memory too
    begun = time.perf_counter()
    command, pipes = [sys.executable, __file__, "--serve"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    first = ask(process, spec)
    return process, first | {"first_step_seconds": time.perf_counter() - begun}


def ask(process: subprocess.Popen, question: dict, program: str = "benchmarks/step.py") -> dict:
    with contextlib.suppress(BrokenPipeError):  # then there is no reply
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    reply = process.stdout.readline()
    if not reply:
        raise SystemExit(f"{program}: a side ended with code {process.wait()}; see the lines above")
    return json.loads(reply)


def family_and_size(model: str) -> tuple[str, str]:
    """("swin", "t") for "swin_t". A size without a family is a ViT. A family without sizes has the size ""."""
    if model in FAMILIES:
        return model, ""
    family, _, size = model.rpartition("_")
    return family or "vit", size


def measure(model: str, dtype: str, batch: int, options: argparse.Namespace) -> list[dict]:
    """The rows of one model in one dtype: sides start one after another, then measure in turns."""
    family, size = family_and_size(model)
    image = options.image or FAMILIES[family].image
    settings = {"remat": options.remat, "scan": options.scan, "attention": options.attention}
    settings = {name: value for name, value in settings.items() if value is not None} | {
        "microbatches": options.microbatches
    }
    spec = {"family": family, "size": size, "dtype": dtype, "batch": batch, "image": image, "settings": settings}
    sides = [side for side in options.ours if side in FAMILIES[family].ours]
    processes, firsts, shape = {}, {}, None
    with contextlib.ExitStack() as stack:
        for side in [*sides, *options.peer]:
            processes[side], firsts[side] = start({"side": side, "shape": shape, **spec})
            stack.callback(processes[side].communicate)  # closes its stdin, which ends it
            shape = firsts[side].pop("shape", shape)
        rounds = {side: [] for side in processes}
        for number in range(options.rounds + 2):
            for side in list(processes)[:: -1 if number % 2 else 1]:
                rounds[side].append(ask(processes[side], {"seconds": options.seconds}))
    flops = step_flops(family, image, shape, batch)
    rounds = {side: of_side[2:] for side, of_side in rounds.items()}  # the first two warm up and count the calls
    name, peers = f"{family}_{size}".strip("_"), {side: rounds[side] for side in options.peer}
    return [
        {"model": name, "dtype": dtype, "side": side, "batch": batch, "image": image}
        | ({} if side in PEERS else {"settings": settings})
        | firsts[side]
        | summarize(rounds[side], {} if side in PEERS else peers, batch, flops)
        for side in processes
    ]


def summarize(rounds: list[dict], peers: dict[str, list[dict]], batch: int, flops: int) -> dict:
    """Medians over the rounds of rates and of ratios within a round, and the rounds themselves.

    `times_each` compares with each peer, `times_peer` with the fastest one, which has the smallest ratio.
    """
    seconds = [r["step_seconds"] for r in rounds]
    times = {}
    for name, peer_rounds in peers.items():
        ratios = [other["step_seconds"] / own for own, other in zip(seconds, peer_rounds, strict=True)]
        times[name] = [min(ratios), statistics.median(ratios), max(ratios)]
    return {
        "images_per_second": statistics.median(batch / t for t in seconds),
        "times_peer": min(times.values(), key=lambda low_median_high: low_median_high[1], default=None),
        "times_each": times,
        "flops_per_second": statistics.median(flops / t for t in seconds),
        "matmul_flops_per_second": statistics.median(r["matmul_flops_per_second"] for r in rounds),
        "of_matmul": statistics.median(flops / r["step_seconds"] / r["matmul_flops_per_second"] for r in rounds),
        "step_flops": flops,
        "rounds": rounds,
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table; benchmarks/README.md explains the columns."""
    head = "model,dtype,side,batch,M params,images/s,x peer,min-max,GFLOP/s,matmul,of matmul,first step s,peak MiB"
    lines = [head.split(",")]
    for row in rows:
        low, ratio, high = [f"{quotient:.2f}" for quotient in row["times_peer"] or []] or [""] * 3
        lines.append([
            row["model"], row["dtype"], row["side"], str(row["batch"]), f"{row['parameters'] / 1e6:.2f}",
            f"{row['images_per_second']:.2f}", ratio, low and f"{low}-{high}",
            f"{row['flops_per_second'] / 1e9:.0f}", f"{row['matmul_flops_per_second'] / 1e9:.0f}",
            f"{row['of_matmul']:.0%}", f"{row['first_step_seconds']:.1f}",
            f"{(row['device_peak_bytes'] or row['host_peak_bytes']) / 2**20:.0f}",
        ])  # fmt: skip
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table of these lines with right-aligned columns. The first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in [lines[0], rule, *lines[1:]])


def run_text(*command: str) -> str:
    """The output of a command, or "" if it does not exist."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if shutil.which(command[0]) else None
    return done.stdout.rstrip() if done else ""


def describe() -> dict:
    """Machine, date, package versions, commit and uncommitted changes."""
    processors = run_text("lscpu", "--json")
    fields = {field["field"]: field["data"] for field in json.loads(processors)["lscpu"]} if processors else {}
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": run_text("git", "rev-parse", "HEAD"),
        "changed": run_text("git", "status", "--porcelain", "simmim_jax", "benchmarks/step.py").splitlines(),
        "cpu": f"{fields.get('Model name:', platform.processor())}, family {fields.get('CPU family:')}",
        "cores": CORES,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": run_text("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "platform": platform.platform(),
        "versions": found,
        "load_average_start": os.getloadavg(),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ti,s,b", help="like vit_s,swin_t,cifar; a size without a family is a ViT")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--ours", default="plain,official", help="our sides, if the model has them")
    parser.add_argument(
        "--peer", default="eager", help="mode of PyTorch: eager, compile, both separated by a comma, or none"
    )
    parser.add_argument("--remat", help="for our sides: none, attention, dots or full")
    parser.add_argument("--scan", action="store_true", default=None, help="our sides use lax.scan over their blocks")
    parser.add_argument("--attention", help="for our sides: auto, xla or cudnn")
    parser.add_argument("--microbatches", type=int, default=1, help="parts of a batch, for our sides")
    parser.add_argument("--batch", default="8", help="images per step: one number, or one for each model")
    parser.add_argument(
        "--image", type=int, help="side in pixels, a multiple of 32 (cifar: 8); default: that of the model"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds of steps by each side in a round; at least one step"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    options.peer = [] if options.peer == "none" else options.peer.split(",")
    if unknown := set(options.peer).difference(PEERS):
        parser.exit(2, f"no peer {', '.join(sorted(unknown))}: give eager, compile, both, or none\n")
    if options.peer and missing:
        parser.exit(2, f"no {' and '.join(missing)}: pip install -r benchmarks/requirements.txt, or give --peer=none\n")
    models, options.ours = options.models.split(","), options.ours.split(",")
    if unknown := set(options.ours).difference(*(family.ours for family in FAMILIES.values())):
        parser.exit(2, f"no side {', '.join(sorted(unknown))}: give some of plain,official\n")
    for model in models:
        family, _ = family_and_size(model)
        if family not in FAMILIES:
            parser.exit(2, f"no model {model!r}: give {', '.join(FAMILIES)}, the first two with a size, like swin_t\n")
        if set(options.ours).isdisjoint(FAMILIES[family].ours):
            parser.exit(2, f"{model} has no side {options.ours[0]}: give {' or '.join(FAMILIES[family].ours)}\n")
    batches = [int(batch) for batch in options.batch.split(",")]
    if len(batches) not in (1, len(models)):
        parser.exit(2, f"{len(batches)} batch sizes for {len(models)} models: give one, or one for each\n")

    report = {"command": " ".join(["python benchmarks/step.py", *arguments]), **describe(), "rows": []}
    for model, batch in zip(models, batches * (len(models) // len(batches)), strict=True):
        for dtype in options.dtypes.split(","):
            rows = measure(model, dtype, batch, options)
            report["rows"] += rows
            report["load_average_end"] = os.getloadavg()
            print(table(rows), "\n", flush=True)
            if options.out:  # after each model, to keep what has been measured
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:])
