"""python -m simmim_jax.tools.evaluate RUN [options]

Evaluate a run on images that it was not trained on. A classifier, trained here or imported by `convert`: top-1 and
top-5 over the whole validation set, one row in results.csv, and with --out a confusion matrix. A pretraining run: its
held-out masked loss, as the run itself measures it. A segmentation run: mIoU.
"""

import argparse
import os

from simmim_jax.errors import CheckpointError, DataError, Parser
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  a fine-tuned run, on the held-out images of its own data:
    python -m simmim_jax.tools.evaluate runs/finetuned
  the same at another size, on other images, with the confusion matrix and the 24 worst mistakes:
    python -m simmim_jax.tools.evaluate runs/finetuned --data=DIR --image-size=256 --out=figures
  a classifier from timm or transformers, once imported:
    python -m simmim_jax.tools.convert FOLDER runs/theirs
    python -m simmim_jax.tools.evaluate runs/theirs --data=DIR/imagenet --crop-fraction=0.9
  a segmentation run, on images and label maps; with --out also a table of classes and overlays:
    python -m simmim_jax.tools.evaluate runs/segments --data=DIR --out=figures
"""


def make_parser() -> Parser:
    description = "Evaluate a classifier, a segmentation run or a pretraining run over a whole held-out set."
    parser = cli.make_parser("evaluate", description, EXAMPLES)
    add, path, count = parser.add_argument, os.path.expanduser, cli.number(int, 0)
    add("run", type=cli.path, metavar="RUN", help="workdir of a run or an import, or a step in it")
    add("--data", type=path, default="", metavar="PATH", help="a data.path, digits, or tfds:NAME (default: the run's)")
    add("--split", default="", metavar="NAME", help="part of the images (default: the evaluation part, or all)")
    cli.add_image_options(parser)
    add("--limit", type=count, metavar="N", help="number of images, evenly spread; 0: all (default: all or the run's)")
    add(
        "--results", type=path, default="results.csv", metavar="FILE", help="add a row (default: results.csv; '': none)"
    )
    add("--out", type=path, default="", metavar="FOLDER", help="write tables and pictures here")
    add("--mistakes", type=count, default=24, metavar="N", help="images on mistakes.png (default: 24; 0: no file)")
    cli.add_overwrite(parser)
    return parser


def run(argv: list[str]) -> None:
    """Evaluate, by the command line."""
    options = cli.parse_known(make_parser(), argv)
    with cli.translate_errors(DataError, options.out or options.run, "fix that and run again", "lower --batch-size"):
        evaluate(options)


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run by its objective."""
    from simmim_jax.runs.finished import load_run, make_run_objective
    from simmim_jax.runtime import compilation
    from simmim_jax.tools import images
    from simmim_jax.tools.evaluate import classification, pretraining, segmentation

    commands = {  # by the evaluator that fits the objective
        "accuracy": classification.evaluate_classifier,
        "reconstruction": pretraining.evaluate_pretraining,
        "segmentation": segmentation.evaluate_segmentation,
    }
    compilation.enable_cache()
    found = load_run(options.run, options.image_size)
    run = images.follow_images(found, options.data)
    if run is not found:
        print(f"{options.data}: the run's images, moved; the part that it held out is evaluated", flush=True)
    objective = make_run_objective(run)
    command = next((commands[name] for name in objective.evals if name in commands), None)
    if not command:
        what = f"a run of {run.objective_name}, which this command does not evaluate"
        raise CheckpointError(what, str(run.folder), "see summary.json in its workdir")
    command(run, objective, options)


if __name__ == "__main__":
    cli.start(run)
