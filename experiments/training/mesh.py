"""The mesh of devices of a run, and where weights and batches lie on it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

import lora_jax as lora
from experiments.errors import UserError
from experiments.models.options import Shards, WeightAxes
from lora_jax import paths

DATA, FSDP, TENSOR = NAMES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)
RULES: Mapping[str | None, str | None] = {
    "embed": FSDP,
    "heads": TENSOR,
    "groups": TENSOR,
    "hidden": TENSOR,
    "vocab": TENSOR,
    "experts": None,
    None: None,
}
"""The axis of the mesh that divides an axis of a weight."""


@dataclass(frozen=True)
class MeshSizes:
    """How many devices there are along each axis of the mesh; their product is the devices that a run uses."""

    data: int = 1
    """Copies of the base: each takes an equal part of the batch."""

    fsdp: int = 1
    """Parts of each weight, and of the batch; a weight is gathered where it is used."""

    tensor: int = 1
    """Parts of each layer's heads and hidden width."""

    sequence: bool = False
    """Whether the tensor axis divides the tokens of a sequence too, from layer to layer."""

    def __post_init__(self) -> None:
        for name in NAMES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} must be positive, not {getattr(self, name)}")
        if self.sequence and self.tensor == 1:
            raise ValueError("mesh.sequence divides tokens over the tensor axis; mesh.tensor is 1")

    @property
    def count(self) -> int:
        """Devices in all."""
        return self.data * self.fsdp * self.tensor

    @property
    def replicas(self) -> int:
        """Parts of a batch."""
        return self.data * self.fsdp

    @property
    def shards(self) -> Shards:
        """What divides a model's activations."""
        return Shards(BATCH, TENSOR, TENSOR if self.sequence else None)

    def __str__(self) -> str:
        named = " × ".join(f"{name} {getattr(self, name)}" for name in NAMES)
        return named + (", sequences over tensor" if self.sequence else "")


