"""What an adapter is and what a recipe is: the two small contracts that every family fulfils."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factored, dense
from lora_jax.initializers import Reading
from lora_jax.leaves import shapes
from lora_jax.renamed import RenamedMethod

BATCH, IN, OUT, LOOKUP = "batch", "in", "out", "lookup"
"""Axis roles. `lookup` is an in axis that is indexed (an embedding's vocabulary) instead of contracted."""
ROLES = (BATCH, IN, OUT, LOOKUP)

WEIGHT, SCALAR, SPLIT = "weight", "scalar", "split-"
"""Other words of layouts: see :func:`trained`."""

NO_BIAS = (
    "the adapter adds a bias to the outputs, which no merged weight holds. Use the adapter unmerged, or load it on a "
    "base whose layer has a bias (of zeros): lora_jax.peft.load then adds the adapter's bias to that one."
)
"""Why an adapter with an offset is not merged, and what to do."""

KINDS: dict[str, type["Adapter"]] = {}
"""Adapter classes by the name that checkpoints give them."""


def trained(layout: str = "", *, vector: bool = False, **options: Any) -> Any:
    """Declares a field of an adapter whose inexact leaves are trained.

    Args:
      layout: What the axes of its array are, in words: 'batch', 'in' and 'out' are the weight's axes of that role,
        'weight' all of its axes, 'split-in' and 'split-out' axes of that role of which one is a part of the weight's,
        and another word is an axis that the weight does not have ('batch rank in'). 'scalar' is none. Shardings are
        made from it, and arrays that contradict it are refused. Empty says nothing.
      vector: Whether it holds a number for each output, input or rank, as a bias does, instead of a factor.
        Optimizers treat the two differently (:func:`lora_jax.optim.decay_mask`).
      **options: Of `dataclasses.field`. A field with `default=None, kw_only=True` may be absent, from checkpoints too.
    """
    metadata = {"trained": True, "vector": vector, "layout": layout, "leading": False}
    return dataclasses.field(metadata=metadata, **options)


def frozen(layout: str = "", *, leading: bool = False, **options: Any) -> Any:
    """Declares a field of an adapter whose leaves never train; may differ between adapters of one kind.

    Args:
      layout: As for :func:`trained`.
      leading: Whether the array may have only the first of these axes.
      **options: As for :func:`trained`.
    """
    return dataclasses.field(metadata={"trained": False, "layout": layout, "leading": leading}, **options)


def static(*, choices: tuple[Any, ...] = ()) -> Any:
    """Declares a field that is part of the structure: strings, numbers, booleans and tuples of these.

    Args:
      choices: The values that it may have; empty for any of its type.
    """
    return dataclasses.field(metadata={"static": True, "choices": choices})


class Adapter:
    """A pytree node that knows how to change one weight. Subclasses are decorated with :func:`adapter`.

    Attributes:
      axes: The role of each axis of the weight: 'batch', 'in' or 'out'.
      kind: The name in checkpoints and reports.
      additive: Whether merging adds a term that does not depend on the weight, so that subtracting it
        restores the weight. Such kinds have a leaf `scale` that multiplies the term.
      merged_because: Why the weight is merged before use, for adapters without a factored form.
    """

    axes: tuple[str, ...]
    kind: ClassVar[str]
    additive: ClassVar[bool] = False
    merged_because: ClassVar[str] = "the adapter has no factored form"
    padded = RenamedMethod("pad_rank")
    neutral = RenamedMethod("identity_like")

    def __init_subclass__(cls) -> None:
        RenamedMethod.check(cls)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyrefly: ignore[bad-argument-type]
        values = {field.name: getattr(self, field.name) for field in fields if "trained" in field.metadata}
        absent = {field.name for field in fields if field.kw_only and values.get(field.name) is None}
        shown = ", ".join(f"{name}={shapes(value)}" for name, value in values.items() if name not in absent)
        return f"{self.kind}({shown})"

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the adapter fits."""
        raise TypeError(f"{type(self).__name__} does not say the shape of its weight: define shape().")

    def factored(self, weight: Any) -> Factored | None:
        """The adapted weight as labeled tensors, or None where only :meth:`merge` exists.

        Args:
          weight: An array, or a quantized leaf: its `shape`, `ndim` and `dtype` are the weight's, and
            :func:`lora_jax.leaves.dequantized` gives its values.
        """
        del weight
        return None

    def merge(self, weight: jax.Array) -> jax.Array:
        """The adapted weight: computed in at least float32, then cast to the dtype of `weight`.

        Raises:
          ValueError: The adapter adds an offset to the outputs, which no weight holds.
        """
        form = self.factored(weight)
        if form is None:
            raise TypeError(f"{type(self).__name__} has neither a factored form nor its own merge().")
        if form.offset is not None:
            raise ValueError(NO_BIAS)
        return dense(weight, form.dims(weight.shape), form.factors, form.gains)

    @property
    def rank(self) -> int | None:
        """The size that :meth:`pad_rank` raises; None for kinds without one."""
        return None

    def pad_rank(self, rank: int) -> Self:
        """The same adapter with a larger rank, so that adapters of different ranks stack.

        What is added are zeros behind the present entries. They change neither the weight nor the gradients of
        the present entries, and have no gradients themselves. (Where two zero factors multiply, both hold.)

        Args:
          rank: At least :attr:`rank`.
        """
        raise TypeError(f"{type(self).__name__} has no rank to pad to {rank}.")

    def identity_like(self, weight: jax.Array | None) -> Self:
        """An adapter with the structure, shapes and dtypes of this one that leaves its weight as it is.

        It stands for this path in members of a stack that do not adapt it.

        Args:
          weight: The weight; may be None for kinds whose neutral adapter does not depend on it.

        Raises:
          ValueError: The kind needs the weight, and there is none.
        """
        del weight
        raise TypeError(
            f"{type(self).__name__} does not say which of its adapters changes nothing: define identity_like()."
        )

    def trainable(self) -> Self:
        """The adapter with each leaf replaced by whether it trains. Integers never do."""
        masks = {
            field.name: jax.tree.map(
                lambda leaf, trains=field.metadata["trained"]: trains and is_inexact(leaf),
                getattr(self, field.name),
            )
            for field in dataclasses.fields(self)  # pyrefly: ignore[bad-argument-type]
            if "trained" in field.metadata
        }
        return dataclasses.replace(self, **masks)  # pyrefly: ignore[bad-specialization]

    def layout(self, name: str) -> str:
        """What the axes of a field's array are; see :func:`trained`. A single block has no axis of its own."""
        fields = {field.name: field for field in dataclasses.fields(self)}  # pyrefly: ignore[bad-argument-type]
        words = fields[name].metadata["layout"]
        return words if len(getattr(self, "blocks", ())) > 1 else words.replace(" block", "")

    def contradiction(self) -> str | None:
        """What contradicts in static fields, where their types and the layouts of arrays do not tell."""
        return None

    def describe(self) -> dict[str, Any]:
        """What a reader wants to know of the adapter (rank, alpha, …), as JSON values."""
        return {}


T = TypeVar("T", bound="Adapter")


@dataclass_transform(frozen_default=True, field_specifiers=(trained, frozen, static))
def adapter(kind: str) -> Callable[[type[T]], type[T]]:
    """Makes a class an adapter: a frozen dataclass, a pytree node, known to checkpoints as `kind`.

    Fields are declared by :func:`trained`, :func:`frozen` and :func:`static`. Unflattening calls
    nothing but the dataclass's own constructor, so leaves may be anything (None, booleans, shapes).
    """

    def decorate(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        fields = dataclasses.fields(cls)  # pyrefly: ignore[bad-argument-type]
        jax.tree_util.register_dataclass(
            cls,
            data_fields=[f.name for f in fields if "trained" in f.metadata],
            meta_fields=[f.name for f in fields if "static" in f.metadata],
        )
        cls.kind = kind
        KINDS[kind] = cls
        return cls

    return decorate


class Recipe:
    """Makes an adapter for a weight. Recipes are frozen dataclasses.

    Attributes:
      axes: The roles of the weight's axes where tracing should not decide them; None lets it.
      needs_axes: Whether the recipe has to know the roles at all.
      reads: What :func:`lora_jax.prepare` is to read of the data for it; see
        :class:`lora_jax.initializers.Initializer`.
    """

    axes: tuple[str, ...] | None = None
    needs_axes: ClassVar[bool] = True
    reads: str | None = None
    make = RenamedMethod("create")
    informed = RenamedMethod("with_calibration")

    def __init_subclass__(cls) -> None:
        RenamedMethod.check(cls)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> Adapter:
        """A new adapter.

        Args:
          key: A PRNG key.
          weight: The weight, an array or a quantized leaf; recipes that only need its shape also take a
            `jax.ShapeDtypeStruct`.
          axes: The role of each of its axes: 'batch', 'in', 'out', or 'lookup' for an in axis that
            is indexed.
        """
        raise TypeError(f"{type(self).__name__} makes no adapter: define create().")

    def prepare(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, Adapter]:
        """The weight and its adapter, for inits that move part of the weight into the adapter."""
        return weight, self.create(key, weight, axes)

    def with_calibration(self, readings: Mapping[str, Reading]) -> dict[str, "Recipe | None"]:
        """The recipe for each path that gets this one, with what was read of the data; None leaves a path out."""
        raise TypeError(f"{type(self).__name__} reads {self.reads}: define with_calibration().")


def needed(weight: jax.Array | None, kind: str) -> jax.Array:
    """The weight that :meth:`Adapter.identity_like` cannot do without; raises where there is none."""
    if weight is None:
        raise ValueError(f"A {kind} adapter that changes nothing is made from the weight: give base=.")
    return weight


def pad_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind the entries of one axis, up to `size`."""
    if size < array.shape[axis]:
        raise ValueError(f"An axis of size {array.shape[axis]} cannot be padded to {size}.")
    return jnp.pad(array, [(0, size - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])


Delta = dict[str, Adapter]
"""Adapters by the paths of the weights that they adapt."""


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is an adapter."""
    return isinstance(node, Adapter)


def with_frozen_stopped(node: Adapter) -> Adapter:
    """The adapter, with no derivative with respect to its frozen leaves."""
    return jax.tree.map(lambda trains, leaf: leaf if trains else jax.lax.stop_gradient(leaf), node.trainable(), node)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is an array of floats (or complex numbers)."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def check_axes(axes: Sequence[str], shape: Sequence[int]) -> None:
    """Raises `ValueError` unless `axes` gives one known role for each axis of a weight."""
    if isinstance(axes, str) or not isinstance(axes, Sequence):
        raise ValueError(f"axes={axes!r}: expected a role for each axis, such as ('in', 'out').")
    if len(axes) != len(shape):
        raise ValueError(
            f"axes={tuple(axes)} gives {len(axes)} roles; the weight of shape {tuple(shape)} needs {len(shape)}."
        )
    unknown = [role for role in axes if role not in ROLES]
    if unknown:
        raise ValueError(f"axes={tuple(axes)}: {unknown[0]!r} is no axis role; the roles are {', '.join(ROLES)}.")
