"""Segmentation of whole images of any size, by windows of the model's input size; exact for any batch size.

Shape letters: y x pixels of an image or a window, c channels, m windows, k l the grid of logits, n classes.
"""

import csv
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Integer, Num, UInt8

from simmim_jax.data.pixels import Pixels
from simmim_jax.errors import ConfigError, DataError, NonFiniteError, check_minimum, warn_once
from simmim_jax.evals.sheet import make_tile, save_png, sheet
from simmim_jax.files import write_atomically
from simmim_jax.runtime import processes

PIXELS = Pixels()  # 8-bit RGB
COLUMNS = ("image", "truth", "prediction")
TILE = 224  # pixels of the longer side of an image on the sheet
CHUNK = 2**20  # logits that are enlarged at a time, so that they stay in a core's cache
THREADS = min(4, os.cpu_count() or 1)  # threads that enlarge logits while the device computes the next windows
END = np.iinfo(np.int32).max  # stands for an index after the last


def make_windows_reader(predict: Callable, batch_size: int, shard_index: int, num_shards: int) -> Callable:
    """A function (params, windows [m, y, x, c]) -> logits [m, k, l, n], for m up to `batch_size`.

    predict(params, this process's batch) -> {"logits", "batch_index"} of all processes; all give the same windows.
    """

    def read(params, windows: Num[np.ndarray, "m y x c"]) -> Float[np.ndarray, "m k l n"]:
        count = len(windows)
        padding = np.zeros((batch_size - count, *windows.shape[1:]), windows.dtype)
        batch_index = np.arange(batch_size, dtype=np.int32)
        batch = {
            "image": np.concatenate([windows, padding]),
            "label": np.full(batch_size, -1, np.int32),
            "batch_index": batch_index,
            "valid": batch_index < count,
        }
        out = predict(params, {name: x[shard_index::num_shards] for name, x in batch.items()})
        return out["logits"][np.argsort(out["batch_index"])][:count]

    return read


def make_segmentation(
    *,
    read_windows: Callable,
    whole: Iterable[dict],
    window: tuple[int, int],
    window_batch: int,
    fill: Num[np.ndarray, " c"],
    folder: str,
    classes: tuple[str, ...] = (),
    max_bad_images: int | None = None,
    pixels: Pixels = PIXELS,
    step: int = 0,
    pictures: int = 8,
):
    """The evaluator of segmentation.

    An image is cut into overlapping windows, padded with `fill` if it is smaller. Logits are averaged where windows
    overlap and resized to the label map; the highest is the prediction. Labels from n on are no class.

    Metrics in 0..1: "miou", the mean intersection over union of the classes that occur in a map or a prediction;
    "pixel_accuracy"; "mean_accuracy", over the classes that occur in a map. "images" is their number. Writes a row for
    each class to `folder`/segmentation.csv, and some images, evenly spread, to `folder`/segmentation_<step>.png.
    No folder, no files.

    read_windows: (params, windows) -> logits, for up to `window_batch` windows of size `window`.
    whole: with a length; gives {"image" [y, x, c] as stored, "label_map" [h, w], "index"}, the index ascending. Images
        that one process lacks are left out by all.
    max_bad_images: the number of images that may be left out; None: any. step: pixels from one window to the next,
        rounded to whole logits; 0: two thirds of a window. pictures: images on the picture.

    Raises DataError if more images are left out, and NonFiniteError.
    """
    check_minimum("evals.segmentation.step", step, 0)
    check_minimum("evals.segmentation.pictures", pictures, 0)
    if step > min(window):
        what = f"step {step} leaves gaps between windows of {window}"
        raise ConfigError(what, "evals.segmentation.step", f"give {min(window)} or less")

    def run(state) -> dict[str, float]:
        counts, shown, images = np.zeros((0, 0), np.int64), [], 0
        drawn = min(pictures, len(whole)) if folder else 0
        wanted = {n * len(whole) // drawn for n in range(drawn)}
        read = partial(read_windows, state.params)
        segmented = segment_all(read, shared_records(whole), window, window_batch, fill, step)
        for record, prediction, num_classes in segmented:
            if not images:
                counts = np.zeros((num_classes, num_classes), np.int64)
            counts += count_pixels(record["label_map"], prediction, num_classes)
            if images in wanted:
                shown.append((pixels.display(record["image"]), record["label_map"], prediction))
            images += 1
        missing = len(whole) - images  # the same number in all processes
        if max_bad_images is not None and missing > max_bad_images:
            what = f"{missing} of {len(whole)} images to evaluate on cannot be used: see the messages above"
            where = f"at most {max_bad_images} may be left out"
            raise DataError(what, where, "fix them, or set max_bad_fraction higher")
        if not counts.sum():
            raise DataError("no held-out pixel has a class", "config.data", "see the messages above")
        warn_absent(counts, classes)
        measures = measure_classes(counts)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(folder) / "segmentation.csv", format_table(counts, measures, classes))
        if shown:
            save_png(Path(folder) / f"segmentation_{int(state.step)}.png", draw_segmentations(shown, len(counts)))
        present = counts.sum(axis=1) > 0
        return {
            "miou": float(np.nanmean(measures["iou"])),
            "pixel_accuracy": float(np.trace(counts) / counts.sum()),
            "mean_accuracy": float(measures["accuracy"][present].mean()),
            "images": float(images),
        }

    return run


