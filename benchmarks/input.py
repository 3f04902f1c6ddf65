"""Images/s of the input pipeline, compared with PyTorch's DataLoader and tf.data on the same cores.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python -m simmim_jax.tools.prepare --help          # makes the shards of --shards-path
    python benchmarks/input.py --path=PHOTOGRAPHS --shards-path=SHARDS --out=input.json
    python benchmarks/input.py --path=PHOTOGRAPHS --peer=none --rounds=2 --seconds=1 --max-difference
    python benchmarks/input.py --path=PHOTOGRAPHS --sweep

Each side reads the same files and makes endless batches of random crops (0.67 to 1 of the area, 224 x 224), flipped
with probability 0.5:

    ours, photographs   simmim_jax.data.make_batches from the folder, with the given workers, threads and prefetch
    ours, shards        the same from the shards of simmim_jax.tools.prepare
    torch, N workers    DataLoader with the transform and masks of SimMIM's data_simmim.py
    tf                  tf.data: decode_and_crop_jpeg, bilinear; "tf, antialiased" with antialias=True

Each side is its own process with its own workers, pinned to the same cores. The sides measure one at a time, in an
order that each round reverses. The others are stopped with SIGSTOP, including their workers. If a stopped side used the
CPU, the run ends. A turn begins by discarding batches, including those that were ready. A ratio is the median over the
rounds of the ratios within a round, because machines drift.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from step import ROOT, describe, run_text
from step import ask as ask_side

SCALE, RATIO, FLIP = (0.67, 1.0), (3 / 4, 4 / 3), 0.5
BLOCK, HIDDEN, PATCH = 32, 0.6, 16  # masks of the PyTorch side: pixels, fraction, pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ask = functools.partial(ask_side, program="benchmarks/input.py")  # send a request to a side; returns its reply
SETTINGS = ("workers", "threads", "prefetch")
SWEEP = {"workers": (0, 1, 2), "threads": (1, 2, 4), "prefetch": (2, 4)}
GOALS = (  # (our side, peer, minimum ratio)
    ("ours, photographs", "torch", 2.5),
    ("ours, shards", "torch", 5.0),
    ("ours, photographs", "tf", 1.0),
    ("ours, shards", "tf", 1.0),
)
PEERS = ("torch", "tf", "tf, antialiased")  # compared with our rows; torch with its best number of workers
PACKAGES = (
    "numpy", "pillow", "grain", "array_record", "simplejpeg", "cykooz_resizer", "torch", "torchvision",
    "tensorflow-cpu", "tensorflow",
)  # fmt: skip
IDLE = 0.05  # CPU seconds that a stopped side may appear to use: the kernel counts in hundredths


# A side is (batches, images, settings): an endless iterator over arrays of images, the number of images, its settings.


def ours(path: str, source: str, batch: int, image: int, settings: dict, **_) -> tuple:
    """`simmim_jax` with these settings. None means the default of a config."""
    from simmim_jax import data
    from simmim_jax.config import base_config

    settings = {name: base_config().data[name] if value is None else value for name, value in settings.items()}
    records = data.make_source(source, path=path, split="train", heldout_fraction=0.0)
    spec = data.BatchSpec(
        batch_size=batch, seed=0, image_size=(image, image), crop_scale=SCALE, crop_ratio=RATIO, flip=FLIP
    )
    batches = data.make_batches(records, spec, loading=data.Loading(**settings))
    return (each["image"] for each in batches), len(records), settings


def torch_side(path: str, batch: int, image: int, workers: int, torchvision: str, **_) -> tuple:
    """The loader of SimMIM's data_simmim.py for one process, with an endless shuffled sampler."""
    import torch

    sys.path += [torchvision] if torchvision else []
    # PyPI's torchvision is built for CUDA. With a torch without CUDA, it fails while it registers its own operators. No
    # transform uses them, so skip the registration.
    register = torch.library.register_fake
    nothing = lambda function: function  # noqa: E731
    torch.library.register_fake = lambda operator, *args, **kwargs: (
        nothing if str(operator).startswith("torchvision::") else register(operator, *args, **kwargs)
    )
    from torchvision import datasets, transforms

    torch.library.register_fake = register
    crop = transforms.Compose([
        transforms.Lambda(lambda picture: picture.convert("RGB") if picture.mode != "RGB" else picture),
        transforms.RandomResizedCrop(image, scale=SCALE, ratio=RATIO),
        transforms.RandomHorizontalFlip(FLIP),
        transforms.ToTensor(),
        transforms.Normalize(mean=torch.tensor(MEAN), std=torch.tensor(STD)),
    ])  # fmt: skip
    blocks, tokens = image // BLOCK, BLOCK // PATCH

    def mask() -> np.ndarray:
        hidden = np.zeros(blocks**2, int)
        hidden[np.random.permutation(blocks**2)[: int(np.ceil(blocks**2 * HIDDEN))]] = 1
        return hidden.reshape(blocks, blocks).repeat(tokens, axis=0).repeat(tokens, axis=1)

    dataset = datasets.ImageFolder(path, lambda picture: (crop(picture), mask()))
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=2**40 // len(dataset) * len(dataset))
    loader = torch.utils.data.DataLoader(dataset, batch, sampler=sampler, num_workers=workers, drop_last=True)
    return (images.numpy() for (images, _), _ in loader), len(dataset), {"workers": workers}


