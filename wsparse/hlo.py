"""What a compiled XLA program does in one call on one device, read from its text.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here every instruction is
counted as often as it runs: a loop whose condition compares a counter with a constant (a scan over layers or
steps) by the way from the counter's start to that constant over its step, a loop that stops when its data say
so (a search) by the bound in its name, a scope `at_most_N_passes` (once without), and the pieces that XLA
makes of one asynchronous collective as one.
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
    """One array of an instruction's type."""

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
    """A collective, as often as it runs.

    Attributes:
      kind: one of `COLLECTIVES`.
      count: times it runs in one call.
      bytes: of one run: the larger of what one device puts in and what it gets out.
      group: devices that take part in it together.
      path: where in the program it comes from, as jax names operations.
      in_search: it runs in a loop whose length the data decide; `count` is then a bound.
      between_slices: it crosses the network between TPU slices, and `group` counts slices.
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
      computations: by name.
      entry: the name of the one that is called.
    """

    computations: dict[str, Computation]
    entry: str

    def executions(self) -> tuple[Counter[str], set[str]]:
        """How often each computation runs in one call, and those that run inside a search."""
        runs: Counter[str] = Counter()
        searching: set[str] = set()

        def visit(name: str, times: int, in_search: bool) -> None:
            runs[name] += times
            if in_search:
                searching.add(name)
            for each in self.computations[name].values():
                if each.op == "while":
                    (condition,) = _called(each, "condition")
                    (body,) = _called(each, "body")
                    trips, is_search = self._trips(self.computations[name], each, condition, body)
                    visit(body, times * trips, in_search or is_search)
                    visit(condition, times * trips, in_search or is_search)
                elif each.op in ("fusion", "call", "conditional") or each.op.startswith("async"):
                    keys = ("calls", "to_apply", "true_computation", "false_computation",
                            "branch_computations", "called_computations")  # fmt: skip
                    for callee in _called(each, *keys):
                        visit(callee, times, in_search)

        visit(self.entry, 1, False)
        return runs, searching

    def _trips(
        self, around: Computation, loop: Instruction, condition: str, body: str
    ) -> tuple[int, bool]:
        """`(iterations, whether that is a bound)` of a loop in the computation `around`."""
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
        """Where a loop's counter begins: not at 0 where XLA made the first iterations apart from it."""
        state = around.get(loop.operands[0])
        value = around.get(state.operands[index]) if state and state.op == "tuple" else None
        while value and value.op in ("copy", "bitcast"):
            value = around[value.operands[0]]
        return int(value.operands[0]) if value and value.op == "constant" else 0

    def _step(self, body: str, index: int) -> int:
        """What a loop adds to its counter: more than 1 where XLA put several iterations into one."""
        instructions = self.computations[body]
        results = _root(instructions)
        if results.op == "tuple":
            new = instructions[results.operands[index]]
            if new.op == "fusion":
                instructions = self.computations[_called(new, "calls")[0]]
                new = _root(instructions)
            added = [instructions[operand] for operand in new.operands if operand in instructions]
            constants = [int(each.operands[0]) for each in added if each.op == "constant"]
            if new.op == "add" and constants:
                return constants[0]
        return 1

    def walk(self) -> Iterator[tuple[str, int, bool, Instruction]]:
        """`(computation, times it runs, inside a search, instruction)` for everything that runs."""
        runs, searching = self.executions()
        for name, times in runs.items():
            for each in self.computations[name].values():
                yield name, times, name in searching, each

    def matmul_flops(self) -> int:
        """Floating-point operations of matrix products: two for every product of two numbers.

        Those of a Pallas kernel are what it was declared with (`pallas.CostEstimate`).
        """
        total = 0
        for name, times, _, each in self.walk():
            if each.op in ("dot", "convolution"):
                left, right = (self.computations[name][o].result[0] for o in each.operands[:2])
                count = _dot_flops if each.op == "dot" else _convolution_flops
                total += times * count(each, left, right)
            elif each.op == "custom-call" and (
                declared := re.search(r'"cost_estimate":\{"flops":"(\d+)"', each.attributes)
            ):
                total += times * int(declared[1])
        return total

    def collectives(self) -> list[Collective]:
        """Every collective; the pieces of an asynchronous one, which share a channel, are one."""
        found: dict[str, Collective] = {}
        for name, times, in_search, each in self.walk():
            if each.op in ("send", "recv") and "_xla_megascale_transfer_type" in each.attributes:
                # A pair of them is one collective: what is sent, and what comes back.
                key, kind, slices = _between_slices(each.attributes)
                moved = each.result[0].bytes
                if key not in found or found[key].bytes < moved:
                    found[key] = Collective(kind, times, moved, slices, "", in_search, True)
                continue
            kind = each.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if name.lstrip("%").startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            results = [array.bytes for array in each.result]
            moved = max(results) if each.op.endswith("-start") else sum(results)
            if kind == "reduce-scatter":
                moved = max(
                    moved,
                    sum(
                        array.bytes
                        for operand in each.operands
                        for array in self.computations[name][operand].result
                    ),
                )
            path = re.search(r'op_name="([^"]*)"', each.attributes)
            channel = re.search(r"channel_id=(\d+)", each.attributes)
            key = f"{kind} {channel[1]}" if channel else f"{name} {each.name}"
            if key not in found or found[key].count < times:
                group = _group_size(each.attributes)
                where = path[1] if path else ""
                found[key] = Collective(kind, times, moved, group, where, in_search)
        return list(found.values())

    def hbm_bytes(self) -> int:
        """Bytes that instructions read from and write to device memory.

        Fusions are counted by what they read of their operands (the slice, where they slice) and write.
        What XLA keeps in a core's own memory costs nothing.
        """
        total = 0
        fused = {
            callee
            for computation in self.computations.values()
            for each in computation.values()
            if each.op == "fusion"
            for callee in _called(each, "calls")
        }
        for name, times, _, each in self.walk():
            if name not in fused:
                total += times * self._bytes(self.computations[name], each)
        return total

    def _bytes(self, computation: Computation, each: Instruction) -> int:
        if each.op in _FREE or each.op.endswith(("-done", "-update")):
            return 0
        if each.op == "copy-start":
            return _hbm(each.result[:2])
        if each.op in ("send", "recv"):
            return _hbm(each.result[:1])
        if each.op.endswith("-start"):
            return _hbm(each.result[:1] and [max(each.result, key=lambda array: array.bytes)])
        operands = [
            computation[operand].result for operand in each.operands if operand in computation
        ]
        if each.op == "dynamic-slice" or each.op == "slice":
            return 2 * _hbm(each.result)
        if each.op == "dynamic-update-slice":
            return 2 * _hbm(operands[1])
        if each.op == "fusion":
            (callee,) = _called(each, "calls")
            return self._fusion_bytes(self.computations[callee], operands, each.result)
        return _hbm(each.result) + sum(_hbm(operand) for operand in operands)

    def _fusion_bytes(
        self, fused: Computation, operands: list[list[Array]], result: list[Array]
    ) -> int:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for each in fused.values():
            for operand in each.operands:
                users[operand].append(each)
        total = 0
        for each in fused.values():
            if each.op != "parameter":
                continue
            arrays = operands[int(each.operands[0])]
            reads = users[each.name]
            if reads and all(
                user.op in ("dynamic-slice", "dynamic-update-slice")
                and user.operands[0] == each.name
                and each.name not in user.operands[1:]
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
    """Parse the text of a compiled program (`jax.stages.Compiled.as_text`)."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            each = _instruction(found[2], found[3], bool(found[1]))
            current[each.name] = each
    return Program(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, _, rest = text[end:].lstrip(") ").partition("(")
    close = _closing(f"({rest}", 0) - 1
    inside, attributes = rest[: close - 1], rest[close:]
    arrays = [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), "S(" not in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(text[:end])
    ]
    operands = re.findall(r"%([\w.\-]+)", inside) or [part for part in [inside.strip()] if part]
    return Instruction(name, kind, arrays, operands, attributes, is_root)


def _root(computation: Computation) -> Instruction:
    """The instruction whose result is the computation's."""
    (root,) = (each for each in computation.values() if each.is_root)
    return root


def _closing(text: str, start: int) -> int:
    """The position just after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    return len(text)


def _called(each: Instruction, *keys: str) -> list[str]:
    """Names of the computations under these attributes."""
    names = []
    for key in keys:
        if found := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", each.attributes):
            names += re.findall(r"%([\w.\-]+)", found[1])
    return names


def _hbm(arrays: list[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _group_size(attributes: str) -> int:
    """Devices per group, in any of the three ways XLA writes groups; 1 where none are given.

    Raises:
      ValueError: they are written in another way.
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
    """A transfer between TPU slices: `(its own name, kind of collective, slices that take part)`.

    Raises:
      ValueError: it is written in another way.
    """
    values = dict(re.findall(r'_xla_(\w+)="([^"]*)"', attributes))
    name = values.get("host_transfer_rendezvous")
    kind = values.get("megascale_transfer_type", "").lower().replace("_", "-")
    slices = re.match(r"\{([\d,]+)\}x", values.get("megascale_target", ""))
    if not name or kind not in COLLECTIVES or not slices:
        raise ValueError(f"unknown transfer between slices: {attributes[:200]}")
    return name, kind, len(slices[1].split(","))


def _dot_flops(each: Instruction, left: Array, right: Array) -> int:
    del right
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
    axes = [int(axis) for axis in found[1].split(",")] if found and found[1] else []
    return 2 * math.prod(each.result[0].shape) * math.prod(left.shape[axis] for axis in axes)


def _convolution_flops(each: Instruction, left: Array, right: Array) -> int:
    """Products that touch no padding, which is how XLA's TPU compiler writes batched products."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    assert labels is not None, each.attributes
    lhs, rhs, out = labels.groups()
    result = each.result[0]
    total = (
        2 * left.shape[lhs.index("b")] * right.shape[rhs.index("i")] * right.shape[rhs.index("o")]
    )
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    for number in range(len(lhs) - 2):
        axis = str(number)
        values = {
            key: settings[key].split("x")[number] if key in settings else default
            for key, default in {
                "stride": "1",
                "pad": "0_0",
                "lhs_dilate": "1",
                "rhs_dilate": "1",
            }.items()
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
