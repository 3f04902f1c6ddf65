"""Held-out masked loss and pictures of reconstructions, always of the same images under the same masks.

Shape letters: b images, y x pixels, c channels, h w pixels of the sheet.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from simmim_jax.data.pixels import Pixels
from simmim_jax.errors import DataError, check_minimum
from simmim_jax.evals.sheet import make_tile, save_png, sheet

PIXELS = Pixels()  # 8-bit RGB
COLUMNS = ("original", "masked", "prediction", "pasted")


def make_reconstruction(
    *,
    predict: Callable,
    heldout: Iterable[dict],
    spread: Callable[[int], Iterable[dict]],
    folder: str,
    pixels: Pixels = PIXELS,
    pictures: int = 8,
):
    """The evaluator of the masked loss. Metric: "masked_loss", the mean over the held-out images.

    predict(params, batch) -> "loss", "valid", "batch_index" [b], "image", "prediction" [b, y, x, c] in 0..1, and
    "mask" [b, y, x], which depends on an image's "batch_index" only.

    pictures: the number of images, spread evenly over the held-out ones, that are drawn to
    `folder`/reconstruction_<step>.png. No folder, no picture.
    """

    check_minimum("evals.reconstruction.pictures", pictures, 0)

    def run(state) -> dict[str, float]:
        outs = (predict(state.params, batch) for batch in heldout)
        losses = np.concatenate([out["loss"][out["valid"]] for out in outs])
        if not losses.size:
            raise DataError("no held-out image can be read", "config.data", "see the messages above")
        shown = {}  # by batch_index
        for batch in spread(pictures) if pictures else ():
            out = predict(state.params, batch)
            rows = zip(out["image"], out["mask"], out["prediction"], strict=True)
            shown |= {n: row for n, row, valid in zip(out["batch_index"], rows, out["valid"], strict=True) if valid}
        if shown and folder:
            path = Path(folder) / f"reconstruction_{int(state.step)}.png"
            save_png(path, draw_reconstructions([shown[batch_index] for batch_index in sorted(shown)], pixels))
        return {"masked_loss": float(losses.mean(dtype=np.float64))}

    return run


def draw_reconstructions(
    rows: Sequence[tuple[Float[np.ndarray, "y x c"], Bool[np.ndarray, "y x"], Float[np.ndarray, "y x c"]]],
    pixels: Pixels = PIXELS,
) -> UInt8[np.ndarray, "h w 3"]:
    """A sheet with a row for each (image, mask, prediction).

    Its columns: the image, its visible part, the masked part of the prediction (the rest is not trained), and both
    together. pixels: of the images, which decides the channels that are shown.
    """

    def panels(image, mask, prediction) -> tuple:
        hidden = mask[..., None]
        return (
            image,
            np.where(hidden, 0.5, image),
            np.where(hidden, prediction, 0.5),
            np.where(hidden, prediction, image),
        )

    def shown(panel):
        return panel[..., pixels.shown] if panel.shape[-1] > 3 or pixels.scale else panel

    tiles = [[make_tile(shown(panel)) for panel in panels(*row)] for row in rows]
    return sheet(tiles, titles=COLUMNS, title=pixels.caption())
