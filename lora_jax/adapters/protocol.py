"""The contracts of adapters and recipes."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from lora_jax.adapters import layouts
from lora_jax.adapters.factored import Factor, Factored, check_form, dense
from lora_jax.adapters.layouts import BATCH, IN, LOOKUP, OUT, ROLES  # noqa: F401 (roles belong to the protocol)
from lora_jax.initializers import Statistics
from lora_jax.leaves import shapes, short
from lora_jax.renamed import check_members, former_members

NO_BIAS = (
    "the adapter adds a bias to the outputs, which no merged weight holds. Use the adapter unmerged, or load it on a "
    "base whose layer has a bias (of zeros): lora_jax.peft.load then adds the adapter's bias to that one."
)
"""Why an adapter with an offset is not merged, and what to do."""

NONLINEAR = (
    "the adapter is a nonlinear function of the layer's output, which no merged weight holds. Use it unmerged, by "
    "lora_jax.adapt, on a weight that is multiplied as a whole with an input; leave it out to merge the others."
)
"""Why an adapter with a function of the output is not merged, and what to do."""

KINDS: dict[str, type["Adapter"]] = {}
"""Adapter classes by the name that checkpoints give them."""


def trained(layout: str = "", *, vector: bool = False, **options: Any) -> Any:
    """Declares a field of an adapter whose inexact leaves are trained.

    Args:
      layout: The axes of its array in words, such as 'batch rank in'; see :mod:`lora_jax.adapters.layouts`. The
        weight's shape, the rank, padding and shardings are derived from it, and arrays that contradict it are refused.
        Empty declares nothing.
      vector: Whether it holds a number for each output, input or rank, as a bias does, instead of a factor.
        Optimizers treat the two differently (:func:`lora_jax.optim.decay_mask`).
      **options: Options of `dataclasses.field`. A field with `default=None, kw_only=True` may be absent, also from
        checkpoints.
    """
    metadata = {"trained": True, "vector": vector, "layout": layout, "leading": False}
    return dataclasses.field(metadata=metadata, **options)


def frozen(layout: str = "", *, leading: bool = False, **options: Any) -> Any:
    """Declares a field of an adapter whose leaves never train; may differ between adapters of one kind.

    Args:
      layout: As for :func:`trained`.
      leading: Whether the array may have only the first of these axes, as scales have.
      **options: As for :func:`trained`.
    """
    return dataclasses.field(metadata={"trained": False, "layout": layout, "leading": leading}, **options)


def static(layout: str = "", *, choices: tuple[Any, ...] = ()) -> Any:
    """Declares a field that is part of the structure: strings, numbers, booleans and tuples of these.

    Args:
      layout: If the field holds sizes of the weight's axes which no array has: these axes, as for :func:`trained`.
      choices: The values that it may have; empty for any of its type.
    """
    return dataclasses.field(metadata={"static": True, "choices": choices, "layout": layout, "leading": False})


@former_members(padded="pad_rank", neutral="identity_like", layout="labels", contradiction="find_inconsistency")
class Adapter:
    """A pytree node that knows how to change one weight. Subclasses are decorated with :func:`adapter`.

    Attributes:
      axes: The role of each axis of the weight: 'batch', 'in' or 'out'.
      kind: The name in checkpoints and reports.
      additive: Whether merging adds a term that does not depend on the weight, so that subtracting it
        restores the weight. Such kinds have a leaf `scale` that multiplies the term.
      merged_because: Why the weight is merged before use, for adapters without a factored form.
      nonlinear: Whether the factored form has a function of the output (`on_output`), so that no weight can be merged.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from lora_jax.adapters import frozen, static, trained
      >>> @lora.adapter("docs.Outer")
      ... class OuterAdapter(lora.Adapter):
      ...     u: jax.Array = trained("batch in")
      ...     v: jax.Array = trained("batch out")
      ...     scale: jax.Array = frozen("scalar")
      ...     axes: tuple[str, ...] = static()
      ...
      ...     additive = True
      ...
      ...     def factored(self, weight):
      ...         return self.form(self.factor("u"), self.factor("v"), self.factor("scale"))
      >>> outer = OuterAdapter(jnp.ones(4), jnp.ones(3), jnp.float32(2), axes=("in", "out"))
      >>> outer.shape(), outer.merge(jnp.zeros((4, 3))).tolist()[0]
      ((4, 3), [2.0, 2.0, 2.0])
    """

    axes: tuple[str, ...]
    kind: ClassVar[str]
    additive: ClassVar[bool] = False
    _sizes: ClassVar[tuple[str, ...]] = ()
    merged_because: ClassVar[str] = "the adapter has no factored form"
    nonlinear: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        check_members(cls)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # pyrefly: ignore[bad-argument-type]
        values = {field.name: getattr(self, field.name) for field in fields if "trained" in field.metadata}
        absent = {field.name for field in fields if field.kw_only and values.get(field.name) is None}
        shown = ", ".join(f"{name}={shapes(value)}" for name, value in values.items() if name not in absent)
        return f"{type(self).__name__}({shown})"

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that the adapter fits."""
        shape = layouts.shape(self)
        if shape is None:
            raise TypeError(
                f"The layouts of {type(self).__name__} do not determine the weight's shape: define shape(), or declare "
                "the missing sizes by static(layout)."
            )
        return shape

    def labels(self, name: str) -> tuple[str, ...]:
        """The label of each axis of a field's array; see :func:`lora_jax.adapters.layouts.labels`."""
        return layouts.labels(self, name)

    def factor(self, name: str, **renamed: str) -> Factor:
        """A field's array as a factor of the factored form, labeled as its layout declares.

        Args:
          name: The name of the field.
          **renamed: Other labels for some of the layout's, such as `rank="other"`.
        """
        array = getattr(self, name)
        return Factor(array, tuple(renamed.get(label, label) for label in self.labels(name)[: array.ndim]))

    def form(self, *factors: Factor, **parts: Any) -> Factored:
        """The factored form of a weight whose axes have the labels that layouts give them.

        Args:
          *factors: Their product is added to the weight.
          **parts: Gains, an offset, a dropout rate and a function of the output, as of
            :class:`lora_jax.adapters.factored.Factored`.
        """
        return Factored(labels=layouts.axis_labels(self), factors=factors, **parts)

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
          ValueError: The adapter adds an offset to the outputs, or a function of them, which no weight holds.
        """
        if self.nonlinear:
            raise ValueError(NONLINEAR)
        form = self.factored(weight)
        if form is None:
            raise TypeError(f"{type(self).__name__} has neither a factored form nor its own merge().")
        check_form(form, type(self).__name__)
        if form.offset is not None:
            raise ValueError(NO_BIAS)
        return dense(weight, form.dims(weight.shape), [form.factors] if form.factors else [], form.gains)

    @property
    def rank(self) -> Any:
        """The size that :meth:`pad_rank` raises, an integer; None for kinds without one."""
        for name, (axis, *_) in layouts.rank_axes(self).items():
            return getattr(self, name).shape[axis]
        return None

    def pad_rank(self, rank: int) -> Self:
        """The same adapter with a larger rank, so that adapters of different ranks stack.

        The present entries are followed by zeros, which change neither the weight nor the gradients of the present
        entries, and have no gradients themselves. (For a product of two factors that are both padded, both hold.)

        Args:
          rank: At least :attr:`rank`.
        """
        axes = layouts.rank_axes(self)
        if not axes:
            raise TypeError(f"{type(self).__name__} has no rank to pad to {rank}.")
        padded = {name: getattr(self, name) for name in axes}
        for name, ranks in axes.items():
            for axis in ranks:
                padded[name] = pad_axis(padded[name], axis, rank)
        return dataclasses.replace(self, **padded)  # pyrefly: ignore[bad-specialization]

    def identity_like(self, weight: jax.Array | None) -> Self:
        """An adapter with the structure, shapes and dtypes of this one that does not change its weight.

        A stack uses it for members that do not adapt this path. For additive kinds all arrays but scales
        are zero.

        Args:
          weight: The weight; may be None for kinds whose identity does not depend on it.

        Raises:
          ValueError: The kind needs the weight, which is None.
        """
        del weight
        if not self.additive:
            raise TypeError(
                f"{type(self).__name__} is not additive: define identity_like(), which does not change the weight."
            )
        return dataclasses.replace(self, **layouts.zeros(self))  # pyrefly: ignore[bad-specialization]

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

    def find_inconsistency(self) -> str | None:
        """Describes an inconsistency of static fields that types and layouts allow; None if there is none."""
        return None

    def describe(self) -> dict[str, Any]:
        """Returns the adapter's settings for reports (rank, alpha, …), as JSON values."""
        return {}


