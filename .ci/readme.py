"""python .ci/readme.py SCRATCH: run every command of README.md's bash blocks, in order and small, and then its Python.

A command that is not known here is an error, so that none is shown that nobody has run.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
from torch_files import write_pth  # noqa: E402

SMALL = {  # what makes a command small: flags added by its config, or None where it runs as it stands
    "configs/digits_vit_tiny.py": None,
    "configs/digits_linear.py": ["--config.epochs=5.0"],
    "configs/folder_vit_small.py": [
        "--config.image_size=64,64", "--config.batch_size=8", "--config.steps=3", "--config.encoder.depth=2",
        "--config.data.heldout_fraction=0.3", "--config.save_every=2",
    ],
    "configs/cifar10_vit_tiny.py": ["--config.batch_size=16", "--config.steps=3", "--config.eval_images=32"],
    "configs/cifar10_linear.py": ["--config.batch_size=16", "--config.steps=3"],
    "configs/folder_finetune.py": ["--config.batch_size=8", "--config.steps=2", "--config.eval_batch_size=8"],
    "configs/digits_finetune.py": ["--config.epochs=4.0"],
    "configs/folder_segment.py": ["--config.image_size=64,64", "--config.batch_size=8", "--config.steps=3"],
    "configs/simmim_swin_b_100ep.py": [
        "--config.image_size=64,64", "--config.batch_size=8", "--config.steps=2", "--config.encoder.depths=1,1,1,1",
        "--config.encoder.width=32", "--config.encoder.num_heads=1,1,2,2", "--config.eval_images=8",
        "--config.data.workers=1",
    ],
}  # fmt: skip
INSTEAD = {  # of what makes a command small, where a flag of the command itself has another
    "--config.encoder.name=swin": [
        "--config.image_size=64,64",
        "--config.batch_size=8",
        "--config.steps=2",
        "--config.encoder.depths=1,1,1,1",
        "--config.encoder.window=4",
        "--config.data.heldout_fraction=0.3",
    ],
    "--processes=2 --devices-per-process=4": ["--config.steps=20", "--config.eval_images=64"],
    "--config.encoder.name= ": ["--config.batch_size=8", "--config.steps=2", "--config.data.heldout_fraction=0.3"],
}
AS_THEY_STAND = (
    "python benchmarks/step.py", "python -m simmim_jax.tools.convert", "python -m simmim_jax.tools.prepare",
    "python -m simmim_jax.tools.plan", "python -m simmim_jax.tools.probe", "python -m simmim_jax.tools.evaluate",
    "python -m simmim_jax.tools.predict", "python -m simmim_jax.tools.embed", "python -m simmim_jax.tools.map",
)  # fmt: skip
ALREADY_RUN = ("pip install -r requirements.txt", "python -m pytest")  # by .ci/run itself


def picture(n: int, side: int = 72) -> Image.Image:
    return Image.fromarray(np.random.default_rng(n).integers(0, 256, (side, side, 3), dtype=np.uint8))


class Cifar10(tfds.core.GeneratorBasedBuilder):
    """A stand-in under the real set's name and version: what a prepared TFDS folder looks like to a run."""

    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(32, 32, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(64), "test": self._generate_examples(32)}

    def _generate_examples(self, count):
        for n in range(count):
            file = io.BytesIO()
            picture(n, 32).save(file, "PNG")
            yield n, {"image": file.getvalue(), "label": n % 10}


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def readme_commands() -> list[str]:
    lines = [line for block in readme_blocks("bash") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def main(scratch: Path) -> None:
    folder = scratch / "images"
    for n in range(40):
        path = folder / f"class_{n % 10}" / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(path)
    segments = scratch / "segments"
    for n in range(16):
        for part, content in (("images", picture(n)), ("annotations", Image.fromarray(np.uint8(np.eye(72) * (n % 3))))):
            path = segments / part / ("val" if n % 4 == 0 else "train") / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            content.save(path)
    official = "simmim_pretrain__swin_base__img192_window6__800ep.pth"
    with np.load(ROOT / "tests" / "golden" / "official_swin_pretrain.npz") as arrays:  # a Swin of the size of a stamp
        model = {name.removeprefix("params/"): arrays[name] for name in arrays if name.startswith("params/")}
    write_pth(scratch / official, {"model": model, "epoch": 799})
    places = {"HOST:PORT": "127.0.0.1:8476", "--processes=N": "--processes=2"}
    places |= {"TFDS_DIR": scratch / "tfds", "=DIR": f"={folder}", "runs/": f"{scratch}/runs/", "=N ": "=10 "}
    places |= {" DIR ": f" {folder} ", "PREPARED": scratch / "prepared", "=preview.png": f"={scratch}/preview.png"}
    places |= {"exported/": f"{scratch}/exported/", official: scratch / official, "probes/": f"{scratch}/probes/"}
    places |= {"=SEGMENTS": f"={segments}", " IMAGE": f" {folder}/class_0/0.jpg"}
    Cifar10(data_dir=str(scratch / "tfds"), file_format="array_record").download_and_prepare()

    for command in readme_commands():
        if command.startswith(ALREADY_RUN):
            continue
        config = re.search(r"--config (\S+?\.py)", command)
        if not (config and config.group(1) in SMALL) and not command.startswith(AS_THEY_STAND):
            sys.exit(f"README.md shows a command that .ci/readme.py does not know: {command}")
        for shown, real in places.items():
            command = command.replace(shown, str(real))
        if config and not command.startswith(AS_THEY_STAND):
            instead = [flags for part, flags in INSTEAD.items() if part in command]
            command = " ".join([command, *(instead[0] if instead else SMALL[config.group(1)] or [])])
        if "configs/simmim_" in command and "main" in command:  # of ImageNet, the stand-in's name and split
            command += " --config.data.name=cifar10 --config.data.heldout_split=test"
        if "--process=I" in command:  # on two hosts: here on one, at once
            first, second = (command.replace("--process=I", f"--process={n}") for n in range(2))
            command = f"{first} & {second} && wait $!"
        print(f"$ {command}", flush=True)
        subprocess.run(command, shell=True, check=True, cwd=ROOT)
    for program in readme_blocks("python"):
        program = program.replace("runs/", f"{scratch}/runs/").replace('"IMAGE"', f'"{folder}/class_0/0.jpg"')
        print(program, flush=True)
        subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
