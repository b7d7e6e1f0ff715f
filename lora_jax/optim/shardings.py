"""Shardings of optimizer state, derived from those of the trained leaves."""

from typing import Any

import jax
from jax.sharding import Sharding

from lora_jax.optim.offload import HOST, KIND


def optimizer_shardings(opt_state: Any, train: Any, shardings: Any, default: Sharding) -> Any:
    """Computes the sharding of every array of an optimizer state, from those of the trained leaves.

    Args:
      opt_state: The types of its arrays (`jax.typeof`), for their shapes and memory spaces.
      train: The trained half of a delta, of arrays or shapes.
      shardings: The sharding of each leaf of `train`.
      default: The sharding of arrays that belong to no trained leaf.

    Returns:
      A tree like `opt_state`. An array whose path ends in that of a trained leaf of the same shape has that leaf's
      sharding. Memory kinds are those of `opt_state`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(train)
    by_path = {path: (leaf.shape, to) for (path, leaf), to in zip(leaves, jax.tree.leaves(shardings), strict=True)}

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> Sharding:
        tails = (path[start:] for start in range(len(path)))
        shape, sharding = next((by_path[tail] for tail in tails if tail in by_path), (None, default))
        sharding = sharding if shape == leaf.shape else default
        return sharding.with_memory_kind(KIND) if leaf.memory_space == HOST else sharding

    return jax.tree_util.tree_map_with_path(sharding_of, opt_state)
