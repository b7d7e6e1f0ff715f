"""What a compiled program does on one device: products, exchanges with other devices, memory traffic."""

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
"""Exchanges whose bytes the program does not state, or that none of the steps here has: they are named, not counted."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective operation.

    Attributes:
      kind: Of :data:`KINDS`.
      bytes: Of the whole array that a group has in the end (all-gather) or in the beginning (reduce-scatter); of each
        member's array else.
      groups: `int[groups, members]`; of a collective-permute `int[pairs, 2]`.
      times: How often it runs in the program.
      name: Of the first instruction of its form.
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    name: str

    @property
    def members(self) -> int:
        """Of a group."""
        return 2 if self.kind == "collective-permute" else self.groups.shape[1]

    @property
    def sent(self) -> float:
        """Bytes that one device sends each time: what rings of n members need.

        (n − 1)/n of the array for an all-gather, a reduce-scatter and an all-to-all, twice that for an all-reduce;
        a collective-permute sends its array once, from the devices that do not keep it.
        """
        if self.kind == "collective-permute":
            return self.bytes if any(source != target for source, target in self.groups) else 0
        ring = (self.members - 1) / self.members
        return self.bytes * ring * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of a program, on one device.

    Attributes:
      dots: Floating-point operations of matrix products and convolutions, a multiplication and an addition each one.
      kernels: Those of kernels that are no HLO.
      exchanges: Equal ones are one, with how often they run.
      traffic: Bytes to and from memory.
      unknown: Calls and exchanges that are not counted for want of knowing what they do, and how often each runs.
    """

    dots: float = 0.0
    kernels: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
    unknown: tuple[tuple[str, int], ...] = ()

    @property
    def flops(self) -> float:
        """All that is counted; additions and functions of single elements are not."""
        return self.dots + self.kernels

    def sent(self) -> dict[str, float]:
        """Bytes that one device sends, by the kind of the exchange."""
        total = dict.fromkeys(KINDS, 0.0)
        for one in self.exchanges:
            total[one.kind] += one.sent * one.times
        return total

    def runs(self) -> dict[str, int]:
        """How often exchanges of each kind run."""
        total = dict.fromkeys(KINDS, 0)
        for one in self.exchanges:
            total[one.kind] += one.times
        return total


def cost(module: Module) -> Cost:
    """Counts what a compiled program does.

    The body of a loop counts as often as it runs, of the branches of a conditional the one with the most operations,
    an asynchronous exchange where it starts.

    Raises:
      ValueError: How often a loop runs cannot be told (the message names it); an exchange has groups of unknown form,
        or steps and no beginning.
    """
    _check_begun(module)
    return _computation(module, module.entry, {}, fused=False)


def _check_begun(module: Module) -> None:
    """Each exchange that is done in steps begins somewhere, where it is counted."""
    begun, continued = set(), {}
    for where in module.computations.values():
        for one in where:
            if one.opcode in KINDS and "chain_id" in one.attributes:
                channel = one.value("channel_id")
                if traffic.continues(where, one):
                    continued[channel] = one.name
                else:
                    begun.add(channel)
    for channel, name in continued.items():
        if channel not in begun:
            raise ValueError(f"The exchange of channel {channel} has a step, %{name}, and no beginning.")


def _computation(module: Module, where: Computation, known: loops.Known, *, fused: bool) -> Cost:
    return _sum(_instruction(module, where, one, known, fused=fused) for one in where)


def _instruction(module: Module, where: Computation, one: Instruction, known: loops.Known, *, fused: bool) -> Cost:
    opcode, computations = traffic.operation(one), module.computations
    moved = Traffic() if fused else traffic.of_instruction(module, where, one)
    if opcode == "while":
        times = loops.trip_count(module, where, one, known)
        body = computations[one.called("body") or ""]
        inner = loops.unchanged(module, body, loops.initial(module, where, one, known))
        return _times(_computation(module, body, inner, fused=False), times)
    if opcode == "conditional":
        branches = [_computation(module, computations[name], {}, fused=False) for name in one.branches()]
        return max(branches, key=lambda branch: (branch.flops, branch.traffic.device))
    if opcode in ("call", "async"):
        called = computations[one.called("to_apply") or one.called("calls") or ""]
        return _computation(module, called, {}, fused=False)
    if opcode == "fusion":
        called = computations[one.called("calls") or ""]
        scattered = _reduce_scatter(module, called)
        if scattered is not None:
            return Cost(exchanges=(scattered,), traffic=moved)
        return _sum((_computation(module, called, {}, fused=True), Cost(traffic=moved)))
    if opcode in KINDS:
        if traffic.continues(where, one):
            return Cost()
        return Cost(exchanges=(_exchange(module, where, one),), traffic=moved)
    if opcode in UNCOUNTED:
        return Cost(traffic=moved, unknown=((opcode, 1),))
    if opcode == "dot":
        return Cost(dots=_dot(where, one), traffic=moved)
    if opcode == "ragged-dot":
        return Cost(dots=2 * where.operand(one).shape.elements * one.shape.dims[-1], traffic=moved)
    if opcode == "convolution":
        return Cost(dots=_convolution(where, one), traffic=moved)
    if opcode == "custom-call":
        flops, unknown = kernel_flops(where, one)
        return Cost(kernels=flops, traffic=moved, unknown=((unknown, 1),) if unknown else ())
    return Cost(traffic=moved)


