"""Parameters by path."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.quantization import Quantized


def flatten_weights(base: Any) -> dict[str, Any]:
    """Returns the leaves of parameters by their '/'-joined paths; a quantized weight is one leaf.

    Example:
      >>> flatten_weights({"layers": {"kernel": 1}})
      {'layers/kernel': 1}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(base, is_leaf=is_quantized)
    return {_path(keys): leaf for keys, leaf in leaves}


def map_weights(function: Callable[[str, Any], Any], base: Any) -> Any:
    """Returns parameters with `function(path, leaf)` in place of each leaf; a quantized weight is one leaf.

    Example:
      >>> map_weights(lambda path, leaf: f"{path}={leaf}", {"layers": {"kernel": 1}})
      {'layers': {'kernel': 'layers/kernel=1'}}
    """
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: function(_path(keys), leaf), base, is_leaf=is_quantized)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a quantized weight."""
    return isinstance(leaf, Quantized)


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
