"""The compiled training step: gradients, accumulation and metrics, under jit or pmap."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.compiled import Metrics, Step
from lora_jax.finite import check_finite
from lora_jax.meshes import mesh_sharding, replicated
from lora_jax.optim import trainable_mask
from lora_jax.optim.extra import check_transform
from lora_jax.optim.offload import in_host_memory
from lora_jax.splitting import Mask, Static
from lora_jax.state import TrainState
from lora_jax.step_checks import check_batch, check_state
from lora_jax.transform import dropout_keys
from lora_jax.update import make_update

__all__ = ["DEVICES", "Metrics", "Step", "TrainState", "check_finite", "train_step"]


DEVICES = "devices"
"""The name of the mapped axis under pmap."""


def train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    donate: bool = True,
    skip_nonfinite: bool = False,
    pmap: bool = False,
) -> Step[TrainState]:
    """Creates a compiled training step, which updates the trainable leaves.

    Args:
      loss_fn: `loss_fn(base, delta, batch, key)` returns a scalar loss or `(loss_sum, weight)`, two scalars: a sum over
        examples or tokens, and their number or total weight. Sums are added over microbatches and devices and divided
        by the total weight; plain losses are averaged. `key` is for dropout: pass it to
        `adapted(…, dropout_key=key)`.
      tx: An Optax transform. It receives the trainable leaves only, and `value=`, `grad=` and `frozen=` (the other half
        of the delta) if its update accepts them. :meth:`TrainState.create` raises an error for transforms that need
        more (line searches, which call the loss again).
      accumulate: The number of microbatches per step; it divides the leading size of every leaf of the batch.
      has_aux: Whether `loss_fn` returns a pair whose second element is a pytree of arrays, as for
        `jax.value_and_grad`: `(loss, aux)` or `((loss_sum, weight), aux)`. The step returns it as `metrics["aux"]`.
        With `accumulate` its leaves are stacked, `[accumulate, …]`; with `pmap` they are `[devices, …]` or
        `[devices, accumulate, …]`.
      donate: Whether the step reuses the buffers of its input state, which cannot be read afterwards.
      skip_nonfinite: Whether a step does not change the delta and the optimizer state if its loss or gradients are not
        finite or its weight is invalid. The state's step and key still advance, and `metrics["skipped"]` is 1
        (otherwise 0).
      pmap: Whether to run the step under `jax.pmap` over all local devices. Each device gets an equal part of the
        batch's leading axis, the state (base included) is replicated, and gradients are summed. The results equal those
        of the form without pmap, which runs sharded if its inputs are.

    Returns:
      `step(state, batch) -> (state, metrics)`. The buffers of the delta's trainable leaves, the optimizer state, the
      step and the key are donated; those of the base and of frozen leaves (VeRA's shared pair) are not. A step
      preserves every array's sharding. Metrics are scalars: `loss`; `grad_norm`, the global norm of the gradients;
      `weight`, the total weight; `invalid_weights`, the number of microbatches whose weight is negative or not finite;
      and `nonfinite`, `{path: number of gradient elements that are NaN or infinite}`. :func:`check_finite` raises an
      error on the last two. If the total weight is zero (a batch of padding), sums are not divided.
      `step.lower(state, batch)` lowers the step without running it, as the method of a function from `jax.jit` does.
      Without pmap its leaves may be `jax.ShapeDtypeStruct` with shardings on devices of another machine.
      `step.lower(state, batch).compile()` is called like the step, and has XLA's analyses.

    Raises:
      TypeError: `tx` is not an Optax transform. (From the step:) the loss is not real, or does not have the form that
        `has_aux` requires.
      ValueError: (from the step) The loss is not a scalar; the batch cannot be divided by `accumulate` times the
        number of devices; under pmap, the state has arrays in host memory.
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

      Variables that a model changes (batch statistics) are auxiliary outputs, which the caller writes into the base.
      The step is not compiled again:

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
    update = make_update(
        dropout_keys.with_recording(loss_fn, calls), accumulate, axis, has_aux=has_aux, skip_nonfinite=skip_nonfinite
    )
    donated = (4,) if donate else ()
    masks: dict[Any, Mask] = {}  # `trainable_mask` takes milliseconds

    def body(static, mask, arrays, frozen, carry, batch):
        train, *rest = carry
        (delta, *rest), metrics, aux = update(tx, static.restore(arrays), (mask.restore(train, frozen), *rest), batch)
        return (mask.split(delta)[0], *rest), metrics, aux

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
        # A step preserves the shardings of its state literally: JAX would compile the next step again for an equivalent
        # sharding of another form (without a trailing None, with an axis of one device).
        out = jax.tree.unflatten(structure, shardings)
        return jax.jit(body, donate_argnums=donated, static_argnums=(0, 1), out_shardings=(out, None, None))

    def program(args: tuple[Any, ...]) -> Callable:
        leaves, structure = jax.tree.flatten(args[4])
        return mapped if pmap else jitted(structure, tuple(map(_output_sharding, leaves)))

    def arguments(state: TrainState, batch: Any) -> tuple[Any, ...]:
        check_state(state, TrainState)
        devices = jax.local_device_count() if pmap else 1
        check_batch(batch, accumulate, devices)
        if pmap:
            batch = jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)
        structure = jax.tree.structure(state.delta)
        if structure not in masks:
            masks[structure] = Mask(structure, tuple(jax.tree.leaves(trainable_mask(state.delta))))
        mask = masks[structure]
        train, frozen = mask.split(state.delta)
        static, arrays = Static.split(state.base)
        carry = (train, state.opt_state, state.step, state.key)
        if pmap and not isinstance(jax.tree.leaves(train)[0], jax.ShapeDtypeStruct):
            # The state that the step returns is already replicated.
            arrays, frozen, carry = _replicate((arrays, frozen, carry))
        return static, mask, arrays, frozen, carry, batch

    def finish(state: TrainState, args: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[TrainState, Metrics]:
        static, mask, arrays, frozen, *_ = args
        (train, opt_state, number, key), metrics, aux = results
        dropout_keys.warn_without_key(calls, state.delta)
        if has_aux:
            metrics["aux"] = aux
        base = static.restore(arrays) if pmap else state.base
        return TrainState(base, mask.restore(train, frozen), opt_state, number, key), metrics

    return Step.create(arguments, program, finish, static=2, check_buffers=pmap)


def _output_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding that a step must preserve: that of an array on a mesh, unless its type includes it."""
    sharding = mesh_sharding(leaf)
    if sharding is None or len(sharding.device_set) == 1 or in_host_memory(leaf):
        return None
    return None if AxisType.Explicit in sharding.mesh.axis_types else sharding


def _replicate(tree: Any) -> Any:
    """Copies the arrays of a tree to every local device; an array that occurs several times is copied once."""
    sharding = replicated(Mesh(jax.local_devices(), (DEVICES,)))
    copies: dict[int, jax.Array] = {}

    def replicate(leaf: Any) -> jax.Array:
        if in_host_memory(leaf):
            raise ValueError(
                "train_step(pmap=True): the state has arrays in host memory, which pmap does not support. Use the form "
                "without pmap, on sharded inputs."
            )
        if id(leaf) not in copies:
            copies[id(leaf)] = jax.device_put(leaf, sharding)
        return copies[id(leaf)]

    return jax.tree.map(replicate, tree)
