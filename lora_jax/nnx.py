"""Converts NNX modules to functions of parameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lora_jax import paths

__all__ = ["functional", "nested", "updated"]


def functional(model: nnx.Module) -> tuple[Callable, dict[str, Any]]:
    """Splits an NNX module into a pure function and its parameters.

    Args:
      model: Any module. It is not changed.

    Returns:
      `(apply_fn, base)`. `base` is a plain nested dict of every variable except random state, with NNX's keys (the
      items of a list have the keys 0, 1, …) and paths such as `layers/0/query/kernel`.
      `apply_fn(base, *args, rngs=None, mutable=(), **kwargs)` calls a fresh copy of the module:

      - `rngs`: a PRNG key that reseeds every random stream. A `__call__` with an argument of that name receives it as
        `nnx.Rngs`. Without a key, dropout is off, and such a `__call__` receives None, unless the argument has a
        default.
      - `mutable`: the variables that the call may change: classes (`nnx.BatchStat`), their names in NNX
        ('batch_stats') or patterns of paths. The result is then `(out, changed)` with the changed variables as a dict
        like `base`.

      To put weights back into the module, use `nnx.update(model, lora.merge(base, delta))` or :func:`updated`.

    Raises:
      TypeError: `model` is not an NNX module but, for example, a Linen module, a class or a function. (From
        `apply_fn`:) `rngs` is not a PRNG key.
      ValueError: (from `apply_fn`) The call changes a variable that is not a parameter and not in `mutable`, or `base`
        does not fit the module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen, nnx
      >>> apply_fn, base = functional(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> sorted(base), apply_fn(base, jnp.ones((2, 4))).shape
      (['bias', 'kernel'], (2, 3))
    """
    _check_module(model, "functional")
    graphdef, random, state = nnx.split(model, nnx.RngState, ...)
    flat = paths.flatten(state)
    names, treedef = flat.paths, flat.treedef
    keys = _keys(state)
    parameter = inspect.signature(type(model).__call__).parameters.get("rngs")

    def apply_fn(base: Any, *args: Any, rngs: jax.Array | None = None, mutable: Any = (), **kwargs: Any) -> Any:
        leaves = _leaves(base)
        missing = [name for name in names if name not in leaves]
        unknown = [name for name in leaves if name not in names]
        if missing or unknown:
            first = (missing or unknown)[0]
            raise ValueError(
                f"The base does not fit the module: it lacks {len(missing)} variables and has {len(unknown)} unknown "
                f"ones, for example {first!r}; {paths.nearest(first, list(leaves if missing else names))}."
            )
        values = [leaves[name] for name in names]
        # Copy, so that the call does not change the random state or the module of an earlier call.
        module = nnx.merge(graphdef, random, treedef.unflatten(values), copy=True)
        if rngs is None:
            module.set_attributes(deterministic=True, raise_if_not_found=False)
            if parameter is not None and parameter.default is parameter.empty:
                kwargs["rngs"] = None
        else:
            if not isinstance(rngs, jax.Array):
                raise TypeError(f"rngs: expected a PRNG key, such as jax.random.key(0); got {type(rngs).__name__}.")
            _reseed(module, rngs)
            if parameter is not None:
                kwargs["rngs"] = nnx.Rngs(rngs)
        out = module(*args, **kwargs)
        after = nnx.split(module, nnx.RngState, ...)[2]
        before = dict(zip(names, values))
        variables = dict(_variables(after))
        allowed = (mutable,) if isinstance(mutable, str | type) else tuple(mutable)
        # Lifted transforms (nnx.remat, nnx.jit) replace every variable, also parameters, by another tracer.
        changed = {
            path: leaf
            for path, leaf in _leaves(after).items()
            if leaf is not before.get(path)
            and not (isinstance(variables[path], nnx.Param) and not _is_named(path, variables[path], allowed))
        }
        for path in changed:
            if not _is_named(path, variables[path], allowed):
                raise ValueError(
                    f"The call changes the variable {path!r} ({type(variables[path]).__name__}), which is not in "
                    f"mutable={mutable!r}. Add it, or call model.eval() first."
                )
        return (out, _nested(changed, keys | _keys(after))) if allowed else out

    return apply_fn, _nested(flat.as_dict(), keys)


def updated(target: Any, params: Any) -> Any:
    """Returns a module, or a base from :func:`functional`, with some of its variables replaced.

    Args:
      target: An NNX module, which is not changed, or a base.
      params: A tree with some or all of its variables, such as merged weights or the variables that a call changed.

    Returns:
      A new module or a new base. New arrays get the shardings of the arrays that they replace.

    Raises:
      TypeError: `target` is a module of another framework.
      ValueError: `params` has a path that is not in the target, or an array of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen, nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> new = updated(model, {"layers": {0: {"bias": jnp.ones(3)}}})
      >>> new.layers[0].bias[...].tolist(), model.layers[0].bias[...].tolist()
      ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    if isinstance(target, nnx.Module):
        graphdef, random, state = nnx.split(target, nnx.RngState, ...)
        return nnx.merge(graphdef, random, updated(state, params), copy=True)
    if isinstance(target, type) or callable(target):
        _check_module(target, "updated")
    flat, changes = paths.flatten(target), _leaves(params)
    variables = flat.as_dict()
    for path, leaf in changes.items():
        if path not in variables:
            raise ValueError(f"The target has no variable {path!r}; {paths.nearest(path, list(variables))}.")
        if jnp.shape(leaf) != jnp.shape(variables[path]):
            raise ValueError(f"{path!r}: expected the shape {jnp.shape(variables[path])}, got {jnp.shape(leaf)}.")
    return flat.map(lambda path, leaf: _with_sharding(changes[path], leaf) if path in changes else leaf)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Builds a nested dict from '/'-joined paths.

    Example:
      >>> nested({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    return _nested(leaves, {path: tuple(path.split("/")) for path in leaves})


def _nested(leaves: Mapping[str, Any], keys: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Builds a nested dict from leaves by path, and the keys of each path."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = keys[path]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _keys(state: Any) -> dict[str, tuple[Any, ...]]:
    """Returns the keys of each leaf of a state by its path. Items of a list have integer keys, as in NNX."""
    keys_of = {}
    for entries, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]:
        keys = tuple(getattr(entry, "key", entry) for entry in entries)
        for tail in paths.flatten(node).paths:  # "" unless the variable holds a tree
            keys_of["/".join(map(str, keys)) + tail] = (*keys, *tail.split("/")[1:])
    return keys_of


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _check_module(model: Any, where: str) -> None:
    """Raises `TypeError` unless `model` is an NNX module, with advice for other objects."""
    if isinstance(model, nnx.Module):
        return
    if isinstance(model, linen.Module):
        what = f"a Linen module ({type(model).__name__})"
        advice = "adapt model.apply, a function of the variables that model.init returns: lora.adapt(model.apply)"
    elif isinstance(model, type):
        what, advice = f"the class {model.__name__}", f"create a module first: {model.__name__}(…)"
    elif callable(model):
        what = f"the function {getattr(model, '__name__', type(model).__name__)}"
        advice = "a function of parameters needs no conversion: lora.adapt(fn)"
    else:
        what, advice = f"{type(model).__name__}", "for a function of parameters use lora.adapt(fn)"
    raise TypeError(f"lora.nnx.{where}: expected an instance of flax.nnx.Module; got {what}. Instead, {advice}.")


def _with_sharding(new: Any, old: Any) -> Any:
    """Returns an array with the sharding of the one that it replaces, so that compiled steps are reused."""
    if isinstance(old, jax.Array) and isinstance(new, jax.Array) and not isinstance(new, jax.core.Tracer):
        return new if new.sharding == old.sharding else jax.device_put(new, old.sharding)
    return new


def _leaves(base: Any) -> dict[str, Any]:
    return paths.flatten(base).as_dict()


def _variables(state: Any) -> list[tuple[str, Any]]:
    """Returns the variables of a state with their paths."""
    entries = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]
    return [(paths.join(keys), variable) for keys, variable in entries]


def _is_named(path: str, variable: Any, allowed: tuple) -> bool:
    """Returns whether `mutable` names a variable by class, by the class's name in NNX, or by a pattern of its path."""
    kind = type(variable)
    names = (kind.__name__, nnx.variable_name_from_type(kind, allow_register=True))
    return any(
        isinstance(variable, name) if isinstance(name, type) else name in names or paths.search(name, path)
        for name in allowed
    )


def _reseed(module: nnx.Module, key: jax.Array) -> None:
    """Reseeds every random stream with a key derived from `key` and the position of the stream."""
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    for number, stream in enumerate(streams):
        stream_key = jax.random.fold_in(key, number)
        shape = stream.key.get_value().shape
        stream.key.set_value(jax.random.split(stream_key, shape) if shape else stream_key)
        stream.count.set_value(jnp.zeros_like(stream.count.get_value()))
