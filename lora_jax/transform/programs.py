"""A cache of traced calls, kept as long as the function lives, so that later calls do not trace again."""

import dis
import functools
import inspect
import operator
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

MAX_BINDINGS = 8
"""Number of sets of closed-over values for which the programs of one function are cached; the oldest is dropped."""

MAX_PROGRAMS = 128
"""Number of programs cached for one function and set of closed-over values; the oldest is dropped."""

_EMPTY = object()


class ClosureReader:
    """Reads the objects that a function uses besides its arguments, to be compared by identity.

    These are its code, the values of its closure cells, its default arguments, and the globals that its code names,
    and the same of the functions it wraps (`functools.partial`, bound methods, `jax.jit`, `functools.wraps`, an object
    with `__call__`). The contents of these objects, and what called functions read, are not inspected.
    """

    def __init__(self, fn: Callable):
        self._functions = list(_functions(fn))
        self._globals = [sorted(_global_names(function.__code__)) for function in self._functions]

    def __call__(self) -> tuple[Any, ...]:
        """Returns the current objects."""
        values: list[Any] = []
        for function, names in zip(self._functions, self._globals):
            values += [function.__code__, function.__defaults__, function.__kwdefaults__]
            values += [_cell_contents(cell) for cell in function.__closure__ or ()]
            values += [function.__globals__.get(name, _EMPTY) for name in names]
        return tuple(values)


def _functions(fn: Any) -> Iterator[types.FunctionType]:
    """Yields the Python functions that a callable wraps, outermost first."""
    visited: set[int] = set()
    while fn is not None and id(fn) not in visited:
        visited.add(id(fn))
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
    """Returns the names of globals that a function's code reads, including its inner functions."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _EMPTY


class Programs:
    """The programs of one function, keyed by the objects that it reads and by its arguments."""

    def __init__(self):
        self._by_binding: dict[tuple[int, ...], tuple[list[Callable[[], Any]], dict[Hashable, Any]]] = {}

    def get(self, values: tuple[Any, ...], key: Hashable) -> Any:
        """Returns the program, or None."""
        return self._bound(values).get(key)

    def all_keys(self) -> Iterator[Any]:
        """Yields the keys of all cached programs."""
        for _, programs in list(self._by_binding.values()):
            yield from list(programs)

    def _bound(self, values: tuple[Any, ...]) -> dict[Hashable, Any]:
        """Returns the programs for these objects (none if an earlier object had the same identity)."""
        references, programs = self._by_binding.get(tuple(map(id, values)), ((), {}))
        return programs if all(map(operator.is_, [reference() for reference in references], values)) else {}

    def put(self, values: tuple[Any, ...], key: Hashable, program: Any) -> None:
        """Caches a program. `values` are held by weak references if they support these."""
        ids = tuple(map(id, values))
        programs = self._bound(values) | {key: program}
        self._by_binding.pop(ids, None)
        self._by_binding[ids] = list(map(_reference, values)), programs
        _drop_oldest(self._by_binding, MAX_BINDINGS)
        _drop_oldest(programs, MAX_PROGRAMS)


def _drop_oldest(entries: dict[Any, Any], limit: int) -> None:
    """Drops the oldest entries beyond the limit."""
    for key in list(entries)[: max(0, len(entries) - limit)]:
        del entries[key]


def _reference(value: Any) -> Callable[[], Any]:
    """Returns a function that returns the object as long as it lives."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


_CACHE: dict[int, tuple[weakref.ref, dict[Hashable, Programs]]] = {}


def get_programs(fn: Any, options: Hashable) -> Programs:
    """Returns the programs of a function or a bound method; they live as long as the function or the bound object."""
    owner, name = (fn.__self__, fn.__func__) if inspect.ismethod(fn) else (fn, None)
    number = id(owner)
    if number not in _CACHE or _CACHE[number][0]() is not owner:
        try:
            _CACHE[number] = weakref.ref(owner, lambda _: _CACHE.pop(number, None)), {}
        except TypeError:  # does not support weak references
            return Programs()
    return _CACHE[number][1].setdefault((name, options), Programs())
