"""Shardings of a delta and of a training state, derived from the shardings of the base."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax import paths
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.leaves import is_array, is_quantized
from lora_jax.meshes import replicated, shard_count, spec_entries
from lora_jax.optim import partition, trainable_mask
from lora_jax.optim.shardings import optimizer_shardings
from lora_jax.quantization.placement import shardings as quantized_shardings
from lora_jax.splitting import split_by
from lora_jax.state import TrainState


def delta_shardings(base_shardings: Any, delta: Delta) -> Delta:
    """Computes the sharding of every array of a delta from the shardings of the weights.

    An axis that an array shares with its weight is divided like the weight's axis: `a` of a low-rank pair has the batch
    and in axes, `b` the batch and out axes, and the rank axis is not divided. `TrainState.create` gives the optimizer
    state of a sharded delta the shardings of the delta.

    Args:
      base_shardings: A tree of shardings like the base, or the base itself if its arrays are sharded. For a quantized
        weight it has the sharded leaf, or a tree of shardings like the leaf.
      delta: The delta; its arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      A tree of shardings like `delta`, for `jax.device_put(delta, shardings)` or as `out_shardings` of a function that
      creates the delta. An axis is not divided if the shards of the weight do not match parts of the array (blocks,
      split axes, sizes that the mesh does not divide).

    Raises:
      ValueError: The delta names a path that the base lacks; a leaf of `base_shardings` has no sharding.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> sharding = delta_shardings({"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))}, delta)["w"]
      >>> sharding.a.spec, sharding.b.spec
      (P(None, 'fsdp'), P(None, 'tensor'))
    """
    check_adapters(delta)
    leaves = paths.flatten(base_shardings).as_dict()
    shardings = {}
    for path, node in delta.items():
        if path not in leaves:
            raise ValueError(f"The base has no sharding for {path!r}; {paths.nearest(path, list(leaves))}.")
        shardings[path] = _adapter_shardings(node, _weight_sharding(path, leaves[path], len(node.shape())))
    return shardings


def state_shardings(base_shardings: Any, state: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """Computes a TrainState's shardings from shapes and the shardings of the weights.

    Use it to compile for devices of another machine, or to restore a checkpoint onto another mesh. The shardings are
    those that `TrainState.create` gives the state of a delta that is sharded by :func:`delta_shardings`. An array of
    the optimizer state whose path ends in that of a trained leaf of the same shape has the sharding of that leaf, in
    host memory if `tx` keeps it there. Its other arrays (counts, the rows and columns of adafactor), the step and the
    key are replicated.

    Args:
      base_shardings: As for :func:`delta_shardings`, for every array of the base.
      state: The state; its arrays may be `jax.ShapeDtypeStruct`, as in `jax.eval_shape(TrainState.create, …)`.
      tx: The Optax transform of the optimizer state.

    Returns:
      A tree of shardings like `state`, base included; leaves that are not arrays are unchanged.

    Raises:
      ValueError: As for :func:`delta_shardings`; a weight of the state's base has no sharding; the optimizer state
        belongs to another transform.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
      >>> base, tx = {"w": jnp.ones((8, 4))}, optax.adam(1e-3)
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = jax.eval_shape(functools.partial(lora.TrainState.create, tx=tx), base, delta, key=jax.random.key(1))
      >>> shardings = state_shardings({"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, state, tx)
      >>> shardings.opt_state[0].mu["w"].a.spec, shardings.step.spec
      (P(None, 'fsdp'), P())
    """
    delta, base = delta_shardings(base_shardings, state.delta), _base_shardings(base_shardings, state.base)
    shardings = [leaf for leaf in jax.tree.leaves((delta, base)) if isinstance(leaf, Sharding)]
    if not shardings:
        raise ValueError("The state has neither adapters nor a base with arrays, from which to derive shardings.")
    default = next((replicated(x.mesh) for x in shardings if isinstance(x, NamedSharding)), shardings[0])
    train = partition(state.delta)[0]
    train_shardings, _ = split_by(trainable_mask(state.delta), delta)
    opt_state = optimizer_shardings(_array_types(state.opt_state, tx, train), train, train_shardings, default)
    fields: Any = {"base": base, "delta": delta, "opt_state": opt_state, "step": default, "key": default}
    return dataclasses.replace(state, **fields)


def _array_types(opt_state: Any, tx: optax.GradientTransformation, train: Delta) -> Any:
    """The types of the arrays of optimizer state, which include their memory space: `jax.eval_shape` omits it."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train)
    program, expected = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    structure = jax.tree.structure(expected)
    if structure != jax.tree.structure(opt_state):
        raise ValueError(
            f"The optimizer state belongs to another transform: tx.init returns {structure} for this delta, the state "
            f"has {jax.tree.structure(opt_state)}."
        )
    return jax.tree.unflatten(structure, program.out_avals)


def _base_shardings(base_shardings: Any, base: Any) -> Any:
    """The sharding of every array of a base, including those of quantized weights."""
    leaves = paths.flatten(base_shardings).as_dict()

    def sharding_of(path: str, leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        if path not in leaves:
            raise ValueError(f"The base has no sharding for {path!r}; {paths.nearest(path, list(leaves))}.")
        source = leaves[path]
        if is_quantized(leaf) and is_quantized(source):
            return jax.tree.map(lambda part: part if isinstance(part, Sharding) else part.sharding, source)
        sharding = _weight_sharding(path, source, leaf.ndim)
        return quantized_shardings(leaf, sharding) if is_quantized(leaf) else sharding

    return paths.flatten(base).map(sharding_of)


def _weight_sharding(path: str, leaf: Any, ndim: int) -> Sharding:
    """The sharding of a weight with `ndim` axes, from a sharding, an array or a quantized leaf."""
    stored = leaf.codes if is_quantized(leaf) else leaf
    sharding = stored if isinstance(stored, Sharding) else getattr(stored, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise ValueError(
            f"{path!r} has no sharding: got {type(leaf).__name__}, expected a sharding or a sharded array."
        )
    return leaf.unpacked(sharding, ndim) if is_quantized(leaf) and isinstance(sharding, NamedSharding) else sharding


def _adapter_shardings(node: Adapter, sharding: Sharding) -> Adapter:
    if not isinstance(sharding, NamedSharding):  # on one device
        return jax.tree.map(lambda _: sharding, node)
    entries = spec_entries(sharding.spec, len(node.shape()))
    by_label = {str(axis): entry for axis, entry in enumerate(entries)}
    changes = {}
    for field in dataclasses.fields(node):  # pyrefly: ignore[bad-argument-type]
        if "trained" in field.metadata:
            array = getattr(node, field.name)
            if array is None:
                continue
            candidates = [by_label.get(label) for label in node.labels(field.name)]
            spec = [
                entry if size % shard_count(entry, sharding.mesh) == 0 else None
                for entry, size in zip(candidates, array.shape)
            ]
            changes[field.name] = NamedSharding(
                sharding.mesh,
                PartitionSpec(*spec, *[None] * (array.ndim - len(spec))),
                memory_kind=sharding.memory_kind,
            )
    return dataclasses.replace(node, **changes)  # pyrefly: ignore[bad-specialization]
