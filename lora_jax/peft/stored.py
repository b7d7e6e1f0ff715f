"""An adapter's files, opened: its config and its tensors, checked when they are read."""

import collections
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.tensors import Tensors
from lora_jax.peft.view import View

_LAST = 4  # tensors that are kept


@dataclasses.dataclass(frozen=True)
class Share:
    """Where the matrix of one expert is in a parameter that holds those of all.

    Attributes:
      expert: Its number.
      part: Which of the expert's matrices it is.
      experts: How many there are.
      parts: How many matrices of an expert the parameter holds.
    """

    expert: int
    part: int
    experts: int
    parts: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """An adapter's config and its open tensors."""

    config: Config
    tensors: Tensors | View
    _last: collections.OrderedDict[str, np.ndarray] = dataclasses.field(default_factory=collections.OrderedDict)

    def described(self, key: Key) -> str:
        return f"{key.key} {self.tensors[key.key]}"

    def read(self, key: Key, shape: Sequence[int], *, again: bool = False) -> np.ndarray:
        """A tensor, after a check of its shape and values; one that is wanted again soon is kept."""
        if self.tensors[key.key] != tuple(shape):
            raise ValueError(f"shape: {self.described(key)}, expected {tuple(shape)}")
        if key.key in self._last:
            return self._last[key.key]
        value = self.tensors.read(key.key)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"dtype: {key.key} is {value.dtype}, expected floats")
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"not finite: {key.key}")
        if again:
            self._last[key.key] = value
            if len(self._last) > _LAST:
                self._last.popitem(last=False)
        return value


@dataclasses.dataclass
class Module:
    """What an adapter holds for one matrix of the base.

    Attributes:
      name: Of the base's tensor, without the prefix.
      label: What the config's patterns are matched with.
      parts: The keys, by part.
      share: Of an expert's matrix, where it is in the parameter that the factors are for.
    """

    name: str
    label: str
    parts: dict[str, Key] = dataclasses.field(default_factory=dict)
    share: Share | None = None