def tf_side(path: str, batch: int, image: int, antialias: bool, cores: list[int], **_) -> tuple:
    """tf.data as in its guides: decode only the crop, with AUTOTUNE on one thread per core."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(len(cores))
    tf.config.threading.set_inter_op_parallelism_threads(len(cores))
    files = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    whole = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])

    def load(name):
        content = tf.io.read_file(name)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(content), whole, area_range=SCALE, aspect_ratio_range=RATIO, max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.stack([begin[0], begin[1], extent[0], extent[1]])
        pixels = tf.image.decode_and_crop_jpeg(content, window, channels=3)
        pixels = tf.image.resize(pixels, (image, image), method="bilinear", antialias=antialias)
        return tf.image.random_flip_left_right(tf.cast(tf.round(pixels), tf.uint8))

    options = tf.data.Options()
    options.deterministic = False
    options.threading.private_threadpool_size = len(cores)
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(batch, drop_remainder=True).prefetch(2)
    return dataset.with_options(options).as_numpy_iterator(), len(files), {"threads": len(cores)}


MAKERS = {"ours": ours, "torch": torch_side, "tf": tf_side}


def max_difference(path: str, image: int) -> dict:
    """Compare our pixels with Pillow's crop and bilinear resize of the same boxes, one box per photograph."""
    from PIL import Image, ImageOps

    from simmim_jax.data import make_source, transforms
    from simmim_jax.data.decode import Picture

    source = make_source("folder", path=path, split="train", heldout_fraction=0.0)
    found, size = [], (image, image)
    for i in range(len(source)):
        content = source[i]["image"]
        picture = Picture(content, 3)
        own = transforms.random_resized_crop(picture, np.random.default_rng(i), size, SCALE, RATIO, "bilinear")
        box = transforms._random_box(np.random.default_rng(i), picture.width, picture.height, SCALE, RATIO)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        theirs = upright.crop(box).resize(size, Image.Resampling.BILINEAR)
        apart = np.abs(own.astype(int) - np.asarray(theirs))
        found.append((int(apart.max()), float(apart.mean()), float((apart > 0).mean()), source.name(i)))
    greatest, _, _, name = max(found)
    mean, share = (statistics.fmean(column) for column in list(zip(*found, strict=True))[1:3])
    return {"images": len(found), "greatest": greatest, "in": name, "mean": mean, "share_that_differs": share}


