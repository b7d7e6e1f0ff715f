"""quantize() and dequantize(): the choice of leaves of a base, and the conversion of a tree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import axes as axis_roles
from lora_jax import paths
from lora_jax.adapters.protocol import BATCH, LOOKUP, check_axes, is_adapter
from lora_jax.functions import check_function
from lora_jax.leaves import dequantized, is_array, is_quantized, short
from lora_jax.quantization.encoding import quantize_leaf
from lora_jax.quantization.formats import Format, blocked_axes

HEAD = r"^((params|model)/)?(output|head|classifier|score|logits)(/|$)|(^|/)(lm_head|unembed\w*)(/|$)"
"""Matches the paths of weights that compute a model's output."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The format of each leaf of a base, computed from shapes alone.

    Attributes:
      chosen: `{path: (format, role of each axis)}` of the weights that are quantized.
      shapes: `{path: shape}` of every array.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: x @ base["w"] + base["b"]
      >>> shapes = {"w": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16), "b": jax.ShapeDtypeStruct((8,), jnp.bfloat16)}
      >>> plan = Plan.of(shapes, {"": lora.NF4()}, fn, jax.ShapeDtypeStruct((2, 64), jnp.bfloat16))
      >>> stream = [("w", jnp.ones((64, 8), jnp.bfloat16)), ("b", jnp.ones(8, jnp.bfloat16))]  # a checkpoint
      >>> {path: plan(path, array).dtype.name for path, array in stream}, list(plan.chosen)
      ({'w': 'bfloat16', 'b': 'bfloat16'}, ['w'])
    """

    chosen: Mapping[str, tuple[Format, tuple[str, ...]]]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, base: Any, rules: Mapping[str, Format | None], fn: Callable | None = None, /, *args: Any) -> "Plan":
        """Plans for a base, whose leaves may be `jax.ShapeDtypeStruct`. Takes the arguments of :func:`quantize`."""
        if any(map(is_adapter, jax.tree.leaves(base, is_leaf=is_adapter))):
            raise TypeError("quantize takes a base; got adapters, which are not quantized.")
        if not isinstance(rules, Mapping):
            raise TypeError(f"Expected rules as a dict from path patterns to formats; got {type(rules).__name__}.")
        for pattern, form in rules.items():
            if form is not None and not isinstance(form, Format):
                value = f"the class {form.__name__}: write {form.__name__}()" if isinstance(form, type) else short(form)
                raise TypeError(f"The rule {pattern!r} takes a format, such as NF4(), or None; got {value}.")
            try:
                if form is not None:
                    form.check_encodable()
            except ValueError as error:
                raise ValueError(f"The rule {pattern!r}: {error}") from error
        if fn is not None:
            check_function("quantize(base, rules, fn, *args)", fn)
        flat = paths.flatten(base)
        leaves = {path: leaf for path, leaf in zip(flat.paths, flat.leaves) if is_array(leaf)}
        matched: dict[str, list[str]] = {pattern: [] for pattern, form in rules.items() if form is not None}
        for path, pattern in paths.match_patterns(rules, list(leaves)).items():
            if pattern in matched:
                matched[pattern].append(path)
        matches = [path for group in matched.values() for path in group]
        uses = None if fn is None else axis_roles.uses_of(fn, base, matches, args, {})
        chosen: dict[str, tuple[Format, tuple[str, ...]]] = {}
        for pattern, group in matched.items():
            form = rules[pattern]
            assert form is not None
            roles = {path: _roles(form, path, leaves[path], uses) for path in group}
            quantizable = {path: axes for path, axes in roles.items() if not isinstance(axes, str)}
            if not quantizable:
                first = next(iter(roles))
                raise ValueError(
                    f"The rule {pattern!r} matches nothing that can be quantized: {first!r} {roles[first]}."
                )
            body = {
                path: axes for path, axes in quantizable.items() if LOOKUP not in axes and not paths.search(HEAD, path)
            }
            # Embeddings and heads are quantized only by a rule that matches nothing else.
            chosen |= {path: (form, axes) for path, axes in (body or quantizable).items()}
        ordered = {path: chosen[path] for path in leaves if path in chosen}
        return cls(ordered, {path: tuple(leaf.shape) for path, leaf in leaves.items()})

    def __call__(self, path: str, leaf: Any) -> Any:
        """Quantizes a leaf if the plan says so.

        Args:
          path: Its path in the base.
          leaf: An array, of which each device quantizes its own shard, or a `jax.ShapeDtypeStruct`. It may hold some
            of the layers of a stack.

        Returns:
          The quantized leaf, or the leaf itself.

        Raises:
          ValueError: The plan has no such path or has another shape for it; the leaf contains NaN or Inf, or its shards
            are not whole blocks.
        """
        if path not in self.shapes:
            raise ValueError(f"The plan has no path {path!r}; {paths.nearest(path, list(self.shapes))}.")
        if path not in self.chosen:
            return leaf
        form, axes = self.chosen[path]
        shape, planned = tuple(leaf.shape), self.shapes[path]
        if len(shape) != len(planned) or any(n != m and role != BATCH for n, m, role in zip(shape, planned, axes)):
            raise ValueError(f"{path!r} has shape {shape}; the plan is for shape {planned}.")
        try:
            quantized, is_finite = quantize_leaf(leaf, form, axes)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        if not is_finite:
            raise ValueError(
                f"{path!r} contains NaN, Inf or numbers beyond {form.largest:.7g}, which cannot be quantized to "
                f"{form.name}."
            )
        return quantized


def quantize(base: Any, rules: Mapping[str, Format | None], fn: Callable | None = None, /, *args: Any) -> Any:
    """Replaces weights by codes of few bits and scales.

    The function does not change: `lora_jax.adapt(fn)(quantized, delta, …)` accepts the tree, with any adapters or none
    (`{}`). Weights are dequantized when they are used, and again in the backward pass, whose residuals are the codes.
    A weight that reaches an operation without a rule before its contraction is dequantized there, and the result is an
    ordinary array; :func:`lora_jax.explain` reports it.

    Args:
      base: Parameters. Leaves are quantized one at a time, and each device quantizes its own shard. Leaves may be
        `jax.ShapeDtypeStruct`.
      rules: `{pattern: format}`. Patterns are searched in '/'-joined paths, the first match wins, and None excludes
        its matches. A pattern quantizes the matching weights that the function contracts. Norms and biases are not
        quantized; embeddings and the head only if a pattern matches nothing else.
      fn: `fn(base, *args)` is traced (not run) to find the contracted axes, along which blocks run. Without it every
        format needs `axes=`.
      *args: Arguments of fn; arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The tree with quantized leaves, which print their format and their bits per weight.

    Raises:
      ValueError: A pattern matches nothing, or nothing that can be quantized; a weight contains NaN or Inf; its shards
        are not whole blocks.
      TypeError: The value of a rule is not a format.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: jnp.tanh(x @ base["hidden"]) @ base["head"]
      >>> base = {"hidden": jax.random.normal(jax.random.key(0), (128, 64)), "head": jnp.ones((64, 2))}
      >>> small = quantize(base, {"": lora.NF4()}, fn, jnp.ones((1, 128)))
      >>> small["hidden"], small["head"].dtype.name
      (NF4[128, 64](dtype=float32, block=64, double, 4.133 bits), 'float32')

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §3
    """
    plan = Plan.of(base, rules, fn, *args)
    return paths.flatten(base).map(lambda path, leaf: plan(path, leaf) if path in plan.shapes else leaf)


def dequantize(base: Any) -> Any:
    """Dequantizes every quantized leaf of a tree.

    Trades memory for speed: a loop over the quantized base dequantizes each weight in every iteration, a loop over this
    tree does not.

    Args:
      base: From :func:`quantize`.

    Returns:
      The tree with arrays instead of quantized leaves, in the dtypes of the original weights; other leaves are the
      same objects.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> again = dequantize(lora.quantize(base, {"w": lora.NF4(axes=("in", "out"))}))
      >>> error = jnp.linalg.norm(again["w"] - base["w"]) / jnp.linalg.norm(base["w"])
      >>> round(float(error), 2)
      0.09
    """
    return jax.tree.map(dequantized, base, is_leaf=is_quantized)


def _roles(form: Format, path: str, leaf: Any, uses: Mapping[str, Any] | None) -> tuple[str, ...] | str:
    """Returns the roles of a leaf's axes, or the reason why it cannot be quantized."""
    if is_quantized(leaf):
        return "is quantized already"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"has dtype {leaf.dtype}"
    if 0 in leaf.shape:
        return f"is empty, of shape {tuple(leaf.shape)}"
    try:
        if form.axes is not None:
            check_axes(form.axes, leaf.shape)
            axes = form.axes
        elif uses is None:
            raise ValueError(f"{form} needs axis roles: pass a function to trace, or axes= to the format.")
        elif not uses[path]:
            return "is not used by the function"
        elif not axis_roles.roles_by_use(uses[path], len(leaf.shape)):
            return "is neither contracted nor looked up by the function, as far as tracing follows it"
        else:
            axes = axis_roles.roles(uses[path], leaf.shape)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
    return tuple(axes) if blocked_axes(axes)[0] else f"has no axis for blocks: its roles are {axes}"
