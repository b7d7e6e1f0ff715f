"""One traced call of a function on a base and a delta, evaluated as often as arguments of its kind come."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.leaves import is_array
from lora_jax.transform import jaxprs
from lora_jax.transform.call import Arguments, Call, entered
from lora_jax.transform.interpreter import Interpreter

_ARRAY = object()


class Key(NamedTuple):
    """What a trace depends on: the structure and the types of arrays, and the leaves that are no arrays."""

    kind: Hashable
    static: Hashable


class Structure(NamedTuple):
    """A tree of arguments without its arrays."""

    treedef: Any
    leaves: list[Any]

    def tree(self, arrays: Sequence[Any]) -> Any:
        """The tree with these arrays."""
        queue = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(queue) if leaf is _ARRAY else leaf for leaf in self.leaves])


class Leaves:
    """The leaves of a tree of arguments, arrays apart from the rest.

    Attributes:
      structure: The tree without its arrays.
      arrays: The arrays, in order.
      key: Of a trace with them; None where the leaves that are no arrays cannot be hashed.
    """

    def __init__(self, tree: Any):
        leaves, treedef = jax.tree.flatten(tree)
        self.structure = Structure(treedef, leaves)
        self.arrays, types, others = [], [], []
        for position, leaf in enumerate(leaves):  # as little as can be: this runs at every call
            if type(leaf) is jaxprs.ConcreteArray:  # many times as fast as isinstance
                types.append(leaf.aval)
            elif is_array(leaf):
                types.append(jax.typeof(leaf))
            else:
                others.append((position, type(leaf), _distinct(leaf)))
                continue
            self.arrays.append(leaf)
            leaves[position] = _ARRAY
        self.key = _hashable(Key((treedef, tuple(types), jaxprs.trace_context()), tuple(others)))

    def are_together(self) -> bool:
        """Whether one compiled program can take the arrays: none is bound to other devices than another."""
        places = {
            frozenset(array.sharding.device_set)
            for array in self.arrays
            if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.committed
        }
        return len(places) <= 1


def _distinct(leaf: Any) -> Any:
    """A leaf as a part of a key: 0.0 and -0.0 are equal, and NaN does not equal itself."""
    if type(leaf) is float:
        return leaf.hex()
    if type(leaf) is complex:
        return leaf.real.hex(), leaf.imag.hex()
    return leaf


def _hashable(key: Key) -> Key | None:
    try:
        hash(key)
    except TypeError:
        return None
    return key


class Evaluation:
    """Evaluates a traced call: as it stands inside other transformations, else by a program compiled once.

    Args:
      call: The traced call.
      interpreter: Evaluates it.
      structure: Of `(base, delta, args, kwargs, dropout_key)`.
      name: Of the compiled program.
      compiles: Whether the next call outside of transformations compiles.
      later: Whether calls after it do.
    """

    def __init__(
        self, call: Call, interpreter: Interpreter, structure: Structure, name: str, *, compiles: bool, later: bool
    ):
        def results(consts, arrays):
            base, delta, args, kwargs, dropout_key = structure.tree(arrays)
            arguments = Arguments.of(base, args, kwargs).varying_with(delta)
            return call.results(interpreter, consts, entered(delta, arguments, dropout_key, interpreter))

        results.__name__ = results.__qualname__ = name
        self._call = call
        self._results = results
        self._compiled = jax.jit(results)
        self._compiles, self._later = compiles, later

    def __call__(self, leaves: Leaves) -> Any:
        evaluate = self._results
        if not jaxprs.is_staged():
            evaluate = self._compiled if self._compiles else self._results
            self._compiles = self._later
        return self._call.restored(evaluate(self._call.program.consts, leaves.arrays))
