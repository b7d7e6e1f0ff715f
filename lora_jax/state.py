"""TrainState: the state of a training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import checks, paths
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import Delta
from lora_jax.leaves import shapes
from lora_jax.meshes import mesh_sharding, replicated
from lora_jax.optim import join, partition
from lora_jax.optim.extra import check_transform, check_usable, init_optimizer
from lora_jax.optim.offload import in_host_memory
from lora_jax.optim.shardings import optimizer_shardings
from lora_jax.transform.call import Arguments, check_delta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a training step reads and, except for the base, updates.

    Attributes:
      base: Frozen parameters. A separate argument of the compiled step, never donated or changed.
      delta: Adapters.
      opt_state: `tx.init(train)` with `train, frozen = lora_jax.partition(delta)`.
      step: The number of completed steps, an int32 scalar.
      key: A PRNG key, which each step splits.

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
        """Creates the state before the first step. It copies the delta and the key, so that steps do not donate them.

        Args:
          base: Frozen parameters.
          delta: Adapters.
          tx: The Optax transform of :func:`lora_jax.train_step`.
          key: A PRNG key.

        Raises:
          TypeError: `delta` is not a dict of adapters; `tx` is not an Optax transform; `key` is not a PRNG key.
          ValueError: `delta` does not fit the base, is one half of :func:`lora_jax.partition`, or was returned by
            :func:`lora_jax.prepare` with another base; `tx` needs arguments that a training step does not have.
        """
        check_transform(tx, "TrainState.create")
        checks.key("TrainState.create(base, delta, tx, key)", key)
        check_delta(delta, Arguments.create(base))
        check_base(delta, base)
        train, frozen = partition(delta)
        opt_state = init_optimizer(tx, train, "TrainState.create")
        check_usable(tx, train, frozen, "TrainState.create")
        # Copies, because some transforms keep the parameters themselves, and a buffer cannot be donated twice.
        train, opt_state, key = jax.tree.map(_copy, (train, opt_state, key))
        number = jnp.zeros((), jnp.int32)
        meshes = [sharding.mesh for sharding in map(mesh_sharding, jax.tree.leaves(train)) if sharding is not None]
        if meshes:  # the shardings that a step returns, so that it is compiled once
            whole = replicated(meshes[0])
            shardings = jax.tree.map(lambda leaf: mesh_sharding(leaf) or whole, train)
            shardings = optimizer_shardings(jax.tree.map(jax.typeof, opt_state), train, shardings, whole)
            opt_state, number, key = jax.device_put((opt_state, number, key), (shardings, whole, whole))
        return cls(base, join(train, frozen), opt_state, number, key)

    def replace(self, **changes: Any) -> "TrainState":
        """Returns the state with other values for some fields, such as the base, the step count or the key.

        Raises:
          TypeError: A name is not a field.

        Example:
          >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
          >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
          >>> state = TrainState.create({"w": jnp.ones((4, 4))}, delta, optax.sgd(0.1), jax.random.key(1))
          >>> int(state.replace(step=jnp.int32(5)).step)
          5
        """
        return replace_fields(self, changes)

    def __repr__(self) -> str:
        return fields_with_shapes(self)


def fields_with_shapes(state: Any) -> str:
    """Returns the representation of a dataclass with shapes in place of arrays."""
    fields = (f"{field.name}={shapes(getattr(state, field.name))}" for field in dataclasses.fields(state))
    return f"{type(state).__name__}({', '.join(fields)})"


def replace_fields(state: Any, changes: dict[str, Any]) -> Any:
    """Returns a dataclass with other values for some fields; raises `TypeError` for names that are not fields."""
    names = [field.name for field in dataclasses.fields(state)]
    for name in changes:
        if name not in names:
            raise TypeError(
                f"{type(state).__name__}.replace: no field {name!r}; {paths.nearest(name, names, limit=1)}. "
                f"The fields are {', '.join(names)}."
            )
    return dataclasses.replace(state, **changes)


def _copy(leaf: Any) -> jax.Array:
    """Copies a leaf to a new buffer in the same memory."""
    # XLA for TPUs cannot compile a copy within host memory (E1200); `device_put` copies in the runtime.
    return jax.device_put(leaf, may_alias=False) if in_host_memory(leaf) else jnp.copy(leaf)