def serve() -> None:
    """The process of a side. Reads JSON lines: first what to build, then one request per turn."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to stderr
    spec, begun = json.loads(sys.stdin.readline()), time.perf_counter()
    os.sched_setaffinity(0, spec["cores"])  # before libraries size their thread pools
    try:
        batches, images, settings = MAKERS[spec["kind"]](**spec)
        first = next(batches)
    except ImportError as error:
        replies.write(json.dumps({"missing": str(error)}) + "\n")
        return
    except Exception as error:
        # a user error is one line; any other error is a traceback without a reply
        if getattr(error, "kind", "") in ("config", "data") or isinstance(error, OSError):
            replies.write(json.dumps({"error": " ".join(str(error).split())}) + "\n")
            return
        raise
    facts = {
        "images": images, "settings": settings, "shape": first.shape, "dtype": str(first.dtype), "versions": versions(),
        "first_batch_seconds": time.perf_counter() - begun,
    }  # fmt: skip
    replies.write(json.dumps(facts) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        if question.pop("ask") == "difference":
            answer = max_difference(spec["path"], spec["image"])
        else:
            answer = turn(batches, spec["batch"], **question)
        replies.write(json.dumps(answer) + "\n")
    if spec["kind"] == "tf":
        os._exit(0)  # TensorFlow 2.21 sometimes hangs when it destroys a running iterator


def turn(batches: Iterator, batch: int, seconds: float, warm: float) -> dict:
    """The rate between the arrivals of two batches, after `warm` seconds of discarded batches.

    Batches that were ready take milliseconds, so they are gone long before `warm` is over.
    """
    begun, discarded = time.perf_counter(), 0
    while not discarded or time.perf_counter() - begun < warm:
        next(batches)
        discarded += 1
    begun, count, passed = time.perf_counter(), 0, 0.0
    while not count or passed < seconds:
        next(batches)
        count, passed = count + 1, time.perf_counter() - begun
    return {"images_per_second": count * batch / passed, "batches": count, "seconds": passed, "discarded": discarded}


def versions() -> dict:
    """Versions of Python and of the packages that this process has imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if sys.modules.keys() & {name, "PIL" if name == "pillow" else name.removesuffix("-cpu")}:
                found[name] = importlib.metadata.version(name)
    return found


def start(spec: dict, python: str) -> tuple[subprocess.Popen | None, dict]:
    """(process of a side, its facts after the first batch). The process is None if a package of a peer is missing.

    The process leads a process group, so that it can be stopped with its workers. If this program dies, the kernel ends
    the group.
    """
    environment = {"OMP_WAIT_POLICY": "passive", "TF_CPP_MIN_LOG_LEVEL": "2"} | dict(os.environ)
    environment |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONWARNINGS": "ignore"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}  # keep TensorFlow and grain's JAX off the GPU
    command, pipes = [python, __file__, "--serve"], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    begun = time.perf_counter()
    try:
        process = subprocess.Popen(command, env=environment, text=True, process_group=0, **pipes)
    except OSError as error:
        return None, {"missing": f"{python}: {error.strerror}"}
    try:
        facts = ask(process, spec)
    except BaseException:
        end(process)
        raise
    if "missing" in facts or "error" in facts:
        end(process)
        if "error" in facts or spec["kind"] == "ours":
            raise SystemExit(f"benchmarks/input.py: {spec['kind']}: {facts.get('error') or facts['missing']}")
        return None, facts
    return process, facts | {"start_seconds": time.perf_counter() - begun}


def end(process: subprocess.Popen) -> None:
    """End a side and its workers, by force if necessary."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        print(f"benchmarks/input.py: side {process.pid} does not exit and is killed", file=sys.stderr)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> dict[int, tuple[str, float]]:
    """State and CPU seconds of a process and all its descendants, in any process group."""
    known = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            known[int(folder.name)] = int(fields[1]), (fields[0], used)
    members, grown = {pid}, True
    while grown:
        more = {child for child, (parent, _) in known.items() if parent in members} - members
        members, grown = members | more, bool(more)
    return {member: known[member][1] for member in members if member in known}


def pause(process: subprocess.Popen) -> float:
    """Stop a side and its workers; return the CPU seconds that they have used."""
    os.killpg(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while awake := [pid for pid, (state, _) in family(process.pid).items() if state not in "TZX"]:
        if time.monotonic() > deadline:
            raise SystemExit(f"benchmarks/input.py: process {awake[0]} of a side does not stop")
        time.sleep(0.01)
    return used_by(process)


def used_by(process: subprocess.Popen) -> float:
    return sum(used for _, used in family(process.pid).values())


def resume(process: subprocess.Popen, used_before: float) -> None:
    """Continue a stopped side. Exits if it has used the CPU since it was stopped."""
    used = used_by(process) - used_before
    if used > IDLE:
        raise SystemExit(f"benchmarks/input.py: a stopped side used {used:.2f} s of CPU: the measurement is invalid")
    os.killpg(process.pid, signal.SIGCONT)


def in_turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round, which reverses the order of the round before."""
    for number in range(rounds):
        yield names[::-1] if number % 2 else names


