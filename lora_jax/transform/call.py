"""Traces a call of a function of parameters to a program over named weights. Shared by adapt, explain and init."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, paths
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.full import enlarges
from lora_jax.adapters.protocol import Adapter, is_adapter, with_frozen_stopped
from lora_jax.leaves import canonical, dequantized, is_array, is_quantized
from lora_jax.splitting import Static
from lora_jax.transform import dropout_keys, jaxprs
from lora_jax.transform.interpreter import Interpreter, Use
from lora_jax.transform.weight import make_weight, probe


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of one call, split into arrays and static leaves.

    Attributes:
      paths: Paths of the base's array leaves.
      arrays: The array leaves of base, args and kwargs, in order. A quantized weight of the base is one leaf.
      static: The base and `(args, kwargs)` without their arrays.
    """

    paths: tuple[str, ...]
    arrays: tuple[Any, ...]
    static: tuple[Static, Static]

    @classmethod
    def create(cls, base: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> "Arguments":
        flat = paths.flatten(base)
        static_base, weights = Static.split(base, is_leaf=is_quantized)
        static_args, arrays = Static.split((tuple(args), dict(kwargs or {})))
        return cls(
            paths=tuple(path for path, leaf in zip(flat.paths, flat.leaves) if is_array(leaf)),
            arrays=tuple(map(canonical, [*weights, *arrays])),
            static=(static_base, static_args),
        )

    def varying_with(self, delta: Any) -> "Arguments":
        """Inside `shard_map`, makes the arrays vary over every mesh axis that the delta varies over."""
        return dataclasses.replace(self, arrays=tuple(jaxprs.varying_together(self.arrays, delta)))

    def restore(self, arrays: Sequence[Any]) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
        """Returns base, args and kwargs with the given arrays."""
        base, others = self.static
        args, kwargs = others.restore(arrays[len(self.paths) :])
        return base.restore(arrays[: len(self.paths)]), args, kwargs

    def key(self) -> Any:
        """Returns what a trace depends on, or None if a static leaf is not hashable."""
        types = tuple(type(leaf) for static in self.static for leaf in static.leaves)
        key = (tuple(map(jaxprs.aval, self.arrays)), self.static, types, jaxprs.trace_context())
        try:
            hash(key)
        except TypeError:
            return None
        return key


@dataclasses.dataclass(frozen=True)
class Call:
    """A traced call.

    Attributes:
      program: The traced function.
      paths: Paths of the base's array leaves, which are the first inputs of the program.
      outputs: The output without its arrays.
    """

    program: jaxprs.Program
    paths: tuple[str, ...]
    outputs: Static

    @classmethod
    def trace(cls, fn: Callable, arguments: Arguments) -> "Call":
        """Traces `fn(base, *args, **kwargs)`."""
        captured = []

        def flat(*arrays):
            base, args, kwargs = arguments.restore(arrays)
            static, results = Static.split(fn(base, *args, **kwargs))
            captured.append(static)
            return results

        program = jaxprs.trace(flat, list(map(jaxprs.abstract, arguments.arrays)))
        return cls(program, arguments.paths, captured[-1])

    def uses_path(self, path: str) -> bool:
        """Returns whether the outputs depend on the base's leaf at a path."""
        return self.program.used[self.paths.index(path)]

    def evaluate(self, interpreter: Interpreter, arrays: Sequence[Any]) -> Any:
        """Returns the output for these inputs, some of which may be adapted weights."""
        return self.restore(self.results(interpreter, self.program.consts, arrays))

    def results(self, interpreter: Interpreter, consts: Sequence[Any], arrays: Sequence[Any]) -> list[jax.Array]:
        """Returns the array leaves of the output."""
        used = [array for array, keep in zip(arrays, self.program.used) if keep]
        results, _ = interpreter.body(self.program.jaxpr, activations=self._activations)({}, *consts, *used)
        return interpreter.returned(None, results, "the function returns it")[0]

    @functools.cached_property
    def _activations(self) -> frozenset[Any]:
        """The variables of the program that depend on inputs other than the base."""
        used = [position for position, keep in enumerate(self.program.used) if keep]
        flags = [position >= len(self.paths) for position in used]
        return jaxprs.dependents(self.program.jaxpr, [False] * len(self.program.consts) + flags)

    def restore(self, results: Sequence[jax.Array]) -> Any:
        """Returns the output in its own structure, with the given array leaves."""
        return self.outputs.restore(results)


def check_delta(delta: Any, arguments: Arguments, *, enlarged: bool = False) -> None:
    """Raises an error unless `delta` is a dict of adapters that fit the base's leaves.

    Args:
      delta: The object to check.
      arguments: Arguments of a call that include the base.
      enlarged: Whether adapters that replace a leaf (`Full`) may have more entries along one axis than the base.
    """
    check_adapters(delta, _advice(delta, arguments))
    shapes = {path: tuple(leaf.shape) for path, leaf in zip(arguments.paths, arguments.arrays)}
    dtypes = {path: leaf.dtype for path, leaf in zip(arguments.paths, arguments.arrays)}
    for path, node in delta.items():
        if path not in shapes:
            raise ValueError(
                f"The delta adapts {path!r}, which is not in the base; {paths.nearest(path, list(shapes))}."
            )
        if not jnp.issubdtype(dtypes[path], jnp.inexact):
            raise ValueError(
                f"The delta adapts {path!r}, which has the dtype {dtypes[path]}: integers cannot hold the update."
            )
        if node.shape() != shapes[path]:
            if enlarges(node, shapes[path]):
                if enlarged:
                    continue
                raise ValueError(
                    f"The adapter of {path!r} has the shape {node.shape()}, an enlarged vocabulary; the base has "
                    f"{shapes[path]}. Merge it into the base first, for a model of that size: base = lora.merge(base, "
                    f"{{{path!r}: delta.pop({path!r})}})."
                )
            raise ValueError(
                f"The adapter of {path!r} is for a weight of shape {node.shape()}; the base has {shapes[path]}."
            )


def _advice(delta: Any, arguments: Arguments) -> str:
    """Returns a hint on how to correct a call whose argument is not a delta."""
    if isinstance(delta, Mapping) and all(map(is_adapter, delta.values())):
        return ""
    base = arguments.restore(arguments.arrays)[0]
    if any(map(is_adapter, jax.tree.leaves(base, is_leaf=is_adapter))):
        return ": base and delta are exchanged; the base comes first"
    if is_array(delta):
        return ": the delta is the second argument, after the base"
    if isinstance(delta, tuple) and len(delta) == 2 and all(isinstance(half, Mapping) for half in delta):
        return ": combine the halves of partition() with join(train, frozen)"
    return ""


def insert_adapters(
    delta: Mapping[str, Adapter],
    arguments: Arguments,
    dropout_key: jax.Array | None,
    interpreter: Interpreter,
) -> list[Any]:
    """Returns the inputs of a call, with adapted weights in place of the base's arrays."""
    dropout_keys.record_call(dropout_key is not None)
    if dropout_key is not None:
        checks.key("dropout_key", dropout_key)
    if dropout_key is not None and not jax.dtypes.issubdtype(dropout_key.dtype, jax.dtypes.prng_key):
        dropout_key = jax.random.wrap_key_data(dropout_key)
    inputs = list(arguments.arrays)
    for position, path in enumerate(arguments.paths):
        value = inputs[position]
        if path not in delta:
            if is_quantized(value):
                inputs[position] = probe(path, value)
            continue
        node = with_frozen_stopped(delta[path])
        form = node.factored(value)
        if form is None:
            if interpreter.uses is not None:
                interpreter.uses.append(Use(path, "input", False, node.merged_because, "", {}))
            inputs[position] = node.merge(dequantized(value))
        else:
            key = None if dropout_key is None else path_key(dropout_key, path)
            inputs[position] = make_weight(path, value, form, getattr(node, "axes", ()), key)
    return inputs


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Derives the PRNG key of a path. It does not depend on which other paths are adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
