"""Checks that a base is the one that an adapter needs, if :func:`lora_jax.prepare` moved a part of it into the factors.

Such an adapter has a frozen leaf `fingerprint` with a sketch of the moved weight and one of the original: sums of the
weight's elements with pseudo-random signs. A sketch is linear, and the norm of a difference of sketches estimates that
of the difference of the weights. A base is accepted where its sketch is near the moved weight's and not much nearer to
the original's: the moved base cast to bfloat16 or quantized passes, the base before the move does not. The leaf
survives what is done to all leaves of a delta alike: stacks, averages, scaling and weight decay. Where it was changed
in another way (`jax.tree.map(lambda leaf: leaf + 1, delta)`), nothing is checked.
"""

import functools
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import paths
from lora_jax.adapters.factored import explicit_sharding
from lora_jax.adapters.protocol import Adapter
from lora_jax.leaves import dequantized, is_abstract

SIZE = 16
"""The number of sums in a sketch."""

UNIT = (1.0, -1.0)
"""The first entry of a fingerprint, which shows whether it was scaled or changed otherwise."""

ROUNDING = 1e-5
"""The distance between sketches of one weight, over its norm: the order of summation depends on the device."""

FAR = 0.25
"""The distance, over the norm, above which weights differ. The error of four bits is less than half of it."""


def fingerprint(original: Any, moved: Any) -> jax.Array:
    """The fingerprint of a weight that was moved, float32: `UNIT` and the sketches of the moved and the original one.

    Args:
      original: The weight before, an array or a quantized leaf.
      moved: The weight of the base that the adapter needs.
    """
    return jnp.concatenate([jnp.asarray(UNIT, jnp.float32), sketch(moved), sketch(original)])


@jax.jit
def sketch(leaf: Any) -> jax.Array:
    """Sums of a weight's elements with pseudo-random signs, float32 `[SIZE]`; the same on every mesh, to rounding."""
    weight = dequantized(leaf)
    sharding = explicit_sharding(weight)
    if sharding is None:
        return _signed_sums(weight)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    in_auto: Any = jax.sharding.auto_axes(_signed_sums, out_sharding=whole)
    return in_auto(weight)