def measure(specs: dict[str, dict], pythons: dict[str, str], options) -> tuple[dict, dict, dict]:
    """(rounds, facts, missing) of the sides, which all run from start to end. missing: side -> reason."""
    processes, facts, used, missing = {}, {}, {}, {}
    rounds = {name: [] for name in specs}
    try:
        for name, spec in specs.items():
            if spec["kind"] in missing:
                continue
            process, reply = start(spec, pythons.get(spec["kind"], sys.executable))
            if process is None:
                missing[spec["kind"]] = reply["missing"]
                continue
            processes[name], facts[name] = process, reply
            used[name] = pause(process)
        check_same_images(specs, facts)
        for order in in_turns(list(processes), options.rounds + 1):
            for name in order:
                process, before = processes[name], used[name]
                resume(process, before)
                begun = time.perf_counter()
                answer = ask(process, {"ask": "turn", "seconds": options.seconds, "warm": options.warm})
                passed = time.perf_counter() - begun
                used[name] = pause(process)
                rounds[name].append(answer | {"cores_busy": (used[name] - before) / passed})
    finally:
        for process in processes.values():
            end(process)
    return {name: of_side[1:] for name, of_side in rounds.items() if of_side}, facts, missing


def check_same_images(specs: dict[str, dict], facts: dict[str, dict]) -> None:
    """Exit if sides read different numbers of images."""
    counts = {name: facts[name]["images"] for name, spec in specs.items() if name in facts and not spec["prepared"]}
    if len(set(counts.values())) > 1:
        each = "; ".join(f"{name}: {count}" for name, count in counts.items())
        raise SystemExit(f"benchmarks/input.py: the sides read different images ({each}): give JPEGs in class folders")


def measure_sweep(specs: dict[str, dict], options) -> tuple[dict, dict]:
    """(rounds, facts) of each of our settings. Each runs for one turn at a time: all at once would fill the memory."""
    rounds, facts = {name: [] for name in specs}, {}
    for number, order in enumerate(in_turns(list(specs), options.rounds + 1)):
        for name in order:
            process, facts[name] = start(specs[name], sys.executable)
            try:
                rounds[name].append(ask(process, {"ask": "turn", "seconds": options.seconds, "warm": options.warm}))
            finally:
                end(process)
            print(f"round {number}, {name}: {rounds[name][-1]['images_per_second']:.0f} images/s", file=sys.stderr)
    return {name: of_side[1:] for name, of_side in rounds.items()}, facts


def best(rounds: dict[str, list[dict]], names: list[str]) -> str | None:
    """The side with the highest median rate."""
    there = [name for name in names if name in rounds]
    return max(there, key=lambda name: median_rate(rounds[name]), default=None)


def median_rate(rounds: list[dict]) -> float:
    return statistics.median(each["images_per_second"] for each in rounds)


def quotients(own: list[dict], other: list[dict]) -> list[float]:
    """[min, median, max] of the ratios of the rates in the same round."""
    of_rounds = [a["images_per_second"] / b["images_per_second"] for a, b in zip(own, other, strict=True)]
    return [min(of_rounds), statistics.median(of_rounds), max(of_rounds)]


def summarize(rounds: dict[str, list[dict]], facts: dict, cores: int) -> list[dict]:
    """A row for each side: medians over the rounds, and ratios to the peers for our sides."""
    peers = {"torch": best(rounds, [name for name in rounds if name.startswith("torch")])}
    peers |= {name: best(rounds, [name]) for name in PEERS[1:]}
    rows = []
    for name, of_side in rounds.items():
        against = {key: peer for key, peer in peers.items() if peer and name.startswith("ours")}
        rate = median_rate(of_side)
        rows.append({
            "side": name, **facts[name], "images_per_second": rate, "images_per_second_per_core": rate / cores,
            "times": {key: quotients(of_side, rounds[peer]) for key, peer in against.items()}, "compared_with": against,
            "cores_busy": statistics.median(each["cores_busy"] for each in of_side), "rounds": of_side,
        })  # fmt: skip
    return rows