def warn_absent(counts: Int[np.ndarray, "n n"], classes: tuple[str, ...]) -> None:
    """Warn, once, of the classes that no pixel has."""
    absent = [str(n) if n >= len(classes) else f"{n} ({classes[n]})" for n in np.flatnonzero(counts.sum(axis=1) == 0)]
    if absent and processes.is_process_0():
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        warn_once(
            f"{len(absent)} of {len(counts)} classes have no pixel in the label maps; mIoU counts them, as 0, only if"
            f" they are predicted: {', '.join(absent[:8])}{more}"
        )


def count_pixels(truth: np.ndarray, prediction: np.ndarray, num_classes: int) -> Int[np.ndarray, "n n"]:
    """The confusion matrix of the pixels that have a class: true class by row, predicted class by column."""
    valid = truth < num_classes
    pairs = truth[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def measure_classes(counts: Int[np.ndarray, "n n"]) -> dict[str, Float[np.ndarray, " n"]]:
    """ "iou" and "accuracy" of each class in 0..1, NaN if undefined."""
    hits, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return {"iou": hits / (true + predicted - hits), "accuracy": hits / true}


def format_table(counts: Int[np.ndarray, "n n"], measures: dict[str, np.ndarray], classes: tuple[str, ...]) -> str:
    """A row of CSV for each class; undefined numbers are empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("class", "name", "iou", "accuracy", "pixels", "predicted_pixels"))
    for n in range(len(counts)):
        values = [measures[name][n] for name in ("iou", "accuracy")]
        name = classes[n] if n < len(classes) else ""
        numbers = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
        writer.writerow((n, name, *numbers, counts[n].sum(), counts[:, n].sum()))
    return file.getvalue()


def shared_records(whole: Iterable[dict]) -> Iterator[dict]:
    """The records that all processes have, in order.

    Otherwise the windows of the processes would differ, and they compute these together. All processes must take
    the records at the same pace.
    """
    records = iter(whole)
    record = next(records, None)
    while True:
        own = END if record is None else int(record["index"])
        first, last = -processes.process_max(-own), processes.process_max(own)
        if first == last:
            if record is None:
                return
            yield record
        if own < last or first == last:
            record = next(records, None)


def segment_all(
    read: Callable, whole: Iterable[dict], window: tuple[int, int], window_batch: int, fill: np.ndarray, step: int = 0
) -> Iterator[tuple[dict, Int[np.ndarray, "h w"], int]]:
    """(record, its prediction, the number of classes) of each image, in order. Windows of several images share a batch.

    Threads compute predictions while the device computes the next windows.
    """
    blank = np.broadcast_to(fill, (1, *window, len(fill)))
    _, rows, columns, num_classes = read(blank).shape
    stride = window[0] // rows, window[1] // columns
    waiting = []  # (canvas, corner, pixels) of windows for the next batch
    begun, complete = deque(), deque()  # images that lack windows, and images whose predictions are being computed

    def compute() -> None:
        logits = read(np.stack([pixels for _, _, pixels in waiting]))
        if not np.isfinite(logits).all():
            raise NonFiniteError("logits are not finite", "evaluation", "lower the learning rate, in a new --workdir")
        for (canvas, corner, _), of_window in zip(waiting, logits, strict=True):
            canvas.add(corner, of_window)
        waiting.clear()

    def finish(pool: ThreadPoolExecutor, most_left: int) -> Iterator[tuple]:
        """Give complete images to the pool; yield the oldest until at most `most_left` are in it."""
        while begun and not begun[0][1].missing:
            record, canvas = begun.popleft()
            complete.append((record, pool.submit(canvas.predict, record["label_map"].shape)))
        while len(complete) > most_left:
            record, prediction = complete.popleft()
            yield record, prediction.result(), num_classes

    with ThreadPoolExecutor(THREADS) as pool:
        for record in whole:
            canvas = Canvas(record["image"].shape[:2], window, stride, step, num_classes)
            begun.append((record, canvas))
            for corner in canvas.corners:
                waiting.append((canvas, corner, cut_window(record["image"], corner, window, fill)))
                if len(waiting) == window_batch:
                    compute()
            yield from finish(pool, THREADS)
        if waiting:
            compute()
        yield from finish(pool, 0)


def cut_window(
    image: Num[np.ndarray, "y x c"], corner: tuple[int, int], window: tuple[int, int], fill: np.ndarray
) -> Num[np.ndarray, "h w c"]:
    """The window of an image from its top left `corner` on. Pixels outside the image are `fill`."""
    part = image[corner[0] : corner[0] + window[0], corner[1] : corner[1] + window[1]]
    out = np.empty((*window, image.shape[2]), image.dtype)
    out[:] = fill
    out[: part.shape[0], : part.shape[1]] = part
    return out


def corners_along(size: int, window: int, stride: int, step: int) -> list[int]:
    """The first pixels of windows along one side: every `step` pixels, in whole strides; the last reaches the end."""
    step = max(stride, (step or window * 2 // 3) // stride * stride)
    last = -(-max(size - window, 0) // stride) * stride
    return sorted({*range(0, last, step), last})


class Canvas:
    """The logits of one image, summed over its windows, one for each `stride` pixels. missing: windows to come."""

    def __init__(
        self, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], step: int, num_classes: int
    ):
        along = [corners_along(*sides, step) for sides in zip(size, window, stride, strict=True)]
        self.corners = [(top, left) for top in along[0] for left in along[1]]
        self.size, self.stride, self.missing = size, stride, len(self.corners)
        grid = [(corners[-1] + side) // each for corners, side, each in zip(along, window, stride, strict=True)]
        self.total, self.count = np.zeros((*grid, num_classes), np.float32), np.zeros((*grid, 1), np.float32)

    def add(self, corner: tuple[int, int], logits: Float[np.ndarray, "k l n"]) -> None:
        """Add the logits of the window whose top left pixel is `corner`."""
        top, left = (first // stride for first, stride in zip(corner, self.stride, strict=True))
        part = slice(top, top + logits.shape[0]), slice(left, left + logits.shape[1])
        self.total[part] += logits
        self.count[part] += 1
        self.missing -= 1

    def predict(self, shape: tuple[int, int]) -> Int[np.ndarray, "h w"]:
        """The class of each pixel of a label map of this shape: mean logits, resized bilinearly, then the highest.

        Logits completely outside the image are left out.
        """
        rows, columns = (-(-size // stride) for size, stride in zip(self.size, self.stride, strict=True))
        logits = self.total[:rows, :columns] / self.count[:rows, :columns]
        low, high, part = bilinear_taps(shape[1], self.size[1] / self.stride[1], columns)
        part = part[None, :, None]
        below, above, across = bilinear_taps(shape[0], self.size[0] / self.stride[0], rows)
        out, chunk = np.empty(shape, np.int32), max(1, CHUNK // (shape[1] * logits.shape[2]))
        for first in range(0, shape[0], chunk):
            some = slice(first, first + chunk)
            weight = across[some, None, None]
            lines = logits[below[some]] * (1 - weight) + logits[above[some]] * weight
            out[some] = (lines[:, low] * (1 - part) + lines[:, high] * part).argmax(axis=-1)
        return out


def bilinear_taps(count: int, extent: float, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first value, second value, weight of the second) of each of `count` pixels, over `extent` of `size` values.

    Values are at the centers of their units; the outermost extend to the border.
    """
    centers = np.clip((np.arange(count) + 0.5) * (extent / count) - 0.5, 0, size - 1)
    low = centers.astype(np.int64)
    return low, np.minimum(low + 1, size - 1), (centers - low).astype(np.float32)


def palette(num_classes: int) -> UInt8[np.ndarray, "n 3"]:
    """A fixed color for each class: those of PASCAL VOC, from its first object on."""
    numbers, colors = np.arange(1, num_classes + 1), np.zeros((num_classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (numbers >> channel & 1) << (7 - bit)
        numbers = numbers >> 3
    return colors.astype(np.uint8)


def paint(
    image: UInt8[np.ndarray, "h w 3"], classes: Integer[np.ndarray, "h w"], num_classes: int, opacity: float = 0.6
) -> UInt8[np.ndarray, "h w 3"]:
    """An image under the colors of its classes. Pixels without a class show the image."""
    colors = palette(num_classes)[np.minimum(classes, num_classes - 1)]
    mixed = (1 - opacity) * image + opacity * colors
    return np.where((classes < num_classes)[..., None], mixed, image).round().astype(np.uint8)


def draw_segmentations(
    rows: list[tuple[UInt8[np.ndarray, "_ _ _"], np.ndarray, np.ndarray]], num_classes: int
) -> UInt8[np.ndarray, "y x 3"]:
    """A sheet with a row for each (image, truth, prediction). The maps may differ from the image in size."""
    tiles = []
    for image, *maps in rows:
        tile = make_tile(image, min_side=TILE, max_side=TILE)
        painted = [paint(tile, resize_map(each, tile.shape[:2]), num_classes) for each in maps]
        tiles.append([tile, *painted])
    return sheet(tiles, titles=COLUMNS)


def resize_map(classes: Integer[np.ndarray, "y x"], size: tuple[int, int]) -> Integer[np.ndarray, "h w"]:
    """A map of `size` by nearest neighbor."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, classes.shape, strict=True))
    return classes[rows[:, None], columns]
