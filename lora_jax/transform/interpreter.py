"""The interpreter: evaluates a jaxpr in which some values are adapted weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.protocol import NO_BIAS
from lora_jax.transform import jaxprs
from lora_jax.transform.draws import Draws, Numbers
from lora_jax.transform.lazy_dequantized import recomputed
from lora_jax.transform.product import Product
from lora_jax.transform.rules import RULES
from lora_jax.transform.rules.contractions import on_arrays
from lora_jax.transform.weight import CannotFactor, Weight, root


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight by the function.

    Attributes:
      path: Of the weight.
      operation: The JAX primitive; 'input' or 'output' of the function if the weight is merged there.
      factored: Whether the adapter is applied without forming the merged weight.
      reason: Why the weight is merged, or how it is used.
      source: The line of the user's code, or '' for inputs and outputs.
      roles: Role by axis of the original weight, as far as this use tells: 'in', 'out', 'batch', or
        'indexed' for an axis of which one slice is used.
    """

    path: str
    operation: str
    factored: bool
    reason: str
    source: str
    roles: dict[int, str]

    def __str__(self) -> str:
        where = f"in {self.operation} at {self.source}" if self.source else f"as an {self.operation}"
        return f"{'factored' if self.factored else 'merged'} {where}: {self.reason}"


