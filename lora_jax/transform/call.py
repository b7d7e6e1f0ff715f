"""A call of a function of parameters as a program over named weights: what adapt, explain and init share."""

import dataclasses
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
from lora_jax.transform import dropout_keys, jaxprs
from lora_jax.transform.interpreter import Interpreter, Use
from lora_jax.transform.weight import Weight, carried, probe

_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of one call, arrays apart from the rest.

    Attributes:
      paths: Of the leaves of the base.
      arrays: The array leaves of base, args and kwargs, in order. A quantized weight of the base is one.
      static: The other leaves, with a placeholder for each array.
      treedefs: Of the base, and of `(args, kwargs)`.
    """

    paths: tuple[str, ...]
    arrays: tuple[Any, ...]
    static: tuple[Any, ...]
    treedefs: tuple[Any, Any]

    @classmethod
    def of(cls, base: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Arguments":
        flat = paths.flatten(base)
        others, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
        leaves = [*flat.leaves, *others]
        return cls(
            paths=tuple(path for path, leaf in zip(flat.paths, flat.leaves) if is_array(leaf)),
            arrays=tuple(canonical(leaf) for leaf in leaves if is_array(leaf)),
            static=tuple(_ABSENT if is_array(leaf) else leaf for leaf in leaves),
            treedefs=(flat.treedef, treedef),
        )

    def varying_with(self, delta: Any) -> "Arguments":
        """Inside `shard_map`: with arrays that vary over every mesh axis that the delta varies over."""
        return dataclasses.replace(self, arrays=tuple(jaxprs.varying_together(self.arrays, delta)))

    def restored(self, arrays: Sequence[Any]) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
        """Base, args and kwargs again, with these arrays."""
        queue = iter(arrays)
        leaves = [next(queue) if leaf is _ABSENT else leaf for leaf in self.static]
        base, others = self.treedefs
        args, kwargs = jax.tree.unflatten(others, leaves[base.num_leaves :])
        return jax.tree.unflatten(base, leaves[: base.num_leaves]), args, kwargs

    def key(self) -> Any:
        """What a trace depends on, or None where that cannot be hashed."""
        static = tuple((type(leaf), leaf) for leaf in self.static)
        key = (tuple(map(jaxprs.aval, self.arrays)), static, self.treedefs, jaxprs.trace_context())
        try:
            hash(key)
        except TypeError:
            return None
        return key


@dataclasses.dataclass(frozen=True)
class Call:
    """A traced call.

    Attributes:
      program: Its jaxpr.
      paths: Of the base's array leaves, which are the first inputs.
      outputs: The output's structure and its leaves that are no arrays.
    """

    program: jaxprs.Program
    paths: tuple[str, ...]
    outputs: tuple[Any, tuple[Any, ...]]

    @classmethod
    def trace(cls, fn: Callable, arguments: Arguments) -> "Call":
        """Traces `fn(base, *args, **kwargs)`."""
        captured = []

        def flat(*arrays):
            base, args, kwargs = arguments.restored(arrays)
            out, treedef = jax.tree.flatten(fn(base, *args, **kwargs))
            captured.append((treedef, tuple(_ABSENT if is_array(leaf) else leaf for leaf in out)))
            return [leaf for leaf in out if is_array(leaf)]

        program = jaxprs.trace(flat, list(map(jaxprs.abstract, arguments.arrays)))
        return cls(program, arguments.paths, captured[-1])

    def uses_path(self, path: str) -> bool:
        """Whether the outputs depend on a leaf of the base."""
        return self.program.used[self.paths.index(path)]

    def evaluate(self, interpreter: Interpreter, arrays: Sequence[Any]) -> Any:
        """The output for these inputs, some of which may be adapted weights."""
        return self.restored(self.results(interpreter, self.program.consts, arrays))

    def results(self, interpreter: Interpreter, consts: Sequence[Any], arrays: Sequence[Any]) -> list[jax.Array]:
        """The leaves of the output that are arrays."""
        used = [array for array, keep in zip(arrays, self.program.used) if keep]
        results, _ = interpreter.body(self.program.jaxpr)({}, *consts, *used)
        return [
            interpreter.materialize(out, None, "the function returns it") if isinstance(out, Weight) else out
            for out in results
        ]

    def restored(self, results: Sequence[jax.Array]) -> Any:
        """The output with its own structure."""
        queue = iter(results)
        treedef, static = self.outputs
        return jax.tree.unflatten(treedef, [next(queue) if leaf is _ABSENT else leaf for leaf in static])


def check_delta(delta: Any, arguments: Arguments, *, enlarged: bool = False) -> None:
    """Raises unless `delta` is a dict of adapters that fit the base's leaves.

    Args:
      delta: What is checked.
      arguments: Those of a call on the base.
      enlarged: Whether leaves trained outright may have more entries along one axis than the base's.
    """
    check_adapters(delta, _advice(delta, arguments))
    shapes = {path: tuple(leaf.shape) for path, leaf in zip(arguments.paths, arguments.arrays)}
    dtypes = {path: leaf.dtype for path, leaf in zip(arguments.paths, arguments.arrays)}
    for path, node in delta.items():
        if path not in shapes:
            raise ValueError(f"The delta adapts {path!r}, which the base lacks; {paths.nearest(path, list(shapes))}.")
        if not jnp.issubdtype(dtypes[path], jnp.inexact):
            raise ValueError(
                f"The delta adapts {path!r}, which has the dtype {dtypes[path]}: integers would round the update away."
            )
        if node.shape() != shapes[path]:
            if enlarges(node, shapes[path]):
                if enlarged:
                    continue
                raise ValueError(
                    f"The adapter of {path!r} has the shape {node.shape()}, an enlarged vocabulary; the base has "
                    f"{shapes[path]}. Put it into the base first: base = lora.merge(base, {{{path!r}: "
                    f"delta.pop({path!r})}}), for a model of that size."
                )
            raise ValueError(
                f"The adapter of {path!r} is for a weight of shape {node.shape()}; the base has {shapes[path]}."
            )


def _advice(delta: Any, arguments: Arguments) -> str:
    """What the caller may have meant who gave something else than a delta."""
    if isinstance(delta, Mapping) and all(map(is_adapter, delta.values())):
        return ""
    base = arguments.restored(arguments.arrays)[0]
    if any(map(is_adapter, jax.tree.leaves(base, is_leaf=is_adapter))):
        return ": base and delta are exchanged, the base comes first"
    if is_array(delta):
        return ": it comes second, after the base"
    if isinstance(delta, tuple) and len(delta) == 2 and all(isinstance(half, Mapping) for half in delta):
        return ": the halves of partition() are given by join(train, frozen)"
    return ""


def entered(
    delta: Mapping[str, Adapter],
    arguments: Arguments,
    dropout_key: jax.Array | None,
    interpreter: Interpreter,
) -> list[Any]:
    """The inputs of a call, adapted weights in place of the base's."""
    dropout_keys.note(dropout_key is not None)
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
                interpreter.uses.append(Use(path, "entry", False, node.merged_because, "the arguments", {}))
            inputs[position] = node.merge(dequantized(value))
        else:
            key = None if dropout_key is None else path_key(dropout_key, path)
            inputs[position] = carried(path, value, form, key)
    return inputs


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key of a path's own, the same whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
