"""A TFDS data set of four small PNGs with maps, made without TensorFlow or a network."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class TinyScenes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "annotation": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(4):
            truth = np.random.default_rng(i).integers(0, 6, (4, 4)).astype(np.uint8)
            yield f"{i}", {"image": png(truth[..., None].repeat(3, axis=2) * 40), "annotation": png(truth)}
