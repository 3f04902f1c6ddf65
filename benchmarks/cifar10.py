"""Results of a small ViT on CIFAR-10: ours, the ViT of `transformers` trained alike in PyTorch, and random weights.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/cifar10.py --images=DIR --runs=RUNS --out=benchmarks/results/DATE-DEVICE/cifar10.json
    python benchmarks/cifar10.py peer --images=DIR --runs=RUNS --pretrain="--config.epochs=10"       # one stage

DIR has train/<class>/ and test/<class>/. Without --images, TFDS's cifar10 is read. By default all stages run, in this
order. Each resumes after an interruption when the same command is given again:

    ours       pretrain with configs/cifar10_vit_tiny.py in RUNS/ours (--ours: use this finished run instead)
    peer       pretrain the peer with the same config in RUNS/peer: see cifar10_peer.py
    imported   import the peer's weights as a run of ours into RUNS/peer_imported, with simmim_jax.tools.convert
    random     write the initial parameters of `ours` to RUNS/random
    probe      linear probe, k-NN and few-shot probes of all three in RUNS/probe_*, with simmim_jax.tools.probe
    finetune   fine-tune all three with configs/cifar10_finetune.py in RUNS/finetune_*
    report     write the available results to a JSON file and a picture of the curves, and print tables

--pretrain, --probe and --finetune pass flags to the programs of these stages. Run several seeds in their own folders
(--runs=RUNS_1 --pretrain=--config.seed=1, and so on). `report --runs=RUNS_1,RUNS_2` then has mean ± standard deviation.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from step import ROOT, describe, markdown

sys.path.insert(0, str(ROOT))
from simmim_jax.config import refuse_change
from simmim_jax.errors import CheckpointError, ConfigError, DataError, Parser, choose, exit_with_message
from simmim_jax.experiment import make_keys
from simmim_jax.files import read_json, write_atomically
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import load_run, make_run_objective
from simmim_jax.runs.records import read_rows
from simmim_jax.tools.probe.results import DECIDING, DECIDING_ALL

ENCODERS = {"random": "random weights", "ours": "ours", "peer": "transformers"}  # name of a run -> name in tables
COLORS = {"random": "#7d8590", "ours": "#1f6feb", "peer": "#d9730d"}
CURVE_EVERY = 10  # steps between two recorded losses of `ours`
PROBES = {  # column of the table -> (method, images, kind of row) of simmim_jax.tools.probe
    "linear probe": ("linear", "all", "chosen"),
    "linear, paper's block": ("linear", "all", "paper"),
    "k-NN": ("knn", "all", "chosen"),
    "1 % of labels": ("logistic", "1 %", "chosen"),
    "10 % of labels": ("logistic", "10 %", "chosen"),
}
NOT_RUN = "not yet run"


def workdir(encoder: str, options: argparse.Namespace) -> Path:
    """The run with the weights of an encoder."""
    return {"ours": options.ours or options.runs / "ours", "peer": options.runs / "peer_imported"}.get(
        encoder, options.runs / encoder
    )


def config_flags(name: str, options: argparse.Namespace) -> list[str]:
    """--config with this file of configs/, and the flag of its images."""
    if options.images:
        return [f"--config=configs/{name}.py:folder", f"--config.data.path={options.images}"]
    return [f"--config=configs/{name}.py"]


def run(name: str, command: list, options: argparse.Namespace) -> None:
    """Run a command to its end, and record it in RUNS/records/NAME.json. Exits if it fails.

    A SIGTERM is forwarded to the command, so that it can save.
    """
    path = options.runs / "records" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    attempts = json.loads(path.read_text()) if path.exists() else []
    line = shlex.join(map(str, command))
    attempts.append({"command": without_paths(line, options), "seconds": None, "exit_code": None, **describe()})
    write_atomically(path, json.dumps(attempts, indent=1) + "\n")
    print(f"{name}: {line}", flush=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    begun = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # the command gets it too
                code = child.wait()
                break
        signal.signal(signal.SIGTERM, before)
    attempts[-1] |= {"seconds": round(time.perf_counter() - begun, 1), "exit_code": code}
    write_atomically(path, json.dumps(attempts, indent=1) + "\n")
    if code:
        print(f"benchmarks/cifar10.py: {name} ended with code {code}: see the lines above", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def without_paths(text: str, options: argparse.Namespace) -> str:
    """A command without the paths of this machine."""
    names = {options.python: "python", sys.executable: "python", ROOT: ".", options.runs: "RUNS"}
    names |= {options.images: "IMAGES", options.ours: "RUNS/ours"}
    for path, name in sorted(names.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(path), name) if path else text
    return text


def pretrain_ours(options: argparse.Namespace) -> None:
    if options.ours:
        return
    flags = [*config_flags("cifar10_vit_tiny", options), f"--config.log_every={CURVE_EVERY}", *options.pretrain]
    run("ours", [sys.executable, "-m", "simmim_jax.main", *flags, f"--workdir={options.runs}/ours"], options)


def pretrain_peer(options: argparse.Namespace) -> None:
    flags = [*config_flags("cifar10_vit_tiny", options), *options.pretrain, f"--workdir={options.runs}/peer"]
    run("peer", [options.python, ROOT / "benchmarks" / "cifar10_peer.py", *flags], options)


def import_peer(options: argparse.Namespace) -> None:
    target = workdir("peer", options)
    folder = options.runs / "peer" / "huggingface"
    if not folder.exists():
        raise CheckpointError("no finished run of the peer", str(folder.parent), "run the stage peer to its end")
    run("imported", [sys.executable, "-m", "simmim_jax.tools.convert", folder, target, "--overwrite"], options)


def draw_random(options: argparse.Namespace) -> None:
    target = workdir("random", options)
    if not checkpoint.has_steps(str(target)):  # in a new process: here JAX would keep GPU memory
        run("random", [sys.executable, __file__, "write_random", workdir("ours", options), target], options)


def write_random(run_of: str, workdir: str) -> None:
    """Write the initial parameters of the run `run_of` as a new run."""
    run = load_run(run_of)
    init_key = make_keys(run.config["seed"]).init
    checkpoint.write_params(workdir, jax.jit(make_run_objective(run).init)(init_key), run.config)


def each_encoder(name: str, command: Callable, options: argparse.Namespace) -> None:
    """Run `command(run of the encoder, new folder)` for each requested encoder."""
    for encoder in options.encoders:
        source = workdir(encoder, options)
        if not checkpoint.has_steps(str(source)):
            raise CheckpointError(
                f"no weights of {encoder}", str(source), f"run the stages before {name}, or give fewer --encoders"
            )
        run(f"{name}_{encoder}", command(source, options.runs / f"{name}_{encoder}"), options)


def probe(options: argparse.Namespace) -> None:
    images = ["--data", options.images or "tfds:cifar10"]
    program = [sys.executable, "-m", "simmim_jax.tools.probe"]
    each_encoder("probe", lambda source, out: [*program, source, out, *images, *options.probe], options)


def finetune(options: argparse.Namespace) -> None:
    program = [sys.executable, "-m", "simmim_jax.main", *config_flags("cifar10_finetune", options)]
    program += ["--config.encoder.name="]  # use the encoder of each run: that of the peer differs from the config
    each_encoder(
        "finetune",
        lambda source, out: [*program, f"--config.init_from={source}", *options.finetune, f"--workdir={out}"],
        options,
    )


def read_pretraining(folder: Path) -> dict | None:
    """Results of a pretraining run; None if it is not finished."""
    summary = read_json(folder / "summary.json")
    if not summary:
        return None
    names = ("step", "masked_loss", "images_per_second", "seconds", "parameters", "threads", "device", "describe")
    found = {name: summary[name] for name in names if name in summary}
    if versions := read_json(folder / "versions.json"):
        found["versions"] = versions
    return found | {"masked_loss_at_start": summary["start"].get("masked_loss")}


def read_losses(folder: Path) -> dict[int, dict]:
    """The rows of metrics.jsonl by step."""
    return {row["step"]: row for row in read_rows(folder / "metrics.jsonl")}


def compare(ours: Path, peer: Path) -> dict[str, list]:
    """{"step", "ours", "peer"}: the losses at the steps that both runs have recorded.

    Raises ConfigError if their configs differ, and DataError if their batches differ.
    """
    first, second = (read_json(folder / "config.json") for folder in (ours, peer))
    if first and second:
        given = {name: value for name, value in second["encoder"].items() if value is not None}
        same = {name: value for name, value in first["encoder"].items() if name in given}
        refuse_change(first | {"encoder": same}, second | {"encoder": given}, str(peer))
    rows = read_losses(ours), read_losses(peer)
    steps = sorted(rows[0].keys() & rows[1].keys())
    for step in steps:
        if rows[0][step]["samples"] != rows[1][step]["samples"]:
            raise DataError(f"different images at step {step}", f"{ours} and {peer}", "run both with the same flags")
    curves = [[round(of_run[step]["loss"], 5) for step in steps] for of_run in rows]
    return {"step": steps, "ours": curves[0], "peer": curves[1]}


def read_finetuning(folder: Path) -> dict | None:
    """Accuracy and accuracy curve of a finished fine-tuning run; None if there is none."""
    summary = read_json(folder / "summary.json")
    if not summary:
        return None
    rows = read_rows(folder / "evaluations.jsonl")
    curve = {"step": [row["step"] for row in rows], "top1": [round(row["top1"], 5) for row in rows]}
    return {name: summary[name] for name in ("step", "top1", "top5", "images")} | {"curve": curve}


def probe_settings(results: dict) -> dict:
    """Settings that decide a probe's results: options of its images, of each kind of probe, and numbers of images."""
    options = results["options"]
    kinds = results["options_by_method"]
    irrelevant = {"run", "out", "only", "threads", "batch_size", *itertools.chain(*DECIDING.values())}
    of_images = {name: value for name, value in options.items() if name not in {*irrelevant, *DECIDING_ALL}}
    return of_images | kinds | {"train_images": {row["images"]: row.get("train_images") for row in results["rows"]}}


