"""quantize() and dequantize(): which leaves of a base, and the whole tree."""

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
from lora_jax.quantization.encoding import encoded
from lora_jax.quantization.formats import Format, blocked_axes

HEAD = r"^((params|model)/)?(output|head|classifier|score|logits)(/|$)|(^|/)(lm_head|unembed\w*)(/|$)"
"""Paths of weights that make a model's output."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of each leaf of a base: made from shapes, before there are weights.

    Attributes:
      chosen: By path of what is quantized, the format and the role of each axis.
      shapes: By path of every array.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: x @ base["w"] + base["b"]
      >>> shapes = {"w": jax.ShapeDtypeStruct((64, 8), jnp.bfloat16), "b": jax.ShapeDtypeStruct((8,), jnp.bfloat16)}
      >>> plan = Plan.of(shapes, {"": lora.NF4()}, fn, jax.ShapeDtypeStruct((2, 64), jnp.bfloat16))
      >>> stream = [("w", jnp.ones((64, 8), jnp.bfloat16)), ("b", jnp.ones(8, jnp.bfloat16))]  # as tensors come in
      >>> {path: plan(path, array).dtype.name for path, array in stream}, list(plan.chosen)
      ({'w': 'bfloat16', 'b': 'bfloat16'}, ['w'])
    """

    chosen: Mapping[str, tuple[Format, tuple[str, ...]]]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, base: Any, rules: Mapping[str, Format | None], fn: Callable | None = None, /, *args: Any) -> "Plan":
        """The plan for a base, whose leaves may be `jax.ShapeDtypeStruct`. Arguments are those of :func:`quantize`."""
        if any(map(is_adapter, jax.tree.leaves(base, is_leaf=is_adapter))):
            raise TypeError("quantize takes a base; got adapters, which stay floats.")
        if not isinstance(rules, Mapping):
            raise TypeError(f"Rules are a dict from path patterns to formats; got {type(rules).__name__}.")
        for pattern, form in rules.items():
            if form is not None and not isinstance(form, Format):
                value = f"the class {form.__name__}: write {form.__name__}()" if isinstance(form, type) else short(form)
                raise TypeError(f"The rule {pattern!r} takes a format, such as NF4(), or None; got {value}.")
        if fn is not None:
            check_function("quantize(base, rules, fn, *args)", fn)
        flat = paths.flatten(base)
        leaves = {path: leaf for path, leaf in zip(flat.paths, flat.leaves) if is_array(leaf)}
        matched: dict[str, list[str]] = {pattern: [] for pattern, form in rules.items() if form is not None}
        for path, pattern in paths.match_patterns(rules, list(leaves)).items():
            if pattern in matched:
                matched[pattern].append(path)
        named = [path for found in matched.values() for path in found]
        uses = None if fn is None else axis_roles.uses_of(fn, base, named, args, {})
        chosen: dict[str, tuple[Format, tuple[str, ...]]] = {}
        for pattern, found in matched.items():
            form = rules[pattern]
            assert form is not None
            roles = {path: _roles(form, path, leaves[path], uses) for path in found}
            able = {path: axes for path, axes in roles.items() if not isinstance(axes, str)}
            if not able:
                first = next(iter(roles))
                raise ValueError(
                    f"The rule {pattern!r} matches nothing that can be quantized: {first!r} {roles[first]}."
                )
            usual = {path: axes for path, axes in able.items() if LOOKUP not in axes and not paths.search(HEAD, path)}
            # A rule that matches embeddings or heads alone means them.
            chosen |= {path: (form, axes) for path, axes in (usual or able).items()}
        ordered = {path: chosen[path] for path in leaves if path in chosen}
        return cls(ordered, {path: tuple(leaf.shape) for path, leaf in leaves.items()})

    def __call__(self, path: str, leaf: Any) -> Any:
        """The leaf of a path as the plan wants it.

        Args:
          path: In the base.
          leaf: An array (quantized where it is, each device its shard), or a `jax.ShapeDtypeStruct`. It may be some of
            the layers of a stack.

        Raises:
          ValueError: The base that the plan was made for has no such path or another shape there; the leaf holds NaN
            or Inf, or its shards are no whole blocks.
        """
        if path not in self.shapes:
            raise ValueError(f"The plan knows no {path!r}; {paths.nearest(path, list(self.shapes))}.")
        if path not in self.chosen:
            return leaf
        form, axes = self.chosen[path]
        shape, wanted = tuple(leaf.shape), self.shapes[path]
        if len(shape) != len(wanted) or any(n != m and role != BATCH for n, m, role in zip(shape, wanted, axes)):
            raise ValueError(f"{path!r} has the shape {shape}; the plan was made for {wanted}.")
        try:
            made, finite = encoded(leaf, form, axes)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        if not finite:
            raise ValueError(f"{path!r} holds NaN or Inf, or numbers beyond float32, which no block of codes can.")
        return made


def quantize(base: Any, rules: Mapping[str, Format | None], fn: Callable | None = None, /, *args: Any) -> Any:
    """Replaces weights by codes of few bits and scales.

    The function itself is not changed: `lora_jax.adapt(fn)(quantized, delta, …)` takes the tree, with any adapters and
    with none (`{}`). Weights are dequantized where they are used, and again in the backward pass, which keeps their
    codes. A weight that meets an operation without a rule before its product (two joined to one, a mask) is dequantized
    there, and what comes of it is an array like any other; :func:`lora_jax.explain` says so.

    Args:
      base: Parameters. Leaves are quantized one after another, where they are, and each device its own shard. Leaves
        may be `jax.ShapeDtypeStruct`.
      rules: `{pattern: format}`; patterns are searched in '/'-joined paths, the first match wins, None leaves a match
        alone. Of what a pattern matches, weights that the function contracts are quantized. Norms and biases stay,
        and so do embeddings and the head, unless a pattern matches nothing else.
      fn: `fn(base, *args)` is traced (not run) to find which axes are contracted: blocks run along them. Without it
        every format gives `axes=`.
      *args: Arguments of fn; arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The tree with quantized leaves, which print their format and count what they take.

    Raises:
      ValueError: A pattern matches nothing, or nothing that can be quantized; a weight holds NaN or Inf; its shards are
        no whole blocks.
      TypeError: A rule has no format.

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
    """The tree with floats in the place of quantized leaves.

    For those who have the memory and prefer the speed: a loop over the quantized base dequantizes each weight in every
    turn, one over this tree never does.

    Args:
      base: From :func:`quantize`.

    Returns:
      Every quantized leaf dequantized, in the dtype of the weight it was made of; other leaves are the same arrays.

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
    """The roles of a leaf's axes; or why it cannot be quantized."""
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
            raise ValueError(f"{form} needs axis roles: give a function to trace, or the format axes=.")
        elif not uses[path]:
            return "is not used by the function"
        elif not axis_roles.are_told(uses[path], len(leaf.shape)):
            return "is neither contracted nor looked up by the function, as far as tracing follows it"
        else:
            axes = axis_roles.roles(uses[path], leaf.shape)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
    return tuple(axes) if blocked_axes(axes)[0] else f"has no axis that blocks could run along, with the roles {axes}"
