"""What a training step costs: operations, memory and communication, and what a device has of each.

Nothing here runs a step: operations are counted in its traced program, memory and communication in its compiled one.
Bytes are bytes, rates are per second.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters import partial_eval
from jaxtyping import PyTree

GIB = 2**30


class Kind(NamedTuple):
    """What the vendor publishes of one device as JAX counts them; `pattern` matches all of its `device_kind`."""

    pattern: str
    bfloat16: float  # operations a second of dense matmuls
    float32: float  # at JAX's default precision: TF32 on NVIDIA since Ampere, one bfloat16 pass on a TPU
    memory: int
    bandwidth: float  # of the memory
    link: float  # that a device can send to others of its host, in one direction, all links together
    network: float  # that a device can send to other hosts, in one direction


def _nvidia(
    pattern: str,
    bfloat16: int | float,
    float32: int | float,
    memory: int,
    bandwidth: int | float,
    link: int | float,
    network: int | float = 50,
) -> Kind:
    """A Kind in TFLOP/s, GiB and GB/s. Vendors' datasheets add both directions of a link: `link` is half of that."""
    return Kind(pattern, bfloat16 * 1e12, float32 * 1e12, memory * GIB, bandwidth * 1e9, link * 1e9, network * 1e9)


def _tpu(pattern: str, bfloat16: int | float, memory: int, bandwidth: int | float, link: int | float) -> Kind:
    """Within a slice the network is that of the links."""
    return _nvidia(pattern, bfloat16, bfloat16, memory, bandwidth, link, link)


# NVIDIA: the product's datasheet, dense where it prints "with sparsity" (half of that); of GeForce the architecture's
# whitepaper, with float32 accumulation. `network` is one adapter per device as NVIDIA's own DGX has it, 400 Gb/s since
# Hopper, 200 before, 100 in DGX-1; cards that no DGX has are given 100 Gb/s shared by eight, which is an assumption.
# V100 and T4 have no bfloat16: XLA computes it in float32.
# TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, whose ICI bandwidth counts both directions; v3 and v4 from Jouppi
# et al. 2023 (arXiv 2304.01433, table 4). A v3 chip is two devices.
KINDS = {
    "a100-40": _nvidia("NVIDIA A100.*40GB.*", 312, 156, 40, 1555, 300, 25),
    "a100-80": _nvidia("NVIDIA A100.*80GB.*", 312, 156, 80, 2039, 300, 25),
    "b200": _nvidia("NVIDIA B200", 2250, 1100, 180, 7700, 900),
    "h100": _nvidia("NVIDIA H100 80GB HBM3", 989.4, 494.7, 80, 3350, 450),
    "h100-pcie": _nvidia("NVIDIA H100 PCIe", 756, 378, 80, 2000, 64),
    "h200": _nvidia("NVIDIA H200", 989.4, 494.7, 141, 4800, 450),
    "l4": _nvidia("NVIDIA L4", 121, 60, 24, 300, 32, 1.5625),
    "l40s": _nvidia("NVIDIA L40S", 362, 183, 48, 864, 32, 1.5625),
    "rtx4090": _nvidia("NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, 1008, 32, 1.5625),
    "t4": _nvidia("Tesla T4", 8.1, 8.1, 16, 320, 16, 1.5625),
    "v100-16": _nvidia("Tesla V100-SXM.*16GB", 15.7, 15.7, 16, 900, 150, 6.25),
    "v100-32": _nvidia("Tesla V100-SXM.*32GB", 15.7, 15.7, 32, 900, 150, 6.25),
    "tpu-v3": _tpu("TPU v3", 61.5, 16, 450, 140),
    "tpu-v4": _tpu("TPU v4", 275, 32, 1200, 300),
    "tpu-v5e": _tpu("TPU v5 ?(lite|e)", 197, 16, 819, 200),
    "tpu-v5p": _tpu("TPU v5p?", 459, 95, 2765, 600),
    "tpu-v6e": _tpu("TPU v6 ?(lite|e)", 918, 32, 1638, 400),
}


def kind_of(device_kind: str) -> Kind | None:
    """What is published of the device that JAX calls so; None if it is not among `KINDS`."""
    return next((kind for kind in KINDS.values() if re.fullmatch(kind.pattern, device_kind)), None)


def matmul_flops(function: Callable, *arguments: PyTree) -> int:
    """Multiplications and additions in the matmuls and convolutions of `function` of (abstract) arguments.

    As often as they run: those of a scan times its length, of a shard_map times its devices; of a cond the branch with
    most. A loop of unknown length counts once. Attention in one cuDNN call counts as its two matmuls.
    """
    jaxpr = _open(jax.make_jaxpr(function)(*arguments))
    return _count(jaxpr, [False] * len(jaxpr.invars))[0]


def step_flops(loss_fn: Callable, params: PyTree, batch: PyTree, key) -> int:
    """Multiplications and additions in the matmuls of the loss of a whole batch and of its gradient, over all devices.

    The count of MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): each matmul of the forward pass that the
    loss needs, and another for each of its operands that a parameter reaches, but through `stop_gradient`. So frozen
    parameters and images cost no backward pass, and what is computed twice to save memory counts once. Norms, softmax,
    GELU and the optimizer count nothing. `loss_fn` is `(params, batch, key, train) -> (loss, metrics)`; arguments may
    be abstract.
    """
    closed = jax.make_jaxpr(lambda *x: loss_fn(*x, True)[0])(params, batch, key)
    jaxpr, _ = partial_eval.dce_jaxpr(_open(closed), [True], instantiate=True)
    learned = len(jax.tree.leaves(params))
    forward, backward, _ = _count(jaxpr, [n < learned for n in range(len(jaxpr.invars))])
    return forward + backward


def _open(jaxpr) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)  # a ClosedJaxpr's, which later versions of JAX do without