T = TypeVar("T", bound="Adapter")


@dataclass_transform(frozen_default=True, field_specifiers=(trained, frozen, static))
def adapter(kind: str, *, sizes: tuple[str, ...] = ()) -> Callable[[type[T]], type[T]]:
    """Registers a class as an adapter: a frozen dataclass, a pytree node, stored in checkpoints as `kind`.

    Fields are declared by :func:`trained`, :func:`frozen` and :func:`static`. Unflattening calls
    nothing but the dataclass's own constructor, so leaves may be anything (None, booleans, shapes).

    Args:
      kind: The name in checkpoints. Executing the same definition again (a notebook's cell, a reload) replaces it.
      sizes: Words of layouts for axes that the weight does not have.

    Raises:
      TypeError: The class is not an :class:`Adapter`, or its fields are not declared by these functions.
      ValueError: Another class has this kind; the words of a layout are unknown or do not fit together.

    Example:
      >>> import jax, lora_jax as lora
      >>> @lora.adapter("docs.Shift")
      ... class ShiftAdapter(lora.Adapter):
      ...     shift: jax.Array = trained("weight")
      ...     axes: tuple[str, ...] = static()
      ...
      ...     additive = True
      ...
      ...     def merge(self, weight):
      ...         return weight + self.shift
      >>> ShiftAdapter(jax.numpy.ones(3), axes=()).shape()
      (3,)
    """

    if isinstance(kind, type):
        raise TypeError(f'adapter({kind.__name__}): write @adapter("kind"), with the name in checkpoints.')
    if not isinstance(kind, str) or not kind:
        raise TypeError(f"adapter({kind!r}): expected a name for checkpoints, such as 'my_package.MyAdapter'.")
    if isinstance(sizes, str) or not all(isinstance(size, str) for size in sizes):
        raise TypeError(f"adapter({kind!r}, sizes={sizes!r}): expected a tuple of words, such as ('middle',).")

    def decorate(cls: type[T]) -> type[T]:
        if not isinstance(cls, type) or not issubclass(cls, Adapter):
            raise TypeError(f"adapter({kind!r}) on {short(cls)}: expected a subclass of lora_jax.Adapter.")
        other = KINDS.get(kind)
        if other is not None and ((other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__)):
            raise ValueError(
                f"adapter({kind!r}) on {cls.__module__}.{cls.__qualname__}: {other.__module__}.{other.__qualname__} "
                "has this kind already. Choose another name, such as one that begins with your package's."
            )
        _check_declared(cls)
        cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
        fields = dataclasses.fields(cls)  # pyrefly: ignore[bad-argument-type]
        if not any(field.name == "axes" and "static" in field.metadata for field in fields):
            raise TypeError(
                f"{cls.__name__} has no field for the roles of the weight's axes: add axes: tuple[str, ...] = static()."
            )
        declared = {*sizes, *(word for base in cls.__mro__[1:] for word in getattr(base, "_sizes", ()))}
        layouts.check_layouts(cls, kind, sorted(declared))
        jax.tree_util.register_dataclass(
            cls,
            data_fields=[f.name for f in fields if "trained" in f.metadata],
            meta_fields=[f.name for f in fields if "static" in f.metadata],
        )
        cls.kind = kind
        cls._sizes = tuple(declared)
        KINDS[kind] = cls
        return cls

    return decorate


