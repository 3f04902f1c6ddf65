"""A TFDS data set of twelve small PNGs, made without TensorFlow or a network; TFDS must be able to import it."""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from source_files import png

CLASSES = ("dark", "light")


class TinyShades(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((6, 5, 3), 20 * i, np.uint8)).save(file, "PNG")
            yield f"{i:03}", {"image": file.getvalue(), "label": CLASSES[i % 2]}


class TinySplits(tfds.core.GeneratorBasedBuilder):
    """Images of one shade with labels, in the splits of `SPLITS`: {split: [(shade, label or ""), ...]}."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS: ClassVar[dict] = {}
    NAMES: ClassVar[list] = []

    def _info(self):
        label = tfds.features.ClassLabel(names=self.NAMES)
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, download_manager):
        return {split: self._generate_examples(records) for split, records in self.SPLITS.items()}

    def _generate_examples(self, records):
        for shade, label in records:
            yield shade, {"image": io.BytesIO(png(shade)), "label": label or -1}