def _count(jaxpr: Jaxpr, active: Sequence[bool]) -> tuple[int, int, list[bool]]:
    """(forward, backward) matmul operations, and which results depend on an active argument differentiably."""
    forward, backward = 0, 0
    reached = {variable for variable, is_active in zip(jaxpr.invars, active, strict=True) if is_active}
    is_reached = lambda x: not isinstance(x, Literal) and x in reached  # noqa: E731
    for equation in jaxpr.eqns:
        inputs = [is_reached(x) for x in equation.invars]
        own_forward, own_backward, outputs = _count_equation(equation, inputs)
        forward, backward = forward + own_forward, backward + own_backward
        pairs = zip(equation.outvars, outputs, strict=True)
        reached.update(x for x, y in pairs if y and jnp.issubdtype(x.aval.dtype, jnp.inexact))
    return forward, backward, [is_reached(x) for x in jaxpr.outvars]


def _count_equation(equation: JaxprEqn, active: list[bool]) -> tuple[int, int, list[bool]]:
    name, params, everything = equation.primitive.name, equation.params, [any(active)] * len(equation.outvars)
    if name == "stop_gradient":
        return 0, 0, [False]
    if name == "dot_general":
        shape, contracted = equation.invars[1].aval.shape, params["dimension_numbers"][0][1]
        flops = 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        return flops, flops * sum(active), everything
    if name == "conv_general_dilated":
        shape, outputs = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        flops = 2 * equation.outvars[0].aval.size * math.prod(shape) // shape[outputs]
        return flops, flops * sum(active), everything
    if name.startswith("dot_product_attention_fwd"):  # cuDNN's, inside of jax.nn.dot_product_attention
        keys = equation.invars[1].aval.shape[2 if params["layout"] == 1 else 1]  # layout 1: b h n d, 0: b n h d
        logits, values = [2 * equation.outvars[0].aval.size * keys] * 2
        reach_logits = any(active[:2]) or any(active[3:])
        return logits + values, logits * sum(active[:2]) + values * (reach_logits + active[2]), everything
    if name == "scan":
        return _count_scan(equation, active)
    if name == "while":
        return _count_while(params, active)
    if name == "cond":
        branches = [_count(_open(branch), active[1:]) for branch in params["branches"]]
        forward, backward, _ = max(branches, key=lambda x: x[0] + x[1])
        return forward, backward, [any(x) for x in zip(*(outputs for *_, outputs in branches), strict=True)]
    times = math.prod(params["mesh"].shape.values()) if name == "shard_map" else 1
    inner = [_open(x) for x in jaxprs_in_params(params)]
    if len(inner) == 1 and len(inner[0].invars) == len(active):  # jit, remat, custom_jvp, custom_vjp, shard_map
        forward, backward, outputs = _count(inner[0], active)
        return times * forward, times * backward, outputs
    counts = [_count(x, [any(active)] * len(x.invars)) for x in inner]  # what a reduction or a sort calls, say
    return sum(x[0] for x in counts), sum(x[1] for x in counts), everything


