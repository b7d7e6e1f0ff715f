"""Axis roles: which axes of a weight a function contracts, keeps, indexes or runs over."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.adapters.protocol import BATCH, IN, LOOKUP, OUT
from lora_jax.leaves import is_quantized
from lora_jax.transform.call import Arguments, Call
from lora_jax.transform.interpreter import Interpreter, Use
from lora_jax.transform.weight import probe


def uses_of(
    fn: Callable, base: Any, weights: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, list[Use]]:
    """How `fn(base, *args, **kwargs)` uses each of the weights, by path; an empty list for one that it does not use."""
    arguments = Arguments.create(base, args, kwargs)
    call = Call.trace(fn, arguments)
    uses: list[Use] = []
    interpreter = Interpreter(uses=uses)

    def run(*arrays):
        inputs = list(arrays)
        for position, path in enumerate(arguments.paths):
            if path in weights or is_quantized(inputs[position]):
                inputs[position] = probe(path, inputs[position])
        return [out for out in jax.tree.leaves(call.evaluate(interpreter, inputs)) if isinstance(out, jax.Array)]

    jax.eval_shape(run, *arguments.arrays)
    distinct = unique(uses)
    return {path: [use for use in distinct if use.path == path] if call.uses_path(path) else [] for path in weights}


def unique(uses: Sequence[Use]) -> list[Use]:
    """The uses without repetitions (a loop's body may be traced more than once)."""
    distinct: list[Use] = []
    for use in uses:
        if use not in distinct:
            distinct.append(use)
    return distinct


def roles(uses: Sequence[Use], shape: Sequence[int]) -> tuple[str, ...]:
    """The role of each axis of a weight, from the first product with an input, or else the first use, that shows them.

    A product with an array that depends on no input (the power iteration of spectral normalization, a penalty) does not
    tell in from out. A later use may contract the other way (a tied embedding is indexed and then contracted): the
    factors serve both.
    One that contracts a part of the in axes or of the out axes is merged (:mod:`lora_jax.transform.contraction`).

    Args:
      uses: From :func:`uses_of`.
      shape: Of the weight.

    Returns:
      'batch', 'in', 'out' or 'lookup' (an in axis that is indexed) for each axis.

    Raises:
      ValueError: No use shows roles.
    """
    shown = [(use, roles) for use in uses if (roles := _roles_of_use(use, len(shape))) is not None]
    of_inputs = (roles for use, roles in shown if use.of_input and OUT in roles and {IN, LOOKUP} & set(roles))
    first = next(of_inputs, shown[0][1] if shown else None)
    if first is not None:
        return first
    for use in uses:
        if "in and out" in use.roles.values():
            raise ValueError(f"one axis of this weight is contracted in part, in {use.operation} at {use.source}")
    how = "; ".join(f"{use.operation} at {use.source}" for use in uses) or "not at all"
    raise ValueError(
        f"the function contracts no axis of this weight of shape {tuple(shape)}, as far as tracing follows it (it "
        f"is used by {how}), so it has no in or out axis. Full() trains a leaf that is not a matrix. For a weight that "
        "is contracted after that operation, give the recipe axes=; the weight is merged there."
    )


def roles_by_use(uses: Sequence[Use], ndim: int) -> list[tuple[str, ...]]:
    """The roles of a weight's axes, for each use that shows them."""
    shown = (_roles_of_use(use, ndim) for use in uses)
    return [roles for roles in shown if roles is not None]


def _roles_of_use(use: Use, ndim: int) -> tuple[str, ...] | None:
    by_axis = dict(use.roles)
    decisive = {"in", "out", "indexed"} if use.factored else {"in", "out"}
    if not decisive & set(by_axis.values()) or "in and out" in by_axis.values():
        return None
    if "indexed" in by_axis.values():
        # What remains of an expert's weight has an in and an out axis. A row of a table has not: there
        # the index takes the part of the input.
        contracted = {"in", "out"} <= set(by_axis.values())
        if not contracted:
            by_axis = {axis: OUT if role == IN else role for axis, role in by_axis.items()}
        indexed = BATCH if contracted else LOOKUP
        by_axis = {axis: indexed if role == "indexed" else role for axis, role in by_axis.items()}
    # Axes of size one that a reshape dropped have no label left.
    return tuple(by_axis.get(axis, IN) for axis in range(ndim))
