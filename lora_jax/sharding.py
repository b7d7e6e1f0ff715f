"""Where a delta and its training state lie on a mesh, from where the base lies."""

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
from lora_jax.quantization.placement import shardings as of_quantized
from lora_jax.state import TrainState


def delta_shardings(base_shardings: Any, delta: Delta) -> Delta:
    """The sharding of every array of a delta, from those of the weights.

    An axis that an array has in common with its weight is divided as the weight's is: of a low-rank pair `a` has the
    batch and in axes, `b` the batch and out axes, and the rank is whole everywhere. Optimizer state that is made of a
    placed delta (`TrainState.create`) lies where the delta does.

    Args:
      base_shardings: A tree like the base, of shardings, or the base itself where its arrays are placed. A quantized
        weight's is the leaf, or the tree of shardings in its place.
      delta: Its arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      A tree like `delta`, for `jax.device_put(delta, shardings)` or as `out_shardings` of what makes the delta. Where a
      part of the weight's axis is no part of the array's (blocks, divided axes, sizes that do not divide) that axis is
      whole.

    Raises:
      ValueError: The delta names a path that the base lacks; a leaf of `base_shardings` has no sharding.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> made = delta_shardings({"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))}, delta)["w"]
      >>> made.a.spec, made.b.spec
      (P(None, 'fsdp'), P(None, 'tensor'))
    """
    check_adapters(delta)
    leaves = paths.flatten(base_shardings).as_dict()
    made = {}
    for path, node in delta.items():
        if path not in leaves:
            raise ValueError(f"The base has no sharding for {path!r}; {paths.nearest(path, list(leaves))}.")
        sharding = _sharding_of(path, leaves[path], len(node.shape()))
        made[path] = _of_adapter(node, sharding)
    return made


def state_shardings(base_shardings: Any, state: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """The sharding of every array of a training state, from those of the weights.

    For what has to be known before there are arrays: compiling for devices that are not here, restoring a checkpoint
    onto another mesh. It is where `TrainState.create` puts the state of a delta that is placed by
    :func:`delta_shardings`: optimizer state follows the trained leaf that it belongs to (it ends in its path and has
    its shape), in the host's memory where `tx` keeps it there; what belongs to none (counts, adafactor's rows and
    columns), the step and the key are whole on every device.

    Args:
      base_shardings: As for :func:`delta_shardings`, of every array of the base.
      state: Its arrays may be `jax.ShapeDtypeStruct`: `jax.eval_shape(TrainState.create, …)`.
      tx: The transform that the optimizer state is of.

    Returns:
      A tree like `state`, base included; leaves that are no arrays stay as they are.

    Raises:
      ValueError: As for :func:`delta_shardings`; a weight of the state's base has no sharding; the optimizer state is
        of another transform.

    Example:
      >>> import functools, jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
      >>> base, tx = {"w": jnp.ones((8, 4))}, optax.adam(1e-3)
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = jax.eval_shape(functools.partial(lora.TrainState.create, tx=tx), base, delta, key=jax.random.key(1))
      >>> made = state_shardings({"w": NamedSharding(mesh, PartitionSpec("fsdp"))}, state, tx)
      >>> made.opt_state[0].mu["w"].a.spec, made.step.spec
      (P(None, 'fsdp'), P())
      >>> placed = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), state, made)
    """
    delta, base = delta_shardings(base_shardings, state.delta), _of_base(base_shardings, state.base)
    known = [leaf for leaf in jax.tree.leaves((delta, base)) if isinstance(leaf, Sharding)]
    if not known:
        raise ValueError("The state has neither a delta nor a base with arrays, so that no sharding is known.")
    whole = next((replicated(sharding.mesh) for sharding in known if isinstance(sharding, NamedSharding)), known[0])
    train = partition(state.delta)[0]
    of_train = jax.tree.map(lambda trains, to: to if trains else None, trainable_mask(state.delta), delta)
    opt_state = optimizer_shardings(_types(state.opt_state, tx, train), train, of_train, whole)
    places: Any = {"base": base, "delta": delta, "opt_state": opt_state, "step": whole, "key": whole}
    return dataclasses.replace(state, **places)


def _types(opt_state: Any, tx: optax.GradientTransformation, train: Delta) -> Any:
    """The types of the arrays of optimizer state, which tell the memory that `tx` keeps them in: shapes do not."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train)
    program, made = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    structure = jax.tree.structure(made)
    if structure != jax.tree.structure(opt_state):
        raise ValueError(
            f"The optimizer state is of another transform: tx.init makes {structure} of this delta, the state has "
            f"{jax.tree.structure(opt_state)}."
        )
    return jax.tree.unflatten(structure, program.out_avals)


def _of_base(base_shardings: Any, base: Any) -> Any:
    """The sharding of every array of a base, those of quantized weights included."""
    leaves = paths.flatten(base_shardings).as_dict()

    def of(path: str, leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        if path not in leaves:
            raise ValueError(f"The base has no sharding for {path!r}; {paths.nearest(path, list(leaves))}.")
        given = leaves[path]
        if is_quantized(leaf) and is_quantized(given):
            return jax.tree.map(lambda part: part if isinstance(part, Sharding) else part.sharding, given)
        sharding = _sharding_of(path, given, leaf.ndim)
        return of_quantized(leaf, sharding) if is_quantized(leaf) else sharding

    return paths.flatten(base).map(of)


def _sharding_of(path: str, leaf: Any, ndim: int) -> Sharding:
    """The sharding of a weight, of so many axes."""
    stored = leaf.codes if is_quantized(leaf) else leaf
    sharding = stored if isinstance(stored, Sharding) else getattr(stored, "sharding", None)
    if not isinstance(sharding, Sharding):
        raise ValueError(
            f"{path!r} has no sharding: {type(leaf).__name__}. Give a tree of shardings, or placed arrays."
        )
    return leaf.unpacked(sharding, ndim) if is_quantized(leaf) and isinstance(sharding, NamedSharding) else sharding


def _of_adapter(node: Adapter, sharding: Sharding) -> Adapter:
    if not isinstance(sharding, NamedSharding):  # a single device: everything lies there
        return jax.tree.map(lambda _: sharding, node)
    entries = spec_entries(sharding.spec, len(node.shape()))
    by_label = {str(axis): entry for axis, entry in enumerate(entries)}
    changes = {}
    for field in dataclasses.fields(node):  # pyrefly: ignore[bad-argument-type]
        if "trained" in field.metadata:
            array = getattr(node, field.name)
            if array is None:
                continue
            named = [by_label.get(label) for label in node.labels(field.name)]
            spec = [
                entry if size % shard_count(entry, sharding.mesh) == 0 else None
                for entry, size in zip(named, array.shape)
            ]
            changes[field.name] = NamedSharding(
                sharding.mesh,
                PartitionSpec(*spec, *[None] * (array.ndim - len(spec))),
                memory_kind=sharding.memory_kind,
            )
    return dataclasses.replace(node, **changes)  # pyrefly: ignore[bad-specialization]
