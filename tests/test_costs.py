"""costs: operations, memory and communication are counted, to the number, of programs whose costs are known."""

import importlib
import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simmim_jax import optim
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.runtime import sharding
from simmim_jax.runtime.costs import collectives, devices, flops
from simmim_jax.runtime.costs.collectives import Collective
from tests.tiny import PIXELS, tiny_batch, tiny_encoder, tiny_objective

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8**3  # operations of a product of two of these


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
    spec = importlib.util.spec_from_file_location("bench_step", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


def repeat(times, function, x):
    return jax.lax.scan(lambda y, _: (function(y), None), x, length=times)[0]


FUNCTIONS = {
    "a product": (lambda x: x @ x, 1),
    "jit": (jax.jit(lambda x: x @ x), 1),
    "remat": (jax.checkpoint(lambda x: x @ x), 1),
    "custom_vjp": (squared, 1),
    "custom_jvp": (jax.nn.relu, 0),
    "scan": (lambda x: jax.lax.scan(lambda c, _: (c @ x, c @ c), x, length=5)[0], 10),
    "nested scans": (lambda x: repeat(3, lambda y: repeat(2, lambda z: z @ z, y), x), 6),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y @ y @ y, x), 2),
    "while, whose turns nobody knows": (lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x), 1),
    "elementwise": (lambda x: jnp.sin(x) + x, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_count_as_often_as_they_run(name):
    function, products = FUNCTIONS[name]
    assert flops.matmul_flops(function, SQUARE) == products * ONE


def test_a_convolution_counts_its_sums_and_a_batched_product_its_batch():
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID")
    images, kernel = spec(2, 3, 8, 8), spec(5, 3, 2, 2)
    assert flops.matmul_flops(convolve, images, kernel) == 2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)
    assert flops.matmul_flops(jnp.matmul, spec(3, 4, 5), spec(3, 5, 6)) == 2 * 3 * 4 * 5 * 6


def test_products_on_each_device_of_a_shard_map_all_count():
    mesh = sharding.make_mesh()
    split = PartitionSpec("data")
    function = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=split, out_specs=split)
    assert flops.matmul_flops(function, spec(16, 8)) == 8 * 2 * (2 * 2) * 8


