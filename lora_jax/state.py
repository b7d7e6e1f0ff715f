"""TrainState: everything that a training step reads and changes."""

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
        """The state before the first step. Donated steps leave the caller's own delta and key intact.

        Args:
          base: Frozen parameters.
          delta: Adapters.
          tx: The Optax transform of :func:`lora_jax.train_step`.
          key: A PRNG key.

        Raises:
          TypeError: `delta` is no dict of adapters (but the base, say); `tx` is no Optax transform; `key` is no key.
          ValueError: `delta` does not fit the base, is one half of :func:`lora_jax.partition`, or is from
            :func:`lora_jax.prepare`, which returned another base with it; a training step cannot call `tx`, which needs
            parameters of another form or a function of them.
        """
        check_transform(tx, "TrainState.create")
        checks.key("TrainState.create(base, delta, tx, key)", key)
        check_delta(delta, Arguments.create(base))
        check_base(delta, base)
        train, frozen = partition(delta)
        opt_state = init_optimizer(tx, train, "TrainState.create")
        check_usable(tx, train, frozen, "TrainState.create")
        # Copies: some transforms keep the parameters themselves, and no buffer can be donated twice.
        train, opt_state, key = jax.tree.map(_copied, (train, opt_state, key))
        number = jnp.zeros((), jnp.int32)
        meshes = [sharding.mesh for sharding in map(mesh_sharding, jax.tree.leaves(train)) if sharding is not None]
        if meshes:  # where a step would put the rest too: it compiles once
            whole = replicated(meshes[0])
            places = jax.tree.map(lambda leaf: mesh_sharding(leaf) or whole, train)
            places = optimizer_shardings(jax.tree.map(jax.typeof, opt_state), train, places, whole)
            opt_state, number, key = jax.device_put((opt_state, number, key), (places, whole, whole))
        return cls(base, join(train, frozen), opt_state, number, key)

    def replace(self, **changes: Any) -> "TrainState":
        """The state with some fields replaced: another base, a step count, a key.

        Raises:
          TypeError: A name is no field.

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
    """A dataclass's representation with shapes in place of arrays."""
    fields = (f"{field.name}={shapes(getattr(state, field.name))}" for field in dataclasses.fields(state))
    return f"{type(state).__name__}({', '.join(fields)})"


def replace_fields(state: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with some fields replaced; `TypeError` names the fields if one is unknown."""
    names = [field.name for field in dataclasses.fields(state)]
    for name in changes:
        if name not in names:
            raise TypeError(
                f"{type(state).__name__}.replace: no field {name!r}; {paths.nearest(name, names, limit=1)}. "
                f"The fields are {', '.join(names)}."
            )
    return dataclasses.replace(state, **changes)


def _copied(leaf: Any) -> jax.Array:
    """A leaf in a buffer of its own, in the same memory."""
    # XLA compiles no copy within the host's memory for TPUs (E1200); this one is the runtime's.
    return jax.device_put(leaf, may_alias=False) if in_host_memory(leaf) else jnp.copy(leaf)
