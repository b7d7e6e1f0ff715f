"""XLA's memory analysis of compiled functions and of trees of arguments."""

from typing import Any

import jax


def memory_analysis(lowered: jax.stages.Lowered) -> Any:
    """Compiles a lowered function and returns XLA's memory analysis of it.

    Raises:
      RuntimeError: The backend provides no memory analysis.
    """
    memory = lowered.compile().memory_analysis()
    if memory is None:
        raise RuntimeError("XLA provides no memory analysis on this backend.")
    return memory


def argument_bytes(tree: Any) -> tuple[int, int]:
    """The bytes, padding included, that a tree of arrays or shapes takes as arguments: on the device, on the host."""
    if not jax.tree.leaves(tree):
        return 0, 0
    memory = memory_analysis(jax.jit(lambda tree: (), keep_unused=True).lower(tree))
    return memory.argument_size_in_bytes, memory.host_argument_size_in_bytes
