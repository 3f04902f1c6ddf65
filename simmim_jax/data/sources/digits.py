"""scikit-learn's handwritten digits, which need no download."""

import hashlib

import numpy as np

from simmim_jax.data.sources.splits import EVALUATION
from simmim_jax.errors import ConfigError


def make_digits(*, split: str, **_) -> "Digits":
    """The digits of one split: "train", or the test split by any of its names."""
    if split not in ("train", *EVALUATION):
        raise ConfigError(f"digits has no split {split!r}", "data.split", "choose one of train, test")
    return Digits("train" if split == "train" else "test")


class Digits:
    """scikit-learn's digits, 8 x 8 gray, in a fixed random split: 1,437 to train on and 360 to test on."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        digits = load_digits()
        # the file is sorted by class in cycles; the stream of RandomState is frozen, unlike that of default_rng
        order = np.random.RandomState(0).permutation(len(digits.images))
        self.split, self.order = split, order[:1437] if split == "train" else order[1437:]
        self.images = np.round(digits.images[self.order] * (255 / 16)).astype(np.uint8)[..., None]  # n h w 1
        self.labels = digits.target[self.order]
        self.classes = tuple(str(label) for label in digits.target_names)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        return {"image": self.images[i], "label": int(self.labels[i]), "name": self.name(i)}

    def name(self, i: int) -> str:
        return f"digits/{self.order[i]}"

    def describe(self) -> str:
        return f"digits, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        digest = hashlib.sha256(self.images.tobytes() + self.labels.astype(np.int32).tobytes()).hexdigest()
        return {"source": "digits", "split": self.split, "count": len(self), "images_sha256": digest}
