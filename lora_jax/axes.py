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
    fn: Callable, base: Any, wanted: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, list[Use]]:
    """How `fn(base, *args, **kwargs)` uses each of the wanted weights; an empty list where it does not."""
    arguments = Arguments.create(base, args, kwargs)
    call = Call.trace(fn, arguments)
    found: list[Use] = []
    interpreter = Interpreter(uses=found)

    def run(*arrays):
        inputs = list(arrays)
        for position, path in enumerate(arguments.paths):
            if path in wanted or is_quantized(inputs[position]):
                inputs[position] = probe(path, inputs[position])
        return [out for out in jax.tree.leaves(call.evaluate(interpreter, inputs)) if isinstance(out, jax.Array)]

    jax.eval_shape(run, *arguments.arrays)
    return {path: [use for use in unique(found) if use.path == path] if call.uses_path(path) else [] for path in wanted}


def unique(uses: Sequence[Use]) -> list[Use]:
    """The uses without repetitions (a loop's body may be traced more than once)."""
    kept: list[Use] = []
    for use in uses:
        if use not in kept:
            kept.append(use)
    return kept


def roles(uses: Sequence[Use], shape: Sequence[int]) -> tuple[str, ...]:
    """The role of each axis of a weight, from the uses of it.

    The first use decides. A later one may have in and out exchanged (a tied embedding is indexed and
    then contracted the other way).

    Args:
      uses: From :func:`uses_of`.
      shape: Of the weight.

    Returns:
      'batch', 'in', 'out' or 'lookup' (an in axis that is indexed) for each axis.

    Raises:
      ValueError: No use tells roles, or two uses cannot be reconciled.
    """
    told = _told(uses, len(shape))
    if not told:
        how = "; ".join(f"{use.operation} at {use.source}" for use in uses) or "not at all"
        raise ValueError(
            f"the function contracts no axis of this weight of shape {tuple(shape)}, as far as tracing follows it (it "
            f"is used by {how}), so that there is no in or out axis. Full() trains a leaf that is no matrix; a weight "
            "that is contracted after that operation gets its roles from the recipe's axes= and is merged there."
        )
    first_use, first = told[0]
    for use, found in told[1:]:
        if not _reconcilable(first, found):
            raise ValueError(
                f"two uses of this weight of shape {tuple(shape)} need different axis roles: {first} in "
                f"{first_use.operation} at {first_use.source}, {found} in {use.operation} at {use.source}. "
                "Give the recipe axes= to decide"
            )
    return first


def are_told(uses: Sequence[Use], ndim: int) -> bool:
    """Whether any use tells the roles of a weight's axes."""
    return bool(_told(uses, ndim))


def told_roles(uses: Sequence[Use], ndim: int) -> list[tuple[str, ...]]:
    """The roles of a weight's axes by each use that tells them."""
    return [roles for _, roles in _told(uses, ndim)]


def _told(uses: Sequence[Use], ndim: int) -> list[tuple[Use, tuple[str, ...]]]:
    found = [(use, _roles_of_use(use, ndim)) for use in uses]
    return [(use, roles) for use, roles in found if roles is not None]


def _roles_of_use(use: Use, ndim: int) -> tuple[str, ...] | None:
    found = dict(use.roles)
    telling = {"in", "out", "indexed"} if use.factored else {"in", "out"}
    if not telling & set(found.values()):
        return None
    if "in and out" in found.values():
        raise ValueError(f"one axis of this weight is contracted in part, in {use.operation} at {use.source}")
    if "indexed" in found.values():
        # What remains of an expert's weight has an in and an out axis. A row of a table has not: there
        # the index takes the part of the input.
        contracted = {"in", "out"} <= set(found.values())
        if not contracted:
            found = {axis: OUT if role == IN else role for axis, role in found.items()}
        found = {axis: (BATCH if contracted else LOOKUP) if role == "indexed" else role for axis, role in found.items()}
    # Axes of size one that a reshape dropped have no label left.
    return tuple(found.get(axis, IN) for axis in range(ndim))


def _reconcilable(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    def parts(roles):
        return {
            role: frozenset(i for i, r in enumerate(roles) if (IN if r == LOOKUP else r) == role)
            for role in (BATCH, IN, OUT)
        }

    a, b = parts(one), parts(other)
    return a[BATCH] == b[BATCH] and {a[IN], a[OUT]} == {b[IN], b[OUT]}
