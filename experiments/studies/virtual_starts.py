"""Starting points whose parameters have a prefix or a prompt."""

from dataclasses import dataclass, replace
from typing import Any

import jax

from experiments.baselines import prefix_tuning, prompt_tuning
from experiments.studies.head import Start

PREFIX, PROMPT = f"^{prefix_tuning.NAME}/", f"^{prompt_tuning.NAME}$"
"""Patterns of what trains."""


@dataclass(frozen=True)
class WithPrefix:
    """Adds keys and values before those of the text in every layer.

    Attributes:
      length: The number of virtual tokens.
    """

    length: int

    def __call__(self, start: Start, seed: int) -> Start:
        prefix = prefix_tuning.init(jax.random.key(seed), start.problem.shape, self.length)
        return _with_entry(start, prefix_tuning, prefix)


@dataclass(frozen=True)
class WithPrompt:
    """Adds embeddings before those of the text.

    Attributes:
      length: The number of virtual tokens.
    """

    length: int

    def __call__(self, start: Start, seed: int) -> Start:
        table = start.base["encoder"]["embeddings"]["word"]["embedding"]
        return _with_entry(start, prompt_tuning, prompt_tuning.init(jax.random.key(seed), table, self.length))


def _with_entry(start: Start, method: Any, entry: Any) -> Start:
    problem, added = start.problem, {method.NAME: entry}
    problem = replace(problem, apply=method.adapt(problem.apply), base=problem.base | added)
    return replace(start, problem=problem, base=start.base | added)
