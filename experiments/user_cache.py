"""The user's cache directory: compiled programs and tokens, which every run may reuse."""

import os
from pathlib import Path

VARIABLE = "LORA_JAX_CACHE"


def directory(name: str) -> Path:
    """Returns a subdirectory of the cache, which need not exist.

    The cache is in the directory that the environment variable LORA_JAX_CACHE names, or else in `lora_jax` in
    XDG_CACHE_HOME or `~/.cache`. It can be deleted at any time when no run uses it.

    Args:
      name: The name of the subdirectory.

    Example:
      >>> directory("tokens").name
      'tokens'
    """
    if root := os.environ.get(VARIABLE):
        return Path(root).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax" / name
