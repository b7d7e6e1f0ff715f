"""The compiled training step: gradients, accumulation and metrics, by jit or by pmap."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.adapters.protocol import Adapter
from lora_jax.leaves import is_array
from lora_jax.optim import join, partition, trainable_mask
from lora_jax.optim.offload import in_host_memory
from lora_jax.sharding import optimizer_shardings, whole_on
from lora_jax.update import update_of

Delta = dict[str, Adapter]
Metrics = dict[str, Any]

DEVICES = "devices"
"""The name of the mapped axis of the pmap form."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and, but for the base, changes.

    Attributes:
      base: Frozen parameters. Passed separately inside the compiled step, never donated, never returned
        changed.
      delta: Adapters.
      opt_state: `tx.init(train)` with `train, frozen = lora_jax.partition(delta)`.
      step: Steps done, an int32 scalar.
      key: A PRNG key; each step draws one from it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> base = {"w": jnp.ones((4, 4))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = TrainState.create(base, delta, optax.adam(1e-3), jax.random.key(1))
      >>> int(state.step)
      0
    """

    base: Any
    delta: Delta
    opt_state: Any
    step: jax.Array
    key: jax.Array

    @classmethod
    def create(cls, base: Any, delta: Delta, tx: optax.GradientTransformation, key: jax.Array) -> "TrainState":
        """The state before the first step. Donated steps leave the caller's own delta and key intact."""
        train, frozen = partition(delta)
        opt_state = tx.init(train)
        # Copies: some transforms keep the parameters themselves, and no buffer can be donated twice.
        train, opt_state, key = jax.tree.map(_copied, (train, opt_state, key))
        number = jnp.zeros((), jnp.int32)
        meshes = [place.mesh for place in map(_on_mesh, jax.tree.leaves(train)) if place is not None]
        if meshes:  # where a step would put the rest too: it compiles once
            whole = whole_on(meshes[0])
            places = jax.tree.map(lambda leaf: _on_mesh(leaf) or whole, train)
            places = optimizer_shardings(jax.tree.map(jax.typeof, opt_state), train, places, whole)
            opt_state, number, key = jax.device_put((opt_state, number, key), (places, whole, whole))
        return cls(base, join(train, frozen), opt_state, number, key)


@dataclasses.dataclass(frozen=True)
class Static:
    """A tree without its arrays: structure, and the leaves that a compiled function closes over."""

    treedef: Any
    leaves: tuple[Any, ...]

    @classmethod
    def split(cls, tree: Any) -> tuple["Static", list[Any]]:
        """The tree's static part and its arrays."""
        leaves, treedef = jax.tree.flatten(tree)
        static = cls(treedef, tuple(None if is_array(leaf) else leaf for leaf in leaves))
        return static, [leaf for leaf in leaves if is_array(leaf)]

    def restore(self, arrays: list[Any]) -> Any:
        """The tree again."""
        queue = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(queue) if leaf is None else leaf for leaf in self.leaves])


@dataclasses.dataclass(frozen=True)
class Halves:
    """Which leaves of a delta train, so that these alone are donated and returned by a compiled step."""

    treedef: Any
    trains: tuple[bool, ...]

    def split(self, delta: Delta) -> tuple[list[Any], list[Any]]:
        """The leaves that train and the others."""
        leaves = list(zip(self.trains, jax.tree.leaves(delta)))
        return [leaf for trains, leaf in leaves if trains], [leaf for trains, leaf in leaves if not trains]

    def join(self, train: list[Any], frozen: list[Any]) -> Delta:
        """The delta again."""
        queues = {True: iter(train), False: iter(frozen)}
        return jax.tree.unflatten(self.treedef, [next(queues[trains]) for trains in self.trains])


