"""The device mesh of a run, and the shardings of weights and batches on it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

import lora_jax as lora
from experiments.errors import UserError
from experiments.models.options import WeightAxes
from experiments.models.weights import map_weights
from experiments.training.mesh_sizes import BATCH, DATA, FSDP, NAMES, TENSOR, MeshSizes

RULES: Mapping[str | None, str | None] = {
    "embed": FSDP,
    "heads": TENSOR,
    "groups": TENSOR,
    "hidden": TENSOR,
    "vocab": TENSOR,
    "experts": None,
    None: None,
}
"""The mesh axis that an axis of a weight is sharded over, by the name of the latter."""


def make_mesh(sizes: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the given devices, or of the devices of all processes.

    Raises:
      UserError: There are fewer devices than the mesh needs, or more and several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    one_process = len({device.process_index for device in devices}) == 1
    if sizes.count > len(devices) or (sizes.count < len(devices) and not one_process):
        hint = " or ".join(fitting_sizes(sizes, len(devices))) or f"choose sizes whose product is {len(devices)}"
        raise UserError(f"the mesh ({sizes}) has {sizes.count} devices, here are {len(devices)}; {hint}")
    shape = (sizes.data, sizes.fsdp, sizes.tensor)
    # Sizes that are not products of the slice's axes split a physical axis, which is slower.
    grid = mesh_utils.create_device_mesh(shape, devices[: sizes.count], allow_split_physical_axes=True)
    return Mesh(grid, NAMES, axis_types=(AxisType.Auto,) * 3)


def fitting_sizes(sizes: MeshSizes, count: int) -> list[str]:
    """Returns the changes of one size that make a mesh of `count` devices."""
    rest = {name: sizes.count // getattr(sizes, name) for name in NAMES}
    return [f"mesh.{name} {count // rest[name]} fits" for name in NAMES if count % rest[name] == 0]


@contextmanager
def use_mesh(sizes: MeshSizes) -> Iterator[Mesh]:
    """A context in which the mesh of all processes' devices is set.

    Raises:
      UserError: See :func:`make_mesh`.
    """
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        yield mesh


def put_weights(mesh: Mesh, axes: WeightAxes, base: Any) -> Any:
    """Puts weights on the mesh; returns them unchanged if it has one device.

    Raises:
      UserError: See :func:`weight_shardings`.
    """
    if mesh.size == 1:
        return base
    sharding = weight_shardings(mesh, axes)
    return map_weights(lambda path, weight: jax.device_put(np.asarray(weight), sharding(path, weight.shape)), base)


def init_delta(mesh: Mesh, init: Callable[[jax.Array, Any], Any], key: jax.Array, base: Any) -> Any:
    """Returns the delta `init(key, base)` with shardings derived from the base's; compiles only for several devices."""
    if mesh.size == 1:
        return init(key, base)
    return jax.jit(init, out_shardings=lora.delta_shardings(base, jax.eval_shape(init, key, base)))(key, base)


def weight_shardings(mesh: Mesh, axes: WeightAxes) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns a function from a weight's path and shape to its sharding, for `experiments.models.checkpoint.load`.

    A weight that no pattern matches is replicated, as is a vocabulary that its mesh axis does not divide. If a mesh
    axis does not divide another axis of a weight, the function raises a UserError that names sizes which do.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        names = next((names for pattern, names in axes if re.search(pattern, path)), ())
        spec = [RULES[name] for name in names]
        for i, (name, mesh_axis, size) in enumerate(zip(names, spec, shape[len(shape) - len(names) :])):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                if name != "vocab":
                    fits = ", ".join(map(str, nearest_fits(mesh.shape[mesh_axis], lambda n, size=size: size % n == 0)))
                    raise UserError(
                        f"mesh.{mesh_axis} {mesh.shape[mesh_axis]} does not divide {name}, which is {size} in {path} "
                        f"{shape}; nearest that do: {fits}"
                    )
                spec[i] = None
        return NamedSharding(mesh, jax.P(*[None] * (len(shape) - len(names)), *spec))

    return sharding


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, which divides its examples."""
    return NamedSharding(mesh, jax.P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, jax.P())


def check_batch(size: int, sizes: MeshSizes, name: str, *, accumulate: int = 1) -> None:
    """Raises a UserError if microbatches and devices do not divide a batch of `size` examples."""
    parts = sizes.replicas * accumulate
    if size % parts:
        below = size // parts * parts
        fits = " and ".join(str(number) for number in (below, below + parts) if number)
        steps = f" in {accumulate} microbatches" if accumulate > 1 else ""
        raise UserError(f"{name} {size} cannot be divided over a mesh of {sizes}{steps}; nearest that can: {fits}")


def nearest_fits(value: int, fits: Callable[[int], bool]) -> list[int]:
    """Returns the nearest positive numbers that fit, below and (up to twice the value) above."""
    below = next((n for n in range(value - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(value + 1, 2 * value + 2) if fits(n)), None)
    above = above if above is not None or below is not None else next(n for n in range(value + 1, 10**9) if fits(n))
    return [n for n in (below, above) if n is not None]


def process_rows(mesh: Mesh, size: int) -> slice:
    """Returns the examples of a batch of `size` that the devices of this process need."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    limits = [part[0].indices(size)[:2] for part in parts if part is not None]
    first, last = min(start for start, _ in limits), max(stop for _, stop in limits)
    if last - first != len({row for start, stop in limits for row in range(start, stop)}):
        raise UserError(
            f"the examples of process {jax.process_index()} are not contiguous on the mesh; with a smaller mesh.tensor "
            "each process has whole rows of the mesh"
        )
    return slice(first, last)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], size: int) -> dict[str, Any]:
    """Puts a batch of `size` examples, of which each process has its :func:`process_rows`, on the mesh."""
    first = process_rows(mesh, size).start
    return {name: _shard(mesh, rows, size, first) for name, rows in batch.items()}


def put_rows(mesh: Mesh, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Puts a batch that every process holds on the mesh."""
    return {name: _shard(mesh, array, len(array), 0) for name, array in rows.items()}


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts arrays that every process holds on the mesh; returns them unchanged if it has one device."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), replicated(mesh)), tree)


def shard_examples(mesh: Mesh, examples: np.ndarray) -> Any:
    """Shards examples that every process holds over the mesh; returns them unchanged if they are not divisible."""
    return _shard(mesh, examples, len(examples), 0) if len(examples) % _replicas(mesh) == 0 else examples


def _shard(mesh: Mesh, rows: np.ndarray, size: int, first: int) -> Any:
    """Returns an array of `size` rows on the mesh, of which this process holds the `rows` from `first` on."""
    if mesh.size == 1:
        return rows

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        start, stop, _ = (index or (slice(None),))[0].indices(size)
        return rows[start - first : stop - first]

    return jax.make_array_from_callback((size, *rows.shape[1:]), batch_sharding(mesh), part)


def _replicas(mesh: Mesh) -> int:
    return mesh.shape[DATA] * mesh.shape[FSDP]


def gather(tree: Any) -> Any:
    """Returns the arrays of a tree as full NumPy arrays on every process. All processes must call it."""

    def gather_leaf(leaf: jax.Array) -> np.ndarray:
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            mesh = leaf.sharding.mesh  # pyrefly: ignore[missing-attribute]: only meshes span processes
            leaf = jax.jit(lambda x: x, out_shardings=replicated(mesh))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(gather_leaf, tree)
