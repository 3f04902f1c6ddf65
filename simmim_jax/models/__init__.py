"""Encoders: with what an image becomes features.

The contract. An encoder is a `flax.linen` module with

    embed(images) -> tokens                    [b, i, j, c]: one for each `token_stride` x `token_stride` pixels
    trunk(tokens, train, batch_index) -> features [b, k, l, d]: one for each `feature_stride` x `feature_stride` pixels
    check()                                    raises ConfigError for options that cannot work
    layer_id(path) -> layer                    of a parameter: 0 what embeds, 1 to depth the blocks, depth + 1 the rest
    token_stride, feature_stride, depth        pixels, pixels, number of blocks
    stages                                     the blocks, from 1 on, that end its stages; each halves the map
    init_truncation                            where the normal that tokens start from is cut, in standard deviations
    fc_norm                                  whether a classifier norms what it pools, as the map itself is not normed
    DECAYED_TOO                                names that official code decays of this encoder, though of no other
    stacks                                     where blocks are scanned, {a stack of parameters: its blocks, in order}
    remat                                      by name, what of its blocks the backward pass computes again

and `encoder(images, train, batch_index)` is the two in turn. `batch_index` [b] is each image's place in the whole batch, by
which stochastic depth draws from the rng stream "drop_path" while `train` is true (None: 0, 1, 2, ...). Images are
normalized float32, channels last; tokens and features are float32 whatever the dtype of the matmuls. `trunk` sows each
block's output [b, k, l, d] as `intermediates/blocks`, which probes read and training ignores; one with a class token,
that of each block and of the output, [b, d], as `intermediates/class_tokens`. Masked image modeling
replaces tokens between `embed` and `trunk`: what depends on batch_index, or mixes pixels of different tokens, must come
after, in `trunk`, so that nothing of a hidden pixel reaches a feature.

Blocks are modules that `blocks.run_blocks` calls as functions of their parameters: one after another, each with
parameters of its own name, like "block_3/attn/qkv/kernel"; or, with `scan`, by `lax.scan` over a stack of them, like
"blocks/attn/qkv/kernel" with a first axis for the blocks. Initial values, draws and what is sown are the same.

Batch norm's running mean and variance are parameters, named "mean" and "var": they are saved, placed and exchanged as
such, and get no gradient. While `train` is true and the collection "batch_stats" is mutable, an encoder puts their new
values there, under the same paths, and the training step writes them over the old.

A new encoder is one file with its `SIZES`, and one line in `ENCODERS`.
"""

import dataclasses

import flax.linen as nn

from simmim_jax.errors import choose
from simmim_jax.models import convnext, resnet, swin, swinv2, vit

ENCODERS = {
    "convnext": (convnext.ConvNeXt, convnext.SIZES),
    "resnet": (resnet.ResNet, resnet.SIZES),
    "swin": (swin.Swin, swin.SIZES),
    "swinv2": (swinv2.SwinV2, swinv2.SIZES),
    "vit": (vit.ViT, vit.SIZES),
}


def make_encoder(name: str, size: str | None, **options) -> nn.Module:
    """The encoder `name` of a `size` of its table; `options` override the size's own numbers, field by field.

    An option that is None is not given. A size that is None leaves all to the options and the class.
    Raises ConfigError for an unknown name, size or option, with the nearest that exist.
    """
    encoder_class, sizes = choose("encoder", name, ENCODERS)
    fields = {field.name for field in dataclasses.fields(encoder_class)} - {"parent", "name"}
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        choose(f"option of {name}", option, fields)
    of_size = {} if size is None else choose(f"size of {name}", size, sizes)
    given = {option: tuple(value) if isinstance(value, list) else value for option, value in given.items()}
    heads = given.get("num_heads")
    if isinstance(encoder_class.num_heads, int) and isinstance(heads, tuple) and len(heads) == 1:
        given["num_heads"] = heads[0]  # configs have one type for this field: a tuple with a number per stage
    encoder = encoder_class(**{**of_size, **given})
    encoder.check()
    return encoder
