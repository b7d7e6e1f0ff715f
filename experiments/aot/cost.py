"""The cost of a compiled program on one device: products, exchanges with other devices, memory traffic."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from experiments.aot import loops, traffic
from experiments.aot.groups import pairs, replica_groups
from experiments.aot.hlo import Computation, Instruction, Module
from experiments.aot.kernels import kernel_flops
from experiments.aot.traffic import Traffic

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
UNCOUNTED = ("ragged-all-to-all", "collective-broadcast", "send", "recv")
"""Exchanges that are listed but not counted, since the program does not state their bytes or no step has them."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective operation.

    Attributes:
      kind: One of :data:`KINDS`.
      bytes: The size of the gathered array of a group (all-gather), of the array before it is scattered
        (reduce-scatter), otherwise of each member's array.
      groups: `int[groups, members]`, or `int[pairs, 2]` for a collective-permute.
      times: The number of times that it runs in the program.
      name: The name of the first instruction of its form.
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    name: str

    @property
    def members(self) -> int:
        """The number of devices in a group."""
        return 2 if self.kind == "collective-permute" else self.groups.shape[1]

    @property
    def sent(self) -> float:
        """The bytes that one device sends each time, with algorithms on rings of n members.

        (n − 1)/n of the array for an all-gather, a reduce-scatter and an all-to-all, twice that for an all-reduce. A
        collective-permute sends its array once, except from devices to themselves.
        """
        if self.kind == "collective-permute":
            return self.bytes if any(source != target for source, target in self.groups) else 0
        ring = (self.members - 1) / self.members
        return self.bytes * ring * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one run of a program on one device.

    Attributes:
      dots: Floating-point operations of matrix products and convolutions, counting multiplications and additions.
      kernels: Floating-point operations of custom calls.
      exchanges: Collective operations; equal ones are merged.
      traffic: Bytes to and from memory.
      unknown: Calls and exchanges that are not counted, since their cost is unknown, and how often each runs.
    """

    dots: float = 0.0
    kernels: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
    unknown: tuple[tuple[str, int], ...] = ()

    @property
    def flops(self) -> float:
        """All counted operations; elementwise operations are not counted."""
        return self.dots + self.kernels

    def sent(self) -> dict[str, float]:
        """Returns the bytes that one device sends, by the kind of exchange."""
        total = dict.fromkeys(KINDS, 0.0)
        for exchange in self.exchanges:
            total[exchange.kind] += exchange.sent * exchange.times
        return total

    def runs(self) -> dict[str, int]:
        """Returns the number of exchanges that run, by kind."""
        total = dict.fromkeys(KINDS, 0)
        for exchange in self.exchanges:
            total[exchange.kind] += exchange.times
        return total


def cost(module: Module) -> Cost:
    """Returns the cost of a compiled program.

    The body of a loop counts once per iteration, a conditional as its branch with the most operations, and an
    asynchronous exchange when it starts.

    Raises:
      ValueError: The trip count of a loop is unknown, the groups of an exchange have an unknown form, or an exchange
        has steps but no start.
    """
    _check_started(module)
    return _computation(module, module.entry, {}, fused=False)


def _check_started(module: Module) -> None:
    """Raises a ValueError if an exchange with several steps has no start, which would be counted."""
    started, continued = set(), {}
    for computation in module.computations.values():
        for instruction in computation:
            if instruction.opcode in KINDS and "chain_id" in instruction.attributes:
                channel = instruction.value("channel_id")
                if traffic.continues(computation, instruction):
                    continued[channel] = instruction.name
                else:
                    started.add(channel)
    for channel, name in continued.items():
        if channel not in started:
            raise ValueError(f"The exchange of channel {channel} has a step, %{name}, but no start.")


def _computation(module: Module, computation: Computation, known_values: loops.Known, *, fused: bool) -> Cost:
    return _sum(
        _instruction(module, computation, instruction, known_values, fused=fused) for instruction in computation
    )


def _instruction(
    module: Module, computation: Computation, instruction: Instruction, known_values: loops.Known, *, fused: bool
) -> Cost:
    opcode, computations = traffic.operation(instruction), module.computations
    bytes_moved = Traffic() if fused else traffic.instruction_traffic(module, computation, instruction)
    if opcode == "while":
        times = loops.trip_count(module, computation, instruction, known_values)
        body = computations[instruction.called("body") or ""]
        inner = loops.unchanged(module, body, loops.initial(module, computation, instruction, known_values))
        return _times(_computation(module, body, inner, fused=False), times)
    if opcode == "conditional":
        branches = [_computation(module, computations[name], {}, fused=False) for name in instruction.branches()]
        return max(branches, key=lambda branch: (branch.flops, branch.traffic.device))
    if opcode in ("call", "async"):
        called = computations[instruction.called("to_apply") or instruction.called("calls") or ""]
        return _computation(module, called, {}, fused=False)
    if opcode == "fusion":
        called = computations[instruction.called("calls") or ""]
        scattered = _reduce_scatter(module, called)
        if scattered is not None:
            return Cost(exchanges=(scattered,), traffic=bytes_moved)
        return _sum((_computation(module, called, {}, fused=True), Cost(traffic=bytes_moved)))
    if opcode in KINDS:
        if traffic.continues(computation, instruction):
            return Cost()
        return Cost(exchanges=(_exchange(module, computation, instruction),), traffic=bytes_moved)
    if opcode in UNCOUNTED:
        return Cost(traffic=bytes_moved, unknown=((opcode, 1),))
    if opcode == "dot":
        return Cost(dots=_dot(computation, instruction), traffic=bytes_moved)
    if opcode == "ragged-dot":
        return Cost(
            dots=2 * computation.operand(instruction).shape.elements * instruction.shape.dims[-1], traffic=bytes_moved
        )
    if opcode == "convolution":
        return Cost(dots=_convolution(computation, instruction), traffic=bytes_moved)
    if opcode == "custom-call":
        flops, unknown = kernel_flops(computation, instruction)
        return Cost(kernels=flops, traffic=bytes_moved, unknown=((unknown, 1),) if unknown else ())
    return Cost(traffic=bytes_moved)


def _dot(computation: Computation, instruction: Instruction) -> float:
    left = computation.operand(instruction).shape
    return (
        2 * instruction.shape.elements * math.prod(left.dims[axis] for axis in instruction.axes("lhs_contracting_dims"))
    )


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Counts the products of a convolution without padding and the holes of dilated inputs.

    XLA expresses matrix products for TPUs as convolutions, and their batch axes as dilated windows.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"%{instruction.name} in %{computation.name} has no dim_labels.")
    left, right = computation.operand(instruction, 0).shape.dims, computation.operand(instruction, 1).shape.dims
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())

    def field(name: str, number: int, default: str) -> list[int]:
        values = fields[name].split("x") if name in fields else [default] * len(spatial)
        return [int(value) for value in values[number].split("_")]

    valid = 1
    for number, letter in enumerate(spatial):
        size, outputs = left[labels[1].index(letter)], instruction.shape.dims[labels[3].index(letter)]
        width = right[labels[2].index(letter)]
        (stride,), (low, *_) = field("stride", number, "1"), field("pad", number, "0_0")
        (input_dilation,), (kernel_dilation,) = field("lhs_dilate", number, "1"), field("rhs_dilate", number, "1")
        positions = stride * np.arange(outputs)[:, None] + kernel_dilation * np.arange(width)[None] - low
        inside = (positions >= 0) & (positions <= input_dilation * (size - 1))
        valid *= int(np.sum(inside & (positions % input_dilation == 0)))
    batches = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    batch = left[labels[1].index("b")] // (int(batches[1]) if batches else 1)
    return 2 * batch * right[labels[2].index("i")] * right[labels[2].index("o")] * valid


def _exchange(module: Module, computation: Computation, instruction: Instruction) -> Exchange:
    kind = traffic.operation(instruction) or instruction.opcode
    if kind == "collective-permute":
        return Exchange(
            kind, computation.operand(instruction).shape.bytes, pairs(instruction.attributes), 1, instruction.name
        )
    groups = replica_groups(instruction.attributes, module.partitions)
    size = sum(array.bytes for name in instruction.operands for array in computation.instructions[name].shapes)
    return Exchange(kind, size * (groups.shape[1] if kind == "all-gather" else 1), groups, 1, instruction.name)


def _reduce_scatter(module: Module, called: Computation) -> Exchange | None:
    """Returns a fusion's reduce-scatter, which XLA expresses for TPUs as an all-reduce and a slice; None without."""
    reduced = [instruction for instruction in called if instruction.opcode == "all-reduce"]
    if not reduced or not any(instruction.opcode == "dynamic-slice" for instruction in called):
        return None
    return dataclasses.replace(_exchange(module, called, reduced[0]), kind="reduce-scatter")


def _sum(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    merged: dict[tuple, Exchange] = {}
    for exchange in (exchange for part in costs for exchange in part.exchanges):
        form = (exchange.kind, exchange.bytes, exchange.groups.shape, exchange.groups.tobytes())
        equal = merged.get(form)
        merged[form] = dataclasses.replace(equal, times=equal.times + exchange.times) if equal else exchange
    unknown: collections.Counter[str] = collections.Counter()
    for part in costs:
        unknown.update(dict(part.unknown))
    return Cost(
        sum(part.dots for part in costs),
        sum(part.kernels for part in costs),
        tuple(merged.values()),
        sum((part.traffic for part in costs), Traffic()),
        tuple(unknown.items()),
    )


def _times(cost: Cost, times: int) -> Cost:
    return Cost(
        cost.dots * times,
        cost.kernels * times,
        tuple(dataclasses.replace(exchange, times=exchange.times * times) for exchange in cost.exchanges),
        cost.traffic * times,
        tuple((name, count * times) for name, count in cost.unknown),
    )
