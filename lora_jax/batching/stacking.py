"""Stacks several deltas into one whose leaves have a leading member axis, and unstacks them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, paths
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.leaves import canonical


def stack(
    deltas: Iterable[Delta], *, members: int | None = None, rank: int | None = None, base: Any = None
) -> dict[str, Adapter]:
    r"""Stacks several deltas into one, for :func:`lora_jax.route`, :func:`lora_jax.train_many` and `jax.vmap`.

    Ranks may differ: factors are padded with zeros, so that :math:`\sum_{r<R} a_r b_r` has :math:`a_r = b_r = 0` for
    the ranks that a member lacks. Paths may differ: a member without an adapter at a path gets one that does not change
    the weight.

    Args:
      deltas: The members. `{}` is the base without adapters. Adapters of several members at one path must have the same
        kind, axes and blocks.
      members: The capacity of the stack, by default the number of deltas. Unused members do not change the weights
        until :func:`lora_jax.swap` replaces them.
      rank: The rank that every adapter with a rank is padded to, by default the largest at its path.
      base: The parameters. Needed for members that lack a path of a DoRA, Full or Rows adapter.

    Returns:
      A delta whose array leaves are `[members, …]`.

    Raises:
      TypeError: `deltas` is one delta instead of a list.
      ValueError: Adapters at one path are incompatible; `members` or `rank` is too small; a member lacks a path whose
        adapter depends on the base, and `base` is None; all deltas are empty.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2))
      >>> stack([one, two, {}], members=4)["w"].a.shape
      (4, 2, 4)
    """
    if isinstance(deltas, Mapping):
        raise TypeError("stack: expected a list of deltas, got one delta; write stack([delta]).")
    deltas = list(deltas)
    for name, number in (("members", members), ("rank", rank)):
        if number is not None:
            checks.positive("stack", name, number)
    members = len(deltas) if members is None else members
    if members < len(deltas):
        raise ValueError(f"stack(members={members}): got {len(deltas)} deltas, more than members.")
    references: dict[str, Adapter] = {}  # by path, with every optional leaf that some member has
    for delta in deltas:
        check_adapters(delta)
        for path, node in delta.items():
            references[path] = _add_optional_leaves(references.get(path, node), node)
    if not references:
        raise ValueError("stack: all deltas are empty; at least one must have an adapter.")
    weights = _weights(base)
    stacked = {}
    for path, reference in references.items():
        nodes = [delta[path] for delta in deltas if path in delta]
        size = rank if rank is not None else max(node.rank or 0 for node in nodes)
        reference = _pad(path, reference, size)
        rows = [_fit(path, delta[path], reference, size) if path in delta else None for delta in deltas]
        if None in rows or members > len(rows):
            identity = _make_identity(path, reference, weights)
            rows = [identity if row is None else row for row in rows] + [identity] * (members - len(rows))
        stacked[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return stacked


def swap(stacked: Delta, slot: int, delta: Delta, *, base: Any = None) -> dict[str, Adapter]:
    """Replaces one member of a stack. Shapes do not change, so compiled functions are reused.

    Args:
      stacked: From :func:`stack`.
      slot: The index of the member to replace.
      delta: The new member; `{}` clears the slot. Its paths must be in the stack, and its ranks must not exceed the
        stack's.
      base: As for :func:`stack`.

    Raises:
      ValueError: The slot is out of range, or the delta does not fit into the stack.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2))
      >>> room = stack([one], members=2, rank=2)
      >>> bool((swap(room, 1, two)["w"].a[1] == two["w"].a).all())
      True
    """
    check_adapters(delta)
    slot, members = checks.integer("swap", "slot", slot), count_members(stacked)
    if not 0 <= slot < members:
        raise ValueError(f"swap(slot={slot}): the stack has {members} members, 0 to {members - 1}.")
    if missing := [path for path in delta if path not in stacked]:
        raise ValueError(f"swap: {missing[0]!r} is not in the stack; {paths.nearest(missing[0], list(stacked))}.")
    weights = _weights(base)
    changed = {}
    for path, node in stacked.items():
        old = jax.tree.map(lambda leaf: leaf[slot], node)
        new = _fit(path, delta[path], old, old.rank or 0) if path in delta else _make_identity(path, old, weights)
        changed[path] = jax.tree.map(lambda leaves, leaf: leaves.at[slot].set(leaf), node, new)
    return changed


def unstack(stacked: Delta, deltas: Sequence[Delta]) -> list[dict[str, Adapter]]:
    """Splits a stack into its members, without the padding that :func:`stack` added.

    Args:
      stacked: From :func:`stack`, possibly trained since.
      deltas: The deltas that were stacked, for the paths and ranks of each member; arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: There are more deltas than members, or a delta has a path, a kind or a rank that is not in the stack.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2))
      >>> [member["w"].rank for member in unstack(stack([one, two]), [one, two])]
      [1, 2]
    """
    if len(deltas) > count_members(stacked):
        raise ValueError(f"unstack: got {len(deltas)} deltas; the stack has {count_members(stacked)} members.")

    def get_adapter(path: str, member: int) -> Adapter:
        like = deltas[member][path]
        if path not in stacked:
            raise ValueError(f"unstack: {path!r} is not in the stack; {paths.nearest(path, list(stacked))}.")
        node = _drop_optional_leaves(stacked[path], like)
        _check_compatible(path, like, node)

        def slice_leaf(leaves, leaf):
            if leaves.ndim != len(leaf.shape) + 1 or any(n > m for n, m in zip(leaf.shape, leaves.shape[1:])):
                raise ValueError(
                    f"{path!r}: a leaf of member {member} has shape {leaf.shape}; the stack has {leaves.shape[1:]}."
                )
            return leaves[(member, *(slice(size) for size in leaf.shape))]

        return jax.tree.map(slice_leaf, node, like)

    return [{path: get_adapter(path, member) for path in delta} for member, delta in enumerate(deltas)]


def count_members(stacked: Delta) -> int:
    """Returns the number of members of a stack."""
    check_adapters(stacked, stacked=True)
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in jax.tree.leaves(dict(stacked))}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError("Not a stack: the leaves have no common leading axis. Create one with stack([…]).")
    (size,) = sizes
    return size


def _weights(base: Any) -> dict[str, Any]:
    return {} if base is None else paths.flatten(base).as_dict()


def _pad(path: str, node: Adapter, rank: int) -> Adapter:
    if node.rank is None:
        return node
    if node.rank > rank:
        raise ValueError(f"{path!r}: an adapter has rank {node.rank}; the stack has rank {rank}.")
    return node.pad_rank(rank)


def _fit(path: str, node: Adapter, like: Adapter, rank: int) -> Adapter:
    """Pads an adapter to the shapes of another one. Raises `ValueError` if they are incompatible."""
    node = _add_optional_leaves(node, like)
    _check_compatible(path, node, like)
    node = _pad(path, node, rank)
    for one, other in zip(jax.tree.leaves(node), jax.tree.leaves(like)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{path!r}: leaves of different shapes or dtypes cannot be stacked: {one.dtype.name}{list(one.shape)} "
                f"and {other.dtype.name}{list(other.shape)}."
            )
    return node


def _add_optional_leaves(node: Adapter, like: Adapter) -> Adapter:
    """Adds zeros for the optional leaves that an adapter lacks and another one has. They have no effect."""
    absent = [name for name in _optional(like) if getattr(node, name, 0) is None]
    leaves = {name: getattr(like, name) for name in absent}
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    return dataclasses.replace(node, **zeros)  # pyrefly: ignore[bad-specialization]


def _drop_optional_leaves(stacked: Adapter, like: Adapter) -> Adapter:
    """Drops the optional leaves of a stacked adapter that a member lacks."""
    absent = [name for name in _optional(stacked) if getattr(like, name, 0) is None]
    return dataclasses.replace(stacked, **dict.fromkeys(absent))  # pyrefly: ignore[bad-specialization]


def _optional(node: Adapter) -> list[str]:
    """Returns the names of an adapter's leaves that another adapter of its kind may lack."""
    fields = dataclasses.fields(node)  # pyrefly: ignore[bad-argument-type]
    return [f.name for f in fields if f.kw_only and getattr(node, f.name) is not None]


