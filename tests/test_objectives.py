"""Laws that every objective in the registry obeys. A new objective needs one line in `OPTIONS`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PIXELS, tiny_batch, tiny_encoder

from simmim_jax.errors import ConfigError
from simmim_jax.evals import EVALUATORS
from simmim_jax.objectives import OBJECTIVES, make_objective
from simmim_jax.train_step import mean_grads

KEY = jax.random.key(0)
OPTIONS = {
    "classify": {"num_classes": 5},
    "segment": {"num_classes": 5},
    "simmim": {"mask_patch_size": 16, "mask_ratio": 0.5},
}
BATCH = tiny_batch(8) | {"label_map": jnp.asarray(np.random.default_rng(0).integers(0, 6, (8, 32, 32), np.uint8))}
BATCH |= {"label": BATCH["label"] % 5}


@pytest.fixture(scope="module", params=sorted(OBJECTIVES))
def objective(request):
    encoder = tiny_encoder(width=16, depth=1, drop_path=0.0)
    return make_objective(request.param, encoder, **PIXELS, **OPTIONS[request.param])


@pytest.fixture(scope="module")
def params(objective):
    return jax.jit(objective.init)(KEY)


def inputs(objective, batch=BATCH):
    """Only the entries that the objective declares."""
    return {name: batch[name] for name in (*objective.needs, "batch_index")}


def test_parameters_are_float32_and_include_the_encoder(params):
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert params["encoder"]


def test_loss_reads_needs_only_and_does_not_depend_on_microbatches(objective, params):
    batch = objective.prepare(inputs(objective))
    grads = partial(mean_grads, key=KEY, loss_fn=objective.loss_fn)
    whole, parts = (jax.jit(partial(grads, microbatches=count))(params, batch) for count in (1, 4))
    loss, metrics, gradient = whole
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert {(x.shape, x.dtype) for x in jax.tree.leaves(metrics)} <= {((), jnp.dtype("float32"))}
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((loss, gradient)))
    for part in gradient.values():
        assert max(jnp.abs(x).max() for x in jax.tree.leaves(part)) > 0
    np.testing.assert_allclose(parts[0], loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), parts[2], gradient)


def test_predict_gives_outputs_for_each_image_from_the_image_only(objective, params):
    out = jax.eval_shape(objective.predict, params, {name: BATCH[name] for name in ("image", "batch_index")}, KEY)
    assert set(out) == set(objective.outputs)
    assert {x.shape[0] for x in out.values()} == {8}


def test_facts_are_consistent(objective):
    assert "image" in objective.needs
    assert set(objective.needs) <= {"image", "label", "label_map"}
    assert bool(objective.num_classes) == bool({"label", "label_map"} & set(objective.needs))
    assert set(objective.online_probes) <= set(objective.evals) <= set(EVALUATORS)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ConfigError, match="did you mean simmim"):
        make_objective("simmin", tiny_encoder(), **PIXELS)
    for name, options in OPTIONS.items():
        with pytest.raises(ConfigError, match="masc"):
            make_objective(name, tiny_encoder(), **PIXELS, **options, masc="random")
