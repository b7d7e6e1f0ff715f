"""The bytes that an instruction of a compiled program moves between a device's memory and its cores."""

import dataclasses
import re
from collections.abc import Iterator

from experiments.aot.hlo import DEVICE, HOST, Array, Computation, Instruction, Module

# Operations that move nothing themselves: references to arrays, and calls of other computations.
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
    """Bytes that are read from and written to a device's memory (`device`) and the host's memory (`host`)."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.device + other.device, self.host + other.host)

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.device * times, self.host * times)


def instruction_traffic(module: Module, computation: Computation, instruction: Instruction) -> Traffic:
    """Returns the traffic of an instruction, which reads each operand once and writes its result once.

    A fusion moves its operands and results only. For slices only the slice is counted, for updates in place only the
    update. Loops, calls and conditionals count nothing, since their computations are counted. Arrays in on-chip memory
    are free. Padding of layouts is counted.
    """
    if operation(instruction) in (*_FREE, None) or instruction.value("custom_call_target") in _FREE_TARGETS:
        return Traffic()
    inner = module.computations.get(instruction.called("calls") or "")
    arrays = list(_fusion(computation, instruction, inner) if inner is not None else _plain(computation, instruction))
    return Traffic(
        sum(size for array, size in arrays if array.space == DEVICE),
        sum(size for array, size in arrays if array.space == HOST),
    )


def operation(instruction: Instruction) -> str | None:
    """Returns the operation of an instruction, asynchronous or not; None if it ends an asynchronous operation."""
    return None if instruction.opcode.endswith(_ENDS) else instruction.opcode.removesuffix(_START)


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """Returns the arrays of an instruction's result, without the operands that an asynchronous start passes on."""
    if not instruction.opcode.endswith(_START) or len(instruction.nested) < 2:
        return instruction.shapes
    if instruction.opcode == "copy-start":  # (result, operand, flag); others are (operands, result, …)
        return instruction.shapes[: instruction.nested[0]]
    return instruction.shapes[instruction.nested[0] : instruction.nested[0] + instruction.nested[1]]


def _plain(computation: Computation, instruction: Instruction) -> Iterator[tuple[Array, float]]:
    """Yields the arrays that an instruction moves, and the number of bytes of each."""
    operands = [array for name in instruction.operands for array in computation.instructions[name].shapes]
    opcode, results = operation(instruction), _results(instruction)
    if opcode in _PARTS:
        yield operands[0], results[0].padded
        yield results[0], results[0].padded
    elif opcode == "dynamic-update-slice":
        yield operands[1], operands[1].padded
        yield results[0], operands[1].padded
    elif opcode == "scatter":  # reads the array and the updates, writes the result
        yield operands[-1], operands[-1].padded
        yield results[0], 2 * operands[-1].padded
    else:
        match = re.search(r'"bytes_accessed":"?(\d+)', instruction.attributes) if opcode == "custom-call" else None
        if match:
            yield Array("u8", (int(match[1]),)), int(match[1])
        else:
            yield from ((array, array.padded) for array in (*operands, *results))


def _fusion(computation: Computation, instruction: Instruction, inner: Computation) -> Iterator[tuple[Array, float]]:
    """Yields the arrays that a fusion moves, and the number of bytes of each."""
    if inner.root.value("custom_call_target") in _FREE_TARGETS:
        return
    for number, name in enumerate(instruction.operands):
        outer = computation.instructions[name]
        if len(outer.shapes) != 1 or outer.nested:
            yield from ((array, array.padded) for array in outer.shapes)
            continue
        yield outer.shape, _read(inner, inner.parameters[number])
    if inner.root.value("custom_call_target") == "AsyncCollectiveStart":
        # (operand, result, flags…); later steps pass the result on, which is written once
        yield instruction.shapes[1], instruction.shapes[1].padded
        return
    is_tuple = inner.root.opcode == "tuple"
    roots = [inner.operand(inner.root, n) for n in range(len(instruction.nested))] if is_tuple else [inner.root]
    if len(roots) == len(instruction.shapes):
        yield from ((array, _write(inner, root, array)) for array, root in zip(instruction.shapes, roots))
    else:
        yield from ((array, array.padded) for array in instruction.shapes)


def _read(inner: Computation, instruction: Instruction) -> float:
    """Returns the number of bytes of an operand that a fusion reads."""
    total = 0
    for user in inner.users[instruction.name]:
        first = user.operands[0] == instruction.name
        if user.opcode in _VIEWS:
            total += _read(inner, user)
        elif user.opcode in _PARTS and first:
            total += user.shape.padded
        elif (user.opcode == "dynamic-update-slice" and first) or user.opcode == "tuple" or continues(inner, user):
            continue
        else:
            return instruction.shape.padded
    return min(total, instruction.shape.padded)


def _write(inner: Computation, root: Instruction, array: Array) -> float:
    """Returns the number of bytes of a result that a fusion writes."""
    while root.opcode in _VIEWS:
        root = inner.operand(root)
    if root.opcode == "dynamic-update-slice":
        return inner.operand(root, 1).shape.padded
    if root.opcode == "parameter" or continues(inner, root):
        return 0
    return array.padded


def continues(computation: Computation, instruction: Instruction) -> bool:
    """Whether this is a later step of an exchange that another fusion started, which XLA overlaps with products."""
    return (
        "chain_id" in instruction.attributes and computation.root.value("custom_call_target") != "AsyncCollectiveStart"
    )
