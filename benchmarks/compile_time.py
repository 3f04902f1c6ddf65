"""Time to the first step by the depth of a ViT, with and without scan over its blocks.

    python benchmarks/compile_time.py --out=compile_time.json
    python benchmarks/compile_time.py --models=vit_ti --batch=2 --image=32 --depths=2,4 --rounds=1      # a quick try

Each measurement is a fresh process without a compilation cache. As a run does, it compiles and computes the initial
state, compiles the step, and takes the first step, on the devices of this machine. The processes run one at a time, in
an order that each round reverses. A ratio is the median over the rounds of (seconds of a depth / seconds of the
smallest depth in the same round).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from step import ROOT, describe, family_and_size, markdown

PHASES = ("build", "init", "compile", "first step")


def serve(spec: dict) -> dict:
    """Seconds of each phase, in a fresh process."""
    begun, phases = time.perf_counter(), {}

    def phase(name: str) -> None:
        phases[name] = time.perf_counter() - begun - sum(phases.values())

    import jax
    import numpy as np

    from simmim_jax.compiled import compile_train_step, make_state, to_device
    from simmim_jax.config import pretrain_config
    from simmim_jax.experiment import make_experiment
    from simmim_jax.runtime.sharding import replicated

    phase("import")
    config = pretrain_config()
    config.image_size, config.batch_size, config.steps = (spec["image"],) * 2, spec["batch"], 100
    config.encoder.size, config.encoder.depth, config.encoder.scan = spec["size"], spec["depth"], spec["scan"]
    config.encoder.dtype = spec["dtype"]
    experiment = make_experiment(config, images=spec["batch"])
    phase("build")
    state = jax.block_until_ready(make_state(experiment))
    phase("init")
    step = compile_train_step(experiment)
    phase("compile")
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in experiment.batches.arrays().items()}
    batch["batch_index"] = np.arange(spec["batch"], dtype=np.int32)
    key = jax.device_put(experiment.keys.step, replicated(experiment.mesh))
    jax.block_until_ready(step(state, to_device(batch, 0, experiment.mesh), key))
    phase("first step")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"phases": phases, "device": device, "seconds": sum(phases[name] for name in PHASES)}


def measure(spec: dict) -> dict:
    """Run `serve` in a new process. Exits if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--serve", json.dumps(spec)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        model = f"{spec['model']} of depth {spec['depth']}"
        raise SystemExit(f"benchmarks/compile_time.py: {model} failed: see the line above")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(rounds: list[list[dict]], specs: list[dict]) -> list[dict]:
    """A row for each spec: medians over the rounds, and ratios to the smallest depth of the same kind in each round."""
    rows = []
    for n, spec in enumerate(specs):
        same = {name: value for name, value in spec.items() if name != "depth"}
        alike = [m for m, other in enumerate(specs) if {k: v for k, v in other.items() if k != "depth"} == same]
        smallest = min(alike, key=lambda m: specs[m]["depth"])
        ratios = [each[n]["seconds"] / each[smallest]["seconds"] for each in rounds]
        own = [each[n] for each in rounds]
        rows.append({
            **spec,
            "device": own[0]["device"],
            "seconds": statistics.median(each["seconds"] for each in own),
            "phases": {name: statistics.median(each["phases"][name] for each in own) for name in own[0]["phases"]},
            "times_least": [min(ratios), statistics.median(ratios), max(ratios)],
            "rounds": own,
        })  # fmt: skip
    return rows


def table(report: dict) -> str:
    """The rows of a report as a Markdown table; benchmarks/README.md explains the columns."""
    lines = [["model", "scan", "depth", *(f"{name} s" for name in PHASES), "all s", "x smallest", "min-max"]]
    for row in report["rows"]:
        low, ratio, high = (f"{quotient:.2f}" for quotient in row["times_least"])
        lines.append([
            row["model"], "on" if row["scan"] else "off", str(row["depth"]),
            *(f"{row['phases'][name]:.2f}" for name in PHASES), f"{row['seconds']:.2f}", ratio, f"{low}-{high}",
        ])  # fmt: skip
    return markdown(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_s", help="sizes of the ViT, like vit_s,vit_b")
    parser.add_argument("--depths", default="12,24,48")
    parser.add_argument("--scan", default="off,on")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--image", type=int, default=224, help="side in pixels, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    for model in options.models.split(","):
        if family_and_size(model)[0] != "vit":
            parser.exit(2, f"no model {model!r}: give sizes of the ViT, like vit_s\n")
    if unknown := set(options.scan.split(",")).difference(("on", "off")):
        parser.exit(2, f"--scan={','.join(sorted(unknown))}: give off, on or off,on\n")
    if not all(depth.isdigit() and int(depth) for depth in options.depths.split(",")) or options.rounds < 1:
        parser.exit(2, "give --depths and --rounds above 0, like --depths=12,24\n")

    shared = {"dtype": options.dtype, "batch": options.batch, "image": options.image}
    specs = [
        {"model": model, "size": family_and_size(model)[1], "scan": scan == "on", "depth": int(depth), **shared}
        for model, scan, depth in itertools.product(
            options.models.split(","), options.scan.split(","), options.depths.split(",")
        )
    ]
    report = {"command": " ".join(["python benchmarks/compile_time.py", *arguments]), **describe(), "rows": []}
    rounds = []
    for number in range(options.rounds):
        measured = {}
        for n in list(range(len(specs)))[:: -1 if number % 2 else 1]:
            measured[n] = measure(specs[n])
        rounds.append([measured[n] for n in range(len(specs))])
        report["rows"], report["load_average_end"] = summarize(rounds, specs), os.getloadavg()
        print(table(report), "\n", flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        from simmim_jax.errors import exit_with_message

        with exit_with_message():
            print(json.dumps(serve(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])