def check_same_budget(*several: argparse.Namespace) -> None:
    """Raise ConfigError if encoders were probed or fine-tuned differently, or `ours` was probed before its last step.

    several: the options for each folder of --runs. With several folders, the seeds of fine-tuning may differ.
    """
    probed, tuned = {}, {}
    free = {"encoder", "init_from"} | ({"seed"} if several[1:] else set())
    for options, encoder in itertools.product(several, ENCODERS):
        folder = options.runs / f"probe_{encoder}"
        if results := read_json(folder / "results.json"):
            probed[folder] = probe_settings(results)
            step = (read_pretraining(workdir("ours", options)) or {}).get("step", "an unfinished run")
            if encoder == "ours" and results["step"] != step:
                raise ConfigError(f"probed at step {results['step']} of {step}", str(folder), "run the stage probe")
        folder = options.runs / f"finetune_{encoder}"
        if read_finetuning(folder):
            config = read_json(folder / "config.json")
            tuned[folder] = {k: v for k, v in config.items() if k not in free}
    for of_each in (probed, tuned):
        folders = list(of_each)
        for folder in folders[1:]:
            refuse_change(of_each[folders[0]], of_each[folder], str(folder))


def gather(options: argparse.Namespace) -> dict:
    """All results of the stages; None for results that are missing."""
    ours, peer = workdir("ours", options), options.runs / "peer"
    pretraining = {"ours": read_pretraining(ours), "peer": read_pretraining(peer)}
    rows = []
    for encoder in ENCODERS:
        loss = pretraining["ours" if encoder == "random" else encoder] or {}
        rows.append({
            "encoder": encoder,
            "masked_loss": loss.get("masked_loss_at_start" if encoder == "random" else "masked_loss"),
            "probe": read_probes(options.runs / f"probe_{encoder}"),
            "finetuned": read_finetuning(options.runs / f"finetune_{encoder}"),
        })  # fmt: skip
    check_same_budget(options)
    config = read_json(ours / "config.json")
    config.get("data", {}).update(path="", data_dir="")
    records = {}
    for path in sorted((options.runs / "records").glob("*.json")):
        records[path.stem] = json.loads(path.read_text())
    return {
        "command": without_paths(shlex.join(["python", "benchmarks/cifar10.py", *options.arguments]), options),
        **describe(),
        "pretraining": pretraining,
        "pretraining_config": config,
        "losses": compare(ours, peer),
        "rows": rows,
        "records": records,
    }


