"""Held-out masked loss, and pictures of what the model sees: always the same images under the same masks."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from simmim_jax.errors import DataError, check_minimum

COLUMNS = ("original", "masked", "prediction", "pasted")


def make_reconstruction(
    *,
    predict: Callable,
    heldout: Iterable[dict],
    spread: Callable[[int], Iterable[dict]],
    folder: str,
    pictures: int = 8,
):
    """predict(params, batch) -> "loss", "valid", "batch_index" [b], "image", "prediction" [b, y, x, c], "mask" [b, y, x].

    Images and predictions are in 0..1; masks depend on an image's "batch_index" alone. Metric: "masked_loss", the mean
    over the held-out images. As many as `pictures` (0: none), spread evenly over them, are drawn to
    `folder`/reconstruction_<step>.png; no `folder`, no picture.
    """

    check_minimum("evals.reconstruction.pictures", pictures, 0)

    def run(state) -> dict[str, float]:
        outs = (predict(state.params, batch) for batch in heldout)
        losses = np.concatenate([out["loss"][out["valid"]] for out in outs])
        if not losses.size:
            raise DataError("none of the held-out images could be read", "config.data", "look at what is said of each")
        shown = {}  # by batch_index
        for batch in spread(pictures) if pictures else ():
            out = predict(state.params, batch)
            rows = zip(out["image"], out["mask"], out["prediction"], strict=True)
            shown |= {p: row for p, row, valid in zip(out["batch_index"], rows, out["valid"], strict=True) if valid}
        if shown and folder:
            path = Path(folder) / f"reconstruction_{int(state.step)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw([shown[batch_index] for batch_index in sorted(shown)])).save(path)
        return {"masked_loss": float(losses.mean(dtype=np.float64))}

    return run


def draw(
    rows: list[tuple[Float[np.ndarray, "y x c"], Bool[np.ndarray, "y x"], Float[np.ndarray, "y x c"]]],
) -> UInt8[np.ndarray, "h w 3"]:
    """A sheet with a row for each (image, mask, prediction): the image, its visible part, the prediction, and the
    prediction with only its hidden part, pasted into the visible part. Small images are enlarged, pixel by pixel."""
    height, width = rows[0][1].shape
    scale = max(1, -(-96 // min(height, width)))
    gap, header = 4, 16
    sheet = Image.new("RGB", (4 * (width * scale + gap) + gap, header + len(rows) * (height * scale + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(COLUMNS):
        pen.text((gap + column * (width * scale + gap), 2), title, fill="black")
    for line, (image, mask, prediction) in enumerate(rows):
        hidden = mask[..., None]
        panels = (image, np.where(hidden, 0.5, image), prediction, np.where(hidden, prediction, image))
        for column, panel in enumerate(panels):
            pixels = np.round(to_rgb(panel) * 255).astype(np.uint8)
            tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (width * scale + gap), header + line * (height * scale + gap)))
    return np.asarray(sheet)


def to_rgb(image: Float[np.ndarray, "y x c"]) -> Float[np.ndarray, "y x 3"]:
    """Three channels of any number: the first three, or the first one as gray."""
    return image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
