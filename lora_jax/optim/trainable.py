"""Partitioning into trainable and frozen leaves, and optimizers with state for the trainable ones only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.protocol import Delta, is_adapter
from lora_jax.leaves import is_array, short
from lora_jax.optim.extra import check_transform, update_with
from lora_jax.splitting import combine, split_by


def trainable_mask(tree: Any) -> Any:
    """Returns which leaves train, for Optax masks.

    Args:
      tree: A delta, or any tree that contains deltas, such as `{"base": …, "delta": …}`.

    Returns:
      The same structure with booleans: True for trainable leaves of adapters (`a` and `b` of a LoRA), False for their
      frozen and integer leaves and for all leaves outside adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> mask = trainable_mask(delta)["w"]
      >>> mask.a, mask.b, mask.scale
      (True, True, False)
    """
    return jax.tree.map(lambda node: node.trainable() if is_adapter(node) else False, tree, is_leaf=is_adapter)


def partition(delta: Delta) -> tuple[Delta, Delta]:
    """Splits a delta into its trainable and its frozen leaves.

    If you write your own training step, differentiate and update `train` only, or use :func:`optimizer`: a plain Optax
    transform over the whole delta can decay frozen leaves, and integer leaves (of `Rows`) have no gradients.

    Args:
      delta: From :func:`lora_jax.init`.

    Returns:
      `(train, frozen)`: two trees like `delta`, each with None in place of the other's leaves.

    Raises:
      TypeError: The tree has leaves but no adapter, for example because it is the base.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> train, frozen = partition(delta)
      >>> len(jax.tree.leaves(train)), len(jax.tree.leaves(frozen))
      (2, 2)
    """
    leaves = jax.tree.leaves(delta, is_leaf=is_adapter)
    if leaves and not any(map(is_adapter, leaves)):
        raise TypeError(
            f"partition(delta): expected a tree of adapters, got leaves such as {short(leaves[0])}; pass the delta "
            "from lora_jax.init, not the base."
        )
    return split_by(trainable_mask(delta), delta)


def join(train: Delta, frozen: Delta) -> Delta:
    """Recombines the two halves that :func:`partition` returns.

    Raises:
      ValueError: The halves belong to different deltas.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> join(*partition(delta)).keys()
      dict_keys(['w'])
    """
    if set(train) != set(frozen):
        different = sorted(set(train) ^ set(frozen))
        raise ValueError(f"join(train, frozen): the halves have different paths, for example {different[0]!r}.")
    return combine(train, frozen)


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer for code in which base and delta are one tree of parameters.

    Args:
      tx: Any Optax transform of plain parameters. It receives the trainable leaves only: its state has no entries for
        other leaves, clipping by the global norm considers trainable gradients only, and neither weight decay nor
        noise changes a frozen leaf. The frozen leaves of adapters are passed to its `update` as `frozen`, and the
        extra arguments of the call (`value=`) by name, if it accepts them.

    Returns:
      A transform of the whole tree whose updates are zero outside the trainable leaves. Gradients of integer leaves
      (`float0`, from `jax.grad(…, allow_int=True)`) are ignored.

    Raises:
      TypeError: `tx` is not an Optax transform.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> base = {"w": jnp.ones((4, 4))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = optimizer(optax.sgd(0.1, momentum=0.9)).init({"base": base, "delta": delta})
      >>> sorted(leaf.shape for leaf in jax.tree.leaves(state))
      [(2, 4), (2, 4)]
    """
    check_transform(tx, "optimizer")

    def select_trainable(params, tree):
        return split_by(trainable_mask(params), tree)[0]

    def init(params):
        return tx.init(select_trainable(params, params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("optimizer(tx).update needs params, to determine the trainable leaves.")
        frozen = jax.tree.map(lambda node: partition(node)[1] if is_adapter(node) else None, params, is_leaf=is_adapter)
        # `frozen=` of a caller that partitioned the tree itself (train_step) takes precedence.
        extra = {"frozen": frozen, **extra}
        train_updates, train = select_trainable(params, updates), select_trainable(params, params)
        train_updates, state = update_with(tx, train_updates, state, train, extra)
        updates = jax.tree.map(
            lambda leaf, update: jnp.zeros_like(leaf) if update is None and is_array(leaf) else update,
            params,
            train_updates,
            is_leaf=lambda leaf: leaf is None,
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
