"""A quantized weight: codes and scales in place of floats."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.meshes import shard_count, spec_entries
from lora_jax.quantization import blockwise
from lora_jax.quantization.codec import Codec
from lora_jax.quantization.scales import SECOND_BLOCK, Scales
from lora_jax.renamed import former_members
from lora_jax.transform.regions import region


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
@former_members(place="block_axis")
class Quantized:
    """A weight as codes, and a scale for each block of them.

    The blocked axes of the weight (usually the contracted ones) are merged into one axis of `codes`, in the position of
    the first of them. All other axes are those of the weight. Leading batch axes (layers, experts) lead in every array,
    so that slicing, stacking, scanning and sharding along them act on all arrays alike. Axes are negative numbers, so
    that they stay valid if leading axes are added or removed.

    Attributes:
      codes: uint8; along the blocked axis the bytes of each block, as the format defines them.
      scales: float32, or :class:`Scales`; along the blocked axis one for each block. None if the bytes of a block
        contain its scales.
      format: The code.
      blocked: The weight's axes that blocks run along, as negative numbers, the slowest first.
      sizes: Their sizes. The last block is padded if the product is not a multiple of the block.
      dtype: The dtype of the weight.
      used: The partition spec of the last axes of `codes` when the weight is used, if it differs from their stored
        sharding; see :func:`~lora_jax.quantization.placement.gathered`.
    """

    codes: jax.Array
    scales: jax.Array | Scales | None
    format: Codec = dataclasses.field(metadata={"static": True})
    blocked: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    used: PartitionSpec = dataclasses.field(default=PartitionSpec(), metadata={"static": True})

    @classmethod
    def of(cls, weight: jax.Array, form: Codec, blocked: Sequence[int], layers: int) -> "Quantized":
        """Quantizes an array.

        Args:
          weight: Floats.
          form: The code.
          blocked: The axes that blocks run along, as negative numbers, in order.
          layers: The number of leading axes that have second-level scales of their own.
        """
        codes, scales = blockwise.encode_blocks(weight, form, blocked, layers)
        return cls(
            codes=codes,
            scales=scales,
            format=form,
            blocked=tuple(blocked),
            sizes=tuple(weight.shape[axis] for axis in blocked),
            dtype=np.dtype(weight.dtype),
        )

    def requantized(self, weight: jax.Array) -> "Quantized":
        """Quantizes another weight of the same shape with this leaf's format and shardings."""
        leaf = Quantized.of(weight.astype(self.dtype), self.format, self.blocked, self.layers)
        leaf = dataclasses.replace(leaf, used=self.used)

        def put(new: jax.Array, old: jax.Array) -> jax.Array:
            is_concrete = isinstance(old, jax.Array) and not isinstance(new, jax.core.Tracer)
            return jax.device_put(new, old.sharding) if is_concrete and new.sharding != old.sharding else new

        return jax.tree.map(put, leaf, self)

    @property
    def block_axis(self) -> int:
        """The blocked axis of `codes` and scales, as a negative number."""
        return blockwise.code_axis(self.blocked)

    @property
    def layers(self) -> int:
        """The number of leading axes that all arrays have in common."""
        if isinstance(self.scales, Scales):
            return len(self.scales.offset.shape)
        return len(self.codes.shape) + self.block_axis

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        rest = [size for axis, size in enumerate(self.codes.shape, -len(self.codes.shape)) if axis != self.block_axis]
        order = [axis for axis in range(-len(rest) - len(self.blocked), 0) if axis not in self.blocked]
        sizes = dict(zip(order, rest)) | dict(zip(self.blocked, self._block_sizes()))
        return tuple(sizes[axis] for axis in sorted(sizes))

    def _block_sizes(self) -> tuple[int, ...]:
        """The sizes of the blocked axes; in a shard the first of them is a part of the weight's."""
        size = blockwise.weight_count(self.codes.shape[self.block_axis], self.format)
        if size == blockwise.block_count(math.prod(self.sizes), self.format) * self.format.block:
            return self.sizes
        return (size // math.prod(self.sizes[1:]), *self.sizes[1:])

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.codes.shape) + len(self.blocked) - 1

    @property
    def size(self) -> int:
        """The number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits per weight, scales and padding included."""
        return 8.0 * self.nbytes / self.size

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # in a mask, or in one half of a partition
            return f"Quantized({self.codes!r}, {self.scales!r}, {self.format.name})"
        double = ", double" if isinstance(self.scales, Scales) else ""
        sizes = ", ".join(map(str, self.shape))
        return (
            f"{self.format.name}[{sizes}](dtype={np.dtype(self.dtype).name}, block={self.format.block}{double}, "
            f"{self.bits:.3f} bits)"
        )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Dequantizes the weight for `np.asarray`."""
        del copy
        return np.asarray(self.dequantize(), dtype)

    def dequantize(self) -> jax.Array:
        """Returns the weight, of `shape` and `dtype`; computed in float32.

        Raises:
          ValueError: The arrays are not those of one weight.
        """
        blockwise.check_arrays(self.codes, self.scales, self.format, self.block_axis)
        sharding = self._explicit_sharding()
        if sharding is None:
            # Op by op the weight would be held in floats several times; under a trace a nested jit costs memory.
            is_traced = any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(self))
            return _dequantize(self) if is_traced else _dequantize_compiled(self)
        # The compiler finds the shardings of the reshapes to and from blocks; that of the result is known.
        in_auto: Any = jax.sharding.auto_axes(_dequantize, out_sharding=sharding)
        return in_auto(self)

    def apply_dequantized(self, function: Callable[..., jax.Array], *operands: Any) -> jax.Array:
        """Computes `function(weight, *operands)` so that the weight in floats exists only during this computation.

        Args:
          function: Returns one array; it must not close over traced arrays.
          *operands: Pytrees of arrays.
        """
        return region(lambda leaf, *operands: function(leaf.dequantize(), *operands), self, *operands)

    def _explicit_sharding(self) -> NamedSharding | None:
        """The sharding of the weight on a mesh with explicit axes; None on other meshes."""
        sharding = jax.typeof(self.codes).sharding
        return self.unpacked(sharding, self.ndim) if AxisType.Explicit in sharding.mesh.axis_types else None

    def unpacked(self, sharding: NamedSharding, ndim: int) -> NamedSharding:
        """Returns the sharding of the weight, which has `ndim` axes, from that of the codes."""
        size = ndim - len(self.blocked) + 1
        entries = list(spec_entries(sharding.spec, size))
        block_entry = entries.pop(size + self.block_axis)
        order = [axis for axis in range(-ndim, 0) if axis not in self.blocked]
        by_axis = dict(zip(order, entries)) | {self.blocked[0]: block_entry}
        return NamedSharding(sharding.mesh, PartitionSpec(*(by_axis.get(axis) for axis in range(-ndim, 0))))

    def at_use(self) -> "Quantized":
        """Returns the leaf with the sharding `used`; unchanged unless all axes of the mesh are automatic."""
        mesh = jax.typeof(self.codes).sharding.mesh
        if not self.used or set(mesh.axis_types) != {AxisType.Auto}:  # with explicit axes the function reshards
            return self

        def constrain(array: jax.Array, *spec: Any) -> jax.Array:
            leading = [PartitionSpec.UNCONSTRAINED] * (array.ndim - len(spec))
            return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*leading, *spec)))

        codes, scales = constrain(self.codes, *self.used), self.scales
        if not isinstance(scales, Scales):
            scales = None if scales is None else constrain(scales, *self.used)
            return dataclasses.replace(self, codes=codes, scales=scales)
        # Second-level scales are divided along the slowest axis only: see `specs`.
        slowest = [entry for axis, entry in enumerate(self.used, -len(self.used)) if axis != self.block_axis][:1]
        scales = dataclasses.replace(
            scales, codes=constrain(scales.codes, *self.used), second=constrain(scales.second, *slowest)
        )
        return dataclasses.replace(self, codes=codes, scales=scales)

    def specs(self, spec: Any, mesh: Any) -> Any:
        """Returns a partition spec for each array, in a tree like this one.

        Codes and scales are divided as the weight is, but along blocked axes only if each shard is a whole number of
        blocks. Second-level scales are divided only if each shard has a whole number of their blocks.

        Args:
          spec: The partition spec of the weight in floats.
          mesh: Its mesh.
        """
        by_axis = dict(zip(range(-self.ndim, 0), spec_entries(spec, self.ndim)))
        first, *more = (by_axis.pop(axis) for axis in self.blocked)
        count = shard_count(first, mesh)
        is_whole = math.prod(self.sizes) % (self.format.block * count) == 0 and self.sizes[0] % count == 0
        is_whole |= count == 1
        entries = list(by_axis.values())
        block_entry = first if is_whole and not any(more) else None
        codes_entries = list(entries)
        codes_entries.insert(len(entries) + 1 + self.block_axis, block_entry)
        codes: Any = PartitionSpec(*codes_entries)
        if not isinstance(self.scales, Scales):
            return dataclasses.replace(self, codes=codes, scales=None if self.scales is None else codes)
        layers, inner = entries[: self.layers], entries[self.layers :]
        # In the order of the scales the first of the weight's other axes is the slowest.
        slowest = inner[0] if inner and not any(inner[1:]) and block_entry is None else None
        number = math.prod(self.scales.codes.shape[self.layers :])
        if number % (SECOND_BLOCK * shard_count(slowest, mesh)):
            slowest = None
        second: Any = PartitionSpec(*layers, slowest)
        offset: Any = PartitionSpec(*layers)
        return dataclasses.replace(self, codes=codes, scales=Scales(codes=codes, second=second, offset=offset))

    def parts(self, spec: Any, mesh: Any) -> "tuple[Quantized, Any] | None":
        """Prepares the leaf for `shard_map`, in which each device has its shard of the weight as a leaf of its own.

        Returns:
          The leaf with float32 scales (a shard does not need those of others), and a partition spec for each array.
          None if a shard of the weight is not a whole number of blocks.
        """
        leaf = dataclasses.replace(self._with_first_level(), used=PartitionSpec())  # a device uses its own shard
        specs = leaf.specs(spec, mesh)
        by_axis = dict(zip(range(-self.ndim, 0), spec_entries(spec, self.ndim)))
        expected = [by_axis[axis] for axis in self.blocked if by_axis[axis] is not None]
        block_entry = specs.codes[len(specs.codes) + self.block_axis]
        return (leaf, specs) if expected == ([] if block_entry is None else [block_entry]) else None

    def rows(self, take: Callable[[jax.Array], jax.Array]) -> "Quantized | None":
        """Applies `take`, which takes rows of an array's first axis, to all arrays; None if that axis is blocked."""
        if -self.ndim in self.blocked:
            return None
        leaf = self._with_first_level()
        # The axes of the indices replace the first axis and have the sharding of the indices.
        return dataclasses.replace(jax.tree.map(take, leaf), used=PartitionSpec(*leaf.used[-leaf.codes.ndim + 1 :]))

    def _with_first_level(self) -> "Quantized":
        """The leaf with float32 scales."""
        if not isinstance(self.scales, Scales):
            return self
        return dataclasses.replace(self, scales=self._first_level(), format=self.format.with_float_scales())

    def _first_level(self) -> jax.Array | None:
        """The scales in float32; None if the codes contain them."""
        return self.scales.decode(self.block_axis) if isinstance(self.scales, Scales) else self.scales


def _dequantize(leaf: Quantized) -> jax.Array:
    scales, sizes = leaf._first_level(), leaf._block_sizes()
    return blockwise.decode_blocks(leaf.codes, scales, leaf.format, leaf.blocked, sizes, leaf.dtype)


_dequantize_compiled = jax.jit(_dequantize)
