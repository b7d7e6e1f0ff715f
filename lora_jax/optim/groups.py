"""Groups of leaves with different optimizer settings: LoRA+, weight decay masks, transforms by path."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lora_jax import paths
from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter, is_adapter

Label = Callable[[str, Any, Adapter | None], Any]
"""`(path, leaf, adapter) -> label`, with the adapter that the leaf belongs to, or None."""


def labels(tree: Any, label: Label) -> Any:
    """Labels each leaf of a tree, for `optax.multi_transform` and Optax masks.

    Args:
      tree: A delta, its trainable half, updates for it, or any tree that contains one of these.
      label: `label(path, leaf, adapter)`. The path ends in the leaf's name ('attention/query/kernel/b'); the adapter is
        the one that the leaf belongs to, or None outside adapters.

    Returns:
      A tree of the same structure with labels as leaves.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> train, frozen = lora.partition(delta)
      >>> label = labels(train, lambda path, leaf, adapter: path)["w"]
      >>> label.a, label.b, label.scale
      ('w/a', 'w/b', None)
    """

    def label_node(keys, node):
        adapter = node if is_adapter(node) else None
        return jax.tree_util.tree_map_with_path(
            lambda leaf_keys, leaf: label(paths.join((*keys, *leaf_keys)), leaf, adapter), node
        )

    return jax.tree_util.tree_map_with_path(label_node, tree, is_leaf=is_adapter)


def by_path(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """Applies a different transform to each group of paths, for example for separate learning rates.

    Args:
      transforms: `{pattern: transform}`. Patterns are searched in the paths of leaves, which end in the leaf's name
        ('attention/query/kernel/b'); the first match wins. The pattern '' matches all remaining leaves;
        `optax.set_to_zero()` freezes a group.

    Returns:
      An Optax transform. Each inner transform has state for its own leaves only.

    Raises:
      ValueError: (from `init` and `update`) A pattern matches no leaf, or only leaves that earlier patterns match; a
        leaf matches no pattern.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> base = {"encoder": jnp.ones((4, 4)), "classifier": jnp.ones((4, 2))}
      >>> spec = {"encoder": lora.LoRA(2, axes=("in", "out")), "classifier": lora.Full()}
      >>> train, frozen = lora.partition(lora.init(jax.random.key(0), base, spec))
      >>> tx = by_path({"^classifier": optax.sgd(0.01), "": optax.sgd(1.0)})
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, train), tx.init(train), train)
      >>> round(float(updates["classifier"].value[0, 0]), 4), float(updates["encoder"].a[0, 0])
      (-0.01, -1.0)
    """
    for pattern in transforms:
        paths.check_pattern(pattern)

    def grouped(tree):
        counts = dict.fromkeys(transforms, 0)
        leaf_paths: list[str] = []

        def label(path, leaf, adapter):
            del leaf, adapter
            leaf_paths.append(path)
            match = next((pattern for pattern in transforms if paths.search(pattern, path)), None)
            if match is None:
                patterns = ", ".join(map(repr, transforms))
                raise ValueError(
                    f"by_path: the leaf {path!r} matches none of {patterns}; '' matches all remaining leaves."
                )
            counts[match] += 1
            return match

        grouping = labels(tree, label)
        for pattern, count in counts.items():
            if not count and any(paths.search(pattern, path) for path in leaf_paths):
                raise ValueError(
                    f"by_path: the pattern {pattern!r} is fully shadowed by earlier patterns. "
                    "The first match wins: move it forward."
                )
            if not count:
                nearest = paths.nearest(pattern, leaf_paths)
                raise ValueError(f"by_path: the pattern {pattern!r} matches no leaf; {nearest}.")
        return grouping

    return optax.multi_transform({**transforms}, grouped)


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    r"""LoRA+: multiplies the learning rate of `b` by `ratio`. Chain it after the optimizer.

    Scales the updates of the factor `b` of LoRA, DoRA and AdaLoRA adapters, which is initialized to zero, and of leaves
    that are a vector per matrix (DoRA's magnitudes, gains, trained biases and norms). In embeddings, `a` is the factor
    that is initialized to zero; use :func:`by_path` to change its learning rate. Since an optimizer multiplies by the
    learning rate last, scaling the updates equals scaling the learning rate, also with weight decay and schedules.

    Args:
      ratio: :math:`\eta_B / \eta_A`; may come from `optax.inject_hyperparams`.

    Raises:
      ValueError: (from `init` and `update`) There is no trainable factor `b`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> train, frozen = lora.partition(delta)
      >>> tx = optax.chain(optax.sgd(0.5), lora_plus(16.0))
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, train), tx.init(train))
      >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
      (-0.5, -8.0)

    References:
      Hayou et al., `LoRA+ <https://arxiv.org/abs/2402.12354>`_, 2024, §4
    """

    def group(tree):
        is_b = labels(
            tree, lambda path, leaf, adapter: isinstance(adapter, LoRAAdapter | AdaLoRAAdapter) and _name(path) == "b"
        )
        if not any(jax.tree.leaves(is_b)):
            leaf_paths = jax.tree.leaves(labels(tree, lambda path, leaf, adapter: path))
            nearest = paths.nearest("/b", leaf_paths)
            raise ValueError(f"lora_plus: no LoRA or AdaLoRA adapter has a trainable factor b; {nearest}.")
        is_vector = labels(tree, lambda path, leaf, adapter: adapter is not None and _is_vector(path, leaf, adapter))
        return jax.tree.map(operator.or_, is_b, is_vector)

    return optax.masked(optax.scale(ratio), group)


def decay_mask(tree: Any) -> Any:
    """Returns which leaves weight decay applies to, for `optax.adamw(…, mask=decay_mask)`.

    Args:
      tree: A delta, or its trainable half.

    Returns:
      The tree with booleans: True for factors and for whole weights; False for leaves that are a vector per matrix
      (magnitudes, gains, AdaLoRA's values, biases, norms) and outside adapters. A stack of biases or norm scales (of
      scanned layers) is recognized by the last name of its path, 'bias' or 'scale'.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.DoRA(2, axes=("in", "out"))})
      >>> mask = decay_mask(lora.partition(delta)[0])["w"]
      >>> mask.a, mask.b, mask.magnitude
      (True, True, False)
    """
    return labels(tree, lambda path, leaf, adapter: adapter is not None and not _is_vector(path, leaf, adapter))


def _is_vector(path: str, leaf: Any, adapter: Adapter) -> bool:
    """Returns whether a leaf is declared as a vector, or is a whole weight that is a bias or a norm's scale."""
    *weight, name = path.split("/")
    if not adapter.axes:  # a whole weight without axis roles
        return leaf.ndim < 2 or weight[-1] in ("bias", "scale")
    (field,) = (field for field in dataclasses.fields(adapter) if field.name == name)  # pyrefly: ignore[bad-argument-type]
    return field.metadata.get("vector", True)  # frozen leaves belong to neither group


def _name(path: str) -> str:
    return path.rpartition("/")[2]
