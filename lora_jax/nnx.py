"""An NNX module as a function of parameters."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax import paths


def functional(model: nnx.Module) -> tuple[Callable, dict[str, Any]]:
    """Splits an NNX module into a pure function and its parameters.

    Args:
      model: Any module. It is not changed.

    Returns:
      `(apply_fn, base)`. `base` is a plain nested dict of every variable that is no random state, with
      paths such as `layers/0/query/kernel`. `apply_fn(base, *args, rngs=None, mutable=(), **kwargs)`
      calls a fresh copy of the module:

      - `rngs`: a PRNG key that reseeds every random stream, and that a `__call__` with an argument of
        that name is given as `nnx.Rngs`; without it dropout is off.
      - `mutable`: what the call may change: classes (`nnx.BatchStat`), their names in NNX
        ('batch_stats') or patterns of paths; the result is then `(out, changed)` with the changed
        variables as a dict like `base`.

    Raises:
      ValueError: (from `apply_fn`) The call changes a variable, other than a parameter, that `mutable`
        does not name, or `base` does not fit the module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> apply_fn, base = functional(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> sorted(base), apply_fn(base, jnp.ones((2, 4))).shape
      (['bias', 'kernel'], (2, 3))
    """
    graphdef, random, state = nnx.split(model, nnx.RngState, ...)
    flat = paths.flatten(state)
    names, treedef = flat.paths, flat.treedef

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
        else:
            _reseed(module, rngs)
            if "rngs" in inspect.signature(type(module).__call__).parameters:
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
        return (out, nested(changed)) if allowed else out

    return apply_fn, nested(flat.as_dict())


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict from '/'-joined paths.

    Example:
      >>> nested({"a/b": 1, "a/c": 2})
      {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _leaves(base: Any) -> dict[str, Any]:
    return paths.flatten(base).as_dict()


def _variables(state: Any) -> list[tuple[str, Any]]:
    """The variables of a state with their paths."""
    found = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    return [("/".join(paths.segment(key) for key in keys), variable) for keys, variable in found]


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
