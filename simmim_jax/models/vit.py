"""Vision Transformer as in official SimMIM: BEiT's, with all of its options.

Shape letters: b images, i and j the token grid, n tokens of one image (class token included), d width, h heads.
Source: microsoft/SimMIM models/vision_transformer.py; the paper's section 4.1 and appendix.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from simmim_jax.errors import ConfigError
from simmim_jax.models.attention import (
    ATTENTION,
    QueryKeyValue,
    attend_by_cudnn,
    attend_by_xla,
    choose_attention,
    cudnn_padding,
)
from simmim_jax.models.blocks import REMAT, Blocks, Drop, drop_path, drops, run_blocks
from simmim_jax.models.encoder import Encoder
from simmim_jax.models.layers import (
    LayerNorm,
    LayerScale,
    Linear,
    Mlp,
    RelativePositionBias,
    check_heads,
    patch_convolution,
    truncated_normal,
)

SIZES = {
    "ti": {"width": 192, "depth": 12, "num_heads": 3},
    "s": {"width": 384, "depth": 12, "num_heads": 6},
    "b": {"width": 768, "depth": 12, "num_heads": 12},
    "l": {"width": 1024, "depth": 24, "num_heads": 16},
    "h": {"width": 1280, "depth": 32, "num_heads": 16},
}


def sincos_position(grid: tuple[int, int], width: int, class_token: bool) -> Float[np.ndarray, "n d"]:
    """Fixed 2-D sine and cosine embedding: half of the channels encode the column, half the row (MAE, arXiv
    2111.06377).

    With a class token, its row comes first and is zero.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return np.pad(table, ((int(class_token), 0), (0, 0))).astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention. qkv_bias: biases on queries and values ("qv"), on all three ("qkv"), or "none"."""

    num_heads: int
    qkv_bias: str
    form: str
    recompute: bool
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], bias: Float[Array, "h n n"] | None) -> Float[Array, "b n d"]:
        tokens, width = x.shape[1:]
        initial, head_width = truncated_normal(self.init_truncation), width // self.num_heads
        cudnn = choose_attention(self.form, self.dtype, head_width) == "cudnn"
        if cudnn and (more := cudnn_padding(tokens)):
            x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
        query, key, value = QueryKeyValue(self.num_heads, self.qkv_bias == "qkv", self.dtype, initial, name="qkv")(x)
        if self.qkv_bias == "qv":  # a bias on the keys shifts all logits of a query equally, so softmax ignores it
            query += self.param("q_bias", nn.initializers.zeros, (self.num_heads, head_width)).astype(query.dtype)
            value += self.param("v_bias", nn.initializers.zeros, (self.num_heads, head_width)).astype(value.dtype)
        if cudnn:
            x = attend_by_cudnn(query, key, value, bias, tokens)
        else:
            x = attend_by_xla(query, key, value, bias, recompute=self.recompute)
        x = Linear(width, self.dtype, initial, axes=2, name="proj")(x)
        return x[:, :tokens].astype(jnp.float32)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with LayerScale and stochastic depth."""

    num_heads: int
    mlp_ratio: float
    qkv_bias: str
    per_block_bias: bool
    class_token: bool
    attention: str
    recompute: bool
    layer_scale: float
    norm_epsilon: float
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], drop: Drop | None, bias: Float[Array, "h n n"] | None, grid: tuple[int, int]
    ) -> Float[Array, "b n d"]:
        def scale(branch, name):
            return LayerScale(self.layer_scale, name=name)(branch) if self.layer_scale else branch

        if self.per_block_bias:
            bias = RelativePositionBias(self.num_heads, self.class_token, name="rel_pos_bias")(grid)
        attention = Attention(
            self.num_heads, self.qkv_bias, self.attention, self.recompute, self.init_truncation, self.dtype, name="attn"
        )
        branch = attention(LayerNorm(self.norm_epsilon, name="norm1")(x), bias)
        x += drop_path(scale(branch, "scale_attn"), drop, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.init_truncation, self.dtype, name="mlp")
        branch = mlp(LayerNorm(self.norm_epsilon, name="norm2")(x))
        return x + drop_path(scale(branch, "scale_mlp"), drop, 1)


def rescale(params: PyTree, number: Int[Array, ""]) -> PyTree:
    """A block's initial parameters with the last kernel of both branches divided by sqrt(2 * (number + 1)).

    Official `fix_init_weight`. `number` counts from 0.
    """
    factor = jax.lax.rsqrt(2.0 * (number + 1))
    last = (("attn", "proj"), ("mlp", "fc2"))

    def one(path, leaf):
        *module, name = (key.key for key in path)
        return leaf * factor if name == "kernel" and tuple(module) in last else leaf

    return jax.tree.map_with_path(one, params)


