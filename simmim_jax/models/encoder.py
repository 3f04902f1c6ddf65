"""The base class of encoders: every attribute that other code reads, with its default.

Shape letters: b images, y x pixels, c channels, i j the token grid, k l the feature grid, d width.
"""

import dataclasses
import itertools

import flax.linen as nn
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError, check_minimum
from simmim_jax.models.blocks import REMAT
from simmim_jax.models.layers import MAX_TRUNCATION


class Encoder(nn.Module):
    """An image encoder in two parts, `embed` and `trunk`; `simmim_jax.models` states the contract.

    A subclass defines `embed`, `trunk`, `layer_id`, `token_stride` and `feature_stride`, and `depths` or `depth`. It
    overrides other attributes if their defaults do not fit. To make an attribute an option, a subclass annotates it: it
    is then a field. The attributes below have no annotation, so that Linen does not make them fields of every encoder.

    Options of most encoders:
      drop_path: stochastic depth rate of the last block; it grows linearly from 0 in the first.
      init_truncation: truncation of the initial normal distributions, in standard deviations of 0.02. Official code
        truncates a ViT's at one in pretraining, and all others at an absolute value of 2, which cuts nothing.
      remat: what the backward pass recomputes:
        "none"  nothing
        "dots"  everything except each block's input, convolutions, and matmuls with weights
        "full"  everything except each block's input; needs the least memory and a third more compute
      scan: run the blocks with `lax.scan`. Compile time is then the same for any depth. The parameters of equal blocks
        are stacked; `scanned_layers` lists the stacks.
      norm_epsilon: added to the variance in norms.
      dtype: dtype of the matmuls and convolutions, "float32" or "bfloat16".
    """

    # Constants of a class.
    CHOICES = {"remat": REMAT, "dtype": ("float32", "bfloat16")}  # noqa: RUF012 - field: its allowed values
    NO_DECAY = ("mask_token",)  # names of parameters without weight decay, in addition to `optim.NO_DECAY`
    NO_DECAY_KEYWORDS = ()  # the same, but in official pretraining they decay

    # Fields, or properties that follow from fields.
    depths = ()  # blocks per stage; (): one stage
    num_heads = None
    class_token = False  # whether `trunk` adds a class token and sows it as `intermediates/class_tokens`
    pretrained_windows = None  # Swin V2: windows that normalize displacements; None: no continuous position bias
    fc_norm = False  # whether a classifier normalizes after pooling, because `trunk` does not end in a norm
    norm_epsilon = 1e-6
    init_truncation = MAX_TRUNCATION
    drop_path = 0.0
    remat = "none"
    scan = False
    dtype = "float32"

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.depths)

    @property
    def stages(self) -> tuple[int, ...]:
        """The number of the last block of each stage, counted from 1."""
        return tuple(itertools.accumulate(self.depths or (self.depth,)))

    @property
    def scanned_layers(self) -> dict[str, tuple[str, ...]]:
        """{name of a stack of parameters: names of its blocks, in order}; empty if nothing is scanned."""
        return {}

    def layer_id(self, path: str) -> int:
        """The layer of a parameter, for layer-wise rates: 0 embedding, 1 to depth blocks, depth + 1 the rest."""
        raise NotImplementedError

    def no_decay(self, pretraining: bool) -> dict[str, tuple[str, ...]]:
        """Names of parameters without weight decay, by `optim.decay_rule`.

        official: as the official optimizers build their groups. Their pretraining code prefixes the keywords with
            "encoder." and looks for them inside of parameter names, where they never are: what they name decays.
        intended: what the keywords name never decays. In fine-tuning this is the official rule too.
        Source: `SimMIM.no_weight_decay_keywords` and optimizer.py of microsoft/SimMIM.
        """
        intended = (*self.NO_DECAY, *self.NO_DECAY_KEYWORDS)
        return {"official": self.NO_DECAY if pretraining else intended, "intended": intended}

    def options(self) -> dict:
        """All fields and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("parent", "name")}

    def check(self) -> None:
        """Raise ConfigError for invalid options, before anything is compiled."""
        for field, allowed in self.CHOICES.items():
            if (value := getattr(self, field)) not in allowed:
                fix = f"choose one of {', '.join(allowed)}"
                raise ConfigError(f"unknown {field} {value!r}", f"encoder.{field}", fix)
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path {self.drop_path} is not in [0, 1)", "encoder.drop_path")
        self.check_minimum("init_truncation", "norm_epsilon", strict=True)

    def check_minimum(self, *fields: str, minimum: int = 0, strict: bool = False) -> None:
        """Raise ConfigError unless these fields are at least `minimum`, or above it if `strict`."""
        for field in fields:
            check_minimum(f"encoder.{field}", getattr(self, field), minimum, strict=strict)

    def check_stages(self, *fields: str, count: int = 0) -> None:
        """Raise ConfigError unless each of these fields has a positive integer per stage.

        count: number of stages; 0: any, but the same for all fields.
        """
        values = {field: getattr(self, field) for field in fields}
        whole = all(isinstance(n, int) and n > 0 for numbers in values.values() for n in numbers)
        lengths = set(map(len, values.values()))
        if not whole or len(lengths) > 1 or 0 in lengths or (count and count not in lengths):
            what = " and ".join(f"{field} {numbers}" for field, numbers in values.items())
            where = ", ".join(f"encoder.{field}" for field in fields)
            raise ConfigError(
                what, where, "give one whole number above 0 per stage" + f", {count} in all" * bool(count)
            )

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b i j d1"]:
        raise NotImplementedError

    def trunk(
        self, tokens: Float[Array, "b i j d1"], train: bool = False, batch_index: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l d2"]:
        raise NotImplementedError

    def __call__(
        self, images: Float[Array, "b y x c"], train: bool = False, batch_index: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l d"]:
        return self.trunk(self.embed(images), train, batch_index)
