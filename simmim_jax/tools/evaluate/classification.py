"""Evaluation of a classifier: accuracies, a row in results.csv, and tables and pictures of its mistakes."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from simmim_jax.errors import DataError
from simmim_jax.evals import accuracy
from simmim_jax.evals.sheet import save_png
from simmim_jax.evaluation import Subject, make_eval_inputs, make_run_subject
from simmim_jax.files import utf8_name, write_atomically
from simmim_jax.objectives import Objective
from simmim_jax.runs.finished import Run, make_state
from simmim_jax.tools import images
from simmim_jax.tools.cli import Progress, check_output, has_mark, to_csv
from simmim_jax.tools.evaluate import confusion, results

TABLES, PICTURES = ("classes.csv", "confusion.csv"), ("confusion.png", "mistakes.png")


def evaluate_classifier(run: Run, objective: Objective, options: argparse.Namespace) -> None:
    """Print the accuracies, append a row to the results, and write the files of --out."""
    if options.results:
        check_output(options.results, overwrite=True, is_ours=results.is_ours)
    source, description = open_images(run, options)
    if options.data:
        source = images.match_classes(images.class_names(run), source)
    check_classes(run, source, compare_names=bool(options.data))
    if options.out:
        for name in (*TABLES, *PICTURES):
            is_ours = is_table if name in TABLES else has_mark
            check_output(Path(options.out) / name, overwrite=options.overwrite, is_ours=is_ours)
    subject, count = make_subject(run, objective, source, description, options)
    answers, mistakes = classify(run, subject, options, Progress("evaluate", count))
    num_classes = run.config["objective"]["num_classes"]
    left_out = count - len(answers.label)
    images.check_left_out(left_out, count, options.max_bad_fraction, source)
    metrics = accuracy.top(answers, num_classes)
    percents = "".join(f"top-{k} {100 * metrics[f'top{k}']:.2f} %  " for k in (1, 5) if f"top{k}" in metrics)
    untrained = describe_untrained(run, source, answers)
    line = f"{percents}of {len(answers.label)} images{untrained}"
    print(line + (f", {left_out} left out" if left_out else ""), flush=True)
    if options.results:
        given = {"crop_pct": f"{subject.crop.crop_fraction:g}", "interpolation": subject.crop.interpolation}
        given |= {"run": options.run, "data": description + untrained}
        results.append_row(Path(options.results), results.make_row(run, metrics, given))
        print(f"a row added to {options.results}")
    if options.out:
        names = [utf8_name(str(name)) for name in source.classes] or [str(n) for n in range(num_classes)]
        write_files(Path(options.out), answers, mistakes, names)


def open_images(run: Run, options: argparse.Namespace) -> tuple:
    """(the images to evaluate on, their description); see `images.open_heldout`."""
    make = partial(images.open_source, run, options.data, heldout_fraction=0.0)
    source = images.open_heldout(run, options, make, lambda source: images.has_parts(options.data))
    description = source.describe()
    undivided = options.data and not images.is_own(run, options.data) and not options.split
    return source, description.replace("split train", "all") if undivided else description


def check_classes(run: Run, source, *, compare_names: bool) -> None:
    """Raise DataError unless the images have labels, of as many classes as the head.

    compare_names: also warn if the class names differ from the run's.
    """
    num_classes, found = run.config["objective"]["num_classes"], tuple(source.classes)
    images.check_labels(source, "--split")
    if found and len(found) != num_classes:
        what = f"the head has {num_classes} classes, the images have {len(found)}"
        raise DataError(what, source.describe(), "give images of the head's classes, or fine-tune the run on these")
    if compare_names:
        images.warn_other_classes(images.class_names(run), source)


def describe_untrained(run: Run, source, answers: accuracy.Answers) -> str:
    """A note on the images whose class had no training image in the run; "" if there are none."""
    names = [name for name in run.config.get("untrained_classes", ()) if name in source.classes]
    count = int(np.isin(answers.label, [source.classes.index(name) for name in names]).sum())
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f" ({count} of them of classes without training images: {utf8_name(shown)})" if count else ""


def make_subject(
    run: Run, objective: Objective, source, description: str, options: argparse.Namespace
) -> tuple[Subject, int]:
    """(the run on the images of `source`, their number). Prints what is evaluated."""
    crop = images.make_crop(run, options.crop_fraction, options.interpolation)
    line = f"{results.model_name(run)} at step {run.step}, {description}: {images.describe_crop(crop)}"
    print(line, flush=True)
    subject = make_run_subject(
        run,
        objective,
        source,
        crop=crop,
        batch_size=options.batch_size,
        limit=options.limit or 0,
        loading=images.make_loading(options.threads),
        folder=options.out,
    )
    return subject, min(options.limit or len(source), len(source))


def classify(
    run: Run, subject: Subject, options: argparse.Namespace, progress: Progress
) -> tuple[accuracy.Answers, list[confusion.Mistake]]:
    """(the classifier's answers, its mistakes of highest confidence)."""
    eval_inputs, params = make_eval_inputs(subject), make_state(run, subject.mesh).params
    mistakes = confusion.Mistakes(options.mistakes if options.out else 0)

    def answer() -> Iterator[accuracy.Answers]:
        for batch in progress.watch(eval_inputs["heldout"]):
            answers, used = accuracy.read_answers(eval_inputs["predict"](params, batch))
            if mistakes.limit:
                mistakes.add(batch["image"][used], answers)
            yield answers

    return accuracy.join(answer()), mistakes.kept


def is_table(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.readline().startswith(b"class,")


def write_files(folder: Path, answers: accuracy.Answers, mistakes: list[confusion.Mistake], names: list[str]) -> None:
    """Write the table of classes, the confusion matrix as a table and a picture, and the mistakes.

    Files of an earlier evaluation that this one does not write are removed.
    """
    for name in (*TABLES, *PICTURES):
        (folder / name).unlink(missing_ok=True)
    tables, pictures = {"classes.csv": confusion.classes_csv(answers, names)}, {}
    if len(names) <= confusion.MAX_CLASSES:
        matrix = confusion.confusion_matrix(answers, len(names))
        rows = ([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
        tables["confusion.csv"] = to_csv([["class", *names], *rows])
        pictures["confusion.png"] = confusion.draw_confusion(matrix, names)
    if mistakes:
        pictures["mistakes.png"] = confusion.draw_mistakes(mistakes, names)
    for name, content in tables.items():
        write_atomically(folder / name, content)
    for name, pixels in pictures.items():
        save_png(folder / name, pixels)
    print(f"{folder}: {', '.join([*tables, *pictures])}")
