"""python .ci/readme.py SCRATCH: run every command and Python block of the documentation at small settings.

The documentation is README.md, CONTRIBUTING.md and docs/. Commands run as the pages show them, in a folder where the
placeholders (DIR, IMAGE, SEGMENTS, ...) are real files. A command starts when the runs and files that it reads are
written. Two commands run at a time. A command that matches neither `SMALL` nor `NOT_RUN` is an error, so no page shows
a command that nobody has run.
"""

import io
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
AT_A_TIME = 2  # commands

NOT_RUN = {  # start of a command: why it does not run here
    "pip install -r requirements.txt": ".ci/run runs it",
    "pip install -r tests/requirements-parity.txt": ".ci/run runs it",
    "pip install --no-deps timm": ".ci/run runs it",
    "python -m pytest": ".ci/run runs it",
    "ruff ": ".ci/run runs it",
    ".ci/run": "it runs this program",
    'pip install -U "jax[cuda13]"': "needs a GPU",
    'pip install -U "jax[tpu]"': "needs a TPU",
    "pip install --require-hashes -r requirements-lock.txt": "would replace the environment that is tested",
    "sbatch ": "needs SLURM; tests/test_launch.py runs the script with a stand-in for srun",
}

FEW = "--config.steps=2 --config.batch_size=8 --config.optim.warmup_epochs=0"
DIGITS = "--config.steps=20 --config.optim.warmup_epochs=0.1 --config.eval_images=100 --config.probe_block=1"
SHALLOW = "--config.encoder.depth=2"
STAMPS = "--config.image_size=64,64"  # pixels
TINY_VIT = "--config.encoder.width=48 --config.encoder.depth=2 --config.encoder.num_heads=3"
TINY_SWIN = "--config.encoder.width=32 --config.encoder.depths=1,1,1,1 --config.encoder.num_heads=1,1,2,2"
HELD_OUT = "--config.data.heldout_fraction=0.3"

SMALL = (  # regular expression of a command, flags that make it small; the first that fits counts
    (r"--print_config", ""),
    (r"main .*/digits_vit_tiny.*runs/digits_b128", f"{DIGITS} {SHALLOW} --config.steps=2"),
    (r"(main|launch/local.sh) .*/digits_vit_tiny", f"{DIGITS} {SHALLOW}"),
    (r"main .*/digits_linear", f"--config.steps=10 {SHALLOW} --config.objective.block=1"),
    (r"main .*/digits_finetune", "--config.steps=10 --config.optim.warmup_epochs=0"),
    (r"main .*/folder_vit_small.*name=swin", f"{FEW} {STAMPS} {TINY_SWIN} {HELD_OUT} --config.encoder.window=4"),
    (r"main .*/folder_vit_small.*init_from", f"{FEW} {STAMPS} {HELD_OUT} --config.encoder.window=4"),
    (r"main .*/folder_vit_small.*--extend", f"{FEW} {STAMPS} {TINY_VIT} {HELD_OUT} --config.steps=4"),
    (r"main .*/folder_vit_small.*(SATELLITE|MICROSCOPE)", f"{FEW} {STAMPS} {TINY_VIT} {HELD_OUT}"),
    (r"main .*/folder_vit_small", f"{FEW} {STAMPS} {TINY_VIT} {HELD_OUT} --config.save_every=1"),
    (r"preview .*/folder_vit_small", f"{FEW} {STAMPS} {TINY_VIT} {HELD_OUT} --seconds=0.5"),
    (r"main .*/folder_finetune.*init_from=runs/mine", f"{FEW} {STAMPS} --config.eval_batch_size=8"),
    (r"main .*/folder_finetune", f"{FEW} {STAMPS} --config.eval_batch_size=8 --config.encoder.window=2"),
    (r"main .*/folder_segment", f"{FEW} {STAMPS}"),
    (r"main .*/cifar10_vit_tiny", f"{FEW} {SHALLOW} --config.eval_images=32 --config.probe_block=1"),
    (r"main .*/cifar10_linear", f"{FEW} {SHALLOW} --config.eval_images=32 --config.objective.block=1"),
    (r"main .*/simmim_swin_b_100ep", f"{FEW} {STAMPS} {TINY_SWIN} --config.eval_images=8 --config.data.workers=1"
                                     " --config.data.name=cifar10 --config.data.heldout_split=test"),
    (r"tools.plan ", f"--devices=8 --config.batch_size=64 {STAMPS} --config.encoder.depth=1 --config.probe_block=1"),
    (r"tools.probe ", "--limit=100 --epochs=3 --seeds=2"),
    (r"tools.(prepare|evaluate|predict|embed|map|convert) ", ""),
    (r"benchmarks/step.py ", "--dtypes=float32"),
)  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every command of the bash blocks, each once, in the order of the pages."""
    text = "".join(block for page in PAGES for block in blocks(page, "bash")).replace("\\\n", " ")
    lines = (line.split(" # ")[0].strip() for line in text.splitlines())
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line and not line.startswith("#")))


def why_not_run(command: str) -> str:
    """The reason of `NOT_RUN`, or an empty string."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), "")


def small(command: str) -> str:
    """`command` with the flags that make it small, in place of its own. Raises LookupError for an unknown command."""
    for pattern, flags in SMALL:
        if re.search(pattern, command):
            added = {flag.split("=")[0]: flag for flag in flags.split()}
            kept = [word for word in command.split() if word.split("=")[0] not in added]
            return " ".join([*kept, *added.values()])
    raise LookupError(f"the pages show a command that .ci/readme.py does not know: {command}")