def _dot(where: Computation, one: Instruction) -> float:
    left = where.operand(one).shape
    return 2 * one.shape.elements * math.prod(left.dims[axis] for axis in one.axes("lhs_contracting_dims"))


def _convolution(where: Computation, one: Instruction) -> float:
    """Products with what is there: padding and the holes of dilated inputs cost nothing.

    XLA writes matrix products for TPUs as convolutions, and their batch axes as dilated windows.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if labels is None:
        raise ValueError(f"%{one.name} in %{where.name} has no dim_labels.")
    left, right = where.operand(one, 0).shape.dims, where.operand(one, 1).shape.dims
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(letter for letter in labels[1] if letter.isdigit())

    def field(name: str, number: int, default: str) -> list[int]:
        values = fields[name].split("x") if name in fields else [default] * len(spatial)
        return [int(value) for value in values[number].split("_")]

    valid = 1
    for number, letter in enumerate(spatial):
        size, outputs = left[labels[1].index(letter)], one.shape.dims[labels[3].index(letter)]
        width = right[labels[2].index(letter)]
        (stride,), (low, *_) = field("stride", number, "1"), field("pad", number, "0_0")
        (dilated,), (apart,) = field("lhs_dilate", number, "1"), field("rhs_dilate", number, "1")
        places = stride * np.arange(outputs)[:, None] + apart * np.arange(width)[None] - low
        valid *= int(np.sum((places >= 0) & (places <= dilated * (size - 1)) & (places % dilated == 0)))
    batches = re.search(r"batch_group_count=(\d+)", one.attributes)
    batch = left[labels[1].index("b")] // (int(batches[1]) if batches else 1)
    return 2 * batch * right[labels[2].index("i")] * right[labels[2].index("o")] * valid


def _exchange(module: Module, where: Computation, one: Instruction) -> Exchange:
    kind = traffic.operation(one) or one.opcode
    if kind == "collective-permute":
        return Exchange(kind, where.operand(one).shape.bytes, pairs(one.attributes), 1, one.name)
    groups = replica_groups(one.attributes, module.partitions)
    size = sum(array.bytes for name in one.operands for array in where.instructions[name].shapes)
    return Exchange(kind, size * (groups.shape[1] if kind == "all-gather" else 1), groups, 1, one.name)


def _reduce_scatter(module: Module, called: Computation) -> Exchange | None:
    """The reduce-scatter that a fusion is for TPUs: an all-reduce of which each device keeps its slice."""
    reduced = [one for one in called if one.opcode == "all-reduce"]
    if not reduced or not any(one.opcode == "dynamic-slice" for one in called):
        return None
    return dataclasses.replace(_exchange(module, called, reduced[0]), kind="reduce-scatter")


def _sum(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    together: dict[tuple, Exchange] = {}
    for one in (exchange for part in costs for exchange in part.exchanges):
        form = (one.kind, one.bytes, one.groups.shape, one.groups.tobytes())
        seen = together.get(form)
        together[form] = dataclasses.replace(seen, times=seen.times + one.times) if seen else one
    unknown: collections.Counter[str] = collections.Counter()
    for part in costs:
        unknown.update(dict(part.unknown))
    return Cost(
        sum(part.dots for part in costs),
        sum(part.kernels for part in costs),
        tuple(together.values()),
        sum((part.traffic for part in costs), Traffic()),
        tuple(unknown.items()),
    )


def _times(one: Cost, times: int) -> Cost:
    return Cost(
        one.dots * times,
        one.kernels * times,
        tuple(dataclasses.replace(exchange, times=exchange.times * times) for exchange in one.exchanges),
        one.traffic * times,
        tuple((name, count * times) for name, count in one.unknown),
    )