def train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    pmap: bool = False,
) -> "Step":
    """Makes a compiled training step of the trainable leaves.

    Args:
      loss_fn: `loss_fn(base, delta, batch, key)` returns a scalar loss, or `(loss_sum, weight)`: a sum
        and what it is to be divided by (the tokens it counts), both scalars. Sums are added up over
        microbatches and devices and divided by the total weight; plain losses are averaged.
      tx: An Optax transform; it sees the trainable leaves alone, and `value=`, `grad=` and `frozen=` (the other
        half of the delta) where it takes them. (Line searches, which call the loss again, are not served.)
      accumulate: Microbatches a step; the leading size of every leaf of the batch is a multiple of it.
      pmap: Runs the step under `jax.pmap` over all local devices: each takes an equal part of the batch's leading
        axis, the state (base included) is replicated, gradients are summed. The numbers are those of the plain
        form (which itself runs sharded where its inputs are).

    Returns:
      `step(state, batch) -> (state, metrics)`. The buffers of the delta's trained leaves, the optimizer state, the
      step and the key are donated; those of the base and of frozen leaves (VeRA's shared pair) are not. Metrics are
      scalars: `loss`; `grad_norm`, the global norm of the gradients; `weight`, the total weight; and `nonfinite`, per
      path the number of gradient elements that are NaN or infinite, for :func:`check_finite`.
      `step.lower(state, batch)` is the same without running it, for a compiler's analyses; without pmap, leaves may be
      `jax.ShapeDtypeStruct`, on devices that are not here.

    Raises:
      ValueError: (from the step) The batch cannot be divided by `accumulate` times the devices; under pmap, the state
        has arrays in host memory.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> fn = lambda base, x: x @ base["w"]
      >>> base, x = {"w": jnp.ones((4, 1))}, jnp.ones((2, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1)}, fn, x)
      >>> adapted = lora.adapt(fn)
      >>> loss = lambda base, delta, x, key: jnp.mean(adapted(base, delta, x) ** 2)
      >>> tx = optax.sgd(0.01)
      >>> state = TrainState.create(base, delta, tx, jax.random.key(1))
      >>> step = train_step(loss, tx)
      >>> state, metrics = step(state, x)
      >>> float(metrics["loss"]), int(state.step)
      (16.0, 1)
    """
    update = update_of(loss_fn, accumulate, DEVICES if pmap else None)

    known: dict[Any, Halves] = {}  # telling the halves apart costs milliseconds

    def body(static, halves, arrays, frozen, moving, batch):
        train, *rest = moving
        (delta, *rest), metrics = update(tx, static.restore(arrays), (halves.join(train, frozen), *rest), batch)
        return (halves.split(delta)[0], *rest), metrics

    mapped = jax.pmap(
        body,
        axis_name=DEVICES,
        in_axes=(None, None, None, None, None, 0),
        out_axes=None,
        donate_argnums=(4,),
        static_broadcasted_argnums=(0, 1),
    )

    @functools.cache
    def jitted(structure: Any, places: tuple[NamedSharding | None, ...]) -> Callable:
        # What moves stays where it lies, in the very words: of a sharding that says the same in others (without a last
        # None, with an axis of one device) JAX would compile the next step anew.
        kept = jax.tree.unflatten(structure, places)
        return jax.jit(body, donate_argnums=(4,), static_argnums=(0, 1), out_shardings=(kept, None))

    def compiled(moving: Any) -> Any:
        leaves, structure = jax.tree.flatten(moving)
        return mapped if pmap else jitted(structure, tuple(map(_kept, leaves)))

    def arguments(state: TrainState, batch: Any) -> tuple[Any, ...]:
        devices = jax.local_device_count() if pmap else 1
        check_batch(batch, accumulate, devices)
        if pmap:
            batch = jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)
        structure = jax.tree.structure(state.delta)
        if structure not in known:
            known[structure] = Halves(structure, tuple(jax.tree.leaves(trainable_mask(state.delta))))
        halves = known[structure]
        train, frozen = halves.split(state.delta)
        static, arrays = Static.split(state.base)
        moving = (train, state.opt_state, state.step, state.key)
        return static, halves, arrays, frozen, moving, batch

    def run(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        static, halves, arrays, frozen, moving, batch = arguments(state, batch)
        if pmap:  # once: what comes back is replicated already, and compiles nothing else
            arrays, frozen, moving = _replicated((arrays, frozen, moving))
        step = compiled(moving)
        (train, opt_state, number, key), metrics = step(static, halves, arrays, frozen, moving, batch)
        base = static.restore(arrays) if pmap else state.base
        return TrainState(base, halves.join(train, frozen), opt_state, number, key), metrics

    def lower(state: TrainState, batch: Any) -> jax.stages.Lowered:
        given = arguments(state, batch)
        return compiled(given[4]).lower(*given)

    return Step(run, lower)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, from :func:`train_step`.

    Attributes:
      run: `run(state, batch) -> (state, metrics)`, which calling it does.
      lower: `lower(state, batch)`, the same traced for these shapes and lowered, not run.
    """

    run: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    lower: Callable[[TrainState, Any], jax.stages.Lowered]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return self.run(state, batch)


def _on_mesh(leaf: Any) -> NamedSharding | None:
    """The sharding of an array that lies on a mesh; of a tracer none is known."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _kept(leaf: Any) -> NamedSharding | None:
    """The sharding of a leaf of the state that a step has to keep: on a mesh, where types do not say it."""
    sharding = _on_mesh(leaf)
    if sharding is None or len(sharding.device_set) == 1 or in_host_memory(leaf):
        return None
    return None if AxisType.Explicit in sharding.mesh.axis_types else sharding


def _copied(leaf: Any) -> jax.Array:
    """A leaf in a buffer of its own, in the same memory."""
    # XLA compiles no copy within the host's memory for TPUs (E1200); this one is the runtime's.
    return jax.device_put(leaf, may_alias=False) if in_host_memory(leaf) else jnp.copy(leaf)


def _replicated(tree: Any) -> Any:
    """The arrays of a tree on every local device; one that stands in several places stays one."""
    sharding = NamedSharding(Mesh(jax.local_devices(), (DEVICES,)), PartitionSpec())
    placed: dict[int, jax.Array] = {}

    def place(leaf: Any) -> jax.Array:
        if in_host_memory(leaf):
            raise ValueError(
                "train_step(pmap=True): the state has arrays in host memory, where pmap keeps none. Use the form "
                "without pmap, on sharded inputs."
            )
        if id(leaf) not in placed:
            placed[id(leaf)] = jax.device_put(leaf, sharding)
        return placed[id(leaf)]

    return jax.tree.map(place, tree)


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises where a step's loss or gradients are not finite; waits for the step to finish.

    Args:
      metrics: From a step made by :func:`train_step` or :func:`lora_jax.train_many`.

    Raises:
      FloatingPointError: Names every path whose gradient has NaN or infinite elements, with the number, and the
        members where there are many.

    Example:
      >>> import jax.numpy as jnp
      >>> check_finite({"loss": jnp.float32(1), "nonfinite": {"w": jnp.int32(0)}})
    """
    bad = {path: np.asarray(counts) for path, counts in metrics["nonfinite"].items() if np.any(counts)}
    loss = np.asarray(metrics["loss"])
    if bad:
        named = ", ".join(f"{path} ({_elements(counts)})" for path, counts in bad.items())
        raise FloatingPointError(f"Gradients are not finite (loss {loss}): {named}.")
    if not np.isfinite(loss).all():
        raise FloatingPointError(f"The loss is {loss}, though the gradients are finite.")


def _elements(counts: np.ndarray) -> str:
    """A number of elements, or one for each member that has any."""
    if not counts.ndim:
        return f"{counts} elements"
    return ", ".join(f"member {member}: {counts[member]} elements" for member in np.flatnonzero(counts))


def check_batch(batch: Any, accumulate: int, devices: int = 1) -> None:
    """Raises unless every leaf of a batch can be divided into microbatches and over devices."""
    parts = accumulate * devices
    if parts == 1:
        return
    for leaf in jax.tree.leaves(batch):
        if not jnp.ndim(leaf) or leaf.shape[0] % parts:
            raise ValueError(
                f"A leaf of the batch has shape {jnp.shape(leaf)}; its leading size must be a multiple of {parts} "
                f"(accumulate={accumulate} × {devices} devices)."
            )