def files(command: str) -> tuple[set[str], set[str]]:
    """The runs and files that a command (reads, writes), if commands of the pages write them."""
    named = re.findall(r"(?<![\w/])(?:(?:runs|exported|probes)/[\w.]+|PREPARED)", command)
    writes = set(re.findall(r"--(?:workdir|out|results|neighbors)[= ](\S+)", command))
    if re.search(r"tools.(prepare DIR|convert|embed|map|probe) ", command):
        arguments = [word for word in command.split()[3:] if not word.startswith("-")]
        writes.add(arguments[-1] if "tools.probe" not in command else arguments[1])
    return set(named) - writes, writes & set(named)


def concrete(command: str) -> str:
    """`command` with numbers for N and I and an address for HOST:PORT. One for each process runs as all of them."""
    command = re.sub(r"(?<=num_classes=)N\b", "10", command).replace("--processes=N", "--processes=2")
    if "HOST:PORT" not in command:
        return command
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = command.replace("HOST:PORT", f"127.0.0.1:{free.getsockname()[1]}")
    first, second = (command.replace("--process=I", f"--process={n}") for n in range(2))
    return f"{first} & {second} && wait $!"


def run(command: str, folder: Path, environment: dict[str, str]) -> tuple[int, str, float]:
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True, timeout=900,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout, time.monotonic() - start


def run_all(waiting: dict[str, str], folder: Path, environment: dict[str, str]) -> None:
    """Run the values of `waiting`, each when what its key reads is there. Ends the program at the first that fails."""
    written_by_some = set().union(*(files(command)[1] for command in waiting))
    done, running = set(), {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        while waiting or running:
            ready = [command for command in waiting if not (files(command)[0] & written_by_some) - done]
            # What changes a run comes last, so that no other command reads the run at the same time.
            ready = [command for command in ready if "--extend" not in command or (len(waiting) == 1 and not running)]
            for command in ready[: AT_A_TIME - len(running)]:
                running[pool.submit(run, waiting.pop(command), folder, environment)] = command
            if not running:
                sys.exit(f"these commands wait for one another: {list(waiting)}")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                command = running.pop(future)
                code, output, seconds = future.result()
                print(f"\n$ {command}\n{output}[exit code {code}, {seconds:.0f} s]", flush=True)
                if code:
                    pool.shutdown(cancel_futures=True)
                    sys.exit(f"this command failed with exit code {code}: {command}")
                done |= files(command)[1]


def write_inputs(folder: Path) -> None:
    """What the placeholders of the pages stand for, under their own names."""
    import numpy as np
    import tensorflow_datasets as tfds
    import tifffile
    from PIL import Image

    sys.path.append(str(ROOT / "tests"))
    from torch_files import write_pth

    def picture(n: int, side: int = 72) -> Image.Image:
        return Image.fromarray(np.random.default_rng(n).integers(0, 256, (side, side, 3), dtype=np.uint8))

    def save(image: Image.Image, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    class Cifar10(tfds.core.GeneratorBasedBuilder):
        """A stand-in with the name and version of the real data set."""

        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(64), "test": self._generate_examples(32)}

        def _generate_examples(self, count):
            for n in range(count):
                file = io.BytesIO()
                picture(n, 32).save(file, "PNG")
                yield n, {"image": file.getvalue(), "label": n % 10}

    for n in range(40):
        save(picture(n), folder / "DIR" / f"class_{n % 10}" / f"{n}.jpg")
    picture(0).save(folder / "IMAGE", "JPEG")
    (folder / "SATELLITE").mkdir()
    for n in range(40):
        values = np.random.default_rng(n).integers(0, 4096, (72, 72, 12), dtype=np.uint16)
        save(Image.fromarray(values[..., 0]), folder / "MICROSCOPE" / f"{n}.png")
        tifffile.imwrite(folder / "SATELLITE" / f"{n}.tif", values, planarconfig="contig", compression="lzw")
    for n in range(16):
        part = "val" if n % 4 == 0 else "train"
        save(picture(n), folder / "SEGMENTS" / "images" / part / f"{n}.png")
        save(Image.fromarray(np.uint8(np.eye(72) * (n % 3))), folder / "SEGMENTS" / "annotations" / part / f"{n}.png")
    tfds.disable_progress_bar()
    Cifar10(data_dir=str(folder / "TFDS_DIR"), file_format="array_record").download_and_prepare()
    with np.load(ROOT / "tests" / "golden" / "official_swin_pretrain.npz") as arrays:  # a very small Swin
        model = {name.removeprefix("params/"): arrays[name] for name in arrays if name.startswith("params/")}
    write_pth(folder / "simmim_pretrain__swin_base__img192_window6__800ep.pth", {"model": model, "epoch": 799})


def main(scratch: Path) -> None:
    shown = commands()
    waiting = {command: concrete(small(command)) for command in shown if not why_not_run(command)}
    for command in shown:
        if why := why_not_run(command):
            print(f"not run: {command} ({why})")
    folder = scratch / "pages"
    folder.mkdir()
    for name in ("simmim_jax", "configs", "launch", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    write_inputs(folder)
    environment = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"), **os.environ}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    run_all(waiting, folder, environment)
    for page in PAGES:
        if page.name == "extending.md":  # tests/test_extending.py runs its blocks
            continue
        for program in blocks(page, "python"):
            print(f"\n{page.name}:\n{program}", flush=True)
            subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
