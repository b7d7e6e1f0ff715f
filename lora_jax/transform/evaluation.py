"""A traced call of a function on a base and a delta, reused for every call with arguments of the same types."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from lora_jax.leaves import is_array
from lora_jax.splitting import ARRAY, Static
from lora_jax.transform import jaxprs
from lora_jax.transform.call import Arguments, Call, insert_adapters
from lora_jax.transform.interpreter import Interpreter


class Key(NamedTuple):
    """What a trace depends on.

    Attributes:
      arrays: The tree structure and the types of the arrays.
      static: The leaves that are not arrays.
    """

    arrays: Hashable
    static: Hashable


class Leaves:
    """The leaves of a tree of arguments, split into arrays and static leaves.

    Attributes:
      structure: The tree without its arrays.
      arrays: The arrays, in order.
      key: The cache key of a trace with these arguments, or None if a static leaf is not hashable.
    """

    def __init__(self, tree: Any):
        leaves, treedef = jax.tree.flatten(tree)
        self.structure = Static(treedef, leaves)
        self.arrays, types, others = [], [], []
        for position, leaf in enumerate(leaves):  # runs at every call: keep it fast
            if type(leaf) is jaxprs.ConcreteArray:  # much faster than isinstance
                types.append(leaf.aval)
            elif is_array(leaf):
                types.append(jax.typeof(leaf))
            else:
                others.append((position, type(leaf), _distinct(leaf)))
                continue
            self.arrays.append(leaf)
            leaves[position] = ARRAY
        self.key = _hashable(Key((treedef, tuple(types), jaxprs.trace_context()), tuple(others)))

    def on_same_devices(self) -> bool:
        """Returns whether one compiled program can take the arrays: all committed arrays are on the same devices."""
        device_sets = {
            frozenset(array.sharding.device_set)
            for array in self.arrays
            if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.committed
        }
        return len(device_sets) <= 1


def _distinct(leaf: Any) -> Any:
    """Returns a leaf as part of a key. Floats become strings, since 0.0 equals -0.0 and NaN does not equal itself."""
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
    """Evaluates a traced call: inline inside other transformations, otherwise by a program that is compiled once.

    Args:
      call: The traced call.
      interpreter: Evaluates the call.
      structure: The structure of `(base, delta, args, kwargs, dropout_key)`.
      name: The name of the compiled program.
      compile_first: Whether the first call outside transformations is compiled.
      compile_later: Whether later calls are.
    """

    def __init__(
        self,
        call: Call,
        interpreter: Interpreter,
        structure: Static,
        name: str,
        *,
        compile_first: bool,
        compile_later: bool,
    ):
        def results(consts, arrays):
            base, delta, args, kwargs, dropout_key = structure.restore(arrays)
            arguments = Arguments.create(base, args, kwargs).varying_with(delta)
            return call.results(interpreter, consts, insert_adapters(delta, arguments, dropout_key, interpreter))

        results.__name__ = results.__qualname__ = name
        self._call = call
        self._results = results
        self._compiled = jax.jit(results)
        self._compile, self._compile_later = compile_first, compile_later

    def __call__(self, leaves: Leaves) -> Any:
        evaluate = self._results
        if not jaxprs.is_staged():
            evaluate = self._compiled if self._compile else self._results
            self._compile = self._compile_later
        return self._call.restore(evaluate(self._call.program.consts, leaves.arrays))
