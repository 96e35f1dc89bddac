"""Counts the work of a compiled XLA program in one call on one device, from its text.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here every instruction is
counted as often as it runs. The trip count of a loop whose condition compares a counter with a constant (a
scan over layers or steps) is the distance from the counter's start to that constant, divided by its step; the
compiler for TPUs does not annotate it. A loop that stops depending on its data (a search) is counted by the
bound in its name, a scope `at_most_N_passes` (once without). The parts of one asynchronous collective count
as one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
         "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"}  # fmt: skip
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


class Array(NamedTuple):
    """An array in the type of an instruction."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", "", self.dtype.split("e")[0]) or 0)
        return math.prod(self.shape) * bits // 8


class Instruction(NamedTuple):
    """One line of a computation: `name = result op(operands), attributes`."""

    name: str
    op: str
    result: list[Array]
    operands: list[str]
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """A collective, and how often it runs.

    Attributes:
      kind: One of `COLLECTIVES`.
      count: Executions in one call.
      bytes: Bytes of one execution: the larger of a device's input and output.
      group: Number of devices that take part together.
      path: Name of the operation in the JAX program.
      in_search: Whether it is in a loop whose length depends on data; `count` is then a bound.
      between_slices: Whether it crosses the network between TPU slices; `group` then counts slices.
    """

    kind: str
    count: int
    bytes: int
    group: int
    path: str
    in_search: bool
    between_slices: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program.

    Attributes:
      computations: Computations by name.
      entry: Name of the computation that is called.
    """

    computations: dict[str, Computation]
    entry: str

    def executions(self) -> tuple[Counter[str], set[str]]:
        """Returns executions of every computation in one call, and the computations inside a search."""
        runs: Counter[str] = Counter()
        searching: set[str] = set()

        def visit(name: str, times: int, in_search: bool) -> None:
            runs[name] += times
            if in_search:
                searching.add(name)
            for instruction in self.computations[name].values():
                if instruction.op == "while":
                    (condition,) = _called(instruction, "condition")
                    (body,) = _called(instruction, "body")
                    trips, is_search = self._trips(self.computations[name], instruction, condition, body)
                    visit(body, times * trips, in_search or is_search)
                    visit(condition, times * trips, in_search or is_search)
                elif instruction.op in ("fusion", "call", "conditional") or instruction.op.startswith(
                    "async"
                ):
                    keys = ("calls", "to_apply", "true_computation", "false_computation",
                            "branch_computations", "called_computations")  # fmt: skip
                    for callee in _called(instruction, *keys):
                        visit(callee, times, in_search)

        visit(self.entry, 1, False)
        return runs, searching

    def _trips(self, around: Computation, loop: Instruction, condition: str, body: str) -> tuple[int, bool]:
        """Returns `(iterations, is_bound)` of a loop in the computation `around`."""
        instructions = self.computations[condition]
        root = _root(instructions)
        if root.op == "compare" and "direction=LT" in root.attributes:
            counter, bound = (instructions[operand] for operand in root.operands)
            if bound.op == "constant":
                place = re.search(r"index=(\d+)", counter.attributes)
                index = int(place[1]) if place else 0
                span = int(bound.operands[0]) - self._start(around, loop, index)
                return -(-span // self._step(body, index)), False
        bounds = re.findall(r"at_most_(\d+)_passes", loop.attributes)
        return int(bounds[-1]) if bounds else 1, True

    def _start(self, around: Computation, loop: Instruction, index: int) -> int:
        """Returns the start of a loop's counter, which is not 0 where XLA peeled the first iterations."""
        state = around.get(loop.operands[0])
        value = around.get(state.operands[index]) if state and state.op == "tuple" else None
        while value and value.op in ("copy", "bitcast"):
            value = around[value.operands[0]]
        return int(value.operands[0]) if value and value.op == "constant" else 0

    def _step(self, body: str, index: int) -> int:
        """Returns the step of a loop's counter, which is more than 1 where XLA unrolled the loop."""
        instructions = self.computations[body]
        results = _root(instructions)
        if results.op == "tuple":
            new = instructions[results.operands[index]]
            if new.op == "fusion":
                instructions = self.computations[_called(new, "calls")[0]]
                new = _root(instructions)
            added = [instructions[operand] for operand in new.operands if operand in instructions]
            constants = [
                int(instruction.operands[0]) for instruction in added if instruction.op == "constant"
            ]
            if new.op == "add" and constants:
                return constants[0]
        return 1

    def walk(self) -> Iterator[tuple[str, int, bool, Instruction]]:
        """Yields `(computation, executions, in_search, instruction)` of everything that runs."""
        runs, searching = self.executions()
        for name, times in runs.items():
            for instruction in self.computations[name].values():
                yield name, times, name in searching, instruction

    def matmul_flops(self) -> int:
        """Returns the FLOPs of matrix products: two for every product of two numbers.

        Those of a Pallas kernel are as declared in its `pallas.CostEstimate`.
        """
        total = 0
        for name, times, _, instruction in self.walk():
            if instruction.op in ("dot", "convolution"):
                left, right = (self.computations[name][o].result[0] for o in instruction.operands[:2])
                count = _dot_flops if instruction.op == "dot" else _convolution_flops
                total += times * count(instruction, left, right)
            elif instruction.op == "custom-call" and (
                declared := re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
            ):
                total += times * int(declared[1])
        return total

    def collectives(self) -> list[Collective]:
        """Returns every collective; the parts of an asynchronous one, which share a channel, count as one."""
        collectives: dict[str, Collective] = {}
        for name, times, in_search, instruction in self.walk():
            if (
                instruction.op in ("send", "recv")
                and "_xla_megascale_transfer_type" in instruction.attributes
            ):
                # A pair of them is one collective: the data that is sent, and the data that comes back.
                key, kind, slices = _between_slices(instruction.attributes)
                moved = instruction.result[0].bytes
                if key not in collectives or collectives[key].bytes < moved:
                    collectives[key] = Collective(kind, times, moved, slices, "", in_search, True)
                continue
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if name.lstrip("%").startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            results = [array.bytes for array in instruction.result]
            moved = max(results) if instruction.op.endswith("-start") else sum(results)
            if kind == "reduce-scatter":
                moved = max(
                    moved,
                    sum(
                        array.bytes
                        for operand in instruction.operands
                        for array in self.computations[name][operand].result
                    ),
                )
            path = re.search(r'op_name="([^"]*)"', instruction.attributes)
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = f"{kind} {channel[1]}" if channel else f"{name} {instruction.name}"
            if key not in collectives or collectives[key].count < times:
                group = _group_size(instruction.attributes)
                where = path[1] if path else ""
                collectives[key] = Collective(kind, times, moved, group, where, in_search)
        return list(collectives.values())

    def hbm_bytes(self) -> int:
        """Returns the bytes that instructions read from and write to device memory.

        Fusions count what they read of their operands (the slice, where they slice) and what they write.
        Arrays that XLA keeps in a core's own memory cost nothing.
        """
        total = 0
        fused = {
            callee
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.op == "fusion"
            for callee in _called(instruction, "calls")
        }
        for name, times, _, instruction in self.walk():
            if name not in fused:
                total += times * self._bytes(self.computations[name], instruction)
        return total

    def _bytes(self, computation: Computation, instruction: Instruction) -> int:
        if instruction.op in _FREE or instruction.op.endswith(("-done", "-update")):
            return 0
        if instruction.op == "copy-start":
            return _hbm(instruction.result[:2])
        if instruction.op in ("send", "recv"):
            return _hbm(instruction.result[:1])
        if instruction.op.endswith("-start"):
            return _hbm(instruction.result[:1] and [max(instruction.result, key=lambda array: array.bytes)])
        operands = [computation[operand].result for operand in instruction.operands if operand in computation]
        if instruction.op == "dynamic-slice" or instruction.op == "slice":
            return 2 * _hbm(instruction.result)
        if instruction.op == "dynamic-update-slice":
            return 2 * _hbm(operands[1])
        if instruction.op == "fusion":
            (callee,) = _called(instruction, "calls")
            return self._fusion_bytes(self.computations[callee], operands, instruction.result)
        return _hbm(instruction.result) + sum(_hbm(operand) for operand in operands)

    def _fusion_bytes(self, fused: Computation, operands: list[list[Array]], result: list[Array]) -> int:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in fused.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        total = 0
        for instruction in fused.values():
            if instruction.op != "parameter":
                continue
            arrays = operands[int(instruction.operands[0])]
            reads = users[instruction.name]
            if reads and all(
                user.op in ("dynamic-slice", "dynamic-update-slice")
                and user.operands[0] == instruction.name
                and instruction.name not in user.operands[1:]
                for user in reads
            ):
                sliced = sum(user.result[0].bytes for user in reads if user.op == "dynamic-slice")
                total += sliced if arrays and arrays[0].in_hbm else 0
            else:
                total += _hbm(arrays)
        root = _root(fused)
        while root.op == "bitcast":
            root = fused[root.operands[0]]
        parts = [fused[o] for o in root.operands] if root.op == "tuple" else [root]
        if len(parts) != len(result):
            return total + _hbm(result)
        for part, array in zip(parts, result, strict=True):
            while part.op == "bitcast":
                part = fused[part.operands[0]]
            if part.op == "dynamic-update-slice" and array.in_hbm:
                total += fused[part.operands[1]].result[0].bytes
            else:
                total += _hbm([array])
        return total


