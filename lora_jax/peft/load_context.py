"""What the parts of a loader share: the adapter's files, the base, and the problems so far."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax import paths
from lora_jax.adapters.protocol import Adapter
from lora_jax.io.read_errors import list_problems, shorten
from lora_jax.peft import keys
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.base_index import BaseIndex
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.names import Names

_HINTS = 4  # the number of unknown keys that are reported with the nearest names


class LoadContext:
    """An adapter that is loaded on a base.

    Attributes:
      config: The adapter's config.
      tensors: The adapter's tensors.
      base: The base's tensors.
      problems: Everything that does not fit; reported together at the end.
    """

    def __init__(self, config: Config, tensors: AdapterTensors, base: Any, names: Names):
        self.config = config
        self.tensors = tensors
        self.base = BaseIndex(base, names)
        self.problems: list[str] = []
        self._hints = _HINTS

    def finish(self, directory: Path, delta: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """Returns a delta in the base's order.

        Raises:
          ValueError: There are problems, or the delta is empty.
        """
        if self.problems:
            raise ValueError(shorten(f"{directory}: the adapter does not fit {list_problems(self.problems)}"))
        if not delta:
            raise ValueError(f"{directory}: holds no adapter.")
        order = {path: number for number, path in enumerate(self.base.leaves)}
        return dict(sorted(delta.items(), key=lambda item: order[item[0]]))

    def describe_unknown(self, key: Key) -> str:
        """The problem of a key that belongs to no weight of the base; the first ones name the nearest weights."""
        text = f"unused: {self.tensors.describe(key.key)}: the base has no such weight"
        self._hints -= 1
        if self._hints < 0:  # for another kind of base all keys are unknown, and each search compares all names
            return text
        base = self.base
        if key.part == "value":
            return f"{text}; {paths.nearest(base.bare(key.name), list(base.tensors))}{self.ignore_hint(key.name)}"
        modules = dict.fromkeys(keys.split_name(name)[0] for name in (*base.tensors, *base.tied))
        return f"{text}; {paths.nearest(base.bare(key.module), list(modules))}"

    def ignore_hint(self, name: str) -> str:
        """How to ignore a tensor, if no part of the base begins like its name; otherwise empty."""
        first = name.removeprefix(keys.PREFIX).partition(".")[0]
        if any(f".{first}" in f".{x}" for x in (*self.base.tensors, *self.base.in_model.values(), *self.base.tied)):
            return ""
        return f"; ignore=({first!r},) passes it over"
