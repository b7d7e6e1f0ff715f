"""A training step and its lowered and compiled forms, called with (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax

from lora_jax.step_checks import check_lowered, explain_donation

Metrics = dict[str, Any]
State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Step(Generic[State]):
    """A training step, from :func:`train_step` or :func:`train_many`.

    Attributes:
      run: `run(state, batch) -> (state, metrics)`; calling the step calls it.
      lower: `lower(state, batch)` traces and lowers the step without running it.
    """

    run: Callable[[State, Any], tuple[State, Metrics]]
    lower: Callable[[State, Any], "Lowered[State]"]

    def __call__(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self.run(state, batch)

    @classmethod
    def create(
        cls,
        arguments: Callable[[State, Any], tuple[Any, ...]],
        program: Callable[[tuple[Any, ...]], Any],
        finish: Callable[[State, tuple[Any, ...], Any], tuple[State, Metrics]],
        *,
        static: int,
        check_buffers: bool = False,
    ) -> "Step[State]":
        """Creates a step from a compiled function of other arguments.

        Args:
          arguments: `arguments(state, batch)`, the function's arguments.
          program: `program(arguments)`, the function: a result of `jax.jit` or `jax.pmap`.
          finish: `finish(state, arguments, results)`, what the step returns.
          static: The number of leading arguments that are static.
          check_buffers: See :func:`lora_jax.step_checks.explain_donation`.
        """

        def run(state: State, batch: Any) -> tuple[State, Metrics]:
            with explain_donation(state, check=check_buffers):
                args = arguments(state, batch)
                results = program(args)(*args)
            return finish(state, args, results)

        def lower(state: State, batch: Any) -> Lowered[State]:
            args = arguments(state, batch)
            static_args = args[:static]
            lowered_state, lowered_batch = jax.tree.map(lambda leaf: ..., (state, batch))  # structures only

            def call(compiled: jax.stages.Compiled, state: State, batch: Any) -> tuple[State, Metrics]:
                with explain_donation(state, check=check_buffers):
                    call_args = arguments(state, batch)
                    same_static = call_args[:static] == static_args
                    check_lowered(lowered_state, lowered_batch, state, batch, same_static=same_static)
                    results = compiled(*call_args[static:])
                return finish(state, call_args, results)

            return Lowered(program(args).lower(*args), call)

        return cls(run, lower)


class Lowered(Generic[State]):
    """A lowered training step: a `jax.stages.Lowered` whose `compile()` returns a :class:`Compiled`."""

    def __init__(self, lowered: jax.stages.Lowered, call: Callable[..., tuple[State, Metrics]]):
        self._lowered, self._call = lowered, call

    def compile(self, *args: Any, **kwargs: Any) -> "Compiled[State]":
        return Compiled(self._lowered.compile(*args, **kwargs), self._call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled(Generic[State]):
    """A compiled training step: a `jax.stages.Compiled` that is called with `(state, batch)`."""

    def __init__(self, compiled: jax.stages.Compiled, call: Callable[..., tuple[State, Metrics]]):
        self._compiled, self._call = compiled, call

    def __call__(self, state: State, batch: Any) -> tuple[State, Metrics]:
        return self._call(self._compiled, state, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)
