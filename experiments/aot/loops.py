"""The trip counts of while loops in a compiled program."""

import operator
import re
from collections.abc import Callable
from typing import Any

from experiments.aot.hlo import Computation, Instruction, Module

LONGEST = 1_000_000
"""The number of iterations after which a loop counts as infinite."""

Known = dict[int, Any]
"""The values of the elements of a loop's tuple that are known numbers."""

Arguments = Callable[[int], Any]
"""A function from the number of a parameter to its value: a number, or the :data:`Known` of a tuple."""

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = ("copy", "convert", "bitcast", "reshape", "copy-done", "opt-barrier")


class Unknown(ValueError):
    """A value that is unknown before the program runs."""


def trip_count(module: Module, computation: Computation, loop: Instruction, known_values: Known) -> int:
    """Returns the number of iterations of a loop.

    For CPUs and GPUs XLA states it (`known_trip_count`). For TPUs the scalars that the loop's condition depends on are
    computed iteration by iteration.

    Args:
      module: The program.
      computation: The computation that contains the loop.
      loop: The instruction.
      known_values: The values of the computation's parameter, if it is the tuple of a loop.

    Raises:
      ValueError: The number depends on values that are unknown before the program runs, or the loop is infinite.
    """
    match = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if match:
        return int(match[1])
    body, condition = (module.computations[loop.called(role) or ""] for role in ("body", "condition"))
    state = initial(module, computation, loop, known_values)
    runs = 0
    try:
        while _value(module, condition, condition.root, _single(state)):
            state = _next_state(module, body, state)
            runs += 1
            if runs > LONGEST:
                raise Unknown(f"it runs more than {LONGEST:,} times")
    except Unknown as reason:
        raise ValueError(
            f"The trip count of the loop %{loop.name} in %{computation.name} is unknown before it runs: {reason}."
        ) from None
    return runs


def initial(module: Module, computation: Computation, loop: Instruction, known_values: Known) -> Known:
    """Returns the elements of a loop's tuple that are known numbers when it starts."""
    start = computation.operand(loop)
    values = {}
    for number in range(len(loop.nested)):
        try:
            values[number] = _element(module, computation, start, number, _single(known_values))
        except Unknown:
            continue
    return values


def unchanged(module: Module, body: Computation, state: Known) -> Known:
    """Returns the known numbers of a loop's tuple that its body passes on unchanged."""
    unchanged_values = {}
    for number, value in state.items():
        source = _source_element(body, body.root, number)
        if source == number:
            unchanged_values[number] = value
    return unchanged_values


def _source_element(body: Computation, root: Instruction, number: int) -> int | None:
    """Returns the element of the body's parameter that equals an element of its result; None if there is none."""
    if root.opcode != "tuple":
        return None
    instruction = body.operand(root, number)
    while instruction.opcode in _SAME:
        instruction = body.operand(instruction)
    if instruction.opcode == "get-tuple-element" and body.operand(instruction).opcode == "parameter":
        return int(instruction.value("index") or -1)
    return None


def _next_state(module: Module, body: Computation, state: Known) -> Known:
    """Returns the known numbers after one iteration."""
    values = {}
    for number in state:
        try:
            values[number] = _element(module, body, body.root, number, _single(state))
        except Unknown:
            continue
    return values


def _single(argument: Known) -> Arguments:
    """Returns the arguments of a computation with one parameter."""
    return lambda _: argument


def _element(
    module: Module, computation: Computation, instruction: Instruction, number: int, arguments: Arguments
) -> Any:
    """Returns an element of an instruction's result, which is a tuple."""
    if instruction.opcode == "tuple":
        return _value(module, computation, computation.operand(instruction, number), arguments)
    if instruction.opcode == "parameter":
        values = arguments(int(instruction.inside))
        if not isinstance(values, dict) or number not in values:
            raise Unknown(f"element {number} of %{instruction.name} is unknown")
        return values[number]
    if instruction.opcode in _SAME:
        return _element(module, computation, computation.operand(instruction), number, arguments)
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls") or ""]
        return _element(module, inner, inner.root, number, _arguments(module, computation, instruction, arguments))
    if instruction.opcode == "while":
        body = module.computations[instruction.called("body") or ""]
        unchanged_values = unchanged(module, body, initial(module, computation, instruction, arguments(0)))
        if number in unchanged_values:
            return unchanged_values[number]
    raise Unknown(f"%{instruction.name} is a {instruction.opcode}")


def _arguments(module: Module, computation: Computation, instruction: Instruction, arguments: Arguments) -> Arguments:
    """Returns the arguments of the computation that an instruction calls, computed on demand."""
    return lambda number: _value(module, computation, computation.operand(instruction, number), arguments)


def _value(module: Module, computation: Computation, instruction: Instruction, arguments: Arguments) -> Any:
    """Returns the scalar that an instruction computes."""

    def operand(number: int) -> Any:
        return _value(module, computation, computation.operand(instruction, number), arguments)

    if len(instruction.shapes) != 1 or instruction.shape.elements != 1:
        raise Unknown(f"%{instruction.name} is not a scalar")
    if instruction.opcode == "constant":
        return _constant(instruction)
    if instruction.opcode == "parameter":
        value = arguments(int(instruction.inside))
        if isinstance(value, dict):
            raise Unknown(f"%{instruction.name} is an argument")
        return value
    if instruction.opcode == "get-tuple-element":
        return _element(
            module, computation, computation.operand(instruction), int(instruction.value("index") or -1), arguments
        )
    if instruction.opcode in _SAME:
        return operand(0)
    if instruction.opcode in _ARITHMETIC:
        return _ARITHMETIC[instruction.opcode](operand(0), operand(1))
    if instruction.opcode == "compare":
        return _COMPARISONS[instruction.value("direction") or ""](operand(0), operand(1))
    if instruction.opcode == "not":
        return not operand(0)
    if instruction.opcode == "select":
        return operand(1) if operand(0) else operand(2)
    if instruction.opcode in ("fusion", "call"):
        inner = module.computations[instruction.called("calls") or instruction.called("to_apply") or ""]
        return _value(module, inner, inner.root, _arguments(module, computation, instruction, arguments))
    raise Unknown(f"%{instruction.name} is a {instruction.opcode}")


def _constant(instruction: Instruction) -> Any:
    text = instruction.inside.strip("{} ")
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if instruction.shape.dtype[0] in "su" else float(text)
    except ValueError:
        raise Unknown(f"%{instruction.name} is {instruction.inside!r}") from None
