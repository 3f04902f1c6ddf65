"""Operations, memory and communication of programs whose exact costs are known."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench import load_program
from jax.sharding import NamedSharding, PartitionSpec
from tiny import PIXELS, tiny_batch, tiny_encoder

from simmim_jax import optim
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.runtime import sharding
from simmim_jax.runtime.costs import collectives, devices, flops
from simmim_jax.runtime.costs.collectives import Collective

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 8**3  # operations of a matmul of two of these


@pytest.fixture(scope="module")
def bench():
    return load_program("step")


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@jax.custom_vjp
def squared(x):
    return x @ x


squared.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


def repeat(times, function, x):
    return jax.lax.scan(lambda y, _: (function(y), None), x, length=times)[0]


FUNCTIONS = {
    "matmul": (lambda x: x @ x, 1),
    "jit": (jax.jit(lambda x: x @ x), 1),
    "remat": (jax.checkpoint(lambda x: x @ x), 1),
    "custom_vjp": (squared, 1),
    "custom_jvp": (jax.nn.relu, 0),
    "scan": (lambda x: sum(map(jnp.sum, jax.lax.scan(lambda c, _: (c @ x, c @ c), x, length=5))), 10),
    "nested scans": (lambda x: repeat(3, lambda y: repeat(2, lambda z: z @ z, y), x), 6),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y, lambda y: y @ y @ y, x), 2),
    "while, with an unknown trip count": (lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, lambda y: y @ y, x), 1),
    "elementwise": (lambda x: jnp.sin(x) + x, 0),
}  # fmt: skip


def matmul_flops(function, *arguments):
    """FLOPs of a function without trained parameters, which has no backward pass."""
    return flops.step_flops(lambda params, batch, *_: (function(*batch), {}), {}, arguments, 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_matmuls_count_as_often_as_they_run(name):
    function, products = FUNCTIONS[name]
    assert matmul_flops(function, SQUARE) == products * ONE


def test_convolutions_and_batched_matmuls_count_exactly():
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID")
    images, kernel = spec(2, 3, 8, 8), spec(5, 3, 2, 2)
    assert matmul_flops(convolve, images, kernel) == 2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)
    assert matmul_flops(jnp.matmul, spec(3, 4, 5), spec(3, 5, 6)) == 2 * 3 * 4 * 5 * 6


def test_shard_map_counts_the_matmuls_of_all_devices():
    mesh = sharding.make_mesh()
    split = PartitionSpec("data")
    function = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=split, out_specs=split)
    assert matmul_flops(function, spec(16, 8)) == 8 * 2 * (2 * 2) * 8


def trace_cudnn_without_a_gpu(monkeypatch):
    """Let cuDNN's attention be traced on a machine without a GPU."""
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91900)
    for name in ("check_compute_capability", "is_cuda_compute_capability_in_range"):
        monkeypatch.setattr(module, name, lambda *_, **__: True, raising=False)


def test_cudnn_attention_counts_as_its_two_matmuls(monkeypatch):
    trace_cudnn_without_a_gpu(monkeypatch)
    query, key = spec(2, 5, 3, 64, dtype=jnp.bfloat16), spec(2, 7, 3, 64, dtype=jnp.bfloat16)
    counts = []
    for form in ("xla", "cudnn"):
        attend = partial(jax.nn.dot_product_attention, implementation=form)
        loss = lambda p, x, *_, attend=attend: (attend(p, x, x).sum(), {})  # noqa: E731
        counts.append((matmul_flops(attend, query, key, key), flops.step_flops(loss, query, key, 0)))
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
def test_step_counts_needed_gradients_once_and_recomputation_never(frozen, operations, rematted):
    loss_fn = jax.checkpoint(two_layers, static_argnums=3) if rematted else two_layers
    loss_fn = optim.freeze(loss_fn, optim.make_frozen(frozen))
    assert flops.step_flops(loss_fn, LAYERS, spec(4, 16), jax.random.key(0)) == operations


def test_carry_of_a_scan_is_trained_if_any_iteration_makes_it_so():
    def loss_fn(weight, x, key, train):
        turn = lambda c, _: ((c[1], c[0] @ weight), None)  # noqa: E731
        return jax.lax.scan(turn, (x, x), length=3)[0][0].sum(), {}

    # Both gradients of c @ weight count in every iteration, because the body treats c as trained.
    assert flops.step_flops(loss_fn, SQUARE, SQUARE, 0) == 3 * ONE + 3 * 2 * ONE


@pytest.mark.parametrize(
    ("family", "size", "image", "options"),
    [
        ("vit", "ti", 224, {"remat": "dots", "scan": True}),
        pytest.param("vit", "ti", 224, {"remat": "full"}, marks=pytest.mark.slow),
        ("swin", "t", 192, {}),
        pytest.param("swin", "t", 192, {"remat": "dots", "scan": True}, marks=pytest.mark.slow),
    ],
)
def test_step_flops_equal_the_formula_of_the_benchmark(bench, family, size, image, options):
    of_family = bench.FAMILIES[family]
    encoder = make_encoder(family, size, **of_family.ours["official"], **of_family.fitted(image), **options)
    objective = make_objective("simmim", encoder, image_size=(image, image), mean=bench.MEAN, std=bench.STD)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    integers = spec(2, dtype=jnp.int32)
    batch = {"image": spec(2, image, image, 3, dtype=jnp.uint8), "label": integers, "batch_index": integers}
    shape = {name: getattr(encoder, name) for name in of_family.shape}
    of_images = 2 * 2 * 3 * image**2 * shape["width"]  # the formula counts the gradient of the images
    counted = flops.step_flops(objective.loss_fn, params, batch, jax.random.key(0))
    assert counted == bench.step_flops(family, image, shape, 2) - of_images


