"""Encoders: the networks that turn images into features.

An encoder is a subclass of `encoder.Encoder`, a Linen module in two parts:

    embed(images) -> tokens                        [b, i, j, c1], one token per `token_stride` pixels
    trunk(tokens, train, batch_index) -> features  [b, k, l, c2], one feature per `feature_stride` pixels

`encoder(images, train, batch_index)` applies both. The base class declares all other attributes, with defaults.

Images are normalized float32, channels last. The strides must divide the image size. The number of channels is free.
Tokens and features are float32; only matmuls and convolutions run in `dtype`.

Masked image modeling replaces tokens between `embed` and `trunk`. Position embeddings, and every operation that mixes
pixels of different tokens, must therefore be in `trunk`. Then masked pixels have no influence on features.

Stochastic depth is active if `train` is true. It draws from the rng stream "drop_path", for each image by its
`batch_index` [b] in the global batch; None means 0, 1, 2, ....

`trunk` sows each block's output [b, k, l, d] as `intermediates/blocks`, for probes. An encoder with a class token also
sows the class token of each block and of the output [b, d] as `intermediates/class_tokens`.

`blocks.run_blocks` runs the blocks. In a loop, the parameters of each block have their own name, like
"block_3/attn/qkv/kernel". With `scan`, `lax.scan` runs over stacked parameters, like "blocks/attn/qkv/kernel", with the
blocks along the first axis. Both give the same initial values, random draws and sown outputs.

The running mean and variance of batch norm are parameters, named "mean" and "var". They are saved, sharded and
converted like the others, and have no gradient. If `train` is true and the collection "batch_stats" is mutable, an
encoder writes their new values to it under the same paths. The training step then replaces the old values.

To add an encoder, write one file with its `SIZES`, and add one line to `ENCODERS`.
"""

import dataclasses

from simmim_jax.errors import choose
from simmim_jax.models import convnext, resnet, swin, swinv2, vit
from simmim_jax.models.encoder import Encoder

ENCODERS = {  # name: (class, sizes)
    "convnext": (convnext.ConvNeXt, convnext.SIZES),
    "resnet": (resnet.ResNet, resnet.SIZES),
    "swin": (swin.Swin, swin.SIZES),
    "swinv2": (swinv2.SwinV2, swinv2.SIZES),
    "vit": (vit.ViT, vit.SIZES),
}


def make_encoder(name: str, size: str | None, **options) -> Encoder:
    """The encoder `name` with the fields of `size` in its `SIZES`. `options` override these fields.

    An option that is None is ignored. If the size is None, only the options and the class defaults are used.
    Raises ConfigError for an unknown name, size or option, with the nearest valid one, and for invalid values.
    """
    encoder_class, sizes = choose("encoder", name, ENCODERS)
    fields = {field.name for field in dataclasses.fields(encoder_class)} - {"parent", "name"}
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        choose(f"option of {name}", option, fields)
    defaults = {} if size is None else choose(f"size of {name}", size, sizes)
    given = {option: tuple(value) if isinstance(value, list) else value for option, value in given.items()}
    heads = given.get("num_heads")
    if isinstance(encoder_class.num_heads, int) and isinstance(heads, tuple) and len(heads) == 1:
        given["num_heads"] = heads[0]  # in configs this field is always a tuple, with a number per stage
    encoder = encoder_class(**{**defaults, **given})
    encoder.check()
    return encoder
