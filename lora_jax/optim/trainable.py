"""Trainable and frozen leaves apart, and optimizers that keep state on the trainable ones only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.protocol import Adapter, is_adapter
from lora_jax.leaves import is_array, short
from lora_jax.optim.extra import check_transform, update_with

Delta = dict[str, Adapter]


def trainable_mask(tree: Any) -> Any:
    """The tree with each leaf replaced by whether it trains, for Optax masks.

    Args:
      tree: A delta, or any tree that holds deltas, such as `{"base": …, "delta": …}`.

    Returns:
      The same structure with booleans: True on the trained leaves of adapters (`a` and `b` of a LoRA),
      False on their frozen and integer leaves and on everything outside adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> mask = trainable_mask(delta)["w"]
      >>> mask.a, mask.b, mask.scale
      (True, True, False)
    """
    return jax.tree.map(lambda node: node.trainable() if is_adapter(node) else False, tree, is_leaf=is_adapter)


def partition(delta: Delta) -> tuple[Delta, Delta]:
    """Separates what trains from what does not.

    A plain Optax transform over the whole delta can still decay frozen leaves, and integer leaves (of `Rows`) have no
    gradients: a step of your own differentiates and updates `train` alone, or uses :func:`optimizer`.

    Args:
      delta: From :func:`lora_jax.init`.

    Returns:
      `(train, frozen)`: two trees like `delta`, each with None in place of the other's leaves. Gradients
      and optimizer state see `train` only.

    Raises:
      TypeError: The tree has leaves, and no adapter is in it: it is the base, say.

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
            f"partition(delta): the tree holds no adapter, only leaves such as {short(leaves[0])}; give the "
            "delta of lora_jax.init, not the base."
        )
    mask = trainable_mask(delta)
    train = jax.tree.map(lambda trains, leaf: leaf if trains else None, mask, delta)
    frozen = jax.tree.map(lambda trains, leaf: None if trains else leaf, mask, delta)
    return train, frozen


def join(train: Delta, frozen: Delta) -> Delta:
    """The delta again, from the two halves that :func:`partition` made.

    Raises:
      ValueError: The halves are of different deltas.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> join(*partition(delta)).keys()
      dict_keys(['w'])
    """

    def pick(one, other):
        if one is not None and other is not None:
            raise ValueError("join(train, frozen): both halves have a value for the same leaf.")
        return other if one is None else one

    if set(train) != set(frozen):
        different = sorted(set(train) ^ set(frozen))
        raise ValueError(f"join(train, frozen): the halves differ in their paths, {different[0]!r} for one.")
    return jax.tree.map(pick, train, frozen, is_leaf=lambda leaf: leaf is None)


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the one-tree style, where base and delta are one tree of parameters.

    Args:
      tx: Any Optax transform that takes parameters as they are. It sees the trainable leaves alone: its state
        has no entry for others, a global-norm clip measures trainable gradients only, and weight decay or noise
        never reaches a frozen leaf. The adapters' other leaves are passed to its `update` as `frozen`, if it takes
        that argument; so are the extra arguments of the call (`value=`).

    Returns:
      A transform over the whole tree whose updates are zero outside the trainable leaves. Gradients of
      integer leaves (`float0`, from `jax.grad(…, allow_int=True)`) are taken and ignored.

    Raises:
      TypeError: `tx` is no Optax transform.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> base = {"w": jnp.ones((4, 4))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = optimizer(optax.sgd(0.1, momentum=0.9)).init({"base": base, "delta": delta})
      >>> sorted(leaf.shape for leaf in jax.tree.leaves(state))
      [(2, 4), (2, 4)]
    """
    check_transform(tx, "optimizer")

    def chosen(params, tree):
        return jax.tree.map(lambda trains, leaf: leaf if trains else None, trainable_mask(params), tree)

    def init(params):
        return tx.init(chosen(params, params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("optimizer(tx).update needs params, which tell the trainable leaves.")
        frozen = jax.tree.map(lambda node: partition(node)[1] if is_adapter(node) else None, params, is_leaf=is_adapter)
        # A caller that split the tree itself (train_step) has said what is frozen: its word holds.
        extra = {"frozen": frozen, **extra}
        trained, state = update_with(tx, chosen(params, updates), state, chosen(params, params), extra)
        full = jax.tree.map(
            lambda leaf, update: jnp.zeros_like(leaf) if update is None and is_array(leaf) else update,
            params,
            trained,
            is_leaf=lambda leaf: leaf is None,
        )
        return full, state

    return optax.GradientTransformationExtraArgs(init, update)