def gather_all(options: argparse.Namespace) -> dict:
    """The result of `gather`; for several folders, {"seeds": their results}. Raises ConfigError if they are not
    comparable."""
    each = [argparse.Namespace(**vars(options) | {"runs": runs}) for runs in options.folders]
    seeds = [gather(one) for one in each]
    if len(seeds) == 1:
        return seeds[0]
    check_same_budget(*each)
    configs = [found["pretraining_config"] for found in seeds]
    if len({config.get("seed") for config in configs}) < len(configs):
        raise ConfigError(
            "two pretraining runs with the same seed", str(options.runs), "give each its own --config.seed"
        )
    for folder, config in zip(options.folders, configs, strict=True):
        refuse_change(configs[0] | {"seed": config.get("seed")}, config, str(folder))
    commands = [found.pop("command") for found in seeds]
    return {"command": functools.reduce(without_paths, each, commands[0]), **describe(), "seeds": seeds}


def read_probes(folder: Path) -> list[dict]:
    """The rows of a probe's results that were chosen on validation images, and those of the paper's block."""
    rows = read_json(folder / "results.json").get("rows", [])
    return [row for row in rows if row["chosen"] or row["paper"]]


def table(report: dict) -> str:
    """The rows of a report as a Markdown table; benchmarks/README.md explains the columns."""
    lines = [["encoder", "masked loss", *PROBES, "fine-tuned"]]
    for rows in zip(*(each["rows"] for each in report.get("seeds", [report])), strict=True):
        cells = []
        for method, images, which in PROBES.values():
            found = []
            for row in rows:
                fitting = (r for r in row["probe"] if (r["method"], r["images"]) == (method, images) and r[which])
                found.append(max(fitting, key=lambda r: r["validation_top1"] or 0.0, default=None))
            cells.append(format_accuracy(*found))
        losses = [row["masked_loss"] for row in rows]
        loss = NOT_RUN if None in losses else format_mean(losses, ".3f")
        lines.append([ENCODERS[rows[0]["encoder"]], loss, *cells, format_accuracy(*(row["finetuned"] for row in rows))])
    return markdown(lines)


