"""Signatures of functions that take other leading arguments than the function they call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_ANY = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])


def of(fn: Callable) -> Signature:
    """A function's signature, `(*args, **kwargs)` if it has none."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return _ANY


def replaced(fn: Callable, leading: Sequence[str], *, skip: int, options: Sequence[str] = ()) -> Signature:
    """A function's signature with other leading parameters.

    Args:
      fn: The function; parameters keep their names, kinds, defaults and annotations.
      leading: The names of the leading parameters. If the function itself uses one of them, they are positional-only
        and that one has an underscore after its name.
      skip: How many of the function's own positional parameters they replace.
      options: Names of keyword-only parameters with the default None, added unless the function has them.
    """
    signature = of(fn)
    rest = list(signature.parameters.values())
    while skip and rest and rest[0].kind in _POSITIONAL:
        skip -= 1
        del rest[0]
    used = {parameter.name for parameter in rest}
    clash = any(name in used for name in leading)
    first = clash or any(parameter.kind is Parameter.POSITIONAL_ONLY for parameter in rest)
    kind = Parameter.POSITIONAL_ONLY if first else Parameter.POSITIONAL_OR_KEYWORD
    start = []
    for name in leading:
        while name in used:
            name += "_"
        start.append(Parameter(name, kind))
    added = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in options if name not in used]
    end = [parameter for parameter in rest if parameter.kind is Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*start, *rest[: len(rest) - len(end)], *added, *end])


def divided(
    name: str, signature: Signature, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], tuple[Any, ...], dict[str, Any]]:
    """The `count` leading arguments of a call, by position or by name, and the others.

    Raises:
      TypeError: A leading argument is missing or is given twice.
    """
    if len(args) >= count:
        return args[:count], args[count:], dict(kwargs)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None
    names = list(signature.parameters)[:count]
    if any(name not in bound.arguments for name in names):  # (*args, **kwargs) takes anything
        raise TypeError(f"{name}() takes at least {count} arguments; got {len(args)}.")
    return [bound.arguments[name] for name in names], (), {k: v for k, v in kwargs.items() if k not in names}


def describe(wrapper: Callable, fn: Callable, signature: Signature) -> Callable:
    """Gives a wrapper the name and docstring of the function that it calls, and a signature of its own."""
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(fn, name):
            setattr(wrapper, name, getattr(fn, name))
    setattr(wrapper, "__signature__", signature)  # noqa: B010
    return wrapper