def _check_compatible(path: str, node: Adapter, like: Adapter) -> None:
    if type(node) is not type(like):
        raise ValueError(f"{path!r}: {node.kind} and {like.kind} adapters cannot be stacked.")
    if getattr(like, "fingerprint", None) is None and getattr(node, "fingerprint", None) is not None:
        raise ValueError(
            f"{path!r}: the adapter needs the base that lora_jax.prepare returned, unlike those of the stack. Include "
            "such adapters when the stack is created, or convert this one by lora_jax.to_plain_lora(delta, start)."
        )
    if getattr(like, "bias", None) is None and getattr(node, "bias", None) is not None:
        raise ValueError(
            f"{path!r}: the adapter adds a bias to the outputs, and those of the stack do not. Include such an adapter "
            "when the stack is created."
        )
    if jax.tree.structure(node) != jax.tree.structure(like):
        raise ValueError(
            f"{path!r}: adapters with different static fields cannot be stacked: {_format_static(node)} and "
            f"{_format_static(like)}."
        )


def _format_static(node: Adapter) -> str:
    names = (field.name for field in dataclasses.fields(node) if "static" in field.metadata)  # pyrefly: ignore[bad-argument-type]
    return ", ".join(f"{name}={getattr(node, name)!r}" for name in names)


def _make_identity(path: str, like: Adapter, weights: Mapping[str, Any]) -> Adapter:
    try:
        return like.identity_like(canonical(weights.get(path)))
    except ValueError as error:
        if weights and path not in weights:
            raise ValueError(f"{path!r} is not in the base; {paths.nearest(path, list(weights))}.") from None
        raise ValueError(f"{path!r}: {error}") from None
