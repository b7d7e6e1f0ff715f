"""Leaves of a delta in groups that an optimizer treats differently: LoRA+, weight decay, rates by path."""

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
"""(path of a leaf, the leaf, the adapter that it belongs to) -> its label."""


def labels(tree: Any, label: Label) -> Any:
    """The tree with a label for each leaf, as `optax.multi_transform` and Optax masks take it.

    Args:
      tree: A delta, the half of it that trains, updates for it, or any tree that holds such.
      label: `label(path, leaf, adapter)`; the path ends in the leaf's name ('attention/query/kernel/b'). The
        adapter is the one that the leaf belongs to, None outside adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> train, frozen = lora.partition(delta)
      >>> found = labels(train, lambda path, leaf, adapter: path)["w"]
      >>> found.a, found.b, found.scale
      ('w/a', 'w/b', None)
    """

    def of(keys, node):
        owner = node if is_adapter(node) else None
        return jax.tree_util.tree_map_with_path(lambda more, leaf: label(_path((*keys, *more)), leaf, owner), node)

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=is_adapter)


def by_path(transforms: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """Another transform for each group of paths: separate learning rates, or parts that stay as they are.

    Args:
      transforms: `{pattern: transform}`. Patterns are searched in the paths of leaves, which end in the leaf's name
        ('attention/query/kernel/b'); the first match wins. The pattern '' matches what is left;
        `optax.set_to_zero()` keeps a group as it is.

    Returns:
      An Optax transform, each inner one with state for its own leaves alone.

    Raises:
      ValueError: (from `init` and `update`) A pattern matches nothing, or nothing that an earlier one leaves; a
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
        taken = dict.fromkeys(transforms, 0)
        seen: list[str] = []

        def label(path, leaf, adapter):
            del leaf, adapter
            seen.append(path)
            found = next((pattern for pattern in transforms if paths.search(pattern, path)), None)
            if found is None:
                known = ", ".join(map(repr, transforms))
                raise ValueError(f"by_path: the leaf {path!r} matches none of {known}; '' matches what is left.")
            taken[found] += 1
            return found

        grouping = labels(tree, label)
        for pattern, count in taken.items():
            if not count and any(paths.search(pattern, path) for path in seen):
                raise ValueError(
                    f"by_path: the pattern {pattern!r} is fully shadowed by those before it. "
                    "The first match wins: put it earlier."
                )
            if not count:
                raise ValueError(f"by_path: the pattern {pattern!r} matches no leaf; {paths.nearest(pattern, seen)}.")
        return grouping

    return optax.multi_transform({**transforms}, grouped)


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    r"""LoRA+: the learning rate of `b` is `ratio` times that of `a`. Comes after the optimizer in a chain.

    `b` is that of LoRA and its kin (DoRA, AdaLoRA): the factor that starts from zero. Besides it the group holds what
    is a vector for each matrix (DoRA's magnitudes, gains, trained biases and norms). Of an embedding it is `a` that
    starts from zero; a rate of its own comes from :func:`by_path`. A learning rate multiplies updates last, so that
    scaling them by the ratio is the same as raising it, for weight decay and schedules too.

    Args:
      ratio: :math:`\eta_B / \eta_A`; may come from `optax.inject_hyperparams`.

    Raises:
      ValueError: (from `init` and `update`) No adapter of that kind has a factor `b` that trains.

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
            known = jax.tree.leaves(labels(tree, lambda path, leaf, adapter: path))
            raise ValueError(f"lora_plus: no LoRA or AdaLoRA has a factor b that trains; {paths.nearest('/b', known)}.")
        is_vector = labels(tree, lambda path, leaf, adapter: adapter is not None and _is_vector(path, leaf, adapter))
        return jax.tree.map(operator.or_, is_b, is_vector)

    return optax.masked(optax.scale(ratio), group)


def decay_mask(tree: Any) -> Any:
    """Which leaves weight decay is for, as `optax.adamw(…, mask=decay_mask)` takes it.

    Args:
      tree: A delta, or the half of it that trains.

    Returns:
      The tree with booleans: True for factors and for whole weights; False for what is a vector for each matrix:
      magnitudes, gains, AdaLoRA's values, biases, norms. A stack of biases or norm scales (of the layers of a
      scan) is told by its path's last name, 'bias' or 'scale'. False outside adapters.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.DoRA(2, axes=("in", "out"))})
      >>> mask = decay_mask(lora.partition(delta)[0])["w"]
      >>> mask.a, mask.b, mask.magnitude
      (True, True, False)
    """
    return labels(tree, lambda path, leaf, adapter: adapter is not None and not _is_vector(path, leaf, adapter))


def _is_vector(path: str, leaf: Any, adapter: Adapter) -> bool:
    """Whether a leaf of an adapter is a vector: declared as one, or a whole leaf that is a bias or a norm's scale."""
    *weight, name = path.split("/")
    if not adapter.axes:  # a whole leaf, whose roles nobody needed
        return leaf.ndim < 2 or weight[-1] in ("bias", "scale")
    (field,) = (field for field in dataclasses.fields(adapter) if field.name == name)  # pyrefly: ignore[bad-argument-type]
    return field.metadata.get("vector", True)  # what is frozen is of neither group; nothing decays it


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _path(keys: Any) -> str:
    return "/".join(map(paths.segment, keys))
