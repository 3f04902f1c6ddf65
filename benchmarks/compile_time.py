"""Time to the first step by the depth of a ViT, with its blocks one after another and scanned over.

    python benchmarks/compile_time.py --out=compile_time.json
    python benchmarks/compile_time.py --models=vit_ti --batch=2 --image=32 --depths=2,4 --rounds=1      # a quick try

Every measurement is a fresh process without a cache of compiled programs, which makes what a run makes, on the devices
that are here: the state, compiled and drawn; the step, compiled; and the first step. They take turns, one at a time, in
an order that every round reverses. A ratio is the median over the rounds of the quotients within a round: of each depth
to the least one.
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
    """The seconds of each phase, in a process that has done nothing before."""
    begun, phases = time.perf_counter(), {}

    def phase(name: str) -> None:
        phases[name] = time.perf_counter() - begun - sum(phases.values())

    import jax
    import numpy as np

    from simmim_jax import train
    from simmim_jax.config import pretrain_config

    phase("import")
    config = pretrain_config()
    config.image_size, config.batch_size, config.steps = (spec["image"],) * 2, spec["batch"], 100
    config.encoder.size, config.encoder.depth, config.encoder.scan = spec["size"], spec["depth"], spec["scan"]
    config.encoder.dtype = spec["dtype"]
    built = train.build(config, config.steps, 1)
    phase("build")
    places = jax.tree.map(lambda x: x.sharding, built["abstract"])
    state = jax.block_until_ready(jax.jit(built["make_state"], out_shardings=places)())
    phase("init")
    step = train.compile_to_measure(config, built, config.steps, 1)
    phase("compile")
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in train.abstract_batch(config).items()}
    batch["batch_index"] = np.arange(spec["batch"], dtype=np.int32)
    key = jax.device_put(built["key"], jax.sharding.NamedSharding(built["mesh"], jax.sharding.PartitionSpec()))
    jax.block_until_ready(step(state, train.to_device(batch, built["mesh"], tuple(batch)), key))
    phase("first step")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"phases": phases, "device": device, "seconds": sum(phases[name] for name in PHASES)}


def measure(spec: dict) -> dict:
    """What `serve` gives in a process of its own. Ends the program where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--serve", json.dumps(spec)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        model = f"{spec['model']} of depth {spec['depth']}"
        raise SystemExit(f"benchmarks/compile_time.py: {model}: the line above says why")
    return json.loads(done.stdout.splitlines()[-1])


def summarize(rounds: list[list[dict]], specs: list[dict]) -> list[dict]:
    """A row of each spec: medians over the rounds, and its quotients to the least depth of the same kind in a round."""
    rows = []
    for n, spec in enumerate(specs):
        same = {name: value for name, value in spec.items() if name != "depth"}
        alike = [m for m, other in enumerate(specs) if {k: v for k, v in other.items() if k != "depth"} == same]
        least = min(alike, key=lambda m: specs[m]["depth"])
        ratios = [each[n]["seconds"] / each[least]["seconds"] for each in rounds]
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
    """The rows of a report as a Markdown table; benchmarks/README.md says what its columns mean."""
    lines = [["model", "scan", "depth", *(f"{name} s" for name in PHASES), "all s", "x least", "least-most"]]
    for row in report["rows"]:
        least, ratio, most = (f"{quotient:.2f}" for quotient in row["times_least"])
        lines.append([
            row["model"], "on" if row["scan"] else "off", str(row["depth"]),
            *(f"{row['phases'][name]:.2f}" for name in PHASES), f"{row['seconds']:.2f}", ratio, f"{least}-{most}",
        ])  # fmt: skip
    return markdown(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_s", help="sizes of the ViT, like vit_s,vit_b")
    parser.add_argument("--depths", default="12,24,48")
    parser.add_argument("--scan", default="off,on")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=2, help="images a step: this is about compiling")
    parser.add_argument("--image", type=int, default=224, help="side in pixels, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    for model in options.models.split(","):
        if family_and_size(model)[0] != "vit":
            parser.exit(2, f"no model {model!r}: the depth of a ViT alone is one number; give like vit_s\n")
    if unknown := set(options.scan.split(",")).difference(("on", "off")):
        parser.exit(2, f"--scan={','.join(sorted(unknown))}: give off,on or one of them\n")
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
