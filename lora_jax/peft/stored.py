"""An adapter's files, opened: its config and its tensors, checked when they are read."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Stored:
    """An adapter's config and its open tensors."""

    config: Config
    tensors: Tensors

    def described(self, key: Key) -> str:
        return f"{key.key} {self.tensors[key.key]}"

    def read(self, key: Key, shape: Sequence[int]) -> np.ndarray:
        """A tensor, after a check of its shape and values."""
        if self.tensors[key.key] != tuple(shape):
            raise ValueError(f"shape: {self.described(key)}, expected {tuple(shape)}")
        value = self.tensors.read(key.key)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"dtype: {key.key} is {value.dtype}, expected floats")
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"not finite: {key.key}")
        return value


@dataclasses.dataclass
class Module:
    """What an adapter holds for one matrix of the base.

    Attributes:
      name: Of the base's tensor, without the prefix.
      label: What the config's patterns are matched with.
      parts: The keys, by part.
    """

    name: str
    label: str
    parts: dict[str, Key] = dataclasses.field(default_factory=dict)
