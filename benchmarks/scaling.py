"""Communication of a training step under each sharding, counted in the compiled step. Runs nothing.

    python benchmarks/scaling.py --out=scaling.json
    python benchmarks/scaling.py --devices=8 --models=vit_ti --batch-per-device=2 --override=encoder.depth=2

Each number of devices and sharding is a process of `simmim_jax.tools.plan` with simulated devices:

    replicated   each device has all parameters; gradients are summed over all devices
    fsdp         parameters, gradients and moments are sharded over all devices
    tensor       attention and MLP are sharded over groups of `--tensor` devices, the batch over the groups
    mixed        tensor, and fsdp over two groups

The batch has `--batch-per-device` images for each device.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from step import ROOT, describe, family_and_size, markdown

CONFIGS = {"vit": "configs/simmim_vit_b_800ep.py", "swin": "configs/simmim_swin_b_800ep.py"}
PLACEMENTS = ("replicated", "fsdp", "tensor", "mixed")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def make_mesh(placement: str, tensor: int) -> dict[str, int]:
    """The fields of `config.mesh` for a placement."""
    fsdp = {"replicated": 1, "fsdp": -1, "tensor": 1, "mixed": 2}[placement]
    return {"data": -1, "fsdp": fsdp, "tensor": tensor if placement in ("tensor", "mixed") else 1}


def measure(model: str, devices: int, placement: str, options: argparse.Namespace) -> dict:
    """Result of `simmim_jax.tools.plan` for a model on `devices` devices. Exits if it fails."""
    family, size = family_and_size(model)
    batch = options.batch_per_device * devices
    fields = {"encoder.size": size, "encoder.dtype": options.dtype, "batch_size": batch, "steps": 1, "probe_block": 0}
    fields |= {f"mesh.{axis}": ways for axis, ways in make_mesh(placement, options.tensor).items()}
    fields |= dict(override.split("=", 1) for override in options.override)
    command = [
        sys.executable, "-m", "simmim_jax.tools.plan", f"--config={CONFIGS[family]}", f"--devices={devices}",
        f"--devices-per-host={options.devices_per_host}", f"--kind={options.kind}", f"--images={batch}", "--json",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks/scaling.py: {model}, {devices} devices, {placement} failed: see the line above")
    plan = json.loads(done.stdout)
    kept = (
        "mesh", "dtype", "batch_size", "parameters", "state_bytes", "memory_bytes", "compute_seconds",
        "communication_seconds", "collectives",
    )  # fmt: skip
    return {"model": model, "devices": devices, "placement": placement} | {name: plan[name] for name in kept}


def table(report: dict) -> str:
    """The rows of a report as a Markdown table; benchmarks/README.md explains the columns."""
    head = ["model", "devices", "placement", "data x fsdp x tensor", "state MiB", "sent MiB"]
    lines = [[*head, *(f"{kind} MiB" for kind in KINDS[:3]), "others MiB", "collectives", "ms", "of matmuls"]]
    for row in report["rows"]:
        sent = {kind: sum(each["sent"] for each in row["collectives"] if each["kind"] == kind) for kind in KINDS}
        mebibytes = [sum(sent.values()), *(sent[kind] for kind in KINDS[:3]), sum(sent[kind] for kind in KINDS[3:])]
        lines.append([
            row["model"], str(row["devices"]), row["placement"],
            " x ".join(str(row["mesh"][axis]) for axis in ("data", "fsdp", "tensor")),
            f"{row['state_bytes'] / 2**20:.0f}", *(f"{size / 2**20:.1f}" for size in mebibytes),
            str(sum(each["count"] for each in row["collectives"])), f"{row['communication_seconds'] * 1e3:.2f}",
            f"{row['communication_seconds'] / row['compute_seconds']:.0%}",
        ])  # fmt: skip
    return markdown(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_b,swin_b")
    parser.add_argument("--devices", default="8,64,256")
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--tensor", type=int, default=4, help="devices of a tensor-parallel group; ViT-B has 12 heads")
    parser.add_argument("--batch-per-device", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kind", default="h100", help="device whose link rates turn bytes into milliseconds")
    parser.add_argument("--devices-per-host", type=int, default=8)
    parser.add_argument("--override", action="append", default=[], help="a config field, like encoder.depth=2")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    models, placements = options.models.split(","), options.placements.split(",")
    for model in models:
        if family_and_size(model)[0] not in CONFIGS:
            parser.exit(2, f"no model {model!r}: give a size after one of {', '.join(CONFIGS)}, like vit_b\n")
    if unknown := set(placements).difference(PLACEMENTS):
        parser.exit(2, f"no placement {', '.join(sorted(unknown))}: give some of {', '.join(PLACEMENTS)}\n")
    if not all(devices.isdigit() and int(devices) for devices in options.devices.split(",")):
        parser.exit(2, f"--devices={options.devices}: give numbers above 0, like 8,64\n")

    report = {
        "command": " ".join(["python benchmarks/scaling.py", *arguments]), **describe(), "kind": options.kind,
        "devices_per_host": options.devices_per_host, "rows": [],
    }  # fmt: skip
    for model in models:
        for devices in map(int, options.devices.split(",")):
            for placement in placements:
                report["rows"].append(measure(model, devices, placement, options))
                print(f"{model}, {devices} devices, {placement}: done", file=sys.stderr, flush=True)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
