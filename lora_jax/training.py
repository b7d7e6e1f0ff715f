"""The compiled training step: gradients, accumulation and metrics, by jit or by pmap."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.adapters.protocol import Delta
from lora_jax.compiled import Lowered, Metrics, Step
from lora_jax.finite import check_finite
from lora_jax.leaves import is_array
from lora_jax.meshes import mesh_sharding, replicated
from lora_jax.optim import trainable_mask
from lora_jax.optim.extra import check_transform
from lora_jax.optim.offload import in_host_memory
from lora_jax.state import TrainState
from lora_jax.transform import dropout_keys
from lora_jax.update import update_of

__all__ = ["DEVICES", "Metrics", "Static", "Step", "TrainState", "check_finite", "train_step"]


DEVICES = "devices"
"""The name of the mapped axis of the pmap form."""


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
    has_aux: bool = False,
    donate: bool = True,
    skip_nonfinite: bool = False,
    pmap: bool = False,
) -> Step:
    """Makes a compiled training step of the trainable leaves.

    Args:
      loss_fn: `loss_fn(base, delta, batch, key)` returns a scalar loss, or `(loss_sum, weight)`: a sum
        and what it is to be divided by (the tokens it counts), both scalars. Sums are added up over
        microbatches and devices and divided by the total weight; plain losses are averaged. `key` is for
        dropout: pass it on as `adapted(…, dropout_key=key)`.
      tx: An Optax transform; it sees the trainable leaves alone, and `value=`, `grad=` and `frozen=` (the other
        half of the delta) where it takes them. :meth:`TrainState.create` refuses those that need more (line
        searches, which call the loss again).
      accumulate: Microbatches a step; the leading size of every leaf of the batch is a multiple of it.
      has_aux: Whether `loss_fn` returns a pair whose second element is a pytree of arrays, as for
        `jax.value_and_grad`: `(loss, aux)` or `((loss_sum, weight), aux)`. It is `metrics["aux"]`. With
        `accumulate` its leaves are stacked, `[accumulate, …]`; with `pmap`, `[devices, …]` or
        `[devices, accumulate, …]`.
      donate: Whether the step reuses the buffers of the state that it is given, which cannot be read afterwards.
      skip_nonfinite: Whether a step whose loss or gradients are not finite, or with an invalid weight, leaves the
        delta and the optimizer state as they are. The state's step and key advance, and `metrics["skipped"]` is 1
        (else 0).
      pmap: Runs the step under `jax.pmap` over all local devices: each takes an equal part of the batch's leading
        axis, the state (base included) is replicated, gradients are summed. The numbers are those of the plain
        form (which itself runs sharded where its inputs are).

    Returns:
      `step(state, batch) -> (state, metrics)`. The buffers of the delta's trained leaves, the optimizer state, the
      step and the key are donated; those of the base and of frozen leaves (VeRA's shared pair) are not. Metrics are
      scalars: `loss`; `grad_norm`, the global norm of the gradients; `weight`, the total weight; `invalid_weights`,
      the number of microbatches whose weight is negative or not finite; and `nonfinite`, per path the number of
      gradient elements that are NaN or infinite. :func:`check_finite` raises on the last two.
      Where the total weight is zero, as for padding alone, sums are not divided.
      `step.lower(state, batch)` is the same without running it, for a compiler's analyses; without pmap, leaves may be
      `jax.ShapeDtypeStruct`, on devices that are not here. Its `compile()` is called like the step.

    Raises:
      TypeError: `tx` is no Optax transform. (From the step:) the loss is not real, or of another form than `has_aux`
        says.
      ValueError: (from the step) The loss is not a scalar; the batch cannot be divided by `accumulate` times the
        devices; under pmap, the state has arrays in host memory.
      RuntimeError: (from the step) The state's buffers were donated to an earlier step.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> fn = lambda base, x: x @ base["w"]
      >>> base, x = {"w": jnp.ones((4, 1))}, jnp.ones((2, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, dropout=0.1)}, fn, x)
      >>> adapted = lora.adapt(fn)
      >>> loss = lambda base, delta, x, key: jnp.mean(adapted(base, delta, x, dropout_key=key) ** 2)
      >>> tx = optax.sgd(0.01)
      >>> state = TrainState.create(base, delta, tx, jax.random.key(1))
      >>> step = train_step(loss, tx)
      >>> state, metrics = step(state, x)
      >>> float(metrics["loss"]), int(state.step)
      (16.0, 1)

      Variables that a model changes (batch statistics) are auxiliary outputs, which go back into the base. Nothing
      compiles again:

      >>> from flax import nnx
      >>> net = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
      >>> apply_fn, base = lora.nnx.functional(net)
      >>> mutable = dict(mutable=("batch_stats",))
      >>> delta = lora.init(jax.random.key(0), base, {"kernel": lora.LoRA(1)}, apply_fn, x, **mutable)
      >>> adapted = lora.adapt(apply_fn)
      >>> def loss(base, delta, x, key):
      ...     out, changed = adapted(base, delta, x, dropout_key=key, **mutable)
      ...     return jnp.mean(out**2), changed
      >>> state, step = TrainState.create(base, delta, tx, jax.random.key(1)), train_step(loss, tx, has_aux=True)
      >>> state, metrics = step(state, x)
      >>> state = state.replace(base=lora.nnx.updated(state.base, metrics["aux"]))
      >>> bool((state.base["layers"][1]["mean"] != base["layers"][1]["mean"]).all())
      True
    """
    check_transform(tx, "train_step")
    calls: list[bool] = []
    axis = DEVICES if pmap else None
    update = update_of(
        dropout_keys.with_recording(loss_fn, calls), accumulate, axis, has_aux=has_aux, skip_nonfinite=skip_nonfinite
    )
    donated = (4,) if donate else ()
    split_of: dict[Any, Halves] = {}  # computing which leaves train costs milliseconds

    def body(static, halves, arrays, frozen, carry, batch):
        train, *rest = carry
        (delta, *rest), metrics, aux = update(tx, static.restore(arrays), (halves.join(train, frozen), *rest), batch)
        return (halves.split(delta)[0], *rest), metrics, aux

    mapped = jax.pmap(
        body,
        axis_name=DEVICES,
        in_axes=(None, None, None, None, None, 0),
        out_axes=(None, None, 0),
        donate_argnums=donated,
        static_broadcasted_argnums=(0, 1),
    )

    @functools.cache
    def jitted(structure: Any, shardings: tuple[NamedSharding | None, ...]) -> Callable:
        # What a step changes keeps its sharding, in the same words: for one that says the same in others (without a
        # last None, with an axis of one device) JAX would compile the next step anew.
        out = jax.tree.unflatten(structure, shardings)
        return jax.jit(body, donate_argnums=donated, static_argnums=(0, 1), out_shardings=(out, None, None))

    def compiled(carry: Any) -> Any:
        leaves, structure = jax.tree.flatten(carry)
        return mapped if pmap else jitted(structure, tuple(map(_kept, leaves)))

    def arguments(state: TrainState, batch: Any) -> tuple[Any, ...]:
        check_state(state, TrainState)
        devices = jax.local_device_count() if pmap else 1
        check_batch(batch, accumulate, devices)
        if pmap:
            batch = jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)
        structure = jax.tree.structure(state.delta)
        if structure not in split_of:
            split_of[structure] = Halves(structure, tuple(jax.tree.leaves(trainable_mask(state.delta))))
        halves = split_of[structure]
        train, frozen = halves.split(state.delta)
        static, arrays = Static.split(state.base)
        carry = (train, state.opt_state, state.step, state.key)
        if pmap and not isinstance(jax.tree.leaves(train)[0], jax.ShapeDtypeStruct):
            # Once: what comes back is replicated already, and compiles nothing else.
            arrays, frozen, carry = _replicated((arrays, frozen, carry))
        return static, halves, arrays, frozen, carry, batch

    def finish(state: TrainState, args: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[TrainState, Metrics]:
        static, halves, arrays, frozen, *_ = args
        (train, opt_state, number, key), metrics, aux = results
        if has_aux:
            metrics["aux"] = aux
        base = static.restore(arrays) if pmap else state.base
        return TrainState(base, halves.join(train, frozen), opt_state, number, key), metrics

    def run(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        with explaining_donation(state, check=pmap):
            args = arguments(state, batch)
            results = compiled(args[4])(*args)
        dropout_keys.warn_without_key(calls, state.delta)
        return finish(state, args, results)

    def lower(state: TrainState, batch: Any) -> Lowered:
        args = arguments(state, batch)

        def call(program: jax.stages.Compiled, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            with explaining_donation(state, check=pmap):
                now = arguments(state, batch)
                if now[:2] != args[:2]:
                    raise TypeError("The compiled step was lowered for a base and delta of another structure.")
                results = program(*now[2:])
            return finish(state, now, results)

        return Lowered(compiled(args[4]).lower(*args), call)

    return Step(run, lower)


def _kept(leaf: Any) -> NamedSharding | None:
    """The sharding of a leaf of the state that a step has to keep: on a mesh, where types do not say it."""
    sharding = mesh_sharding(leaf)
    if sharding is None or len(sharding.device_set) == 1 or in_host_memory(leaf):
        return None
    return None if AxisType.Explicit in sharding.mesh.axis_types else sharding


def _replicated(tree: Any) -> Any:
    """The arrays of a tree on every local device; one that stands in several places stays one."""
    sharding = replicated(Mesh(jax.local_devices(), (DEVICES,)))
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


def check_state(state: Any, kind: type) -> None:
    """Raises `TypeError` unless a step is given a state of its kind."""
    if not isinstance(state, kind):
        raise TypeError(f"step(state, batch): state is a {kind.__name__}; got {type(state).__name__}.")


@contextlib.contextmanager
def explaining_donation(state: Any, *, check: bool = False) -> Iterator[None]:
    """Says what happened where JAX reports that the buffers of a state are gone: an earlier step reused them.

    Args:
      state: What the step is given.
      check: Whether to look at the buffers first: where they are gone, pmap ends the process.
    """
    try:
        if check and any(map(_is_deleted, jax.tree.leaves(state))):
            raise RuntimeError("a buffer of the state was donated")
        yield
    except (RuntimeError, ValueError) as error:
        if not re.search("deleted|donated", str(error)) or not any(map(_is_deleted, jax.tree.leaves(state))):
            raise
        raise RuntimeError(
            "This state was given to a step before, which reused its buffers (donation). Go on with the state that "
            "the step returned, or make the step with donate=False to use a state more than once."
        ) from error


def _is_deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


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