def _signed_sums(weight: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(weight):
        return _signed_sums(jnp.stack([weight.real, weight.imag], axis=-1))
    number = jnp.zeros(weight.shape, jnp.uint32)  # of each element, in C order
    for axis in range(weight.ndim):
        stride = math.prod(weight.shape[axis + 1 :]) % 2**32
        number += jax.lax.broadcasted_iota(jnp.uint32, weight.shape, axis) * jnp.uint32(stride)
    values = weight.astype(jnp.float32)
    signed = jnp.where(_scrambled(number) & 1 == 0, values, -values)
    longest = int(np.argmax(weight.shape))
    sums = jnp.sum(signed, axis=[axis for axis in range(weight.ndim) if axis != longest])
    return jnp.pad(sums, (0, -sums.size % SIZE)).reshape(-1, SIZE).sum(axis=0)


def _scrambled(number: jax.Array) -> jax.Array:
    """A pseudo-random permutation of 32-bit integers (the finalizer of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number = (number ^ (number >> shift)) * jnp.uint32(factor)
    return number ^ (number >> 16)


class WrongBaseWarning(UserWarning, ValueError):
    """An adapter is called with another base than the one it needs; a `ValueError` if warnings are errors.

    Example:
      >>> import warnings, jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jnp.eye(4)}, lambda base, x: x @ base["w"], jnp.ones((1, 4))
      >>> _, delta = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init="pissa")}, fn, [(x,)])
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     out = lora.adapt(fn)(base, delta, x)
      >>> [warning.category.__name__ for warning in caught]
      ['WrongBaseWarning']
    """


def check_base(delta: Mapping[str, Adapter], base: Any, *, warn: bool = False) -> None:
    """Raises `ValueError` if the base is not the one that adapters need; abstract values are not compared.

    Args:
      delta: Adapters, or stacks of them.
      base: Parameters; leaves that are tracers or shapes pass.
      warn: Whether to warn only, by a :class:`WrongBaseWarning`.

    Raises:
      ValueError: Names the paths and what to do.
    """
    needs = {path: node.fingerprint for path, node in delta.items() if getattr(node, "fingerprint", None) is not None}
    if not needs:
        return
    leaves = paths.flatten(base).as_dict()
    wrong = {p: which for p in needs if p in leaves and (which := _mismatch(needs[p], leaves[p]))}
    if wrong:
        path, which = next(iter(wrong.items()))
        more = f" ({len(wrong)} such paths)" if len(wrong) > 1 else ""
        message = (
            f"{path!r}{more}: the adapter fits the base that lora_jax.prepare returned with it, from which a part "
            f"moved into its factors; this base is {which}. Use the base that prepare returned, or "
            "lora_jax.to_plain_lora(delta, start), which fits the original weights."
        )
        if not warn:
            raise ValueError(message)
        warnings.warn(message, WrongBaseWarning, stacklevel=3)


def needs_moved_base(node: Adapter) -> bool:
    """Whether an adapter needs a base that :func:`lora_jax.prepare` changed; True for tracers."""
    needs = getattr(node, "fingerprint", None)
    return needs is not None and (not _is_concrete(needs) or bool((np.asarray(needs)[..., 0] > 0).any()))


class _ByIdentity:
    """Values by the identity of immutable arrays; an entry is removed when one of them is garbage collected."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], tuple[list[weakref.ref], Any]] = {}

    def get(self, arrays: Sequence[Any]) -> Any:
        _, value = self._entries.get(tuple(map(id, arrays)), ((), None))
        return value

    def put(self, arrays: Sequence[Any], value: Any) -> None:
        key = tuple(map(id, arrays))
        if all(isinstance(array, jax.Array) for array in arrays):  # NumPy's may change
            forget = functools.partial(_forget, weakref.ref(self), key)
            self._entries[key] = ([weakref.ref(array, forget) for array in arrays], value)

    def drop(self, key: tuple[int, ...]) -> None:
        self._entries.pop(key, None)


def _forget(cache: "weakref.ref[_ByIdentity]", key: tuple[int, ...], _: weakref.ref) -> None:
    if (alive := cache()) is not None:
        alive.drop(key)


_SKETCHES, _MATCHES = _ByIdentity(), _ByIdentity()


def _mismatch(needs: Any, leaf: Any) -> str | None:
    """Describes how a weight differs from the one of a fingerprint (or of a stack of them); None if it does not."""
    arrays = jax.tree.leaves(leaf)
    if _MATCHES.get([needs, *arrays]) or is_abstract(leaf) or not all(map(_is_concrete, [needs, *arrays])):
        return None
    have = _SKETCHES.get(arrays)
    if have is None:
        with jax.ensure_compile_time_eval():
            have = np.asarray(sketch(leaf), np.float64)
        _SKETCHES.put(arrays, have)
    which = _difference(np.asarray(needs, np.float64).reshape(-1, len(UNIT) + 2 * SIZE), have)
    if which is None:
        _MATCHES.put([needs, *arrays], True)
    return which


def _difference(needs: np.ndarray, have: np.ndarray) -> str | None:
    unit, sketches = needs[:, :1], needs[:, len(UNIT) :]
    valid = (unit > 0) & (np.abs(unit + needs[:, 1:2]) <= 1e-3 * unit)
    moved, original = np.split(sketches / np.where(valid, unit, 1.0), 2, axis=1)

    def norm(vector: np.ndarray) -> np.ndarray:
        return np.linalg.norm(vector, axis=1)

    size = np.maximum(norm(moved), norm(original))
    to_moved, to_original = norm(have - moved), norm(have - original)
    if (valid[:, 0] & (2 * to_original < to_moved) & (to_moved > ROUNDING * size)).any():
        return "the one before"
    return "another one" if (valid[:, 0] & (to_moved > FAR * size)).any() else None


def _is_concrete(array: Any) -> bool:
    """Whether this process can read the values of an array."""
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
