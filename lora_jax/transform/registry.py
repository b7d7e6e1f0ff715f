"""Rules by primitive. A rule says what a primitive does to weights; `rule` registers it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lora_jax.transform.draws import Draws, Numbers
from lora_jax.transform.jaxprs import Equation, Jaxpr
from lora_jax.transform.weight import Dropout, Term, Weight


class Evaluator(Protocol):
    """What a rule sees of the interpreter (:class:`lora_jax.transform.interpreter.Interpreter` documents it)."""

    flatten: bool

    def body(self, jaxpr: Jaxpr) -> Callable[..., tuple[list[Any], Draws]]: ...
    def cached(self, key: Any, make: Callable[[], Callable]) -> Callable: ...
    def numbers(self, values: Sequence[Any]) -> Numbers: ...
    def advance(self, draws: Draws) -> None: ...
    def constant(self, atom: Any) -> np.ndarray | None: ...
    def is_activation(self, atom: Any) -> bool: ...
    def is_input(self, atom: Any) -> bool: ...
    def constant_axes(self, atom: Any) -> Sequence[int]: ...
    def differentiates(self, equation: Equation) -> bool: ...
    def next_dropout(self, term: Term) -> Dropout | None: ...
    def returned(
        self, equation: Equation, values: Sequence[Any], reason: str
    ) -> tuple[list[Any], dict[int, Weight]]: ...
    def materialize(
        self,
        weight: Weight,
        equation: Equation | None,
        reason: str,
        roles: Mapping[str, str] | None = None,
        *,
        of_input: bool = True,
    ) -> jax.Array: ...
    def record(
        self,
        term: Term,
        equation: Equation | None,
        roles: Mapping[str, str],
        reason: str,
        *,
        factored: bool = True,
        of_input: bool = True,
    ) -> list[int]: ...
    def mark_biased(self, uses: Sequence[int]) -> None: ...


Rule = Callable[[Evaluator, Equation, list[Any]], list[Any]]
"""`rule(interpreter, equation, values)` returns the results of the equation, arrays or weights."""

RULES: dict[str, Rule] = {}
"""By name of the primitive."""


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule for primitives.

    A rule is called if at least one of the operands (`values`) is a
    :class:`~lora_jax.transform.weight.Weight`. It returns one result for each output of the equation. It raises
    :class:`~lora_jax.transform.weight.CannotFactor` with a reason if the primitive has no factored form for these
    operands: the interpreter then merges the weights and evaluates the equation on arrays, so that a rule can only
    make a program cheaper, not wrong. Rules for contractions are registered by
    :func:`lora_jax.transform.contraction.contraction`.

    Args:
      *primitives: Names of the primitives.

    Raises:
      ValueError: A primitive has a rule already.

    Example:
      A cumulative sum along an axis is linear, so it acts on the factors that have the axis.

      >>> from jax import lax
      >>> @rule("cumsum")
      ... def cumsum(interpreter, equation, values):
      ...     (weight,) = values
      ...     (value,) = jaxprs.bind(equation, [weight.value])
      ...     label = weight.single(equation.params["axis"])
      ...     along = lambda array, axis: lax.cumsum(array, axis, equation.params["reverse"])
      ...     return [weight.along(label, along).replace(value=value)]
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from lora_jax.transform import jaxprs
      >>> fn = lambda base, x: x @ jnp.cumsum(base["w"], axis=1)
      >>> base, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(rank=2)}, fn, x)
      >>> print(lora.explain(fn, base, delta, x)["w"][0].factored)
      True
      >>> del RULES["cumsum"]
    """

    def register(function: Rule) -> Rule:
        for name in primitives:
            if name in RULES:
                raise ValueError(f"The primitive {name!r} already has a rule, {RULES[name].__qualname__}.")
            RULES[name] = function
        return function

    return register
