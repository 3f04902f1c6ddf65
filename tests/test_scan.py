"""Blocks run by `lax.scan`: initial values, names of stacks, program size. test_encoders.py compares their outputs."""

from functools import partial

import jax
import numpy as np
import pytest

from simmim_jax.models import make_encoder
from simmim_jax.runtime.scanning import stack

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 32, 32, 3))
VIT = {"width": 16, "depth": 3, "num_heads": 2, "patch_size": 8}
SWIN = {"width": 8, "depths": (1, 5), "num_heads": (1, 2), "window": 2}


@pytest.mark.parametrize(("name", "size"), [("vit", VIT), pytest.param("swin", SWIN, marks=pytest.mark.slow)])
def test_initial_values_are_equal_to_the_bit_with_scan(name, size):
    loop, scan = (make_encoder(name, None, **size, scan=scan) for scan in (False, True))
    expected, actual = (jax.jit(encoder.init)(KEY, IMAGES)["params"] for encoder in (loop, scan))
    jax.tree.map(np.testing.assert_array_equal, actual, stack(expected, scan.scanned_layers))


def test_swin_stacks_plain_and_shifted_blocks_of_stages_with_two_pairs():
    assert make_encoder("swin", "t", scan=True).scanned_layers == {
        "stage_2_blocks_0": ("stage_2_block_0", "stage_2_block_2", "stage_2_block_4"),
        "stage_2_blocks_1": ("stage_2_block_1", "stage_2_block_3", "stage_2_block_5"),
    }
    odd = make_encoder("swin", None, **SWIN, scan=True).scanned_layers
    assert odd["stage_1_blocks_1"] == ("stage_1_block_1", "stage_1_block_3")
    assert "stage_1_block_4" not in sum(odd.values(), ())


def test_program_size_does_not_depend_on_depth_with_scan():
    """Counted in lines of the lowered program, which determine compile time."""

    def lines(depth, scan):
        encoder = make_encoder("vit", None, **{**VIT, "depth": depth}, scan=scan)
        init = partial(encoder.init, images=IMAGES)
        grad = jax.grad(lambda params: encoder.apply(params, IMAGES).sum())
        lowered = jax.jit(init).lower(KEY), jax.jit(grad).lower(jax.eval_shape(init, KEY))
        return sum(len(x.as_text().splitlines()) for x in lowered)

    assert lines(6, True) == lines(3, True)
    assert lines(6, False) > 1.4 * lines(3, False)
