"""How often a while loop of a compiled program runs."""

import operator
import re
from collections.abc import Callable
from typing import Any

from experiments.aot.hlo import Computation, Instruction, Module

LONGEST = 1_000_000
"""Runs after which a loop is taken for one that does not end."""

Known = dict[int, Any]
"""Of the elements of a loop's tuple that are numbers while it runs, their values."""

Arguments = Callable[[int], Any]
"""The arguments of a computation by their numbers: a number, or the :data:`Known` of a tuple."""

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
    """A value that is not known before the program runs."""


def trip_count(module: Module, where: Computation, loop: Instruction, known: Known) -> int:
    """How often the body of a loop runs.

    XLA says it for CPUs and GPUs (`known_trip_count`). For TPUs it does not: there the few scalars that the loop's
    condition depends on are computed, run after run.

    Args:
      module: The program.
      where: The computation that the loop is in.
      loop: The instruction.
      known: Values of `where`'s own parameter, if that is the tuple of a loop.

    Raises:
      ValueError: It depends on what is not known before the program runs, or does not end.
    """
    said = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
    if said:
        return int(said[1])
    body, condition = (module.computations[loop.called(role) or ""] for role in ("body", "condition"))
    state = initial(module, where, loop, known)
    runs = 0
    try:
        while _value(module, condition, condition.root, _only(state)):
            state = _after(module, body, state)
            runs += 1
            if runs > LONGEST:
                raise Unknown("it runs too often")
    except Unknown as reason:
        raise ValueError(
            f"How often the loop %{loop.name} in %{where.name} runs cannot be told before it does: {reason}."
        ) from None
    return runs


def initial(module: Module, where: Computation, loop: Instruction, known: Known) -> Known:
    """The elements of a loop's tuple that are known numbers when it begins."""
    start = where.operand(loop)
    made = {}
    for number in range(len(loop.nested)):
        try:
            made[number] = _element(module, where, start, number, _only(known))
        except Unknown:
            continue
    return made


def unchanged(module: Module, body: Computation, state: Known) -> Known:
    """Of the numbers that are known when a loop begins, those that its body hands on as they are."""
    kept = {}
    for number, value in state.items():
        source = _handed_on(body, body.root, number)
        if source == number:
            kept[number] = value
    return kept


def _handed_on(body: Computation, root: Instruction, number: int) -> int | None:
    """The element of the body's parameter that an element of its result is."""
    if root.opcode != "tuple":
        return None
    one = body.operand(root, number)
    while one.opcode in _SAME:
        one = body.operand(one)
    if one.opcode == "get-tuple-element" and body.operand(one).opcode == "parameter":
        return int(one.value("index") or -1)
    return None


def _after(module: Module, body: Computation, state: Known) -> Known:
    """The known numbers after one run of the body."""
    made = {}
    for number in state:
        try:
            made[number] = _element(module, body, body.root, number, _only(state))
        except Unknown:
            continue
    return made


def _only(argument: Known) -> Arguments:
    """The arguments of a computation that has one."""
    return lambda _: argument


def _element(module: Module, where: Computation, one: Instruction, number: int, given: Arguments) -> Any:
    """An element of an instruction whose result is a tuple."""
    if one.opcode == "tuple":
        return _value(module, where, where.operand(one, number), given)
    if one.opcode == "parameter":
        values = given(int(one.inside))
        if not isinstance(values, dict) or number not in values:
            raise Unknown(f"element {number} of %{one.name} is not known")
        return values[number]
    if one.opcode in _SAME:
        return _element(module, where, where.operand(one), number, given)
    if one.opcode == "fusion":
        inner = module.computations[one.called("calls") or ""]
        return _element(module, inner, inner.root, number, _arguments(module, where, one, given))
    if one.opcode == "while":
        body = module.computations[one.called("body") or ""]
        kept = unchanged(module, body, initial(module, where, one, given(0)))
        if number in kept:
            return kept[number]
    raise Unknown(f"%{one.name} is a {one.opcode}")


def _arguments(module: Module, where: Computation, one: Instruction, given: Arguments) -> Arguments:
    """Those of the computation that an instruction calls, each computed when it is asked for."""
    return lambda number: _value(module, where, where.operand(one, number), given)


def _value(module: Module, where: Computation, one: Instruction, given: Arguments) -> Any:
    """A scalar that an instruction computes."""

    def of(number: int) -> Any:
        return _value(module, where, where.operand(one, number), given)

    if len(one.shapes) != 1 or one.shape.elements != 1:
        raise Unknown(f"%{one.name} is no scalar")
    if one.opcode == "constant":
        return _constant(one)
    if one.opcode == "parameter":
        value = given(int(one.inside))
        if isinstance(value, dict):
            raise Unknown(f"%{one.name} is an argument")
        return value
    if one.opcode == "get-tuple-element":
        return _element(module, where, where.operand(one), int(one.value("index") or -1), given)
    if one.opcode in _SAME:
        return of(0)
    if one.opcode in _ARITHMETIC:
        return _ARITHMETIC[one.opcode](of(0), of(1))
    if one.opcode == "compare":
        return _COMPARISONS[one.value("direction") or ""](of(0), of(1))
    if one.opcode == "not":
        return not of(0)
    if one.opcode == "select":
        return of(1) if of(0) else of(2)
    if one.opcode in ("fusion", "call"):
        inner = module.computations[one.called("calls") or one.called("to_apply") or ""]
        return _value(module, inner, inner.root, _arguments(module, where, one, given))
    raise Unknown(f"%{one.name} is a {one.opcode}")


def _constant(one: Instruction) -> Any:
    text = one.inside.strip("{} ")
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if one.shape.dtype[0] in "su" else float(text)
    except ValueError:
        raise Unknown(f"%{one.name} is {one.inside!r}") from None