def test_linear_probe_costs_a_forward_pass_of_the_blocks_it_reads_and_its_head_twice():
    batch, key = tiny_batch(), jax.random.key(0)

    def probe(depth: int) -> int:
        options = {"num_classes": 10, "block": 1, "fc_norm": False, "train_encoder": False}
        objective = make_objective("classify", tiny_encoder(depth=depth), **PIXELS, **options)
        loss_fn = optim.freeze(objective.loss_fn, optim.make_frozen("encoder/"))
        return flops.step_flops(loss_fn, jax.eval_shape(objective.init, key), batch, key)

    encoder = tiny_encoder(depth=1)
    images = spec(16, 32, 32, 3)
    params = jax.eval_shape(encoder.init, key, images)
    forward = matmul_flops(encoder.apply, params, images)
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
def test_devices_are_found_by_their_jax_names(device_kind, name):
    assert devices.find_kind(device_kind) is devices.KINDS[name]


@pytest.mark.parametrize(
    "device_kind", ["cpu", "NVIDIA H100 NVL", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""]
)
def test_similar_device_names_are_not_found(device_kind):
    assert devices.find_kind(device_kind) is None


def test_peak_flops_are_published_or_measured(monkeypatch):
    device = jax.devices()[0]
    assert 1e8 < devices.peak_flops(device, "float32") < 1e14
    monkeypatch.setattr(devices, "find_kind", lambda _: devices.KINDS["h100"])
    assert devices.peak_flops(device, "bfloat16") == 989.4e12
    assert devices.peak_flops(device, "float32") == 494.7e12


def test_memory_is_per_device_and_counts_donated_arguments_once():
    place = NamedSharding(sharding.make_mesh(), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=place)
    kept = jax.jit(lambda x: x + 1, out_shardings=place).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, out_shardings=place, donate_argnums=0).lower(x).compile()
    assert devices.memory(kept) - devices.memory(donated) == 2**22 // 8
    assert 2**22 // 8 <= devices.memory(donated) < 2**22 // 8 + 1024


def test_simulated_devices_share_free_memory():
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


def test_sum_over_devices_is_an_all_reduce():
    program = compiled(lambda a, b: a @ b, COLUMNS, ROWS)
    assert collectives.collectives(program) == [Collective("all-reduce", 8, 8, 1, 4 * 32**2, 2 * 7 * 4 * 32**2 // 8)]


def test_collective_in_a_scan_counts_every_iteration():
    start = jnp.ones((32, 32))
    once = compiled(lambda a, b: jnp.tanh(start @ (a + start[0, 0]) @ b), COLUMNS, ROWS)
    often = compiled(lambda a, b: repeat(5, lambda c: jnp.tanh(c @ (a + c[0, 0]) @ b), start), COLUMNS, ROWS)
    (outside,), (inside,) = collectives.collectives(once), collectives.collectives(often)
    assert (outside.count, inside.count) == (1, 5)
    assert inside.size == 5 * outside.size


def test_sliced_sum_is_a_reduce_scatter_and_collected_rows_an_all_gather():
    (scattered,) = collectives.collectives(compiled(lambda a, b: a @ b, COLUMNS, ROWS, out=PartitionSpec("data")))
    assert scattered == Collective("reduce-scatter", 8, 8, 1, 4 * 32**2, 7 * 4 * 32**2 // 8)
    (gathered,) = collectives.collectives(compiled(lambda a: a * 2, ROWS))
    assert gathered == Collective("all-gather", 8, 8, 1, 4 * 64 * 32, 7 * 4 * 64 * 32 // 8)


def test_bfloat16_counts_with_its_own_size_even_if_sent_as_float32():
    half = [(shape, "bfloat16", place) for shape, _, place in (COLUMNS, ROWS)]
    (summed,) = collectives.collectives(compiled(lambda a, b: a @ b, *half))
    (gathered,) = collectives.collectives(compiled(lambda a: a * 2, half[1]))
    assert (summed.size, gathered.size) == (2 * 32**2, 2 * 64 * 32)


def test_groups_are_within_a_host_or_across_hosts():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    first, second = (
        compiled(lambda a: a.sum(0), ((8, 64), "float32", PartitionSpec(axis)), mesh=mesh) for axis in ("data", "fsdp")
    )
    (across,), (within,) = (collectives.collectives(program, devices_per_host=4) for program in (first, second))
    assert (across.group, across.local) == (2, 1)
    assert (within.group, within.local) == (4, 4)


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


def test_every_hlo_notation_is_parsed():
    found = {
        (each.kind, each.group, each.local): each for each in collectives.parse_collectives(MODULE, devices_per_host=4)
    }
    sizes = {key: (each.count, each.size, each.sent) for key, each in found.items()}
    assert sizes == {
        ("all-reduce", 2, 2): (7, 7 * 16, 7 * 16),  # in the loop
        ("all-reduce", 2, 1): (1, 64 + 16, 64 + 16),  # a tuple, its groups transposed: 0 with 4
        ("all-gather", 4, 4): (1, 64, 48),  # the result of -done, not of -start
        ("reduce-scatter", 8, 4): (1, 64, 56),  # runs once, although two instructions name it
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


def test_time_is_bound_by_the_slower_link_and_devices_of_a_host_send_in_parallel():
    kind = devices.KINDS["h100"]
    within, all_of_all, one_of_each = (
        Collective("all-reduce", group, local, 1, 0, 10**9).seconds(kind) for group, local in ((8, 8), (64, 8), (8, 1))
    )
    np.testing.assert_allclose([within, all_of_all, one_of_each], [1e9 / 450e9, 1e9 / 400e9, 1e9 / 50e9])