class ViT(Encoder):
    """A plain Vision Transformer (contract: `simmim_jax.models`).

    width: channels of a token, a multiple of num_heads.
    patch_size: side of a patch in pixels; both strides.
    class_token: whether a learned token is added to the patches. Features never contain it.
    num_registers: number of learned tokens that only take part in attention (Darcet et al. 2024, arXiv 2309.16588).
    absolute_position: "none", "learned", or "sincos" (fixed); added to the patches.
    class_position: whether the class token has an absolute position too; not in DeiT III and models with registers of
        timm (`no_embed_class`). Registers have none.
    relative_position: "none", "shared" (one table for all blocks), or "per_block".
    qkv_bias: "qv" (official), "qkv" (timm), or "none".
    layer_scale: initial value of LayerScale; 0 disables it.
    final_norm: LayerNorm after the last block, as in the released pretraining.
    init_truncation: 1 in SimMIM pretraining, none (6) elsewhere.
    remat: also "attention": recompute the logits and weights of attention, which cuDNN never keeps.
    attention: "auto", "xla" or "cudnn" (see `models.attention`). cuDNN takes a relative position bias in bfloat16.
    """

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    class_token: bool = True
    num_registers: int = 0
    absolute_position: str = "none"
    class_position: bool = True
    relative_position: str = "shared"
    qkv_bias: str = "qv"
    layer_scale: float = 0.1
    drop_path: float = 0.0
    final_norm: bool = True
    norm_epsilon: float = 1e-6
    init_truncation: float = 1.0
    remat: str = "none"
    scan: bool = False
    attention: str = "auto"
    dtype: str = "float32"

    CHOICES = {  # noqa: RUF012
        **Encoder.CHOICES,
        "absolute_position": ("none", "learned", "sincos"),
        "relative_position": ("none", "shared", "per_block"),
        "qkv_bias": ("qv", "qkv", "none"),
        "remat": (*REMAT, "attention"),
        "attention": ATTENTION,
    }

    NO_DECAY = ()  # the official ViT excludes only cls_token and pos_embed (microsoft/SimMIM#26)

    def check(self) -> None:
        super().check()
        self.check_minimum("width", "depth", "num_heads", "patch_size", minimum=1)
        check_heads(self.width, self.num_heads, "encoder.width")
        if self.absolute_position == "sincos" and self.width % 4:
            raise ConfigError(f"sincos positions with width {self.width}", "encoder.width", "give a multiple of 4")
        self.check_minimum("mlp_ratio", strict=True)
        self.check_minimum("layer_scale", "num_registers")
        if self.num_registers and self.relative_position != "none":
            what = f"{self.num_registers} registers with relative positions, which are not defined for them"
            raise ConfigError(what, "encoder.num_registers", "give --config.encoder.relative_position=none")

    @property
    def fc_norm(self) -> bool:
        return not self.final_norm

    @property
    def token_stride(self) -> int:
        return self.patch_size

    @property
    def feature_stride(self) -> int:
        return self.patch_size

    @property
    def scanned_layers(self) -> dict[str, tuple[str, ...]]:
        return {"blocks": self._blocks()} if self.scan else {}

    def _blocks(self) -> tuple[str, ...]:
        return tuple(f"block_{n}" for n in range(self.depth))

    def layer_id(self, path: str) -> int:
        """Official `get_vit_layer`."""
        if block := re.match(r"block_(\d+)/", path):
            return int(block.group(1)) + 1
        first = path.startswith(("cls_token", "pos_embed", "patch_embed", "registers"))
        return 0 if first else self.depth + 1

    def setup(self):
        self.patch_embed = patch_convolution(self.width, self.patch_size, self.dtype, self.init_truncation)

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b i j d"]:
        """One token per patch: a linear map of its normalized pixels."""
        return self.patch_embed(images).astype(jnp.float32)

    def _with_positions(self, x: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b n d"]:
        """x plus the absolute position embedding, whose first row is the class token's if x has one."""
        if self.absolute_position == "learned":
            return x + self.param("pos_embed", truncated_normal(self.init_truncation), x.shape[1:])
        if self.absolute_position == "sincos":
            return x + sincos_position(grid, x.shape[-1], x.shape[1] > grid[0] * grid[1])
        return x

    @nn.compact
    def trunk(
        self, tokens: Float[Array, "b i j d"], train: bool = False, batch_index: Int[Array, " b"] | None = None
    ) -> Float[Array, "b i j d"]:
        """The features of the patches. Block outputs are sown as `intermediates/blocks`, before the final norm.

        With a class token, those of the blocks and of the output are sown as `intermediates/class_tokens`.
        """
        b, i, j, d = tokens.shape
        x = tokens.reshape(b, i * j, d)  # b n d
        initial = truncated_normal(self.init_truncation)
        if not self.class_position:
            x = self._with_positions(x, (i, j))
        if self.class_token:
            token = self.param("cls_token", initial, (d,))
            x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, d)), x], axis=1)
        if self.class_position:
            x = self._with_positions(x, (i, j))
        if self.num_registers:
            registers = self.param("registers", initial, (self.num_registers, d))
            parts = jnp.split(x, [int(self.class_token)], axis=1)
            x = jnp.concatenate([parts[0], jnp.broadcast_to(registers, (b, *registers.shape)), parts[1]], axis=1)
        bias = None
        if self.relative_position == "shared":
            bias = RelativePositionBias(self.num_heads, self.class_token, name="rel_pos_bias")((i, j))

        def to_map(x):
            return x[:, int(self.class_token) + self.num_registers :].reshape(b, i, j, d)

        def sow_fn(x):
            return {"blocks": to_map(x)} | ({"class_tokens": x[:, 0]} if self.class_token else {})

        block = Block(
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            per_block_bias=self.relative_position == "per_block",
            class_token=self.class_token,
            attention=self.attention,
            recompute=self.remat == "attention",
            layer_scale=self.layer_scale,
            norm_epsilon=self.norm_epsilon,
            init_truncation=self.init_truncation,
            dtype=self.dtype,
            parent=None,
        )
        blocks = Blocks(
            (block,),
            self._blocks(),
            scanned_layers=tuple(self.scanned_layers),
            args=(bias, (i, j)),
            init_fn=rescale,
            sow_fn=sow_fn,
        )
        key = self.make_rng("params") if self.is_initializing() else None
        x = run_blocks(self, x, blocks, key=key, drop=drops(self, train, batch_index, x))
        if self.final_norm:
            x = LayerNorm(self.norm_epsilon, name="norm")(x)
        if self.class_token:
            self.sow("intermediates", "class_tokens", x[:, 0])
        return to_map(x)
