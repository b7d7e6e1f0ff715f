"""A quantized weight: codes and scales in place of floats."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.quantization.scales import SECOND_BLOCK, Scales, divided

if TYPE_CHECKING:  # formats make leaves
    from lora_jax.quantization.formats import Format


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Quantized:
    """A weight as codes, and a scale for each block of them.

    The blocked axes of the weight (those that are contracted, as a rule) are one axis of `codes`, in the place of the
    first of them. All other axes are what they are in the weight, and batch axes that lead (layers, experts) lead in
    every array, which is why slicing, stacking, scanning and sharding along them act on all arrays alike. Axes are
    counted from the end, so that this stands where leading axes come or go.

    Attributes:
      codes: uint8. Along the blocked axis n weights take n bytes, or n/2 where a code has four bits: byte j of a block
        holds weight j in its upper half and weight j + block/2 in its lower half.
      scales: float32, or :class:`Scales`; along the blocked axis one for each block.
      format: What the codes stand for.
      blocked: The weight's axes that blocks run along, as negative numbers, the slowest first.
      sizes: Their sizes. The last block is padded where they are no multiple of it.
      dtype: Of the weight.
      used: How the last axes of `codes` are divided over devices where the weight is used, if not as they are where it
        lies; see :func:`~lora_jax.quantization.placement.gathered`.
    """

    codes: jax.Array
    scales: jax.Array | Scales
    format: "Format" = dataclasses.field(metadata={"static": True})
    blocked: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    used: PartitionSpec = dataclasses.field(default=PartitionSpec(), metadata={"static": True})

    @classmethod
    def of(cls, weight: jax.Array, form: "Format", blocked: Sequence[int], layers: int) -> "Quantized":
        """Quantizes an array.

        Args:
          weight: Floats.
          form: The format.
          blocked: The axes that blocks run along, as negative numbers, in order.
          layers: How many leading axes have scales of the second level of their own.
        """
        block, sizes = form.block, tuple(weight.shape[axis] for axis in blocked)
        at = blocked[0] + weight.ndim
        # The blocked axes side by side, in the place of the first of them, then as one.
        values = jnp.moveaxis(weight.astype(jnp.float32), tuple(blocked), tuple(range(at, at + len(sizes))))
        lead, tail = values.shape[:at], values.shape[at + len(sizes) :]
        number = -(-math.prod(sizes) // block)
        padding = number * block - math.prod(sizes)
        values = values.reshape(*lead, math.prod(sizes), *tail)
        if padding:
            values = jnp.pad(values, [(0, padding if axis == at else 0) for axis in range(values.ndim)])
        values = values.reshape(*lead, number, block, *tail)
        largest = jnp.max(jnp.abs(values), axis=at + 1, keepdims=True)
        # XLA's maximum over some axes drops NaN: a block that has one is NaN, through its scale.
        largest = jnp.where(jnp.isnan(values).any(axis=at + 1, keepdims=True), jnp.nan, largest)
        codes = form.encode(divided(values, largest))
        if form.bits == 4:
            upper, lower = jnp.split(codes, 2, axis=at + 1)
            codes = jnp.left_shift(upper, jnp.uint8(4)) | lower
        scales = jnp.squeeze(largest, at + 1)
        return cls(
            codes=codes.reshape(*lead, codes.shape[at] * codes.shape[at + 1], *tail),
            scales=Scales.of(scales, layers, at - scales.ndim) if form.double else scales,
            format=form,
            blocked=tuple(blocked),
            sizes=sizes,
            dtype=np.dtype(weight.dtype),
        )

    def requantized(self, weight: jax.Array) -> "Quantized":
        """Another weight of the same shape, quantized as this one is and placed where it is."""
        made = Quantized.of(weight.astype(self.dtype), self.format, self.blocked, self.layers)
        made = dataclasses.replace(made, used=self.used)

        def place(new: jax.Array, old: jax.Array) -> jax.Array:
            known = isinstance(old, jax.Array) and not isinstance(new, jax.core.Tracer)
            return jax.device_put(new, old.sharding) if known and new.sharding != old.sharding else new

        return jax.tree.map(place, made, self)

    @property
    def place(self) -> int:
        """The blocked axis of `codes` and scales, as a negative number."""
        return min(self.blocked) + len(self.blocked) - 1

    @property
    def layers(self) -> int:
        """How many leading axes all arrays have in common."""
        if isinstance(self.scales, Scales):
            return len(self.scales.offset.shape)
        return len(self.codes.shape) + self.place

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        rest = [size for axis, size in enumerate(self.codes.shape, -len(self.codes.shape)) if axis != self.place]
        order = [axis for axis in range(-len(rest) - len(self.blocked), 0) if axis not in self.blocked]
        sizes = dict(zip(order, rest)) | dict(zip(self.blocked, self._block_sizes()))
        return tuple(sizes[axis] for axis in sorted(sizes))

    def _block_sizes(self) -> tuple[int, ...]:
        """The sizes of the blocked axes here: of one shard, the first of them is a part."""
        stored = self.codes.shape[self.place] * (2 if self.format.bits == 4 else 1)
        whole = math.prod(self.sizes)
        if stored == _padded(whole, self.format.block):
            return self.sizes
        return (stored // math.prod(self.sizes[1:]), *self.sizes[1:])

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.codes.shape) + len(self.blocked) - 1

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What codes and scales take."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits for each weight, scales and padding included."""
        return 8.0 * self.nbytes / self.size

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # a mask, or one half of a partition
            return f"Quantized({self.codes!r}, {self.scales!r}, {self.format.name})"
        double = ", double" if isinstance(self.scales, Scales) else ""
        sizes = ", ".join(map(str, self.shape))
        return (
            f"{self.format.name}[{sizes}](dtype={np.dtype(self.dtype).name}, block={self.format.block}{double}, "
            f"{self.bits:.3f} bits)"
        )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """For `np.asarray`: the weight, dequantized."""
        del copy
        return np.asarray(self.dequantize(), dtype)

    def dequantize(self) -> jax.Array:
        """The weight, of `shape` and `dtype`; computed in float32.

        Raises:
          ValueError: The arrays do not fit each other: they are of different weights, or cut.
        """
        self._check()
        sharding = self._explicit_sharding()
        if sharding is None:
            # Op by op it would hold the weight in floats many times; under a trace, a call of its own costs memory.
            is_traced = any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(self))
            return _dequantized(self) if is_traced else _compiled(self)
        # Blocks are cut by reshapes, whose shardings the compiler may find: what comes of it is known.
        in_auto: Any = jax.sharding.auto_axes(_dequantized, out_sharding=sharding)
        return in_auto(self)

    def _explicit_sharding(self) -> NamedSharding | None:
        """That of the weight where the mesh has explicit axes, which types carry; None elsewhere."""
        sharding = jax.typeof(self.codes).sharding
        return self.unpacked(sharding, self.ndim) if AxisType.Explicit in sharding.mesh.axis_types else None

    def unpacked(self, sharding: NamedSharding, ndim: int) -> NamedSharding:
        """The sharding of the weight, of so many axes, from that of the codes."""
        codes = ndim - len(self.blocked) + 1
        kept = [*sharding.spec, *[None] * (codes - len(sharding.spec))]
        along = kept.pop(codes + self.place)
        order = [axis for axis in range(-ndim, 0) if axis not in self.blocked]
        by_axis = dict(zip(order, kept)) | {self.blocked[0]: along}
        return NamedSharding(sharding.mesh, PartitionSpec(*(by_axis.get(axis) for axis in range(-ndim, 0))))

    def at_use(self) -> "Quantized":
        """The leaf with its arrays divided as `used` says; as it is where the compiler divides nothing."""
        mesh = jax.typeof(self.codes).sharding.mesh
        if not self.used or set(mesh.axis_types) != {AxisType.Auto}:  # explicit axes say in types what is gathered
            return self

        def moved(array: jax.Array, *spec: Any) -> jax.Array:
            leading = [PartitionSpec.UNCONSTRAINED] * (array.ndim - len(spec))
            return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*leading, *spec)))

        codes, scales = moved(self.codes, *self.used), self.scales
        if not isinstance(scales, Scales):
            return dataclasses.replace(self, codes=codes, scales=moved(scales, *self.used))
        # Those of the second level are divided along the slowest axis alone: see `specs`.
        slowest = [entry for axis, entry in enumerate(self.used, -len(self.used)) if axis != self.place][:1]
        second = moved(scales.second, *slowest)
        return dataclasses.replace(
            self, codes=codes, scales=dataclasses.replace(scales, codes=moved(scales.codes, *self.used), second=second)
        )

    def specs(self, spec: Any, mesh: Any) -> Any:
        """A partition spec for each array, in a tree like this one.

        Codes and scales are divided as the weight is, but along blocked axes only where each shard is whole blocks.
        Scales of the second level are divided only where each shard has whole blocks of them.

        Args:
          spec: Of the weight in floats.
          mesh: Its mesh.
        """
        by_axis = dict(zip(range(-self.ndim, 0), (*spec, *[None] * (self.ndim - len(spec)))))
        first, *more = (by_axis.pop(axis) for axis in self.blocked)
        whole = math.prod(self.sizes) % (self.format.block * _ways(first, mesh)) == 0
        along = first if whole and self.sizes[0] % _ways(first, mesh) == 0 and not any(more) else None
        kept = list(by_axis.values())
        codes: Any = PartitionSpec(*kept[: len(kept) + self.place + 1], along, *kept[len(kept) + self.place + 1 :])
        if not isinstance(self.scales, Scales):
            return dataclasses.replace(self, codes=codes, scales=codes)
        layers, inner = kept[: self.layers], kept[self.layers :]
        # In the order of the scales the first of the weight's other axes is the slowest.
        slowest = inner[0] if inner and not any(inner[1:]) and along is None else None
        number = math.prod(self.scales.codes.shape[self.layers :])
        if number % (SECOND_BLOCK * _ways(slowest, mesh)):
            slowest = None
        second: Any = PartitionSpec(*layers, slowest)
        offset: Any = PartitionSpec(*layers)
        return dataclasses.replace(self, codes=codes, scales=Scales(codes=codes, second=second, offset=offset))

    def parts(self, spec: Any, mesh: Any) -> "tuple[Quantized, Any] | None":
        """What `shard_map` needs for each device to have its part of the weight as a leaf of its own.

        Returns:
          The leaf with scales in float32, which a part needs no more than its own of, and a partition spec for each
          array; None where a part of the weight would be no whole number of blocks.
        """
        leaf = dataclasses.replace(self._with_first_level(), used=PartitionSpec())  # each device uses what it has
        specs = leaf.specs(spec, mesh)
        by_axis = dict(zip(range(-self.ndim, 0), (*spec, *[None] * (self.ndim - len(spec)))))
        wanted = [by_axis[axis] for axis in self.blocked if by_axis[axis] is not None]
        given = specs.codes[len(specs.codes) + self.place]
        return (leaf, specs) if wanted == ([] if given is None else [given]) else None

    def rows(self, take: Callable[[jax.Array], jax.Array]) -> "Quantized | None":
        """The rows that `take` takes of an array's first axis; None where blocks run along the weight's."""
        if -self.ndim in self.blocked:
            return None
        leaf = self._with_first_level()
        # The index axes take the place of the first, and lie where the indices do.
        return dataclasses.replace(jax.tree.map(take, leaf), used=PartitionSpec(*leaf.used[-leaf.codes.ndim + 1 :]))

    def _with_first_level(self) -> "Quantized":
        if not isinstance(self.scales, Scales):
            return self
        return dataclasses.replace(
            self, scales=self._first_level(), format=dataclasses.replace(self.format, double=False)
        )

    def _first_level(self) -> jax.Array:
        """The scales in float32."""
        return self.scales.decoded(self.place) if isinstance(self.scales, Scales) else self.scales

    def _check(self) -> None:
        scales = self.scales.codes if isinstance(self.scales, Scales) else self.scales
        dtypes = [array.dtype for array in jax.tree.leaves(self)]
        wanted = [jnp.uint8, jnp.float32]
        if isinstance(self.scales, Scales):
            wanted = [jnp.uint8, jnp.uint8, jnp.float32, jnp.float32]
        if dtypes != list(map(jnp.dtype, wanted)):
            raise ValueError(
                f"A quantized weight in {self.format} whose arrays are {', '.join(map(str, dtypes))}; they are "
                f"{', '.join(str(jnp.dtype(dtype)) for dtype in wanted)}. Cast the weight before it is quantized."
            )
        stored = self.codes.shape[self.place] * (2 if self.format.bits == 4 else 1)
        expected = list(self.codes.shape)
        expected[self.place] = -(-stored // self.format.block)
        second = None
        if isinstance(self.scales, Scales):
            inner = math.prod(scales.shape[len(self.scales.offset.shape) :])
            second = (*self.scales.offset.shape, -(-inner // SECOND_BLOCK))
        if (
            tuple(scales.shape) != tuple(expected)
            or stored % self.format.block
            or (second is not None and tuple(self.scales.second.shape) != second)  # pyrefly: ignore
        ):
            parts = {
                "codes": self.codes.shape,
                "scales": scales.shape,
                **({"second": self.scales.second.shape} if isinstance(self.scales, Scales) else {}),
            }
            raise ValueError(
                f"A quantized weight in {self.format} whose arrays do not fit each other: "
                f"{', '.join(f'{name} {tuple(shape)}' for name, shape in parts.items())}; for these codes scales are "
                f"{tuple(expected)}{'' if second is None else f' and second {second}'}."
            )


def _dequantized(leaf: Quantized) -> jax.Array:
    """The weight, of arrays that fit each other.

    In blocks between two barriers: XLA for TPUs would move the reshapes to and from blocks past the arithmetic, and
    then write the scales in float32 for every weight. So it writes nothing but the weight.
    """
    block, half = leaf.format.block, leaf.format.block // 2
    scales = leaf._first_level()
    at = scales.ndim + leaf.place
    lead, tail = leaf.codes.shape[:at], leaf.codes.shape[at + 1 :]
    number = scales.shape[at]
    inner = (1, half) if leaf.format.bits == 4 else (block,)
    codes = jax.lax.optimization_barrier(leaf.codes.reshape(*lead, number, *inner, *tail))
    if leaf.format.bits == 4:
        shifts = jnp.asarray([4, 0], jnp.uint8).reshape(*(1,) * (at + 1), 2, *(1,) * (1 + len(tail)))
        codes = jnp.right_shift(codes, shifts) & jnp.uint8(15)
    values = leaf.format.decode(codes) * jnp.expand_dims(scales, [at + 1 + axis for axis in range(len(inner))])
    values = jax.lax.optimization_barrier(values.astype(leaf.dtype)).reshape(*lead, number * block, *tail)
    sizes = leaf._block_sizes()
    total = math.prod(sizes)
    if total != number * block:
        values = jax.lax.slice_in_dim(values, 0, total, axis=at)
    values = values.reshape(*lead, *sizes, *tail)
    together = range(at, at + len(sizes))
    return jnp.moveaxis(values, tuple(together), tuple(axis + values.ndim for axis in leaf.blocked))


_compiled = jax.jit(_dequantized)


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def _ways(names: Any, mesh: Any) -> int:
    """How many parts an axis of an array is in."""
    if names is None:
        return 1
    return math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)))