def summarize_sweep(rounds: dict[str, list[dict]], facts: dict, sources: dict[str, str]) -> list[dict]:
    """A row for each setting, the best of each source first."""
    rows = []
    for source in dict.fromkeys(sources.values()):
        names = [name for name in rounds if sources[name] == source]
        fastest = best(rounds, names)
        for name in sorted(names, key=lambda name: -median_rate(rounds[name])):
            rows.append({
                "source": source, **facts[name], "images_per_second": median_rate(rounds[name]),
                "times_best": quotients(rounds[name], rounds[fastest]), "rounds": rounds[name],
            })  # fmt: skip
    return rows


def tables(report: dict) -> list[str]:
    """The results as Markdown tables; benchmarks/README.md explains the columns."""
    found = []
    if report.get("rows"):
        found += [table(report["rows"]), goals_table(report["rows"])]
    if report.get("difference"):
        found.append(difference_table(report["difference"]))
    if report.get("sweep"):
        found.append(sweep_table(report["sweep"]))
    return found


def table(rows: list[dict]) -> str:
    lines = [["side", "images/s", "per core", *(f"x {peer}" for peer in PEERS), "cores busy", "start s"]]
    for row in rows:
        rates = [f"{row[name]:.0f}" for name in ("images_per_second", "images_per_second_per_core")]
        times = [span(row["times"].get(peer)) for peer in PEERS]
        lines.append([side_name(row), *rates, *times, f"{row['cores_busy']:.2f}", f"{row['start_seconds']:.1f}"])
    return markdown(lines)


def goals_table(rows: list[dict]) -> str:
    """All goals, whether reached, missed or not measured."""
    times = {row["side"]: row["times"] for row in rows}
    lines = [["goal", "minimum", "measured", "reached"]]
    for side, peer, wanted in GOALS:
        found = times.get(side, {}).get(peer)
        reached = "not measured" if not found else "yes" if found[1] >= wanted else "no"
        lines.append([f"{side}, x {peer}", f"{wanted}", span(found), reached])
    return markdown(lines)


def sweep_table(rows: list[dict]) -> str:
    lines = [["source", *SETTINGS, "images/s", "x best", "start s"]]
    for row in rows:
        settings = (str(row["settings"][name]) for name in SETTINGS)
        lines.append([
            row["source"], *settings, f"{row['images_per_second']:.0f}", span(row["times_best"]),
            f"{row['start_seconds']:.1f}",
        ])  # fmt: skip
    return markdown(lines)


def difference_table(found: dict) -> str:
    numbers = [
        str(found["greatest"]),
        f"{found['mean']:.3f}",
        f"{found['share_that_differs']:.2%}",
        str(found["images"]),
    ]
    return markdown([["max difference", "mean", "values that differ", "images"], numbers])


def side_name(row: dict) -> str:
    """The name of a side, with its settings if it is ours."""
    settings = [str(row["settings"][name]) for name in SETTINGS] if row["side"].startswith("ours") else []
    return row["side"] + (f" ({'/'.join(settings)})" if settings else "")


def span(times: list[float] | None) -> str:
    return f"{times[1]:.2f} ({times[0]:.2f}-{times[2]:.2f})" if times else ""


def markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * (width - 1) + ":" for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


def make_specs(options, cores: list[int]) -> tuple[dict[str, dict], dict[str, dict]]:
    """(our sides, peers): the spec of each side by name."""
    shared = {"cores": cores, "batch": options.batch, "image": options.image, "path": options.path, "prepared": False}
    settings = {name: getattr(options, name) for name in SETTINGS}
    mine = {"ours, photographs": {**shared, "kind": "ours", "source": "folder", "settings": settings}}
    if options.shards_path:
        shards = {"source": "array_record", "path": options.shards_path, "prepared": True}
        mine["ours, shards"] = mine["ours, photographs"] | shards
    peers = {}
    if "torch" in options.peer:
        for workers in sorted({0, 1, len(cores)}):
            name = f"torch, {workers} worker{'' if workers == 1 else 's'}"
            peers[name] = {**shared, "kind": "torch", "workers": workers, "torchvision": options.torchvision}
    if "tf" in options.peer:
        for name, antialias in (("tf", False), ("tf, antialiased", True)):
            peers[name] = {**shared, "kind": "tf", "antialias": antialias}
    return mine, peers


