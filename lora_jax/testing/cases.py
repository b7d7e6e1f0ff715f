"""A weight with an adapter that a recipe creates, and a function that uses it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factor
from lora_jax.adapters.protocol import BATCH, IN, LOOKUP, OUT, Adapter, Recipe, is_inexact, with_frozen_stopped
from lora_jax.leaves import dequantized
from lora_jax.merging import merge
from lora_jax.optim import join, partition
from lora_jax.spec import prepare
from lora_jax.transform.adapt import adapt


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight with an adapter, and a function that uses it.

    Attributes:
      axes: The role of each axis of the weight.
      original: The weight.
      base: The base, which `prepare` may have changed.
      fn: The function of the base and `x`.
      x: Its input.
      fresh: The delta as it is created.
      again: The delta that another key creates.
      delta: The delta with its trained leaves perturbed.
      other: Perturbed otherwise.
    """

    axes: tuple[str, ...]
    original: jax.Array
    base: dict[str, Any]
    fn: Callable
    x: jax.Array
    fresh: dict[str, Adapter]
    again: dict[str, Adapter]
    delta: dict[str, Adapter]
    other: dict[str, Adapter]

    @classmethod
    def create(cls, recipe: Recipe, axes: tuple[str, ...], sizes: Mapping[str, int], key: jax.Array) -> "Case":
        keys = jax.random.split(key, 6)
        shape = tuple(sizes[role] for role in axes)
        weight = jax.random.normal(keys[0], shape) / math.prod(sizes[role] for role in axes if role == IN) ** 0.5
        fn, x = use_weight(axes, shape, keys[1])
        loss = (lambda base, x: score(fn(base, x))) if recipe.reads == "gradient" else None
        (base, fresh), (_, again) = (
            prepare(key, {"w": weight}, {"w": recipe}, fn, [(x,)], loss=loss) for key in (keys[2], keys[5])
        )
        check_unflattening(fresh["w"])
        delta, other = (_perturb(fresh, key) for key in keys[3:5])
        return cls(axes, weight, base, fn, x, fresh, again, delta, other)

    @property
    def node(self) -> Adapter:
        return self.delta["w"]

    @property
    def weight(self) -> jax.Array:
        return dequantized(self.base["w"])

    def outputs(self, delta: Any, base: Any = None) -> jax.Array:
        return jax.jit(adapt(self.fn))(self.base if base is None else base, delta, self.x)

    def merged_outputs(self, delta: Any, base: Any = None) -> jax.Array:
        """The outputs of the merged weight; of an adapter that no weight holds, by its function of the output."""
        return jax.jit(lambda delta: self._merged(delta, self.base if base is None else base))(delta)

    def _merged(self, delta: Any, base: Any) -> jax.Array:
        if not self.node.nonlinear:
            return self.fn(merge(base, delta), self.x)
        y, node = self.fn({"w": dequantized(base["w"])}, self.x), with_frozen_stopped(delta["w"])
        form = node.factored(base["w"])
        assert form is not None and form.on_output is not None
        dims = list(zip(self.axes, form.dims(self.weight.shape)))
        batch, out = ([pair for axis, pairs in dims if axis == role for pair in pairs] for role in (BATCH, OUT))
        pairs = [*batch, ("tokens", y.shape[self.axes.count(BATCH)]), *out]
        labeled = Factor(y.reshape([size for _, size in pairs]), tuple(label for label, _ in pairs))
        change = form.on_output(labeled, None).transposed(labeled.labels).array
        return y + change.reshape(y.shape)

    def effect(self, node: Adapter | None) -> jax.Array:
        """The merged weight, or the outputs if no weight holds what the adapter does; None is no adapter."""
        if not self.node.nonlinear:
            return self.weight if node is None else node.merge(self.weight)
        return self.fn(self.base, self.x) if node is None else self.merged_outputs({"w": node})

    def gradient(self, delta: Any, *, merged: bool = False) -> Any:
        """By all inexact leaves, frozen ones too, in place of the leaves; None for integers."""
        leaves, structure = jax.tree.flatten(delta)
        inexact = [is_inexact(leaf) for leaf in leaves]

        def loss(values):
            values = iter(values)
            node = structure.unflatten([next(values) if yes else leaf for yes, leaf in zip(inexact, leaves)])
            return score(self._merged(node, self.base) if merged else adapt(self.fn)(self.base, node, self.x))

        gradients = iter(jax.jit(jax.grad(loss))([leaf for yes, leaf in zip(inexact, leaves) if yes]))
        return structure.unflatten([next(gradients) if yes else None for yes in inexact])


def check_unflattening(node: Adapter) -> None:
    """Raises `AssertionError` if an adapter cannot be unflattened with any leaves."""
    leaves, structure = jax.tree.flatten(node)
    for leaf in (object(), None, True, "leaf", (1, 2)):
        try:
            jax.tree.unflatten(structure, [leaf] * len(leaves))
        except Exception as error:
            raise AssertionError(
                f"{type(node).__name__} validates its leaves when it is unflattened: {error!r}. JAX unflattens with "
                "any leaves; check arrays in find_inconsistency()."
            ) from error


def use_weight(axes: tuple[str, ...], shape: tuple[int, ...], key: jax.Array) -> tuple[Callable, jax.Array]:
    """A function that uses the weight as its roles say, and its input."""
    # No array with an axis of tokens has the shape of the weight, however its axes are flattened.
    tokens = next(count for count in itertools.count(5) if math.gcd(count, math.prod(shape)) == 1)
    if LOOKUP in axes:
        axis = axes.index(LOOKUP)
        return lambda base, x: jnp.take(base["w"], x, axis=axis), jax.random.randint(key, (tokens,), 0, shape[axis])
    letters = [chr(ord("a") + axis) for axis in range(len(axes))]
    batch, summed, out = ("".join(x for x, role in zip(letters, axes) if role == r) for r in (BATCH, IN, OUT))
    subscripts = f"{batch}z{summed},{''.join(letters)}->{batch}z{out}"
    sizes = dict(zip(letters, shape))
    x = jax.random.normal(key, [tokens if x == "z" else sizes[x] for x in f"{batch}z{summed}"])
    return lambda base, x: jnp.einsum(subscripts, x.astype(base["w"].dtype), base["w"]), x


def _perturb(delta: Any, key: jax.Array) -> Any:
    train, frozen = partition(delta)
    leaves, structure = jax.tree.flatten(train)
    keys = jax.random.split(key, len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys)]
    return join(structure.unflatten(leaves), frozen)


def score(out: jax.Array) -> jax.Array:
    """A scalar to which each element of the output contributes differently."""
    flat = out.astype(jnp.float32).reshape(-1)
    return jnp.sum(flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32)))
