"""A training step and its lowered and compiled forms, called with (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.state import TrainState

Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, from :func:`train_step`.

    Attributes:
      run: `run(state, batch) -> (state, metrics)`; calling the step calls it.
      lower: `lower(state, batch)` traces and lowers the step without running it.
    """

    run: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    lower: Callable[[TrainState, Any], "Lowered"]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return self.run(state, batch)


class Lowered:
    """A lowered training step: a `jax.stages.Lowered` whose `compile()` returns a :class:`Compiled`."""

    def __init__(self, lowered: jax.stages.Lowered, call: Callable):
        self._lowered, self._call = lowered, call

    def compile(self, *args: Any, **kwargs: Any) -> "Compiled":
        return Compiled(self._lowered.compile(*args, **kwargs), self._call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled:
    """A compiled training step: a `jax.stages.Compiled` that is called with `(state, batch)`."""

    def __init__(self, compiled: jax.stages.Compiled, call: Callable):
        self._compiled, self._call = compiled, call

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return self._call(self._compiled, state, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)
