"""Random masking, the strategy of SimMIM: every choice of patches is equally likely."""

import math

import jax
from jaxtyping import Array, Bool, Key


def mask_random(key: Key[Array, ""], grid: tuple[int, int], count: int, context: None) -> Bool[Array, "i j"]:
    """Paper section 3.1, "random masking"; official data/data_simmim.py, `MaskGenerator`."""
    rank = jax.random.permutation(key, math.prod(grid))
    return (rank < count).reshape(grid)
