"""An NNX module as a function of parameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from lora_jax import paths


def functional(model: nnx.Module) -> tuple[Callable, dict[str, Any]]:
    """Splits an NNX module into a pure function and its parameters.

    Args:
      model: Any module. It is not changed.

    Returns:
      `(apply_fn, base)`. `base` is a plain nested dict of every variable that is no random state, with NNX's own
      keys (the items of a list are under 0, 1, …) and paths such as `layers/0/query/kernel`.
      `apply_fn(base, *args, rngs=None, mutable=(), **kwargs)` calls a fresh copy of the module:

      - `rngs`: a PRNG key that reseeds every random stream, and that a `__call__` with an argument of
        that name is given as `nnx.Rngs`. Without it dropout is off, and such a `__call__` is given None,
        unless it has a default.
      - `mutable`: what the call may change: classes (`nnx.BatchStat`), their names in NNX
        ('batch_stats') or patterns of paths; the result is then `(out, changed)` with the changed
        variables as a dict like `base`.

      Weights go back into the module by `nnx.update(model, lora.merge(base, delta))` or :func:`updated`.

    Raises:
      TypeError: `model` is not an NNX module but, for example, a Linen module, a class or a function. (From
        `apply_fn`:) `rngs` is no key.
      ValueError: (from `apply_fn`) The call changes a variable, other than a parameter, that `mutable`
        does not name, or `base` does not fit the module.

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
        given = _leaves(base)
        missing = [name for name in names if name not in given]
        unknown = [name for name in given if name not in names]
        if missing or unknown:
            first = (missing or unknown)[0]
            raise ValueError(
                f"The base does not fit the module: it lacks {len(missing)} variables and has {len(unknown)} that the "
                f"module lacks, {first!r} for one; {paths.nearest(first, list(given if missing else names))}."
            )
        values = [given[name] for name in names]
        # A copy: the module of an earlier call, and random state, are never written to.
        module = nnx.merge(graphdef, random, treedef.unflatten(values), copy=True)
        if rngs is None:
            module.set_attributes(deterministic=True, raise_if_not_found=False)
            if parameter is not None and parameter.default is parameter.empty:
                kwargs["rngs"] = None
        else:
            if not isinstance(rngs, jax.Array):
                raise TypeError(f"rngs takes a PRNG key, such as jax.random.key(0); got {type(rngs).__name__}.")
            _reseed(module, rngs)
            if parameter is not None:
                kwargs["rngs"] = nnx.Rngs(rngs)
        out = module(*args, **kwargs)
        after = nnx.split(module, nnx.RngState, ...)[2]
        before = dict(zip(names, values))
        variables = dict(_variables(after))
        allowed = (mutable,) if isinstance(mutable, str | type) else tuple(mutable)
        # Lifted transforms (nnx.remat, nnx.jit) write every variable back, parameters too: as another tracer.
        changed = {
            path: leaf
            for path, leaf in _leaves(after).items()
            if leaf is not before.get(path)
            and not (isinstance(variables[path], nnx.Param) and not _is_named(path, variables[path], allowed))
        }
        for path in changed:
            if not _is_named(path, variables[path], allowed):
                raise ValueError(
                    f"The call changes the variable {path!r} ({type(variables[path]).__name__}), which "
                    f"mutable={mutable!r} does not name. Name it, or set the module to evaluation with "
                    "model.eval() first."
                )
        return (out, _nested(changed, keys | _keys(after))) if allowed else out

    return apply_fn, _nested(flat.as_dict(), keys)


def updated(target: Any, params: Any) -> Any:
    """A module, or a base from :func:`functional`, with some of its variables replaced.

    Args:
      target: An NNX module, which is not changed, or a base.
      params: A tree of some or all of its variables by their paths: merged weights, or the variables that a call
        changed.

    Returns:
      A new module, or a new base. Arrays are put where those that they replace are.

    Raises:
      TypeError: `target` is a module of another kind.
      ValueError: `params` has a path that the target lacks, or an array of another shape.

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
            raise ValueError(f"{path!r}: the shape {jnp.shape(leaf)} replaces {jnp.shape(variables[path])}.")
    return flat.map(lambda path, leaf: _placed(changes[path], leaf) if path in changes else leaf)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict from '/'-joined paths.

    Example:
      >>> nested({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    return _nested(leaves, {path: tuple(path.split("/")) for path in leaves})


def _nested(leaves: Mapping[str, Any], keys: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A nested dict from paths and the keys that each stands for."""
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = keys[path]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _keys(state: Any) -> dict[str, tuple[Any, ...]]:
    """The keys of each leaf of a state: integers for the items of a list, as NNX has them."""
    keys_of = {}
    for entries, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]:
        keys = tuple(getattr(entry, "key", entry) for entry in entries)
        for tail in paths.flatten(node).paths:  # "" unless the variable holds a tree
            keys_of["/".join(map(str, keys)) + tail] = (*keys, *tail.split("/")[1:])
    return keys_of


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _check_module(model: Any, where: str) -> None:
    """Raises `TypeError` unless `model` is an NNX module; says what to do with what it is instead."""
    if isinstance(model, nnx.Module):
        return
    if isinstance(model, linen.Module):
        what = f"a Linen module ({type(model).__name__})"
        advice = "adapt model.apply, a function of the variables that model.init returns: lora.adapt(model.apply)"
    elif isinstance(model, type):
        what, advice = f"the class {model.__name__}", f"create a module first: {model.__name__}(…)"
    elif callable(model):
        what = f"{getattr(model, '__name__', type(model).__name__)}, a callable of another kind"
        advice = "a function of parameters needs no conversion: lora.adapt(fn)"
    else:
        what, advice = f"{type(model).__name__}", "for a function of parameters use lora.adapt(fn)"
    raise TypeError(f"lora.nnx.{where} takes an instance of flax.nnx.Module; got {what}. Instead, {advice}.")


def _placed(new: Any, old: Any) -> Any:
    """An array with the sharding of the one that it replaces, for which a compiled step was made."""
    if isinstance(old, jax.Array) and isinstance(new, jax.Array) and not isinstance(new, jax.core.Tracer):
        return new if new.sharding == old.sharding else jax.device_put(new, old.sharding)
    return new


def _leaves(base: Any) -> dict[str, Any]:
    return paths.flatten(base).as_dict()


def _variables(state: Any) -> list[tuple[str, Any]]:
    """The variables of a state with their paths."""
    entries = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]
    return [("/".join(paths.segment(key) for key in keys), variable) for keys, variable in entries]


def _is_named(path: str, variable: Any, allowed: tuple) -> bool:
    """Whether `mutable` names a variable: by class, by the class's name in NNX, or by a pattern of its path."""
    kind = type(variable)
    names = (kind.__name__, nnx.variable_name_from_type(kind, allow_register=True))
    return any(
        isinstance(variable, name) if isinstance(name, type) else name in names or paths.search(name, path)
        for name in allowed
    )


def _reseed(module: nnx.Module, key: jax.Array) -> None:
    """Gives every random stream a key derived from `key` and the stream's place."""
    streams = [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]
    for number, stream in enumerate(streams):
        made = jax.random.fold_in(key, number)
        shape = stream.key.get_value().shape
        stream.key.set_value(jax.random.split(made, shape) if shape else made)
        stream.count.set_value(jnp.zeros_like(stream.count.get_value()))
