"""Several deltas as one whose leaves have a leading member axis, and back."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, paths
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.protocol import Adapter
from lora_jax.leaves import canonical

Delta = Mapping[str, Adapter]


def stack(
    deltas: Iterable[Delta], *, members: int | None = None, rank: int | None = None, base: Any = None
) -> dict[str, Adapter]:
    r"""Several deltas as one, for :func:`lora_jax.route`, :func:`lora_jax.train_many` and `jax.vmap`.

    Ranks may differ: factors are filled up with zeros, :math:`\sum_{r<R} a_r b_r` with
    :math:`a_r = b_r = 0` for what a member does not have. Paths may differ: a member without one gets the adapter of
    that kind that changes nothing.

    Args:
      deltas: The members. `{}` is one, the base as it is. At a path that several adapt their adapters are of one
        kind, with equal axes and blocks.
      members: How many the stack has room for; what is left over changes nothing until :func:`lora_jax.swap` fills
        it. None is as many as there are deltas.
      rank: That every adapter with a rank is filled up to. None is each path's largest.
      base: The parameters, from which DoRA, Full and Rows take an adapter that changes nothing.

    Returns:
      A delta whose array leaves are `[members, …]`.

    Raises:
      ValueError: Adapters at one path do not stack; `members` or `rank` is too small; a member lacks a path whose
        adapters start from the base, and there is no base; no delta adapts anything.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2))
      >>> stack([one, two, {}], members=4)["w"].a.shape
      (4, 2, 4)
    """
    if isinstance(deltas, Mapping):
        raise TypeError("stack takes a list of deltas; write stack([delta]).")
    deltas = list(deltas)
    for name, number in (("members", members), ("rank", rank)):
        if number is not None:
            checks.positive("stack", name, number)
    members = len(deltas) if members is None else members
    if members < len(deltas):
        raise ValueError(f"stack(members={members}): there are {len(deltas)} deltas.")
    found: dict[str, Adapter] = {}
    for delta in deltas:
        check_adapters(delta)
        for path, node in delta.items():
            found[path] = _with_room(found.get(path, node), node)
    if not found:
        raise ValueError("stack: no delta adapts anything; a stack of nothing has no members.")
    weights = _weights(base)
    stacked = {}
    for path, first in found.items():
        nodes = [delta[path] for delta in deltas if path in delta]
        size = rank if rank is not None else max(node.rank or 0 for node in nodes)
        first = _padded(path, first, size)
        rows = [_fitted(path, delta[path], first, size) if path in delta else None for delta in deltas]
        if None in rows or members > len(rows):
            nothing = _neutral(path, first, weights)
            rows = [nothing if row is None else row for row in rows] + [nothing] * (members - len(rows))
        stacked[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return stacked


def swap(stacked: Delta, slot: int, delta: Delta, *, base: Any = None) -> dict[str, Adapter]:
    """A stack with another delta in one place; of the same shapes, so that nothing compiles again.

    Args:
      stacked: From :func:`stack`.
      slot: Which member is replaced.
      delta: What takes its place; `{}` empties it. Its paths are among the stack's, its ranks at most as large.
      base: As for :func:`stack`.

    Raises:
      ValueError: There is no such slot, or the delta does not fit into the stack; the message says what it has.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2))
      >>> room = stack([one], members=2, rank=2)
      >>> bool((swap(room, 1, two)["w"].a[1] == two["w"].a).all())
      True
    """
    check_adapters(delta)
    slot, members = checks.integer("swap", "slot", slot), count(stacked)
    if not 0 <= slot < members:
        raise ValueError(f"swap(slot={slot}): the stack has {members} members, 0 to {members - 1}.")
    if missing := [path for path in delta if path not in stacked]:
        raise ValueError(f"swap: the stack lacks {missing[0]!r}; {paths.nearest(missing[0], list(stacked))}.")
    weights = _weights(base)
    changed = {}
    for path, node in stacked.items():
        old = jax.tree.map(lambda leaf: leaf[slot], node)
        new = _fitted(path, delta[path], old, old.rank or 0) if path in delta else _neutral(path, old, weights)
        changed[path] = jax.tree.map(lambda leaves, leaf: leaves.at[slot].set(leaf), node, new)
    return changed


def unstack(stacked: Delta, deltas: Sequence[Delta]) -> list[dict[str, Adapter]]:
    """The members of a stack as deltas of their own: what :func:`stack` added is taken off.

    Args:
      stacked: From :func:`stack`, as it is or trained.
      deltas: What was stacked, for the paths and ranks of each member; arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: There are more deltas than members, or one has a path, a kind or a rank that the stack lacks.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2))
      >>> [member["w"].rank for member in unstack(stack([one, two]), [one, two])]
      [1, 2]
    """
    if len(deltas) > count(stacked):
        raise ValueError(f"unstack: {len(deltas)} deltas; the stack has {count(stacked)} members.")

    def part(path: str, member: int) -> Adapter:
        like = deltas[member][path]
        if path not in stacked:
            raise ValueError(f"unstack: the stack lacks {path!r}; {paths.nearest(path, list(stacked))}.")
        whole = _without_room(stacked[path], like)
        _check_alike(path, like, whole)

        def cut(leaves, leaf):
            if leaves.ndim != len(leaf.shape) + 1 or any(n > m for n, m in zip(leaf.shape, leaves.shape[1:])):
                raise ValueError(
                    f"{path!r}: a leaf of member {member} has shape {leaf.shape}; the stack has {leaves.shape[1:]}."
                )
            return leaves[(member, *(slice(size) for size in leaf.shape))]

        return jax.tree.map(cut, whole, like)

    return [{path: part(path, member) for path in delta} for member, delta in enumerate(deltas)]


def count(stacked: Delta) -> int:
    """The number of members of a stack."""
    check_adapters(stacked, stacked=True)
    sizes = {leaf.shape[0] if leaf.ndim else -1 for leaf in jax.tree.leaves(dict(stacked))}
    if len(sizes) != 1 or -1 in sizes:
        raise ValueError("Not a stack: its leaves have no leading axis of one size. stack([…]) makes one of deltas.")
    (size,) = sizes
    return size


def _weights(base: Any) -> dict[str, Any]:
    return {} if base is None else paths.flatten(base).as_dict()


def _padded(path: str, node: Adapter, rank: int) -> Adapter:
    if node.rank is None:
        return node
    if node.rank > rank:
        raise ValueError(f"{path!r}: an adapter is of rank {node.rank}; the stack has rank {rank}.")
    return node.pad_rank(rank)


def _fitted(path: str, node: Adapter, like: Adapter, rank: int) -> Adapter:
    """The adapter with the shapes of another one; raises where they do not stack."""
    node = _with_room(node, like)
    _check_alike(path, node, like)
    node = _padded(path, node, rank)
    for one, other in zip(jax.tree.leaves(node), jax.tree.leaves(like)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{path!r}: leaves of different shape do not stack: {one.dtype.name}{list(one.shape)} and "
                f"{other.dtype.name}{list(other.shape)}."
            )
    return node


def _with_room(node: Adapter, like: Adapter) -> Adapter:
    """The adapter with zeros, which change nothing, for the optional leaves that it lacks and another one has."""
    lacking = [name for name in _optional(like) if getattr(node, name, 0) is None]
    leaves = {name: getattr(like, name) for name in lacking}
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    return dataclasses.replace(node, **zeros)  # pyrefly: ignore[bad-specialization]


def _without_room(stacked: Adapter, like: Adapter) -> Adapter:
    """A stack without the optional leaves that a member lacks."""
    lacking = [name for name in _optional(stacked) if getattr(like, name, 0) is None]
    return dataclasses.replace(stacked, **dict.fromkeys(lacking))  # pyrefly: ignore[bad-specialization]


def _optional(node: Adapter) -> list[str]:
    """The leaves that an adapter has and another one of its kind may lack."""
    fields = dataclasses.fields(node)  # pyrefly: ignore[bad-argument-type]
    return [f.name for f in fields if f.kw_only and getattr(node, f.name) is not None]


def _check_alike(path: str, node: Adapter, like: Adapter) -> None:
    if type(node) is not type(like):
        raise ValueError(f"{path!r}: {node.kind} and {like.kind} adapters do not stack.")
    if getattr(like, "fingerprint", None) is None and getattr(node, "fingerprint", None) is not None:
        raise ValueError(
            f"{path!r}: the adapter needs the base that lora_jax.prepare returned with it, and those of the stack do "
            "not. Stack such adapters from the start, or lora_jax.to_plain_lora(delta, start), which needs no other "
            "base than they."
        )
    if getattr(like, "bias", None) is None and getattr(node, "bias", None) is not None:
        raise ValueError(
            f"{path!r}: the adapter adds a bias to the outputs, and the stack has no room for one: stack it from the "
            "start."
        )
    if jax.tree.structure(node) != jax.tree.structure(like):
        raise ValueError(f"{path!r}: unlike adapters do not stack: {_static(node)} and {_static(like)}.")


def _static(node: Adapter) -> str:
    names = (field.name for field in dataclasses.fields(node) if "static" in field.metadata)  # pyrefly: ignore[bad-argument-type]
    return ", ".join(f"{name}={getattr(node, name)!r}" for name in names)


def _neutral(path: str, like: Adapter, weights: Mapping[str, Any]) -> Adapter:
    try:
        return like.identity_like(canonical(weights.get(path)))
    except ValueError as error:
        if weights and path not in weights:
            raise ValueError(f"base lacks {path!r}; {paths.nearest(path, list(weights))}.") from None
        raise ValueError(f"{path!r}: {error}") from None