def attention_without_a_gpu(monkeypatch):
    """Let cuDNN's attention be traced: that there is a GPU for it is all that is pretended."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91900)
    for name in ("check_compute_capability", "is_cuda_compute_capability_in_range"):
        monkeypatch.setattr(module, name, lambda *_, **__: True, raising=False)


def test_attention_in_one_call_of_cudnn_counts_as_its_two_products(monkeypatch):
    attention_without_a_gpu(monkeypatch)
    query, key = spec(2, 5, 3, 64, dtype=jnp.bfloat16), spec(2, 7, 3, 64, dtype=jnp.bfloat16)
    counts = []
    for form in ("xla", "cudnn"):
        attend = partial(jax.nn.dot_product_attention, implementation=form)
        loss = lambda p, x, *_, attend=attend: (attend(p, x, x).sum(), {})  # noqa: E731
        counts.append((flops.matmul_flops(attend, query, key, key), flops.step_flops(loss, query, key, 0)))
    assert counts[0] == counts[1]
    assert counts[1][0] == 2 * 2 * (2 * 3 * 5 * 7 * 64)


def two_layers(params, x, key, train):
    hidden = jnp.tanh(x @ params["first"])
    return (hidden @ params["second"]).sum(), {"unused": (hidden @ hidden.T).sum()}


LAYERS = {"first": spec(16, 32), "second": spec(32, 8)}
FIRST, SECOND = 2 * 4 * 16 * 32, 2 * 4 * 32 * 8


@pytest.mark.parametrize(
    ("frozen", "operations"),
    [
        ("", 2 * FIRST + 3 * SECOND),  # no gradient of the batch
        ("first", FIRST + 2 * SECOND),
        ("second", 2 * FIRST + 2 * SECOND),
        (".*", FIRST + SECOND),
    ],
)
@pytest.mark.parametrize("rematted", [False, True])
def test_a_step_counts_each_gradient_that_is_needed_once(frozen, operations, rematted):
    loss_fn = jax.checkpoint(two_layers, static_argnums=3) if rematted else two_layers
    loss_fn = optim.freeze(loss_fn, optim.make_frozen(frozen))
    assert flops.step_flops(loss_fn, LAYERS, spec(4, 16), jax.random.key(0)) == operations


def test_a_carry_that_a_later_turn_makes_depend_on_a_parameter_counts_in_all():
    def loss_fn(weight, x, key, train):
        turn = lambda c, _: ((c[1], c[0] @ weight), None)  # noqa: E731
        return jax.lax.scan(turn, (x, x), length=3)[0][0].sum(), {}

    # Of c @ weight always the gradient of weight, and of c, which the body takes to depend on it.
    assert flops.step_flops(loss_fn, SQUARE, SQUARE, 0) == 3 * ONE + 3 * 2 * ONE


@pytest.mark.parametrize(
    ("family", "size", "side", "image"), [("vit", "ti", "official", 224), ("swin", "t", "official", 192)]
)
@pytest.mark.parametrize("options", [{}, {"remat": "full"}, {"remat": "dots", "scan": True}], ids=str)
def test_a_models_step_counts_as_the_formula_of_the_benchmark_has_it(bench, family, size, side, image, options):
    of_family = bench.FAMILIES[family]
    encoder = make_encoder(family, size, **of_family.ours[side], **of_family.fitted(image), **options)
    objective = make_objective("simmim", encoder, image_size=(image, image), mean=bench.MEAN, std=bench.STD)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    integers = spec(2, dtype=jnp.int32)
    batch = {"image": spec(2, image, image, 3, dtype=jnp.uint8), "label": integers, "batch_index": integers}
    shape = {name: getattr(encoder, name) for name in of_family.shape}
    of_images = 2 * 2 * 3 * image**2 * shape["width"]  # the formula counts a gradient that nobody needs
    counted = flops.step_flops(objective.loss_fn, params, batch, jax.random.key(0))
    assert counted == bench.step_flops(family, image, shape, 2) - of_images


def test_a_linear_probe_costs_the_forward_pass_of_the_blocks_that_it_reads_and_its_head_twice():
    batch, key = tiny_batch(), jax.random.key(0)

    def probe(depth: int) -> int:
        options = {"num_classes": 10, "block": 1, "fc_norm": False, "train_encoder": False}
        objective = make_objective("classify", tiny_encoder(depth=depth), **PIXELS, **options)
        loss_fn = optim.freeze(objective.loss_fn, optim.make_frozen("encoder/"))
        return flops.step_flops(loss_fn, jax.eval_shape(objective.init, key), batch, key)

    encoder = tiny_encoder(depth=1)
    images = spec(16, 32, 32, 3)
    params = jax.eval_shape(encoder.init, key, images)
    forward = flops.matmul_flops(encoder.apply, params, images)
    assert probe(1) == probe(3) == forward + 2 * (2 * 16 * 32 * 10)


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"), ("NVIDIA B200", "b200"),
        ("Tesla V100-SXM2-16GB", "v100-16"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("TPU v3", "tpu-v3"),
        ("TPU v4", "tpu-v4"), ("TPU v5 lite", "tpu-v5e"), ("TPU v5e", "tpu-v5e"), ("TPU v5", "tpu-v5p"),
        ("TPU v5p", "tpu-v5p"), ("TPU v6 lite", "tpu-v6e"), ("TPU v6e", "tpu-v6e"),
    ],
)  # fmt: skip
def test_devices_are_known_by_what_jax_calls_them(device_kind, name):
    assert devices.find_kind(device_kind) is devices.KINDS[name]


@pytest.mark.parametrize(
    "device_kind", ["cpu", "NVIDIA H100 NVL", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""]
)
def test_a_device_that_is_only_alike_is_not_known(device_kind):
    assert devices.find_kind(device_kind) is None


def test_a_known_device_has_its_published_peak_by_type_and_another_is_measured(monkeypatch):
    device = jax.devices()[0]
    assert 1e8 < devices.peak_flops(device, "float32") < 1e14
    monkeypatch.setattr(devices, "find_kind", lambda _: devices.KINDS["h100"])
    assert devices.peak_flops(device, "bfloat16") == 989.4e12
    assert devices.peak_flops(device, "float32") == 494.7e12


def test_memory_is_of_one_device_and_counts_a_donated_argument_once():
    place = NamedSharding(sharding.make_mesh(), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=place)
    kept = jax.jit(lambda x: x + 1, out_shardings=place).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, out_shardings=place, donate_argnums=0).lower(x).compile()
    assert devices.memory(kept) - devices.memory(donated) == 2**22 // 8
    assert 2**22 // 8 <= devices.memory(donated) < 2**22 // 8 + 1024


def test_simulated_devices_share_what_is_free():
    assert 0 < devices.device_memory(jax.devices()[0]) * jax.local_device_count() < 2**46


WHOLE = PartitionSpec()


def compiled(function, *arguments, out=WHOLE, mesh=None):
    """`function` for arguments of (shape, type, PartitionSpec), compiled."""
    mesh = mesh or sharding.make_mesh()
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, place)) for shape, dtype, place in arguments
    ]
    return jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*inputs).compile()


ROWS, COLUMNS = ((64, 32), "float32", PartitionSpec("data")), ((32, 64), "float32", PartitionSpec(None, "data"))


def test_a_sum_over_devices_is_an_all_reduce_of_its_result():
    program = compiled(lambda a, b: a @ b, COLUMNS, ROWS)
    assert collectives.collectives(program) == [Collective("all-reduce", 8, 8, 1, 4 * 32**2, 2 * 7 * 4 * 32**2 // 8)]


def test_in_a_scan_it_counts_every_turn():
    start = jnp.ones((32, 32))
    once = compiled(lambda a, b: jnp.tanh(start @ (a + start[0, 0]) @ b), COLUMNS, ROWS)
    often = compiled(lambda a, b: repeat(5, lambda c: jnp.tanh(c @ (a + c[0, 0]) @ b), start), COLUMNS, ROWS)
    (outside,), (inside,) = collectives.collectives(once), collectives.collectives(often)
    assert (outside.count, inside.count) == (1, 5)
    assert inside.size == 5 * outside.size


def test_what_each_device_then_slices_is_a_reduce_scatter_and_what_it_collects_an_all_gather():
    (scattered,) = collectives.collectives(compiled(lambda a, b: a @ b, COLUMNS, ROWS, out=PartitionSpec("data")))
    assert scattered == Collective("reduce-scatter", 8, 8, 1, 4 * 32**2, 7 * 4 * 32**2 // 8)
    (gathered,) = collectives.collectives(compiled(lambda a: a * 2, ROWS))
    assert gathered == Collective("all-gather", 8, 8, 1, 4 * 64 * 32, 7 * 4 * 64 * 32 // 8)


def test_bfloat16_is_counted_as_such_though_it_travels_as_float32_here():
    half = [(shape, "bfloat16", place) for shape, _, place in (COLUMNS, ROWS)]
    (summed,) = collectives.collectives(compiled(lambda a, b: a @ b, *half))
    (gathered,) = collectives.collectives(compiled(lambda a: a * 2, half[1]))
    assert (summed.size, gathered.size) == (2 * 32**2, 2 * 64 * 32)


def test_groups_along_an_axis_are_within_a_host_or_across():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    first, second = (
        compiled(lambda a: a.sum(0), ((8, 64), "float32", PartitionSpec(axis)), mesh=mesh) for axis in ("data", "fsdp")
    )
    (across,), (within,) = (collectives.collectives(program, devices_per_host=4) for program in (first, second))
    assert (across.group, across.local) == (2, 1)
    assert (within.group, within.local) == (4, 4)


def test_fsdp_gathers_each_split_parameter_and_scatters_its_gradient_once():
    mesh = sharding.make_mesh(fsdp=-1)
    encoder = tiny_encoder(width=256, depth=1, num_heads=4)
    objective = tiny_objective(encoder)
    abstract = sharding.shard_state(jax.eval_shape(objective.init, jax.random.key(0)), mesh)
    places = jax.tree.map(lambda x: x.sharding, abstract)
    gradient = jax.jit(
        jax.grad(lambda *x: objective.loss_fn(*x, True)[0]),
        in_shardings=(places, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=places,
    )
    found = collectives.collectives(gradient.lower(abstract, tiny_batch(256), jax.random.key(0)).compile())
    split = [x for x in jax.tree.leaves(abstract) if not x.sharding.is_fully_replicated]
    whole = sum(4 * x.size for x in split)
    assert len(split) >= 4
    assert sum(each.size for each in found if each.kind == "reduce-scatter") == whole
    assert whole <= sum(each.size for each in found if each.kind == "all-gather") <= 2 * whole


MODULE = """HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %v = f32[4]{0} get-tuple-element(%t), index=1
  %ar = f32[4]{0} all-reduce(%v), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %out = (s32[], f32[4]{0}) tuple(%n, %ar)
}

