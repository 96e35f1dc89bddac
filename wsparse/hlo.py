"""Counts the work of a compiled XLA program in one call on one device, from its text.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here every instruction is
counted as often as it runs. The trip count of a loop whose condition compares a counter with a constant (a
scan over layers or steps) is the distance from the counter's start to that constant, divided by its step; the
compiler for TPUs does not annotate it. A loop that stops depending on its data (a search) is counted by the
bound in its name, a scope `at_most_N_passes` (once without).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")  # fmt: skip
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"}  # fmt: skip
_CALLERS = ("while", "fusion", "call", "conditional")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)"
    r"\((?P<argument>.*?)\)(?:, (?P<attributes>.*))?$"
)
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array in the type of an instruction."""

    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation: `name = result op(operands), attributes`.

    `argument` is the text in the parentheses: a constant's value, a parameter's number. `called` are the
    names of the computations that it runs, by attribute.
    """

    name: str
    op: str
    result: list[Array]
    operands: list[Instruction]
    argument: str
    attributes: str
    called: dict[str, list[str]]
    is_root: bool

    def attribute(self, pattern: str, default: str = "") -> str:
        """Returns the first group of a regular expression found in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else default


class Collective(NamedTuple):
    """A collective that runs `count` times, or at most so often if it is `in_search`.

    `bytes` are those of one execution, the larger of a device's input and output. `group` devices take part
    together; slices, if it crosses the network between TPU slices.
    """

    kind: str
    count: int
    bytes: int
    group: int
    in_search: bool
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and the name of the one that is called."""

    computations: dict[str, list[Instruction]]
    entry: str

    def walk(self) -> Iterator[tuple[str, int, bool, Instruction]]:
        """Yields `(computation, executions, in_search, instruction)` of everything that runs."""
        runs: Counter[str] = Counter()
        searching: set[str] = set()

        def visit(name: str, times: int, in_search: bool) -> None:
            runs[name] += times
            if in_search:
                searching.add(name)
            for instruction in self.computations[name]:
                trips, is_search = self._trips(instruction) if instruction.op == "while" else (1, False)
                for callees in instruction.called.values():
                    for callee in callees:
                        visit(callee, times * trips, in_search or is_search)

        visit(self.entry, 1, False)
        for name, times in runs.items():
            for instruction in self.computations[name]:
                yield name, times, name in searching, instruction

    def _trips(self, loop: Instruction) -> tuple[int, bool]:
        """Returns `(iterations, whether that is a bound)` of a loop."""
        test = self._root(loop.called["condition"][0])
        if test.op == "compare" and "direction=LT" in test.attributes and test.operands[1].op == "constant":
            counter, bound = test.operands
            index = int(counter.attribute(r"index=(\d+)", "0"))
            # The counter does not start at 0 where XLA peeled the first iterations.
            state = loop.operands[0]
            start = state.operands[index] if state.op == "tuple" else state
            while start.op in ("copy", "bitcast"):
                start = start.operands[0]
            span = int(bound.argument) - int(start.argument if start.op == "constant" else 0)
            return -(-span // self._step(loop, index)), False
        bounds = re.findall(r"at_most_(\d+)_passes", loop.attributes)
        return int(bounds[-1]) if bounds else 1, True

    def _step(self, loop: Instruction, index: int) -> int:
        """Returns the step of a loop's counter, which is more than 1 where XLA unrolled the loop."""
        results = self._root(loop.called["body"][0])
        if results.op == "tuple":
            new = results.operands[index]
            if new.op == "fusion":
                new = self._root(new.called["calls"][0])
            constants = [operand.argument for operand in new.operands if operand.op == "constant"]
            if new.op == "add" and constants:
                return int(constants[0])
        return 1

    def _root(self, name: str) -> Instruction:
        """Returns the instruction whose result is the result of the computation."""
        return next(instruction for instruction in self.computations[name] if instruction.is_root)

    def matmul_flops(self) -> int:
        """Returns the FLOPs of matrix products: two for every product of two numbers.

        Those of a Pallas kernel are as declared in its `pallas.CostEstimate`.
        """
        total = 0
        for _, times, _, instruction in self.walk():
            if instruction.op == "dot":
                left = instruction.operands[0].result[0]
                axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
                summed = math.prod(left.shape[axis] for axis in _integers(axes))
                total += times * 2 * math.prod(instruction.result[0].shape) * summed
            elif instruction.op == "convolution":
                total += times * _convolution_flops(instruction)
            elif instruction.op == "custom-call":
                total += times * int(instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"', "0"))
        return total

    def collectives(self) -> list[Collective]:
        """Returns every collective; the parts of an asynchronous one, which share a channel, count as one."""
        collectives: dict[str, Collective] = {}
        for name, times, in_search, instruction in self.walk():
            kind = instruction.op.removesuffix("-start")
            if kind in COLLECTIVES:
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                sizes = [array.bytes for array in instruction.result]
                moved = max(sizes) if instruction.op.endswith("-start") else sum(sizes)
                if kind == "reduce-scatter":
                    read = (array.bytes for operand in instruction.operands for array in operand.result)
                    moved = max(moved, sum(read))
                channel = instruction.attribute(r"channel_id=(\d+)")
                key = f"{kind} {channel}" if channel else f"{name} {instruction.name}"
                new = Collective(kind, times, moved, _group_size(instruction.attributes), in_search)
            elif kind in ("send", "recv") and "_xla_megascale_transfer_type" in instruction.attributes:
                # A pair of them is one collective: the data that is sent, and the data that comes back.
                key, kind, slices = _between_slices(instruction.attributes)
                new = Collective(kind, times, instruction.result[0].bytes, slices, in_search, True)
            else:
                continue
            old = collectives.get(key)
            if not old or old.count < new.count or (new.between_slices and old.bytes < new.bytes):
                collectives[key] = new
        return list(collectives.values())

    def hbm_bytes(self) -> int:
        """Returns the bytes that instructions read from and write to device memory.

        Fusions count what they read of their operands (the slice, where they slice) and what they write.
        Arrays that XLA keeps in a core's own memory cost nothing.
        """
        steps = list(self.walk())
        fused = {step[3].called["calls"][0] for step in steps if step[3].op == "fusion"}
        return sum(
            times * self._bytes(instruction) for name, times, _, instruction in steps if name not in fused
        )

    def _bytes(self, instruction: Instruction) -> int:
        op, result, operands = instruction.op, instruction.result, instruction.operands
        if op in _FREE or op.endswith(("-done", "-update")):
            return 0
        if op == "copy-start":
            return _hbm(result[:2])
        if op in ("send", "recv"):
            return _hbm(result[:1])
        if op.endswith("-start"):
            return _hbm([max(result, key=lambda array: array.bytes)])
        if op in ("dynamic-slice", "slice"):
            return 2 * _hbm(result)
        if op == "dynamic-update-slice":
            return 2 * _hbm(operands[1].result)
        if op == "fusion":
            return self._fusion_bytes(instruction)
        return _hbm(result) + sum(_hbm(operand.result) for operand in operands)

    def _fusion_bytes(self, fusion: Instruction) -> int:
        (callee,) = fusion.called["calls"]
        users: dict[Instruction, list[Instruction]] = defaultdict(list)
        for instruction in self.computations[callee]:
            for operand in instruction.operands:
                users[operand].append(instruction)
        total = 0
        for parameter in self.computations[callee]:
            if parameter.op != "parameter":
                continue
            arrays, reads = fusion.operands[int(parameter.argument)].result, users[parameter]
            if reads and all(_touches_slice(user, parameter) for user in reads):
                sliced = sum(user.result[0].bytes for user in reads if user.op == "dynamic-slice")
                total += sliced if arrays and arrays[0].in_hbm else 0
            else:
                total += _hbm(arrays)
        root = _behind_bitcasts(self._root(callee))
        parts = root.operands if root.op == "tuple" else [root]
        if len(parts) != len(fusion.result):
            return total + _hbm(fusion.result)
        for part, array in zip(map(_behind_bitcasts, parts), fusion.result, strict=True):
            if part.op == "dynamic-update-slice" and array.in_hbm:
                total += part.operands[1].result[0].bytes
            else:
                total += _hbm([array])
        return total


def parse(text: str) -> Program:
    """Returns the program of a text from `jax.stages.Compiled.as_text`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif parts := _INSTRUCTION.match(line):
            current[parts["name"]] = _instruction(parts, current)
    return Program({name: list(body.values()) for name, body in computations.items()}, entry)


def _instruction(parts: re.Match[str], earlier: dict[str, Instruction]) -> Instruction:
    op, argument, attributes = parts["op"], parts["argument"], parts["attributes"] or ""
    result = []
    for kind, bits, dimensions, layout in _ARRAY.findall(parts["type"]):
        shape = _integers(dimensions)
        size = math.prod(shape) * (8 if kind == "pred" else int(bits or 0)) // 8
        result.append(Array(shape, size, "S(" not in layout))
    operands = [earlier[name] for name in _NAME.findall(argument) if name in earlier]
    called = {}
    if op in _CALLERS or op.startswith("async"):
        called = {key: _NAME.findall(names) for key, names in _CALLED.findall(attributes)}
    return Instruction(parts["name"], op, result, operands, argument, attributes, called, bool(parts["root"]))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _behind_bitcasts(instruction: Instruction) -> Instruction:
    while instruction.op == "bitcast":
        instruction = instruction.operands[0]
    return instruction


def _touches_slice(user: Instruction, array: Instruction) -> bool:
    """Returns whether an instruction reads or writes a slice of an array, and nothing else of it."""
    slices = user.op in ("dynamic-slice", "dynamic-update-slice")
    return slices and user.operands[0] is array and user.operands.count(array) == 1


def _hbm(arrays: list[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _group_size(attributes: str) -> int:
    """Returns the devices per group, in any of the three notations of XLA; 1 without groups."""
    groups = re.search(r"replica_groups=(.*)", attributes)
    if groups is None:
        return 1
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}", groups[1]):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if tiled := re.match(r"\[\d+,(\d+)\]", groups[1]):
        return int(tiled[1])
    if listed := re.match(r"\{\{([\d,]*)\}", groups[1]):
        return len(listed[1].split(","))
    raise ValueError(f"unknown replica groups: {groups[1][:80]}")


def _between_slices(attributes: str) -> tuple[str, str, int]:
    """Returns `(name, kind of collective, number of slices)` of a transfer between TPU slices."""
    values = dict(re.findall(r'_xla_(\w+)="([^"]*)"', attributes))
    name = values.get("host_transfer_rendezvous")
    kind = values.get("megascale_transfer_type", "").lower().replace("_", "-")
    slices = re.match(r"\{([\d,]+)\}x", values.get("megascale_target", ""))
    if not name or kind not in COLLECTIVES or not slices:
        raise ValueError(f"unknown transfer between slices: {attributes[:200]}")
    return name, kind, len(slices[1].split(","))


def _convolution_flops(instruction: Instruction) -> int:
    """Counts products outside the padding; XLA's TPU compiler writes batched products like this."""
    left, right = (operand.result[0].shape for operand in instruction.operands[:2])
    lhs, rhs, out = re.split("_|->", instruction.attribute(r"dim_labels=([\w>\-]+)"))
    window = dict(part.split("=") for part in instruction.attribute(r"window=\{([^}]*)\}").split())
    total = 2 * left[lhs.index("b")] * right[rhs.index("i")] * right[rhs.index("o")]
    for number in range(len(lhs) - 2):
        axis, values = str(number), {key: value.split("x")[number] for key, value in window.items()}
        stride, step, dilation = (int(values.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(values.get("pad", "0").split("_")[0])
        reach = (left[lhs.index(axis)] - 1) * step
        total *= sum(
            0 <= position <= reach and position % step == 0
            for o in range(instruction.result[0].shape[out.index(axis)])
            for tap in range(right[rhs.index(axis)])
            for position in [o * stride - low + tap * dilation]
        )
    return total