def format_mean(values: list[float], form: str, deviation: float | None = None) -> str:
    """Mean ± standard deviation; for a single value, `deviation` if there is one."""
    if len(values) > 1:
        deviation = float(np.std(values, ddof=1))
    return f"{float(np.mean(values)):{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")


def format_accuracy(*rows: dict | None) -> str:
    """Accuracy in percent, with the standard deviation over rows (for one row, over its draws), and the blocks."""
    if None in rows:
        return NOT_RUN
    if any(row["top1"] is None for row in rows):
        return "diverged"
    over_draws = rows[0].get("top1_std")
    text = format_mean([100 * row["top1"] for row in rows], ".1f", None if over_draws is None else 100 * over_draws)
    blocks = {f"block {row['block']}" if row["block"] else "output" for row in rows if "block" in row}
    return text + (f" ({', '.join(sorted(blocks))})" if blocks else "")


def moving_average(x: list[int], y: list[float], count: int) -> tuple[list[float], list[float]]:
    """Moving average over `count` points, of x and of y."""
    kernel = np.full(count, 1 / count)
    return np.convolve(x, kernel, "valid").tolist(), np.convolve(y, kernel, "valid").tolist()


def draw(report: dict) -> Figure | None:
    """Losses of both pretraining runs, and accuracies of all fine-tuning runs; None if there are no curves."""
    losses = report["losses"] if len(report["losses"]["step"]) > 1 else None
    tuned = {row["encoder"]: row["finetuned"]["curve"] for row in report["rows"] if row["finetuned"]}
    tuned = {name: curve for name, curve in tuned.items() if len(curve["step"]) > 1}
    if not losses and not tuned:
        return None
    panels = bool(losses) + bool(tuned)
    figure = Figure(figsize=(7.2 * panels, 4.4), dpi=100, layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    if losses:
        panel, count = next(axes), max(1, len(losses["step"]) // 40)
        panel.set_title("pretraining: same images, crops and masks at each step")
        panel.set_ylabel(f"loss, and its moving average over {count} points")
        for name in ("ours", "peer"):
            panel.plot(losses["step"], losses[name], color=COLORS[name], alpha=0.25, linewidth=1)
            x, y = moving_average(losses["step"], losses[name], count)
            panel.plot(x, y, color=COLORS[name], label=f"{ENCODERS[name]}  {y[-1]:.3f}")
    if tuned:
        panel = next(axes)
        panel.set_title("fine-tuning: same recipe and number of steps")
        panel.set_ylabel("top-1 of the test images, %")
        for name, curve in tuned.items():
            percent = [100 * value for value in curve["top1"]]
            panel.plot(curve["step"], percent, color=COLORS[name], label=f"{ENCODERS[name]}  {percent[-1]:.1f}")
    for panel in figure.axes:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def report(options: argparse.Namespace) -> None:
    """Write the JSON file of all results and its picture, and print the table."""
    found = gather_all(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    if figure := draw(found.get("seeds", [found])[0]):
        picture = options.out.with_suffix(".png")
        figure.savefig(picture)
        print(f"\ncurves: {picture}")


STAGES = {
    "ours": pretrain_ours, "peer": pretrain_peer, "imported": import_peer, "random": draw_random, "probe": probe,
    "finetune": finetune, "report": report,
}  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options. Raises ConfigError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)} (default: all)")
    runs = "folder of all runs; for report, several folders separated by commas, one per seed"
    parser.add_argument("--runs", default="runs/cifar10_comparison", help=runs)
    parser.add_argument("--images", default="", help="folder with train/ and test/ (default: TFDS's cifar10)")
    parser.add_argument("--ours", type=Path, help="a finished run of configs/cifar10_vit_tiny.py")
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="encoders for the stages probe and finetune")
    parser.add_argument(
        "--python", default=sys.executable, help="Python with torch and transformers, for the stage peer"
    )
    parser.add_argument("--pretrain", type=shlex.split, default=[], help="flags of both pretraining runs")
    parser.add_argument("--probe", type=shlex.split, default=[], help="flags of simmim_jax.tools.probe")
    parser.add_argument("--finetune", type=shlex.split, default=[], help="flags of the fine-tuning runs")
    parser.add_argument("--out", type=Path, help="JSON file of the report (default: RUNS/cifar10.json)")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    for stage in options.stages:
        choose("stage", stage, STAGES)
    options.stages = [stage for stage in STAGES if stage in options.stages or not options.stages]
    options.encoders = [choose("encoder", name, set(ENCODERS)) for name in options.encoders.split(",")]
    options.images = str(Path(options.images).expanduser().resolve()) if options.images else ""
    options.folders = [Path(folder).expanduser().resolve() for folder in options.runs.split(",")]
    options.runs = options.folders[0]
    if options.folders[1:] and (options.stages != ["report"] or options.ours):
        raise ConfigError(
            "several --runs", "command line", "several folders are only for the stage report, without --ours"
        )
    options.ours = options.ours and options.ours.expanduser().resolve()
    options.out = (options.out or options.runs / "cifar10.json").expanduser().resolve()
    if options.images and not (Path(options.images) / "train").is_dir():
        raise ConfigError("no train/ in this folder", options.images, "give --images=DIR with train/ and test/")
    return options


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["write_random"]:
        write_random(*arguments[1:])
        return
    options = parse(arguments)
    for stage in options.stages:
        STAGES[stage](options)


if __name__ == "__main__":
    with exit_with_message():
        main(sys.argv[1:])