def _check_declared(cls: type) -> None:
    """Raises `TypeError` unless each field of a class is declared as trained, frozen or static."""
    declared: dict[str, Any] = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for name, annotation in inspect.get_annotations(cls).items():
        if "ClassVar" not in str(annotation) and "KW_ONLY" not in str(annotation):
            declared[name] = vars(cls).get(name)
    for name, field in declared.items():
        if not {"trained", "static"} & set(getattr(field, "metadata", ())):
            raise TypeError(
                f"{cls.__name__}.{name}: declare the field by trained(layout), frozen(layout) or static(), such as "
                f"{name}: jax.Array = trained('batch rank in')."
            )


@former_members(make="create", informed="with_calibration")
class Recipe:
    """Creates an adapter for a weight. Recipes are frozen dataclasses.

    Attributes:
      axes: The roles of the weight's axes; None takes them from the trace.
      needs_axes: Whether the recipe needs the roles.
      reads: The statistics of the data that :func:`lora_jax.prepare` collects for it; see
        :class:`lora_jax.initializers.Initializer`.

    Example:
      >>> import dataclasses, jax, lora_jax as lora
      >>> @dataclasses.dataclass(frozen=True)
      ... class Head(lora.Recipe):
      ...     axes: tuple[str, ...] | None = None
      ...
      ...     def create(self, key, weight, axes):
      ...         return lora.Full().create(key, weight, axes)
      >>> delta = lora.init(jax.random.key(0), {"head": jax.numpy.ones(3)}, {"head": Head(("out",))})
      >>> delta["head"].value.tolist()
      [1.0, 1.0, 1.0]
    """

    axes: tuple[str, ...] | None = None
    needs_axes: ClassVar[bool] = True
    reads: str | None = None

    def __init_subclass__(cls) -> None:
        check_members(cls)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> Adapter:
        """A new adapter.

        Args:
          key: A PRNG key.
          weight: The weight, an array or a quantized leaf; recipes that only need its shape also take a
            `jax.ShapeDtypeStruct`.
          axes: The role of each of its axes: 'batch', 'in', 'out', or 'lookup' for an in axis that
            is indexed.
        """
        raise TypeError(f"{type(self).__name__} does not define create().")

    def prepare(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, Adapter]:
        """The weight and its adapter, for inits that move part of the weight into the adapter."""
        return weight, self.create(key, weight, axes)

    def with_calibration(self, statistics: Mapping[str, Statistics]) -> dict[str, "Recipe | None"]:
        """Returns this recipe with the statistics of the data, by path; None leaves a path out."""
        raise TypeError(f"{type(self).__name__} reads {self.reads}: define with_calibration().")