%cond (t.1: (s32[], f32[4])) -> pred[] {
  %t.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[16], y: bf16[8], z: (s32[], f32[4])) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %z = (s32[], f32[4]{0}) parameter(2)
  %loop = (s32[], f32[4]{0}) while(%z), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %both = (f32[16]{0}, /*index=1*/bf16[8]{0:T(8,128)(2,1)}) all-reduce(%x, %y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%y), replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[32]{0} all-gather-done(%start)
  %async = ((f32[16]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
  %waited = f32[2]{0} async-done(%async), calls=%wrapped
  %moved = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %swapped = (f32[4]{0}, f32[4]{0}, f32[4]{0}, f32[4]{0}) all-to-all(%x, %x, %x, %x), replica_groups={{0,1,2,3},{4,5,6,7}}
  %nobody = f32[16]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %all = f32[16]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %copy = f32[16]{0} copy(%all)
}
"""  # noqa: E501


def test_every_notation_of_hlo_is_read():
    found = {
        (each.kind, each.group, each.local): each for each in collectives.parse_collectives(MODULE, devices_per_host=4)
    }
    sizes = {key: (each.count, each.size, each.sent) for key, each in found.items()}
    assert sizes == {
        ("all-reduce", 2, 2): (7, 7 * 16, 7 * 16),  # in the loop
        ("all-reduce", 2, 1): (1, 64 + 16, 64 + 16),  # a tuple, its groups transposed: 0 with 4
        ("all-gather", 4, 4): (1, 64, 48),  # what its end gives, not its start
        ("reduce-scatter", 8, 4): (1, 64, 56),  # called once, though two instructions name it
        ("collective-permute", 2, 2): (1, 64, 64),
        ("all-to-all", 4, 4): (1, 64, 48),
        ("all-reduce", 8, 4): (1, 64, 112),  # no groups: all devices
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a'}", [list(range(8))]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_groups_of_a_mesh_are_those_along_its_named_axes(text, groups):
    assert collectives._groups(f"%x), replica_groups={text}, use_global_device_ids=true", 8) == groups


def test_time_is_that_of_the_slower_link_and_all_devices_of_a_host_send_at_once():
    kind = devices.KINDS["h100"]
    within, all_of_all, one_of_each = (
        Collective("all-reduce", group, local, 1, 0, 10**9).seconds(kind) for group, local in ((8, 8), (64, 8), (8, 1))
    )
    np.testing.assert_allclose([within, all_of_all, one_of_each], [1e9 / 450e9, 1e9 / 400e9, 1e9 / 50e9])
