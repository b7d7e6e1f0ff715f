"""Checksums of arrays that do not depend on their shardings, so that any mesh can compare them.

A checksum consists of two sums of an array's 32-bit words, modulo 2³²: the plain sum, and the sum of (2 i + 1) times
the word at index i. Both detect a change of any word, the second also an exchange of words. They detect damage, not
attacks.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def device_checksums(arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Returns the checksums of arrays on devices. If they span several processes, every process must call it."""
    return np.asarray(_stack_checksums([_in_device_memory(array) for array in arrays])).tolist() if arrays else []


def host_checksum(array: np.ndarray) -> list[int]:
    """Returns the checksum of one array, equal to that of :func:`device_checksums`."""
    words = np.ascontiguousarray(array).reshape(-1).view(np.dtype(f"u{min(array.dtype.itemsize, 4)}"))
    words = words.astype(np.uint32)
    counts = 2 * np.arange(words.size, dtype=np.uint32) + np.uint32(1)
    return [int(words.sum(dtype=np.uint32)), int((words * counts).sum(dtype=np.uint32))]


def fingerprint(tree: Any) -> str:
    """Returns a digest of the paths, shapes, dtypes and checksums of a tree's arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    described = [(jax.tree_util.keystr(keys), leaf.shape, str(leaf.dtype)) for keys, leaf in leaves]
    return hashlib.sha256(repr((described, device_checksums([leaf for _, leaf in leaves]))).encode()).hexdigest()


@jax.jit
def _stack_checksums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(array) for array in arrays])


def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool or array.dtype in (jnp.int4, jnp.uint4):
        array = array.astype(jnp.uint8)
    size = min(array.dtype.itemsize, 4)
    words = jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(jnp.uint32)
    strides = [math.prod(words.shape[i + 1 :]) % 2**32 for i in range(words.ndim)]
    offsets = [
        jax.lax.broadcasted_iota(jnp.uint32, words.shape, i) * np.uint32(stride) for i, stride in enumerate(strides)
    ]
    counts = np.uint32(2) * functools.reduce(jnp.add, offsets, jnp.zeros(words.shape, jnp.uint32)) + np.uint32(1)
    return jnp.stack([jnp.sum(words, dtype=jnp.uint32), jnp.sum(words * counts, dtype=jnp.uint32)])


def _in_device_memory(array: Any) -> Any:
    sharding = getattr(array, "sharding", None)
    if sharding is None or sharding.memory_kind in (None, "device"):
        return array
    return jax.device_put(array, sharding.with_memory_kind("device"))
