"""Traced calls, kept as long as their function lives: a second call with arguments of the same kind traces nothing."""

import dis
import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

BINDINGS = 8
"""Sets of closed-over values of which one function keeps programs; the oldest goes first."""

PROGRAMS = 128
"""Programs that one function keeps for each set of closed-over values; the oldest goes first."""

_EMPTY = object()


class Reader:
    """The objects that a function reads beside its arguments, by identity.

    They are the function itself and its bound object, the values of closure cells, default arguments, and the globals
    that its code names; also of what it wraps (`functools.partial`, bound methods, `jax.jit`, `functools.wraps`, an
    object with `__call__`). What those objects hold, and what the functions that it calls read, is not looked at.
    """

    def __init__(self, fn: Callable):
        self._functions = list(_functions(fn))
        self._globals = [sorted(_global_names(function.__code__)) for function in self._functions]

    def __call__(self) -> tuple[Any, ...]:
        """The objects as they are now."""
        values: list[Any] = []
        for function, names in zip(self._functions, self._globals):
            values += [function.__code__, function.__defaults__, function.__kwdefaults__]
            values += [_content(cell) for cell in function.__closure__ or ()]
            values += [function.__globals__.get(name, _EMPTY) for name in names]
        return tuple(values)


def _functions(fn: Any) -> Iterator[types.FunctionType]:
    """The Python functions that a callable runs first, through wrappers."""
    seen: set[int] = set()
    while fn is not None and id(fn) not in seen:
        seen.add(id(fn))
        if isinstance(fn, functools.partial):
            fn = fn.func
        elif inspect.ismethod(fn):
            fn = fn.__func__
        elif isinstance(fn, types.FunctionType):
            yield fn
            fn = getattr(fn, "__wrapped__", None)
        else:
            fn = getattr(fn, "__wrapped__", None) or type(fn).__call__


def _global_names(code: types.CodeType) -> set[str]:
    """The globals that a function's code names, inner functions included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _EMPTY


class Programs:
    """Programs of one function, by the objects that it reads and by a key of its arguments."""

    def __init__(self):
        self._by_binding: dict[tuple[int, ...], tuple[list[Callable[[], Any]], dict[Hashable, Any]]] = {}

    def get(self, values: tuple[Any, ...], key: Hashable) -> Any:
        """The program, or None."""
        return self._bound(values).get(key)

    def all_keys(self) -> Iterator[Any]:
        """The keys of the programs that are kept, for whatever objects."""
        for _, programs in list(self._by_binding.values()):
            yield from list(programs)

    def _bound(self, values: tuple[Any, ...]) -> dict[Hashable, Any]:
        """The programs for these objects; none for others that had their identities before."""
        references, programs = self._by_binding.get(tuple(map(id, values)), ((), {}))
        return programs if all(map(operator.is_, [reference() for reference in references], values)) else {}

    def put(self, values: tuple[Any, ...], key: Hashable, program: Any) -> None:
        """Keeps a program; `values` are kept by weak references where they have them."""
        ids = tuple(map(id, values))
        programs = self._bound(values) | {key: program}
        self._by_binding.pop(ids, None)
        self._by_binding[ids] = list(map(_reference, values)), programs
        _shorten(self._by_binding, BINDINGS)
        _shorten(programs, PROGRAMS)


def _shorten(entries: dict[Any, Any], limit: int) -> None:
    """Drops the oldest entries."""
    for key in list(entries)[: max(0, len(entries) - limit)]:
        del entries[key]


def _reference(value: Any) -> Callable[[], Any]:
    """Gives the object as long as it lives."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


_KEPT: dict[int, tuple[weakref.ref, dict[Hashable, Programs]]] = {}


def programs_of(fn: Any, options: Hashable) -> Programs:
    """The programs of a function (or of a bound object's method), which live as long as it does."""
    owner, name = (fn.__self__, fn.__func__) if inspect.ismethod(fn) else (fn, None)
    number = id(owner)
    if number not in _KEPT or _KEPT[number][0]() is not owner:
        try:
            _KEPT[number] = weakref.ref(owner, lambda _: _KEPT.pop(number, None)), {}
        except TypeError:  # has no weak references
            return Programs()
    return _KEPT[number][1].setdefault((name, options), Programs())