class Interpreter:
    """Evaluates jaxprs with adapted weights among the values.

    Args:
      flatten: Whether low-rank products see the token axes of their input as one.
      uses: A list that collects every :class:`Use`, or None. With a list nothing is cached.
    """

    def __init__(self, *, flatten: bool = True, uses: list[Use] | None = None):
        self.flatten = flatten
        self.uses = uses
        self._calls: dict[Any, Callable] = {}
        self._first: Numbers = {}
        self._drawn: dict[str, int] = {}

    def body(self, jaxpr: jaxprs.Jaxpr) -> Callable[..., tuple[list[Any], Draws]]:
        """A jaxpr as a function of :meth:`numbers` and its inputs.

        It returns the outputs, arrays or (where a view of a weight is returned) weights, and the draws that the caller
        gives to :meth:`advance`.
        """

        def call(numbers: Numbers, *arguments: Any):
            frame = Interpreter(flatten=self.flatten, uses=self.uses)
            frame._calls = self._calls
            frame._first = numbers
            return frame._run(jaxpr, arguments), Draws(tuple(frame._drawn.items()))

        return call

    def numbers(self, values: Sequence[Any]) -> Numbers:
        """The index of the next use of each weight with dropout among the values."""
        keyed = dict.fromkeys(v.path for v in values if isinstance(v, Weight) and v.key is not None)
        first = {path: self._first.get(path, np.uint32(0)) for path in keyed}
        return Draws(tuple(self._drawn.items())).after(first)

    def advance(self, draws: Draws) -> None:
        """Counts masks that a body has drawn."""
        for path, count in draws.counts:
            self._drawn[path] = self._drawn.get(path, 0) + count

    def _run(self, jaxpr: jaxprs.Jaxpr, arguments: Sequence[Any]) -> list[Any]:
        variables, consts = jaxprs.inputs(jaxpr)
        environment = dict(zip(variables, [*consts, *arguments]))
        last = jaxprs.last_uses(jaxpr)
        for position, equation in enumerate(jaxprs.equations(jaxpr)):
            values = [jaxprs.read(environment, atom) for atom in equation.invars]
            product = _addend(equation, values, last[position])
            if product is None:
                for place, value in enumerate(values):
                    if isinstance(value, Product):
                        values[place] = environment[equation.invars[place]] = value.total()
            with jaxprs.context(equation):
                results = self._apply(equation, values) if product is None else [product.plus(equation, values)]
            environment.update(zip(equation.outvars, results))
            for variable in last[position]:
                del environment[variable]
        outputs = [jaxprs.read(environment, atom) for atom in jaxprs.outputs(jaxpr)]
        return [out.total() if isinstance(out, Product) else out for out in outputs]

    def cached(self, key: Any, make: Callable[[], Callable]) -> Callable:
        """One compiled function per sub-jaxpr, so that calls outside jit compile once."""
        if self.uses is not None:
            return make()
        if key not in self._calls:
            self._calls[key] = make()
        return self._calls[key]

    def _apply(self, equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
        if not any(isinstance(value, Weight) for value in values):
            return on_arrays(equation, values)
        name = equation.primitive.name
        reason = f"there is no factored form of {name}"
        if name in RULES:
            recorded = len(self.uses or ())
            try:
                return RULES[name](self, equation, values)
            except CannotFactor as error:
                reason = str(error)
                if self.uses is not None:  # what the rule had recorded before it gave up
                    del self.uses[recorded:]
        for value in values:
            if isinstance(value, Weight):
                self._note(value, equation, reason)

        def merged(*values):
            return on_arrays(equation, [value.merged() if isinstance(value, Weight) else value for value in values])

        return recomputed(merged, *values)

    def plain(self, equation: jaxprs.Equation, values: Sequence[Any], reason: str) -> list[Any]:
        """The values with weights merged (or, after a lookup, with the looked-up part computed)."""
        return [self.materialize(value, equation, reason) if isinstance(value, Weight) else value for value in values]

    def materialize(self, weight: Weight, equation: jaxprs.Equation | None, reason: str) -> jax.Array:
        """The array that a weight stands for, and a record of it."""
        self._note(weight, equation, reason)
        return recomputed(Weight.merged, weight)

    def _note(self, weight: Weight, equation: jaxprs.Equation | None, reason: str) -> None:
        """Records that a weight becomes an array; raises where its inputs are wanted."""
        if weight.taps:
            where = "" if equation is None else f" ({jaxprs.described(equation)})"
            raise ValueError(f"{weight.path!r}: its inputs cannot be read here: {reason}{where}.")
        if weight.offset is not None:
            where = "" if equation is None else f" ({jaxprs.described(equation)})"
            raise ValueError(f"{weight.path!r}: the weight would be merged here: {reason}{where}; {NO_BIAS}")
        present = {label for label, _ in weight.labels} - weight.cut
        roles = dict.fromkeys(present, "out") | dict.fromkeys(weight.cut, "indexed")
        if _is_lookup(weight):
            self.record(weight, equation, roles, "a lookup: only the rows in use are computed")
        elif weight.cut and equation is not None and equation.primitive.name in ("add", "add_any", "sub"):
            self.record(weight, equation, roles, "a part that is added: all of it is computed", factored=False)
        else:
            self.record(weight, equation, {}, reason, factored=False)

    def next_key(self, weight: Weight) -> Weight:
        """The weight with dropout keys that no other use of it has."""
        if weight.key is None:
            return weight
        number = self.numbers([weight])[weight.path]
        self.advance(Draws(((weight.path, 1),)))
        return weight.fold_in(number)

    def record(
        self,
        weight: Weight,
        equation: jaxprs.Equation | None,
        roles: dict[str, str],
        reason: str,
        *,
        factored: bool = True,
    ) -> None:
        """Notes a use; `roles` are by label."""
        if self.uses is None:
            return
        by_axis: dict[int, str] = {}
        marked = {**dict.fromkeys(weight.cut, "indexed"), **dict.fromkeys(weight.scanned, "batch"), **roles}
        for label, role in marked.items():
            axis = root(label)
            if axis is not None:
                by_axis[axis] = _joined(by_axis.get(axis), role)
        name, where = (equation.primitive.name, jaxprs.source(equation)) if equation is not None else ("output", "")
        self.uses.append(Use(weight.path, name, factored, reason, where, by_axis))


def _is_lookup(weight: Weight) -> bool:
    """Whether the part of a weight that was taken is used as it is: rows by index, or a row."""
    is_row = sum(size > 1 for _, size in weight.labels) <= 1
    return bool(weight.cut) and (weight.looked_up or is_row)


def _addend(equation: jaxprs.Equation, values: Sequence[Any], finished: Sequence[Any]) -> Product | None:
    """The product that an equation adds an independent array to, where that is the product's only use left."""
    if equation.primitive.name not in ("add", "add_any"):
        return None
    for place, (value, other) in enumerate((values, values[::-1])):
        independent = not isinstance(other, Product | Weight)
        if isinstance(value, Product) and independent and equation.invars[place] in finished:
            return value
    return None


def _joined(one: str | None, other: str) -> str:
    """The role of an axis whose parts have two: part batch and part something is that something."""
    if one is None or one in ("batch", "indexed"):
        return other
    if other in ("batch", "indexed") or one == other:
        return one
    return "in and out"
