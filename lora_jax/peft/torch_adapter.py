"""An adapter in PyTorch's terms, as every target writes it."""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from lora_jax.peft import keys
from lora_jax.peft.module import Module
from lora_jax.peft.names import Names


@dataclasses.dataclass
class TorchAdapter:
    """An adapter in PyTorch's terms.

    Attributes:
      modules: Modules with factors.
      values: Replaced tensors, by name.
      rows: By module, the ids of replaced rows, and the rows.
      bias: The biases that are trained without their weights: 'none', 'lora_only' (of modules with factors), 'all'.
      saved: The modules that `values` belong to.
      ambiguous: Whether the name of a module with factors may be a suffix of another module's name.
      tensors: The names in checkpoint files of all tensors of the adapted leaves.
      problems: What PyTorch's terms cannot express.
    """

    modules: list[Module[np.ndarray]] = dataclasses.field(default_factory=list)
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: dict[str, tuple[list[int], np.ndarray]] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    saved: set[str] = dataclasses.field(default_factory=set)
    ambiguous: bool = False
    tensors: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def are_ambiguous(names: Names, modules: Iterable[str]) -> bool:
    """Whether the name of one of some modules may be a suffix of another module's name, which PEFT would match too."""
    examples = (name for weight in names.weights for name in weight.examples())
    declared = {keys.split_name(re.sub(r"\d+", "0", name))[0] for name in examples}
    suffixes = tuple("." + re.sub(r"\d+", "0", module) for module in modules)
    return any(name.endswith(suffixes) for name in declared)