def parse(text: str) -> Program:
    """Returns the program of a text from `jax.stages.Compiled.as_text`."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif parts := _INSTRUCTION.match(line):
            instruction = _instruction(parts[2], parts[3], bool(parts[1]))
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, _, tail = text[end:].lstrip(") ").partition("(")
    close = _closing(f"({tail}", 0) - 1
    inside, attributes = tail[: close - 1], tail[close:]
    arrays = [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text[:end])
    ]
    operands = re.findall(r"%([\w.\-]+)", inside) or [part for part in [inside.strip()] if part]
    return Instruction(name, kind, arrays, operands, attributes, is_root)


def _root(computation: Computation) -> Instruction:
    """Returns the instruction whose result is the result of the computation."""
    (root,) = (instruction for instruction in computation.values() if instruction.is_root)
    return root


def _closing(text: str, start: int) -> int:
    """Returns the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    return len(text)


def _called(instruction: Instruction, *keys: str) -> list[str]:
    """Returns the names of the computations in these attributes."""
    names = []
    for key in keys:
        if names_of := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.attributes):
            names += re.findall(r"%([\w.\-]+)", names_of[1])
    return names


def _hbm(arrays: list[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _group_size(attributes: str) -> int:
    """Returns the devices per group, in any of the three notations of XLA; 1 without groups.

    Raises:
      ValueError: The notation is unknown.
    """
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
    """Returns `(name, kind of collective, number of slices)` of a transfer between TPU slices.

    Raises:
      ValueError: The notation is unknown.
    """
    values = dict(re.findall(r'_xla_(\w+)="([^"]*)"', attributes))
    name = values.get("host_transfer_rendezvous")
    kind = values.get("megascale_transfer_type", "").lower().replace("_", "-")
    slices = re.match(r"\{([\d,]+)\}x", values.get("megascale_target", ""))
    if not name or kind not in COLLECTIVES or not slices:
        raise ValueError(f"unknown transfer between slices: {attributes[:200]}")
    return name, kind, len(slices[1].split(","))


def _dot_flops(instruction: Instruction, left: Array, right: Array) -> int:
    del right
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in found[1].split(",")] if found and found[1] else []
    return 2 * math.prod(instruction.result[0].shape) * math.prod(left.shape[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, left: Array, right: Array) -> int:
    """Counts products outside the padding; XLA's TPU compiler writes batched products like this."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.attributes
    lhs, rhs, out = labels.groups()
    result = instruction.result[0]
    total = 2 * left.shape[lhs.index("b")] * right.shape[rhs.index("i")] * right.shape[rhs.index("o")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    for number in range(len(lhs) - 2):
        axis = str(number)
        values = {
            key: settings[key].split("x")[number] if key in settings else default
            for key, default in {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}.items()
        }
        low = int(values["pad"].split("_")[0])
        stride, spread, dilation = (int(values[k]) for k in ("stride", "lhs_dilate", "rhs_dilate"))
        reach = (left.shape[lhs.index(axis)] - 1) * spread
        total *= sum(
            0 <= position <= reach and position % spread == 0
            for o in range(result.shape[out.index(axis)])
            for tap in range(right.shape[rhs.index(axis)])
            for position in [o * stride - low + tap * dilation]
        )
    return total
