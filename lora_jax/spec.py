"""From a spec (path patterns and recipes) to a delta."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import axes as axis_roles
from lora_jax import checks, paths
from lora_jax.adapters.fingerprints import fingerprint
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter, Recipe, check_axes, is_inexact
from lora_jax.calibration import collect_stats
from lora_jax.functions import check_function
from lora_jax.initializers import GRADIENT
from lora_jax.leaves import canonical, is_array, is_finite, short
from lora_jax.linear import all_linear, linear_weights
from lora_jax.transform.call import path_key

Spec = Mapping[Any, Recipe | None]
"""`{pattern or all_linear: recipe or None}`."""


def assign(base: Any, spec: Spec, linear: Collection[str] = ()) -> dict[str, Any]:
    """Returns the pattern of the spec that each leaf of the base matches: the first that occurs in its path.

    Args:
      base: The parameters.
      spec: As for :func:`init`.
      linear: The paths that `all_linear` matches.

    Returns:
      `{path: pattern}` without the paths whose recipe is None.

    Raises:
      ValueError: A pattern matches nothing, or only paths that earlier ones match.
    """
    flat = paths.flatten(base)
    leaves = [path for path, leaf in zip(flat.paths, flat.leaves) if is_array(leaf)]
    patterns = paths.match_patterns(spec, leaves, {all_linear: linear})
    return {path: pattern for path, pattern in patterns.items() if spec[pattern] is not None}


def _check(spec: Any) -> None:
    """Raises `TypeError` unless a spec is a dict from patterns to recipes."""
    hint = "; lora.all_linear(lora.LoRA(8)) is one" if spec is all_linear or spec == "all-linear" else ""
    if isinstance(spec, Recipe):
        hint = f"; {{'.*kernel': {type(spec).__name__}(…)}} or lora.all_linear({type(spec).__name__}(…)) is one"
    if not isinstance(spec, Mapping):
        raise TypeError(f"A spec is a dict from path patterns to recipes; got {type(spec).__name__}{hint}.")
    for pattern, recipe in spec.items():
        if pattern == "all-linear":
            raise ValueError("The pattern 'all-linear' matches no path: write lora.all_linear, without quotes.")
        if recipe is not None and not isinstance(recipe, Recipe):
            hint = f"; write {recipe.__name__}(…)" if isinstance(recipe, type) else ""
            raise TypeError(f"The spec's {pattern!r} has no recipe but {short(recipe)}{hint}.")


def init(
    key: jax.Array, base: Any, spec: Spec, fn: Callable | None = None, /, *args: Any, **kwargs: Any
) -> dict[str, Adapter]:
    """Creates a delta: an adapter for each weight that a pattern of the spec matches.

    Args:
      key: A PRNG key. Each path draws from its own key, independent of the other paths.
      base: The parameters; any pytree. Leaves may be `jax.ShapeDtypeStruct` for recipes that need the
        shape only.
      spec: `{pattern: recipe}`. Patterns are searched in '/'-joined paths; the first match wins; a recipe
        of None freezes the paths that a later pattern would match. The key `lora_jax.all_linear` matches the
        weights of all linear layers.
      fn: `fn(base, *args, **kwargs)` is traced (not run) to find which axes of each weight are
        contracted. Without it every recipe has `axes=` or needs none.
      *args: Arguments of fn; arrays or `jax.ShapeDtypeStruct`.
      **kwargs: Likewise.

    Returns:
      `{path: adapter}`, in the base's order.

    Raises:
      ValueError: A pattern matches nothing or is fully shadowed, or matches integers; a weight has no axis roles or the
        function never uses it; the rank is above the weight's.
      TypeError: The spec is not a dict of recipes, or a recipe returns something other than an adapter.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"attention": {"query": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}}
      >>> fn = lambda p, x: x @ p["attention"]["query"]["kernel"] + p["attention"]["query"]["bias"]
      >>> delta = init(jax.random.key(0), base, {"query/kernel": lora.LoRA(rank=2)}, fn, jnp.ones((1, 4)))
      >>> {path: adapter.a.shape for path, adapter in delta.items()}
      {'attention/query/kernel': (2, 4)}
    """
    delta = {}
    for path, recipe, arguments in _each(key, base, spec, fn, args, kwargs):
        with _prefix_errors(path):
            delta[path] = _check_result(path, recipe, "create", recipe.create(*arguments))
    return delta


def prepare(
    key: jax.Array,
    base: Any,
    spec: Spec,
    fn: Callable,
    batches: Iterable[Any],
    /,
    *,
    loss: Callable | None = None,
) -> tuple[Any, dict[str, Adapter]]:
    """Like :func:`init`, for initializers that read data or move a part of the weights into the adapters.

    PiSSA, MiLoRA, OLoRA and LoftQ read the weights; EVA and CorDA read the inputs of the weights in `fn`; LoRA-GA reads
    the gradient of `loss`. Inputs are read by differentiating the outputs of `fn`: a use that affects no float output,
    or only one behind a `stop_gradient`, does not count.

    Besides the base this needs memory, in float32, for an in × in matrix for each weight whose inputs are read, or a
    copy of each weight whose gradient is read. The statistics of a weight are freed once its factors are made. (Four
    square weights need at most 4 such matrices, and 1 (EVA), 3 (LoRA-GA) or 7 (CorDA) more while the factors of one
    weight are made, with its singular vectors.)

    Args:
      key: A PRNG key.
      base: The parameters.
      spec: As for :func:`init`.
      fn: `fn(base, *batch)`.
      batches: The function's other arguments, a tuple a batch (or the one argument itself). The first
        is traced for axis roles; all are read, once, if an initializer reads data. Padding tokens count.
      loss: `loss(base, *batch)`, a scalar, for initializers that read gradients.

    Returns:
      The adjusted base and the delta, whose adapters hold fingerprints of the weights that changed: other bases are
      refused. Merged, they are the original base, to rounding in its dtype (except for LoftQ). Weights change one by
      one; those that are not adapted are the same arrays. EVA leaves out weights that get no rank.

    Raises:
      ValueError: As :func:`init`; there is no batch; a loss is passed that no initializer reads, or is missing; the
        inputs of a weight cannot be read; inputs, a gradient or a changed weight contain NaN or Inf; no inputs vary for
        EVA; a weight to read is abstract; EVA is traced (its ranks are Python integers).
      TypeError: `batches` is one array or dict.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> w = jax.random.normal(jax.random.key(1), (4, 3))
      >>> fn, x = (lambda p, x: x @ p["w"]), jnp.ones((1, 4))
      >>> spec = {"w": lora.LoRA(rank=1, init="pissa")}
      >>> base, delta = prepare(jax.random.key(0), {"w": w}, spec, fn, [(x,)])
      >>> bool(jnp.allclose(lora.merge(base, delta)["w"], w, atol=1e-6))
      True

    References:
      Meng et al., `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024, §3; :mod:`lora_jax.initializers` has the others'
    """
    if isinstance(batches, Mapping) or is_array(batches):
        raise TypeError(
            f"batches is an iterable of batches; got one {type(batches).__name__}. For one batch write [batch]."
        )
    rest = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("prepare needs at least one batch, to trace the function.")
    adapted = list(_each(key, base, spec, fn, first, {}))
    recipes = {path: recipe for path, recipe, _ in adapted}
    reads = {path: recipe.reads for path, recipe in recipes.items() if recipe.reads is not None}
    for path, kind in reads.items():
        if kind == GRADIENT and loss is None:
            raise ValueError(f"{path!r}: {recipes[path]} reads the gradient of a loss: give prepare(…, loss=…).")
    if loss is not None and GRADIENT not in reads.values():
        raise ValueError("prepare(loss=…): no recipe of the spec has an initializer that reads gradients.")
    calibrated: dict[str, Recipe | None] = dict(recipes)
    if reads:
        requests = {path: (reads[path], axes) for path, _, (_, _, axes) in adapted if path in reads}
        statistics = collect_stats(fn, loss, base, requests, itertools.chain([first], rest))
        while statistics:
            recipe = recipes[next(iter(statistics))]
            alike = [path for path in statistics if recipes[path] == recipe]
            # Statistics are referenced only by the calibrated recipe, until it has made its adapter.
            calibrated |= recipe.with_calibration({path: statistics.pop(path) for path in alike})
    residuals, delta = {}, {}
    for path, _, arguments in adapted:
        recipe = calibrated.pop(path)
        if recipe is not None:
            with _prefix_errors(path):
                weight, node = _prepare(path, recipe, arguments)
                delta[path] = node
                if weight is arguments[1]:
                    continue
                residuals[path] = weight
                if isinstance(node, LoRAAdapter):
                    delta[path] = dataclasses.replace(node, fingerprint=fingerprint(arguments[1], weight))
                if is_finite(arguments[1]) and not is_finite(weight):
                    raise ValueError(f"{recipes[path]} makes a finite weight one with NaN or Inf.")
    return paths.flatten(base).map(lambda path, leaf: _place_like(residuals.get(path, leaf), leaf)), delta


def _prepare(path: str, recipe: Recipe, arguments: Any) -> tuple[Any, Adapter]:
    """The weight and the adapter that a recipe prepares."""
    result = recipe.prepare(*arguments)
    if not isinstance(result, tuple) or len(result) != 2:
        name = type(result).__name__
        raise TypeError(f"{path!r}: {recipe}: prepare() returned {name}, expected the weight and an Adapter.")
    weight, node = result
    return weight, _check_result(path, recipe, "create" if type(recipe).prepare is Recipe.prepare else "prepare", node)


def _check_result(path: str, recipe: Recipe, method: str, node: Any) -> Adapter:
    """Returns what a recipe's method returned; raises `TypeError` unless it is an adapter."""
    if not isinstance(node, Adapter):
        name = "None" if node is None else type(node).__name__
        raise TypeError(f"{path!r}: {recipe}: {method}() returned {name}, expected an Adapter.")
    return node


def _place_like(weight: Any, leaf: Any) -> Any:
    """The changed weight, with the sharding of the original."""
    if not isinstance(weight, jax.Array) or not isinstance(leaf, jax.Array) or isinstance(weight, jax.core.Tracer):
        return weight
    return weight if weight.sharding == leaf.sharding else jax.device_put(weight, leaf.sharding)


def _each(key, base, spec, fn, args, kwargs):
    """Per adapted path, in the base's order: the recipe, and the key, weight and axis roles for it."""
    _check(spec)
    checks.key("init(key, base, spec, fn, *args)", key)
    if fn is not None:
        check_function("init", fn)
    leaves = paths.flatten(base).as_dict()
    uses, linear = None, ()
    if all_linear in spec:
        if fn is None:
            raise ValueError("all_linear needs a function to trace: give init(key, base, spec, fn, *args).")
        shapes = {path: leaf.shape for path, leaf in leaves.items() if is_array(leaf) and is_inexact(leaf)}
        uses = axis_roles.uses_of(fn, base, list(shapes), args, kwargs)
        linear = linear_weights(uses, shapes)
        if not linear:
            raise ValueError("all_linear: the function multiplies no weight with an input, as far as tracing follows.")
    patterns = assign(base, spec, linear)
    for path, pattern in patterns.items():
        if not is_inexact(leaves[path]):
            raise ValueError(
                f"{path!r}: {type(spec[pattern]).__name__} adapts floats, and this weight has the dtype "
                f"{leaves[path].dtype}, which rounds every update away. Cast it, or leave it out (a recipe of None "
                "before the pattern does)."
            )
        recipe = spec[pattern]
        dtype = getattr(recipe, "dtype", None)
        if jnp.issubdtype(leaves[path].dtype, jnp.complexfloating) and dtype is not None:
            raise ValueError(
                f"{path!r}: {type(recipe).__name__} has factors of dtype {jnp.dtype(dtype).name}, and this weight has "
                f"the dtype {leaves[path].dtype}: they would change its real part only. Train it with Full(), or "
                "keep its real and imaginary parts as two weights; re + 1j * im stays factored."
            )
    if uses is None and fn is not None:
        uses = axis_roles.uses_of(fn, base, list(patterns), args, kwargs)
    axes, wrong = {}, {}
    for path, pattern in patterns.items():
        try:
            axes[path] = _axes(spec[pattern], leaves[path], None if uses is None else uses[path])
        except ValueError as error:
            wrong[path] = error
    for path, error in wrong.items():
        alike = [other for other in axes if patterns[other] == patterns[path]]
        hint = _suggest_pattern(patterns[path], alike, [other for other in wrong if patterns[other] == patterns[path]])
        raise ValueError(f"{path!r}: {error}{hint}") from error
    for path, pattern in patterns.items():
        yield path, spec[pattern], (path_key(key, path), canonical(leaves[path]), axes[path])


def _axes(recipe: Recipe, weight: Any, uses: Sequence[axis_roles.Use] | None) -> tuple[str, ...]:
    """The roles of a weight's axes: those that the recipe declares, or those of the trace."""
    if uses is not None and not uses:
        raise ValueError("the function never uses this weight.")
    if recipe.axes:
        check_axes(recipe.axes, weight.shape)
        return tuple(recipe.axes)
    if not recipe.needs_axes:
        return ()
    if uses is None:
        raise ValueError(f"{recipe} needs axis roles: give a function to trace, or the recipe axes=.")
    return tuple(axis_roles.roles(uses, weight.shape))


def _suggest_pattern(pattern: Any, matches: Sequence[str], others: Sequence[str]) -> str:
    """Suggests a pattern for `matches` that none of `others` match."""
    names = {path.rpartition("/")[2] for path in matches}
    if len(names) != 1 or not isinstance(pattern, str):
        return ""
    name = names.pop()
    for narrow in (f"{pattern.rstrip('/')}/{name}", f"{pattern}.*/{name}", f"{name}$"):
        if all(paths.search(narrow, path) for path in matches) and not any(paths.search(narrow, p) for p in others):
            return f" The pattern {pattern!r} also matches {matches[0]!r}: to adapt that alone, write {narrow!r}."
    return ""


@contextlib.contextmanager
def _prefix_errors(path: str) -> Iterator[None]:
    """Puts the path before the message of a `ValueError`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