def make_sweep(mine: dict[str, dict]) -> tuple[dict[str, dict], dict[str, str]]:
    """(spec of each of our sides in each setting by name, source of each name)."""
    specs, sources = {}, {}
    for side, values in itertools.product(mine, itertools.product(*SWEEP.values())):
        name = f"{side} {'/'.join(map(str, values))}"
        specs[name] = mine[side] | {"settings": dict(zip(SWEEP, values, strict=True))}
        sources[name] = side.removeprefix("ours, ")
    return specs, sources


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="photographs: JPEGs in class folders")
    parser.add_argument("--shards-path", default="", help="shards of them from simmim_jax.tools.prepare")
    parser.add_argument("--peer", default="torch,tf", help="torch, tf, torch,tf or none")
    parser.add_argument("--torchvision", default="", help="folder in which torchvision was installed separately")
    parser.add_argument("--tf-python", default=sys.executable, help="Python with TensorFlow")
    parser.add_argument("--cores", type=int, default=2, help="cores of each side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=224, help="side in pixels")
    for name in SETTINGS:
        default = "one per core" if name == "workers" else "that of a config"
        parser.add_argument(f"--{name}", type=int, help=f"setting of our sides; default: {default}")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds; one more is discarded")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of batches by each side in a round")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds of discarded batches before these")
    parser.add_argument(
        "--sweep", action="store_true", help="measure our sides at workers x threads x prefetch instead"
    )
    parser.add_argument("--max-difference", action="store_true", help="also compare our pixels with Pillow's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if not hasattr(os, "sched_setaffinity") or not os.path.exists("/proc/self/stat"):
        parser.exit(2, "no sched_setaffinity or /proc: run it on Linux\n")
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    if not 0 < options.cores == len(cores):
        parser.exit(
            2, f"--cores={options.cores}, but {len(os.sched_getaffinity(0))} are available: give that or fewer\n"
        )
    if unknown := set(options.peer.split(",")) - {"torch", "tf", "none"}:
        parser.exit(2, f"no peer {', '.join(sorted(unknown))}: give torch, tf, torch,tf or none\n")
    if options.rounds < 1 or options.batch < 1 or options.seconds <= 0 or options.warm < 0:
        parser.exit(2, "give --rounds and --batch of at least 1, --seconds above 0, --warm of at least 0\n")
    for name in ("path", "shards_path"):
        where = getattr(options, name)
        if where and not os.path.isdir(where):
            parser.exit(2, f"--{name.replace('_', '-')}={where} is not a folder\n")
    options.peer = options.peer.split(",")
    options.workers = len(cores) if options.workers is None else options.workers

    mine, peers = make_specs(options, cores)
    changed = run_text("git", "status", "--porcelain", "simmim_jax", "benchmarks/input.py").splitlines()
    report = {"command": " ".join(["python benchmarks/input.py", *arguments]), **describe(), "changed": changed}
    del report["versions"], report["gpu"]  # each side has its own versions, and none uses a GPU
    report |= {"cores_used": cores, "batch": options.batch, "image": options.image}
    missing = {} if options.shards_path else {"ours, shards": "no --shards-path"}
    if options.max_difference:
        process, _ = start(mine["ours, photographs"], sys.executable)
        try:
            report["difference"] = ask(process, {"ask": "difference"})
        finally:
            end(process)
    if options.sweep:
        specs, sources = make_sweep(mine)
        rounds, facts = measure_sweep(specs, options)
        report["sweep"] = summarize_sweep(rounds, facts, sources)
    else:
        rounds, facts, absent = measure(mine | peers, {"tf": options.tf_python}, options)
        missing |= absent | {peer: "not in --peer" for peer in ("torch", "tf") if peer not in options.peer}
        report["rows"] = summarize(rounds, facts, len(cores))
    report |= {"missing": missing, "load_average_end": os.getloadavg()}
    print("\n\n".join(tables(report)))
    for name, why in missing.items():
        print(f"\nnot measured: {name} ({why})")
    for source in dict.fromkeys(row["source"] for row in report.get("sweep", [])):
        first = next(row for row in report["sweep"] if row["source"] == source)
        print(f"\nbest from {source}:", *(f"--config.data.{name}={first['settings'][name]}" for name in SETTINGS))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main(sys.argv[1:])
