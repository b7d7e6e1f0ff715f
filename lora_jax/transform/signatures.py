"""Signatures of wrappers whose leading parameters differ from those of the function they call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_ANY = Signature([Parameter("args", Parameter.VAR_POSITIONAL), Parameter("kwargs", Parameter.VAR_KEYWORD)])


def get_signature(fn: Callable) -> Signature:
    """Returns a function's signature, or `(*args, **kwargs)` if it has none."""
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):
        return _ANY


def replace_leading(fn: Callable, leading: Sequence[str], *, skip: int, options: Sequence[str] = ()) -> Signature:
    """Returns a function's signature with its leading parameters replaced.

    Args:
      fn: The function. The other parameters keep their names, kinds, defaults and annotations.
      leading: The names of the new leading parameters. If the function already uses one of these names, all of them
        are positional-only and the clashing name gets an underscore.
      skip: The number of the function's positional parameters that are replaced.
      options: Names of keyword-only parameters with the default None, added unless the function has them.
    """
    signature = get_signature(fn)
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


def split_leading(
    name: str, signature: Signature, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], tuple[Any, ...], dict[str, Any]]:
    """Splits the arguments of a call into the `count` leading ones, given by position or by name, and the others.

    Raises:
      TypeError: A leading argument is missing or passed twice.
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


def copy_metadata(wrapper: Callable, fn: Callable, signature: Signature) -> Callable:
    """Sets a wrapper's name and docstring to those of the function that it calls, and its signature to `signature`."""
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        if hasattr(fn, name):
            setattr(wrapper, name, getattr(fn, name))
    setattr(wrapper, "__signature__", signature)  # noqa: B010
    return wrapper
