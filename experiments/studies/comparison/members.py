"""The runs of a comparison, and which of them train together."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lora_jax as lora
from experiments.studies.comparison.description import Row

_LARGE = 64  # ranks up to which adapters are padded to train together


class Key(NamedTuple):
    """The name of a run's row, its peak learning rate, and its random seed."""

    row: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Member:
    """A run: a row with one learning rate and one seed.

    Attributes:
      row: The row.
      rate: The peak learning rate.
      seed: The random seed of the initial factors and the order of the examples.
    """

    row: Row
    rate: float
    seed: int

    @property
    def key(self) -> Key:
        """What identifies the run."""
        return Key(self.row.name, self.rate, self.seed)


def kind(member: Member) -> str:
    """Returns what must be equal for runs that train together.

    Adapters that differ in rank or paths are stacked, with zeros where a member has none. Large ranks would cost the
    others too much, and adapters as large as their weights train together only if their patterns are the same.
    """
    row = member.row
    whole = {pattern: recipe for pattern, recipe in row.spec.items() if isinstance(recipe, lora.Full | lora.Rows)}
    kinds = sorted({repr(_without_rank(recipe)) for recipe in row.spec.values()})
    data = (row.rules, row.examples, row.epochs, row.batch_size, member.seed)
    return repr((kinds, whole, data, row.tracked, row.change, row.optimizer, row.penalty))


def _without_rank(recipe: Any) -> Any:
    return replace(recipe, rank=1) if 1 <= getattr(recipe, "rank", 0) <= _LARGE else recipe