def check_weight(weight: jax.Array | None, kind: str) -> jax.Array:
    """The weight that :meth:`Adapter.identity_like` needs; raises `ValueError` if it is None."""
    if weight is None:
        raise ValueError(f"The identity of {kind} depends on the weight: pass base=.")
    return weight


def pad_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """Appends zeros along one axis, up to `size`."""
    if size < array.shape[axis]:
        raise ValueError(f"An axis of size {array.shape[axis]} cannot be padded to {size}.")
    return jnp.pad(array, [(0, size - array.shape[axis] if i == axis % array.ndim else 0) for i in range(array.ndim)])


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


def check_roles(argument: str, roles: Iterable[str]) -> None:
    """Raises `ValueError` unless all roles are roles of axes; the message begins with `argument`."""
    if unknown := [role for role in roles if role not in ROLES]:
        raise ValueError(f"{argument}: got the role {unknown[0]!r}, expected one of {', '.join(map(repr, ROLES))}.")


def check_axes(axes: Sequence[str], shape: Sequence[int]) -> None:
    """Raises `ValueError` unless `axes` gives one known role for each axis of a weight."""
    if isinstance(axes, str) or not isinstance(axes, Sequence):
        raise ValueError(f"axes={axes!r}: expected a role for each axis, such as ('in', 'out').")
    if len(axes) != len(shape):
        raise ValueError(
            f"axes={tuple(axes)} gives {len(axes)} roles; the weight of shape {tuple(shape)} needs {len(shape)}."
        )
    check_roles(f"axes={tuple(axes)}", axes)