def _count_scan(equation: JaxprEqn, active: list[bool]) -> tuple[int, int, list[bool]]:
    body, length = _open(equation.params["jaxpr"]), equation.params["length"]
    # Arguments are constants, carries and slices; results are carries and slices. A slice has lost its first axis.
    whole = lambda outer, inner: len(outer.aval.shape) == len(inner.aval.shape)  # noqa: E731
    carries = sum(map(whole, equation.outvars, body.outvars))
    first = sum(map(whole, equation.invars, body.invars)) - carries
    forward, backward, outputs = _count_to_the_end(body, active, first, carries)
    return length * forward, length * backward, outputs


def _count_while(params: dict, active: list[bool]) -> tuple[int, int, list[bool]]:
    condition, first = params["cond_nconsts"], params["body_nconsts"]
    body, inputs = _open(params["body_jaxpr"]), active[condition:]
    return _count_to_the_end(body, inputs, first, len(inputs) - first)


def _count_to_the_end(body: Jaxpr, active: list[bool], first: int, carries: int) -> tuple[int, int, list[bool]]:
    """`_count` of a loop's body, with a carry active where any turn makes it so."""
    while True:
        forward, backward, outputs = _count(body, active)
        carried = [a or b for a, b in zip(active[first : first + carries], outputs, strict=False)]
        if carried == active[first : first + carries]:
            return forward, backward, outputs
        active = [*active[:first], *carried, *active[first + carries :]]


def peak_flops(device: jax.Device, dtype: str) -> float:
    """Operations a second that `device` can reach in matmuls of `dtype`: as published, else measured, in about 0.2 s.

    What is measured is the best of a few square matmuls; simulated CPU devices share it.
    """
    if kind := kind_of(device.device_kind):
        return kind.bfloat16 if dtype == "bfloat16" else kind.float32
    on_cpu = device.platform == "cpu"
    size = 1024 if on_cpu else 4096
    square = jax.device_put(np.random.default_rng(0).random((size, size), np.float32) - 0.5, device).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(square, square).block_until_ready()
    seconds = []
    while sum(seconds) < 0.1 and len(seconds) < 10:
        begun = time.perf_counter()
        multiply(square, square).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds) / (jax.local_device_count() if on_cpu else 1)


def memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a device needs for a compiled program: arguments, results, what lies between, and its code.

    A donated argument counts once. None where the backend does not tell.
    """
    try:
        stats = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def held_bytes(abstract: PyTree) -> int:
    """What one device holds of a placed abstract tree."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def memory_of(device: jax.Device) -> int | None:
    """Bytes that JAX may use of `device`; of a CPU, what is free now, by its devices here. None where unknown."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform == "cpu":
        return psutil.virtual_memory().available // jax.local_device_count()
    kind = kind_of(device.device_kind)
    return kind and kind.memory


class Collective(NamedTuple):
    """A communication of a step, alike ones together, of each device."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute
    group: int  # devices that take part with each other
    local: int  # of these, at least, on a host of `devices_per_host`
    count: int  # runs a step
    size: int  # bytes of the whole: what is reduced, or is there after a gather; of all runs together
    sent: int  # bytes that a device sends by the ring algorithm

    def seconds(self, kind: Kind) -> float:
        """The least time on devices of `kind`, at the published rates and with nothing else to send.

        Where a group spans hosts, all its devices of a host send by their own adapters at once.
        """
        rate = kind.link if self.local == self.group else min(kind.link, self.local * kind.network)
        return self.sent / rate


