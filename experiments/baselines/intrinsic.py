"""Intrinsic dimension: all weights move within a random subspace of few dimensions, θ = θ₀ + P(z).

P is the Fastfood transform, a block of it for every d weights: its memory is linear in the number of weights n, and
its time is n·log d.

References:
  Li et al., `Measuring the Intrinsic Dimension of Objective Landscapes <https://arxiv.org/abs/1804.08838>`_, 2018
  Aghajanyan et al., `Intrinsic Dimensionality <https://arxiv.org/abs/2012.13255>`_, 2020
  Le, Sarlos and Smola, `Fastfood <https://arxiv.org/abs/1408.3060>`_, 2014
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

import lora_jax as lora

NAME = "intrinsic"
"""The entry of the parameters."""

TRAINED = rf"^{NAME}/(z|scales)$"
"""A pattern of the paths that train; the rest of the entry is the fixed projection."""

_BLOCK = 128  # the size of the Hadamard matrices that are multiplied, a power of two
_LAYER = re.compile(r"(?:^|/)layers/(\d+)/")


def init(key: jax.Array, base: Any, dimension: int, *, pattern: str = "", layers: bool = False) -> dict[str, Any]:
    """Returns the subspace of a base: its coordinates, which are zero, and its random projection.

    Args:
      key: A PRNG key of the projection.
      base: The parameters.
      dimension: The number of coordinates.
      pattern: A regular expression of the paths of the weights that move; empty is all.
      layers: Whether each layer has a trained scale (SAID), which starts from 1; the coordinates are then
        `dimension` minus the number of layers, so that both forms train as many numbers.

    Returns:
      `{"z": float32[dimension], "scales": float32[layers] (if `layers`), "projection": {"signs": int8[size],
      "permutation": int32[size], "gauss": {path: float32[blocks, size]}}}`, where `size` is the power of two from
      `dimension` on.

    Raises:
      ValueError: No path matches, there are fewer dimensions than layers, or `layers` and the layers are stacked.
    """
    leaves = {path: leaf for path, leaf in lora.paths.flatten(base).as_dict().items() if re.search(pattern, path)}
    if not leaves:
        raise ValueError(f"pattern={pattern!r} matches no path; {lora.paths.nearest(pattern, list(_paths(base)))}.")
    if layers and any("layers/" in path and not _LAYER.search(path) for path in leaves):
        raise ValueError(
            "layers=True: the layers are stacked, one leaf for all of them; unroll them, as scan=False does."
        )
    groups = _groups(leaves)
    count = dimension - len(set(groups.values())) if layers else dimension
    if count < 1:
        raise ValueError(f"dimension={dimension}, expected more than the {dimension - count} scales of layers.")
    projection = _projection(key, {path: leaf.size for path, leaf in leaves.items()}, count)
    entry: dict[str, Any] = {"z": jnp.zeros(count), "projection": projection}
    return entry | ({"scales": jnp.ones(len(set(groups.values())))} if layers else {})


def delta(entry: Mapping[str, Any], base: Any) -> dict[str, lora.Adapter]:
    """Returns the change of the weights at coordinates z, as a delta for `lora.adapt` and `lora.merge`.

    Args:
      entry: From :func:`init`, with other coordinates.
      base: The parameters.

    Example:
      >>> base = {"w": jnp.ones((4, 3))}
      >>> entry = init(jax.random.key(0), base, dimension=2)
      >>> moved = lora.merge(base, delta(entry | {"z": jnp.ones(2)}, base))
      >>> moved["w"].shape, bool((moved["w"] != base["w"]).all())
      ((4, 3), True)
    """
    leaves = lora.paths.flatten(base).as_dict()
    changes = _project(entry["z"], entry["projection"])
    groups = _groups(changes)
    result: dict[str, lora.Adapter] = {}
    for path, change in changes.items():
        weight = leaves[path]
        change = change.reshape(-1)[: math.prod(weight.shape)].reshape(weight.shape)
        scale = entry["scales"][groups[path]] if "scales" in entry else jnp.ones(())
        offset = lora.Offset().create(jax.random.key(0), weight, ())
        result[path] = dataclasses.replace(offset, value=scale * change)
    return result


def adapt(apply_fn: Callable) -> Callable:
    """Returns a function like `apply_fn` that also reads a subspace from its parameters.

    Args:
      apply_fn: Any function of parameters.

    Returns:
      `apply(params, *args, **kwargs)`, where `params` is the base with the entry 'intrinsic', of :func:`init`, which
      trains as other leaves do: `spec = {intrinsic.TRAINED: lora.Full()}`.
    """

    @wraps(apply_fn)
    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        base = {name: value for name, value in params.items() if name != NAME}
        return apply_fn(lora.merge(base, delta(params[NAME], base)), *args, **kwargs)

    return apply


def _paths(base: Any) -> tuple[str, ...]:
    return lora.paths.flatten(base).paths


def _groups(paths: Mapping[str, Any]) -> dict[str, int]:
    """Returns the index of the scale of each path: those of a layer share one, and all others together."""
    layer = {path: match[1] if (match := _LAYER.search(path)) else "" for path in paths}
    order = {name: index for index, name in enumerate(dict.fromkeys(layer.values()))}
    return {path: order[name] for path, name in layer.items()}


def _projection(key: jax.Array, sizes: Mapping[str, int], dimension: int) -> dict[str, Any]:
    """Returns the random signs, permutation and Gaussian numbers of a Fastfood transform.

    All blocks share signs and permutation. The numbers are scaled so that a column of P has norm 1.
    """
    size = _padded(dimension)
    signs_key, permutation_key, *keys = jax.random.split(key, 2 + len(sizes))
    gauss = {
        path: jax.random.normal(path_key, (-(-count // size), size))
        for path_key, (path, count) in zip(keys, sizes.items())
    }
    norm = jnp.sqrt(size * sum(jnp.sum(jnp.square(numbers)) for numbers in gauss.values()))
    return {
        "signs": jax.random.rademacher(signs_key, (size,), jnp.int8),
        "permutation": jax.random.permutation(permutation_key, size),
        "gauss": {path: numbers / norm for path, numbers in gauss.items()},
    }


def _project(z: jax.Array, projection: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Computes H·G·Π·H·B·z, with z padded by zeros, for all blocks of each path: `[blocks, size]`."""
    signs, gauss = projection["signs"], projection["gauss"]
    padded = jnp.pad(z, (0, len(signs) - len(z))) * signs.astype(z.dtype)
    mixed = _hadamard(padded)[projection["permutation"]]
    blocks = _hadamard(jnp.concatenate(list(gauss.values())) * mixed[None])
    ends = np.cumsum([len(numbers) for numbers in gauss.values()])
    return dict(zip(gauss, jnp.split(blocks, ends[:-1])))


def _hadamard(x: jax.Array) -> jax.Array:
    """Multiplies the last axis by the Hadamard matrix, by a factor of it at a time: it is a Kronecker power."""
    *rows, size = x.shape
    rest = size
    while rest > 1:
        block = min(_BLOCK, rest)
        rest //= block
        # The axis that is multiplied moves to the front, so that after all factors the order is the first one.
        x = x.reshape(*rows, size // block, block) @ np.asarray(hadamard(block), x.dtype)
        x = jnp.swapaxes(x, -1, -2).reshape(*rows, size)
    return x


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()