def make(sizes: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh, on these devices or on those of all processes.

    Raises:
      UserError: There are fewer devices than the mesh has, or more where several processes have to have a part in it.
    """
    found = list(jax.devices() if devices is None else devices)
    alone = len({device.process_index for device in found}) == 1
    if sizes.count > len(found) or (sizes.count < len(found) and not alone):
        hint = " or ".join(fitting(sizes, len(found))) or f"choose sizes whose product is {len(found)}"
        raise UserError(f"the mesh ({sizes}) has {sizes.count} devices, here are {len(found)}; {hint}")
    shape = (sizes.data, sizes.fsdp, sizes.tensor)
    # Where sizes are no products of the slice's own, an axis goes along a part of a link's: slower, but a mesh.
    placed = mesh_utils.create_device_mesh(shape, found[: sizes.count], allow_split_physical_axes=True)
    return Mesh(placed, NAMES, axis_types=(AxisType.Auto,) * 3)


def fitting(sizes: MeshSizes, count: int) -> list[str]:
    """The sizes along one axis that give a mesh of so many devices, the others left as they are."""
    rest = {name: sizes.count // getattr(sizes, name) for name in NAMES}
    return [f"mesh.{name} {count // rest[name]} fits" for name in NAMES if count % rest[name] == 0]


@contextmanager
def entered(sizes: MeshSizes) -> Iterator[Mesh]:
    """The mesh of all processes' devices, set for what is traced in the `with` block.

    Raises:
      UserError: See :func:`make`.
    """
    mesh = make(sizes)
    with jax.set_mesh(mesh):
        yield mesh


def place_weights(mesh: Mesh, axes: WeightAxes, base: Any) -> Any:
    """Weights on the mesh; on one device as they are.

    Raises:
      UserError: See :func:`of_weights`.
    """
    if mesh.size == 1:
        return base
    sharding = of_weights(mesh, axes)
    return paths.flatten(base).map(
        lambda path, weight: jax.device_put(np.asarray(weight), sharding(path, weight.shape))
    )


def made(mesh: Mesh, make: Callable[[jax.Array, Any], Any], key: jax.Array, base: Any) -> Any:
    """The delta that `make(key, base)` makes of a placed base, on the mesh; on one device without a compilation."""
    if mesh.size == 1:
        return make(key, base)
    return jax.jit(make, out_shardings=lora.delta_shardings(base, jax.eval_shape(make, key, base)))(key, base)


def of_weights(mesh: Mesh, axes: WeightAxes) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The sharding of a weight, from its path and shape, for :func:`experiments.models.checkpoint.load`.

    A weight that no pattern names is whole. A vocabulary that cannot be divided is whole too (many cannot); any other
    axis that cannot be divided is an error (from the function that is returned), a UserError that names what could.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        names = next((names for pattern, names in axes if re.search(pattern, path)), ())
        spec = [RULES[name] for name in names]
        for i, (name, along, size) in enumerate(zip(names, spec, shape[len(shape) - len(names) :])):
            if along is not None and size % mesh.shape[along]:
                if name != "vocab":
                    fits = ", ".join(map(str, around(mesh.shape[along], lambda n, size=size: size % n == 0)))
                    raise UserError(
                        f"mesh.{along} {mesh.shape[along]} does not divide {name}, which is {size} in {path} "
                        f"{shape}; nearest that do: {fits}"
                    )
                spec[i] = None
        return NamedSharding(mesh, jax.P(*[None] * (len(shape) - len(names)), *spec))

    return sharding


def of_batches(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its examples are divided."""
    return NamedSharding(mesh, jax.P(BATCH))


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has a copy of."""
    return NamedSharding(mesh, jax.P())


def check_batch(size: int, sizes: MeshSizes, name: str, *, accumulate: int = 1) -> None:
    """Raises a UserError unless so many examples can be divided over microbatches and devices."""
    parts = sizes.replicas * accumulate
    if size % parts:
        fits = " and ".join(map(str, around(size, lambda n: n % parts == 0)))
        steps = f" in {accumulate} microbatches" if accumulate > 1 else ""
        raise UserError(f"{name} {size} cannot be divided over a mesh of {sizes}{steps}; nearest that can: {fits}")


def around(value: int, fits: Callable[[int], bool]) -> list[int]:
    """The nearest positive numbers that fit, below and above, where there are any up to twice the value."""
    below = next((n for n in range(value - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, 2 * value + 2) if fits(n)), None)
    above = above if above is not None or below is not None else next(n for n in range(value + 1, 10**9) if fits(n))
    return [n for n in (below, above) if n is not None]


def rows(mesh: Mesh, size: int) -> slice:
    """The examples, out of a batch of so many, that this process's devices need."""
    parts = of_batches(mesh).addressable_devices_indices_map((size,)).values()
    limits = [part[0].indices(size)[:2] for part in parts if part is not None]
    first, last = min(start for start, _ in limits), max(stop for _, stop in limits)
    if last - first != len({row for start, stop in limits for row in range(start, stop)}):
        raise UserError(
            f"the examples of process {jax.process_index()} do not stand together on the mesh; a smaller mesh.tensor "
            "would give whole rows of the mesh to each process"
        )
    return slice(first, last)


def place(mesh: Mesh, batch: Mapping[str, np.ndarray], size: int) -> dict[str, Any]:
    """A batch of `size` examples on the mesh, of which each process has its :func:`rows`; on one device as it is."""
    first = rows(mesh, size).start
    return {name: _divided(mesh, mine, size, first) for name, mine in batch.items()}


def divided(mesh: Mesh, examples: np.ndarray) -> Any:
    """Examples, all of which every process has, over the mesh; on one device as they are, where not divisible whole."""
    return _divided(mesh, examples, len(examples), 0) if len(examples) % _replicas(mesh) == 0 else examples


def _divided(mesh: Mesh, mine: np.ndarray, size: int, first: int) -> Any:
    """An array of `size` rows on the mesh, of which this process has those from `first` on."""
    if mesh.size == 1:
        return mine

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(size)
        return mine[start - first : stop - first]

    return jax.make_array_from_callback((size, *mine.shape[1:]), of_batches(mesh), part)


def _replicas(mesh: Mesh) -> int:
    return mesh.shape[DATA] * mesh.shape[FSDP]


def gathered(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, whole on every process; each process has to call it."""

    def one(leaf: jax.Array) -> np.ndarray:
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            mesh = leaf.sharding.mesh  # pyrefly: ignore[missing-attribute]: only meshes span processes
            leaf = jax.jit(lambda x: x, out_shardings=whole(mesh))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)
