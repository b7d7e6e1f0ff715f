"""Bytes that an instruction of a compiled program moves between a device's memory and its cores."""

import dataclasses
import re
from collections.abc import Iterator

from experiments.aot.hlo import DEVICE, HOST, Array, Computation, Instruction, Module

# What moves nothing of itself: names for what is there, and what runs other computations.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
        *("opt-barrier", "add-dependency", "domain", "while", "conditional", "call", "async"),
    )
)
_FREE_TARGETS = frozenset(("AllocateBuffer", "AsyncCollectiveDone", "ConcatBitcast", "AssumeGatherIndicesInBound"))
_VIEWS = ("bitcast", "reshape")
_PARTS = ("dynamic-slice", "slice", "gather")
_START, _ENDS = "-start", ("-done", "-update")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read from and written to a device's memory (`device`), and those to or from the host's (`host`)."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.device + other.device, self.host + other.host)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.device * times, self.host * times)


def of_instruction(module: Module, where: Computation, one: Instruction) -> Traffic:
    """What one instruction moves: each operand read once and its result written once.

    A fusion moves what crosses its border. Of what is sliced only the slice is counted, of what is updated in place
    only the update; of a loop, a call or a conditional nothing, their computations are counted for themselves. Arrays
    that XLA keeps on the chip (in its vector memory) are free, and the padding of the layouts counts.
    """
    if operation(one) in (*_FREE, None) or one.value("custom_call_target") in _FREE_TARGETS:
        return Traffic()
    inner = module.computations.get(one.called("calls") or "")
    moved = list(_fusion(where, one, inner) if inner is not None else _plain(where, one))
    return Traffic(
        sum(size for array, size in moved if array.space == DEVICE),
        sum(size for array, size in moved if array.space == HOST),
    )


def operation(one: Instruction) -> str | None:
    """What an instruction does, asynchronous or not; None where it is the end of what another began."""
    return None if one.opcode.endswith(_ENDS) else one.opcode.removesuffix(_START)


def _results(one: Instruction) -> tuple[Array, ...]:
    """The arrays that an instruction gives, without what the beginning of an asynchronous one hands on."""
    if not one.opcode.endswith(_START) or len(one.nested) < 2:
        return one.shapes
    if one.opcode == "copy-start":  # (result, operand, flag); others are (operands, result, …)
        return one.shapes[: one.nested[0]]
    return one.shapes[one.nested[0] : one.nested[0] + one.nested[1]]


def _plain(where: Computation, one: Instruction) -> Iterator[tuple[Array, float]]:
    """The arrays that an instruction moves, and how many bytes of each."""
    operands = [array for name in one.operands for array in where.instructions[name].shapes]
    opcode, results = operation(one), _results(one)
    if opcode in _PARTS:
        yield operands[0], results[0].padded
        yield results[0], results[0].padded
    elif opcode == "dynamic-update-slice":
        yield operands[1], operands[1].padded
        yield results[0], operands[1].padded
    elif opcode == "scatter":  # what is there, what is new, and what becomes of it
        yield operands[-1], operands[-1].padded
        yield results[0], 2 * operands[-1].padded
    else:
        said = re.search(r'"bytes_accessed":"?(\d+)', one.attributes) if opcode == "custom-call" else None
        if said:
            yield Array("u8", (int(said[1]),)), int(said[1])
        else:
            yield from ((array, array.padded) for array in (*operands, *results))


def _fusion(where: Computation, one: Instruction, inner: Computation) -> Iterator[tuple[Array, float]]:
    """Likewise of a fusion."""
    if inner.root.value("custom_call_target") in _FREE_TARGETS:
        return
    for number, name in enumerate(one.operands):
        outer = where.instructions[name]
        if len(outer.shapes) != 1 or outer.nested:
            yield from ((array, array.padded) for array in outer.shapes)
            continue
        yield outer.shape, _read(inner, inner.parameters[number])
    if inner.root.value("custom_call_target") == "AsyncCollectiveStart":
        # (operand, result, flags…): the steps that follow hand the result on, it is written once
        yield one.shapes[1], one.shapes[1].padded
        return
    is_tuple = inner.root.opcode == "tuple"
    roots = [inner.operand(inner.root, n) for n in range(len(one.nested))] if is_tuple else [inner.root]
    if len(roots) == len(one.shapes):
        yield from ((array, _written(inner, root, array)) for array, root in zip(one.shapes, roots))
    else:
        yield from ((array, array.padded) for array in one.shapes)


def _read(inner: Computation, one: Instruction) -> float:
    """How many bytes of an operand a fusion reads."""
    total = 0
    for user in inner.users[one.name]:
        first = user.operands[0] == one.name
        if user.opcode in _VIEWS:
            total += _read(inner, user)
        elif user.opcode in _PARTS and first:
            total += user.shape.padded
        elif (user.opcode == "dynamic-update-slice" and first) or user.opcode == "tuple" or continues(inner, user):
            continue
        else:
            return one.shape.padded
    return min(total, one.shape.padded)


def _written(inner: Computation, root: Instruction, array: Array) -> float:
    """How many bytes of a result a fusion writes."""
    while root.opcode in _VIEWS:
        root = inner.operand(root)
    if root.opcode == "dynamic-update-slice":
        return inner.operand(root, 1).shape.padded
    if root.opcode == "parameter" or continues(inner, root):
        return 0
    return array.padded


def continues(where: Computation, one: Instruction) -> bool:
    """Whether this is a later step of an exchange that began in another fusion: XLA overlaps products with them."""
    return "chain_id" in one.attributes and where.root.value("custom_call_target") != "AsyncCollectiveStart"