RING = {  # what a device sends, as a part of the whole, in a group of n
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# What changes neither the number of elements nor their values, but by rounding.
SAME_VALUES = {"parameter", "convert", "copy", "bitcast", "reshape", "transpose", "get-tuple-element"}


def collectives(compiled: jax.stages.Compiled, devices_per_host: int | None = None) -> list[Collective]:
    """The communication of a compiled program, the largest first, counted in its HLO.

    Those of a loop count times its turns, where the compiler knows them, else once. devices_per_host: neighbors by
    their number, for `local`; None: all are on one host. Of a program of one device, and of groups of one: none.

    Two habits of XLA:CPU, which simulated devices have, are counted as other compilers do it. An all-reduce of which
    each device then takes its slice is a reduce-scatter. bfloat16 that was widened to float32 for the way alone has its
    own size.
    """
    return collectives_of(compiled.as_text(), devices_per_host)


def collectives_of(text: str, devices_per_host: int | None = None) -> list[Collective]:
    """As `collectives`, of the text of an HLO module."""
    partitions = re.search(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    devices = int(partitions.group(1)) if partitions else 1
    module, entry = _read_module(text)
    runs, sizes = Counter(), Counter()

    def visit(name: str, times: int) -> None:
        for each in module.get(name, {}).values():
            kind = each.operation.removesuffix("-start").removesuffix("-done")
            # The result of a -start has its operands beside it: that of its -done has not.
            if kind in RING and not each.operation.endswith("-start"):
                asked = module[name][each.operands[0]] if each.operation.endswith("-done") else each
                groups = _groups(asked.text, devices)
                group = 2 if kind == "collective-permute" else max(map(len, groups))
                local = min(_local(members, devices_per_host) for members in groups)
                for kept, size in _parts(kind, each, asked, module, name, group) if group > 1 else ():
                    runs[kept, group, local] += times
                    sizes[kept, group, local] += times * size
            for called, turns in _calls(each):
                visit(called, times * turns)

    visit(entry, 1)
    rows = [Collective(*key, runs[key], size, round(RING[key[0]](key[1]) * size)) for key, size in sizes.items()]
    return sorted(rows, key=lambda row: -row.sent)


class _Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str  # of the result: an array's type, or a tuple of them
    operation: str
    operands: list[str]
    text: str  # what stands behind the operation


_Module = dict[str, dict[str, _Instruction]]  # the instructions of each computation, by name
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")


def _read_module(text: str) -> tuple[_Module, str]:
    """The computations of a module, and the name of its entry. The last instruction of a computation is its result."""
    module, entry, current = {}, "", {}
    for line in text.splitlines():
        if not line.startswith(" "):
            if header := _HEADER.match(line):
                current = module.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif found := _LINE.match(line):
            name, shape, operation, rest = found.groups()
            operands = re.findall(r"%([\w.-]+)", re.split(r"\)(?:,|$)", rest, maxsplit=1)[0])
            current[name] = _Instruction(name, shape, operation, operands, rest)
    return module, entry


def _calls(each: _Instruction) -> list[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    if each.operation.endswith(("-update", "-done")):
        return []  # what its -start has called
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', each.text) if each.operation == "while" else None
    called = _CALLED.findall(each.text)
    called += [name.strip().lstrip("%") for names in _BRANCHES.findall(each.text) for name in names.split(",")]
    return [(name, int(trips.group(1)) if trips else 1) for name in dict.fromkeys(called)]


def _parts(kind: str, each: _Instruction, asked: _Instruction, module: _Module, name: str, group: int):
    """(kind, bytes of the whole) of what a collective carries; of an all-reduce what is sliced apart from the rest."""
    whole, promoted = Counter(), re.search(r"to_apply=%?[\w.-]*_promoted\b", asked.text)
    for number, (dtype, elements) in enumerate(_arrays(each.shape)):
        size = elements * _bits(dtype) // 8 * (group if kind == "reduce-scatter" else 1)
        operand = asked.operands[number] if number < len(asked.operands) else ""
        if dtype == "f32" and (promoted or (kind != "all-reduce" and _is_widened(operand, module, name))):
            size //= 2
        sliced = kind == "all-reduce" and _is_sliced(each.name, number, elements // group, module, name)
        whole["reduce-scatter" if sliced else kind] += size
    return whole.items()


def _is_widened(operand: str, module: _Module, name: str) -> bool:
    """Whether a value of a computation is 16 bits wide, and was written as float32."""
    instructions = module[name]
    while found := instructions.get(operand):
        if found.operation == "fusion" and (called := re.search(r"calls=%?([\w.-]+)", found.text)):
            instructions = module[called.group(1)]
            operand = list(instructions)[-1]
        elif found.operation in SAME_VALUES and found.operands:
            operand = found.operands[0]
            if found.operation == "convert" and operand in instructions:
                return instructions[operand].shape.startswith(("bf16", "f16"))
        else:
            break
    return False


def _is_sliced(result: str, number: int, part: int, module: _Module, name: str) -> bool:
    """Whether all that becomes of a result (of element `number` where it is a tuple) is a slice of `part` elements."""
    users = [each for each in module[name].values() if result in each.operands]
    elements = [each for each in users if each.operation == "get-tuple-element"]
    values = [each.name for each in elements if re.search(rf"index={number}\b", each.text)] if elements else [result]
    return set().union(*(_fates(value, part, module, name) for value in values)) == {"sliced"}


def _fates(value: str, part: int, module: _Module, name: str) -> set[str]:
    """What becomes of a value in a computation: "sliced" to `part` elements, "returned", or used "whole"."""
    fates = {"returned"} if value == next(reversed(module[name])) else set()
    for each in module[name].values():
        if value not in each.operands:
            continue
        if each.operation == "dynamic-slice":
            fates.add("sliced" if _arrays(each.shape)[0][1] == part else "whole")
        elif each.operation == "fusion" and (called := re.search(r"calls=%?([\w.-]+)", each.text)):
            places = [f"{n})" for n, operand in enumerate(each.operands) if operand == value]
            inside = module[called.group(1)].values()
            for one in inside:
                if one.operation == "parameter" and one.text.startswith(tuple(places)):
                    fates |= _fates(one.name, part, module, called.group(1))
            if "returned" in fates:
                fates = (fates - {"returned"}) | _fates(each.name, part, module, name)
        else:
            fates |= _fates(each.name, part, module, name) if each.operation in SAME_VALUES else {"whole"}
    return fates


def _arrays(shape: str) -> list[tuple[str, int]]:
    """(type, elements) of an array's type, or of each in a tuple."""
    return [(dtype, math.prod(int(n) for n in sides.split(",") if n)) for dtype, sides in _ARRAY.findall(shape)]


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)


def _groups(text: str, devices: int) -> list[list[int]]:
    """The devices of each group that an instruction names, in any of HLO's notations; all where it names none."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _lists(pairs.group(1))
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return _lists(listed.group(1))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota.group(2), iota.group(3)).reshape(_numbers(iota.group(1))).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", text):
        return _groups_of_mesh(*mesh.groups())
    return [list(range(devices))]


def _numbers(text: str | None) -> list[int] | None:
    return [int(number) for number in text.split(",")] if text else None


def _lists(text: str) -> list[list[int]]:
    return [_numbers(part) for part in re.findall(r"\{([\d,]+)\}", text)]


def _iota(sides: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in an array of these sides, transposed to this order of its axes."""
    return np.arange(math.prod(_numbers(sides))).reshape(_numbers(sides)).transpose(_numbers(order))


def _groups_of_mesh(axes: str, order: str, named: str) -> list[list[int]]:
    """Groups along the named axes of a mesh: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}.

    'b':(2)2 names a part of an axis: of its devices those that the factor 2 behind a factor 2 numbers.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if iota := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        numbers = _iota(*iota.groups())
    elif listed := re.search(r"device_ids=\(([\d,]+)\)", order):
        numbers = np.array(_numbers(listed.group(1)))
    wanted = {}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", named):
        wanted.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    sides, taken = [], []  # the mesh with its axes split where a part of one is named; which of these are
    for name, whole in sizes.items():
        done = 1
        for before, size in sorted(wanted.get(name, [])):
            sides += [before // done, size]
            taken.append(len(sides) - 1)
            done = before * size
        sides.append(whole // done)
    rest = [axis for axis in range(len(sides)) if axis not in taken]
    group = math.prod(sides[axis] for axis in taken)
    return numbers.reshape(sides).transpose([*rest, *taken]).reshape(-1, group).tolist()


def _local(group: list[int], devices_per_host: int | None) -> int:
    """The least devices of a group that are on one host, of the hosts that have any."""
    if devices_per_host is None:
        return len(group)
    return min(Counter(device // devices_per_host for device in group).values())
