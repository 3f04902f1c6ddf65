"""Communication between devices in a compiled step, read from its HLO. Sizes are in bytes, rates per second."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np

from simmim_jax.runtime.costs.devices import Kind


class Collective(NamedTuple):
    """A kind of communication in a step, summed over its runs, per device."""

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute
    group: int  # devices that communicate with each other
    local: int  # minimum number of them on one host
    count: int  # runs per step
    size: int  # bytes that are reduced, or present after a gather, in all runs
    sent: int  # bytes that a device sends with the ring algorithm, in all runs

    def seconds(self, kind: Kind) -> float:
        """Minimum time on devices of `kind`: at published rates, with no other traffic.

        If a group spans hosts, all its devices on a host send through their own network adapters in parallel.
        """
        rate = kind.link if self.local == self.group else min(kind.link, self.local * kind.network)
        return self.sent / rate


RING = {  # fraction of the size that a device sends in a group of n
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
# Operations that keep the number of elements and, up to rounding, their values.
SAME_VALUES = {"parameter", "convert", "copy", "bitcast", "reshape", "transpose", "get-tuple-element"}


def collectives(compiled: jax.stages.Compiled, devices_per_host: int | None = None) -> list[Collective]:
    """The communication of a compiled program, largest first.

    A collective in a loop counts once per iteration if the compiler knows the trip count, otherwise once.
    devices_per_host: for `local`; devices with consecutive numbers share a host; None: all are on one host.

    XLA:CPU does two things differently from accelerator compilers; both are counted as an accelerator does them. An
    all-reduce from which each device takes a slice counts as a reduce-scatter. A bfloat16 array that is widened to
    float32 only for communication counts with its own size.
    """
    return parse_collectives(compiled.as_text(), devices_per_host)


def parse_collectives(text: str, devices_per_host: int | None = None) -> list[Collective]:
    """`collectives` for the text of an HLO module."""
    partitions = re.search(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    devices = int(partitions.group(1)) if partitions else 1
    module, entry = _read_module(text)
    runs, sizes = Counter(), Counter()

    def visit(name: str, times: int) -> None:
        for each in module.get(name, {}).values():
            kind = each.operation.removesuffix("-start").removesuffix("-done")
            # The result of a -start op also holds its operands, the result of its -done op does not.
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
    text: str  # the rest of the line


_Module = dict[str, dict[str, _Instruction]]  # computation name -> instruction name -> instruction
_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")


def _read_module(text: str) -> tuple[_Module, str]:
    """(computations of a module, name of its entry). The last instruction of a computation is its result."""
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
    """The computations that an instruction calls, with the number of calls."""
    if each.operation.endswith(("-update", "-done")):
        return []  # counted at its -start op
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', each.text) if each.operation == "while" else None
    called = _CALLED.findall(each.text)
    called += [name.strip().lstrip("%") for names in _BRANCHES.findall(each.text) for name in names.split(",")]
    return [(name, int(trips.group(1)) if trips else 1) for name in dict.fromkeys(called)]


def _parts(kind: str, each: _Instruction, asked: _Instruction, module: _Module, name: str, group: int):
    """(kind, bytes) of a collective. The sliced part of an all-reduce is a reduce-scatter of its own."""
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
    """Whether a float32 value was converted from a 16-bit one."""
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
    """Whether a result, or element `number` of a tuple, is only used as a slice of `part` elements."""
    users = [each for each in module[name].values() if result in each.operands]
    elements = [each for each in users if each.operation == "get-tuple-element"]
    values = [each.name for each in elements if re.search(rf"index={number}\b", each.text)] if elements else [result]
    return set().union(*(_fates(value, part, module, name) for value in values)) == {"sliced"}


def _fates(value: str, part: int, module: _Module, name: str) -> set[str]:
    """The uses of a value in a computation: "sliced" to `part` elements, "returned", or used "whole"."""
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
    """(dtype, number of elements) of an array type, or of each array in a tuple type."""
    return [(dtype, math.prod(int(n) for n in sides.split(",") if n)) for dtype, sides in _ARRAY.findall(shape)]


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)


def _groups(text: str, devices: int) -> list[list[int]]:
    """The devices of each replica group, in any of HLO's notations; one group of all devices if none is given."""
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
    """0, 1, 2, ... as an array of shape `sides`, transposed to the axis order `order`."""
    return np.arange(math.prod(_numbers(sides))).reshape(_numbers(sides)).transpose(_numbers(order))


def _groups_of_mesh(axes: str, order: str, named: str) -> list[list[int]]:
    """Groups along the named axes of a mesh: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}.

    'b':(2)2 names a part of an axis: split into factors, the factor of size 2 after a factor of size 2.
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
    sides, taken = [], []  # shape with split axes; indices of the named ones
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
    """The minimum number of a group's devices on one host, over the hosts that have any."""
    if devices_per_host is None:
        return len(group)
    return min(Counter(device // devices_per_host for device in group).values())
