"""The interpreter: evaluates a jaxpr in which some values are adapted weights."""

import dataclasses
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.protocol import NO_BIAS, NONLINEAR
from lora_jax.transform import jaxprs
from lora_jax.transform.draws import Draws, Numbers
from lora_jax.transform.lazy_dequantized import recomputed
from lora_jax.transform.outputs import Output
from lora_jax.transform.product import Product
from lora_jax.transform.rules import COMBINING, RULES
from lora_jax.transform.rules.contractions import on_arrays
from lora_jax.transform.tracking import MERGED_BECAUSE, follow, follow_kernel, merged_view, primal
from lora_jax.transform.weight import CannotFactor, Dropout, Term, Weight


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight by the function.

    Attributes:
      path: Of the weight.
      operation: The JAX primitive; 'input' or 'output' of the function if the weight is merged there.
      factored: Whether the adapter is applied without forming the merged weight.
      reason: Why the weight is merged, or how it is used.
      source: The line of the user's code, or '' for inputs and outputs.
      roles: Role by axis of the leaf, for the axes whose role the use shows: 'in', 'out', 'batch', or 'indexed' for an
        axis of which one slice is used.
      of_input: Whether the other operand of a product depends on inputs of the function. Roles come from such a product
        if there is one.
    """

    path: str
    operation: str
    factored: bool
    reason: str
    source: str
    roles: dict[int, str]
    of_input: bool = True

    def __str__(self) -> str:
        where = f"in {self.operation}" + (f" at {self.source}" if self.source else "")
        if self.operation in ("input", "output"):
            where = f"as an {self.operation}"
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
        self._jaxpr: jaxprs.Jaxpr | None = None
        self._equation: jaxprs.Equation | None = None
        self._differentiated = False
        self._activations: Collection[Any] = ()
        self._outlined = False

    def body(
        self, jaxpr: jaxprs.Jaxpr, *, outlined: bool = False, activations: Collection[Any] | None = None
    ) -> Callable[..., tuple[list[Any], Draws]]:
        """A jaxpr as a function of :meth:`numbers` and its inputs.

        It returns the outputs, which are arrays, views of weights or of an :class:`Output`, and the draws that the
        caller passes to :meth:`advance`. If it is outlined, equations without weights are not run: their results are
        zeros. Of a whole program, `activations` are the variables that depend on inputs other than the base.
        """
        differentiated = self._equation is not None and self.differentiates(self._equation)

        def call(numbers: Numbers, *arguments: Any):
            frame = Interpreter(flatten=self.flatten, uses=self.uses)
            frame._calls = self._calls
            frame._activations = self._activations if activations is None else activations
            frame._first = numbers
            frame._differentiated = differentiated
            frame._outlined = outlined or self._outlined
            return frame._run(jaxpr, arguments), Draws(tuple(frame._drawn.items()))

        return call

    def numbers(self, values: Sequence[Any]) -> Numbers:
        """The index of the next use of each weight with dropout among the values."""
        weights = [value for value in values if isinstance(value, Weight)]
        keyed = dict.fromkeys(term.path for weight in weights for term in weight.terms if term.dropout is not None)
        first = {path: self._first.get(path, np.uint32(0)) for path in keyed}
        return Draws(tuple(self._drawn.items())).after(first)

    def advance(self, draws: Draws) -> None:
        """Counts masks that a body has drawn."""
        for path, count in draws.counts:
            self._drawn[path] = self._drawn.get(path, 0) + count

    def constant_axes(self, atom: Any) -> Sequence[int]:
        """Axes along which an operand of the current jaxpr is known to have equal entries."""
        return sorted(jaxprs.constant_axes(self._jaxpr, atom))

    def constant(self, atom: Any) -> np.ndarray | None:
        """The value of an operand of the current jaxpr that is formed from literals alone; None for others."""
        return jaxprs.constant(self._jaxpr, atom)

    def is_activation(self, atom: Any) -> bool:
        """Whether an operand depends on inputs of the function other than the base."""
        return not jaxprs.is_literal(atom) and atom in self._activations

    def is_input(self, atom: Any) -> bool:
        """Whether an operand may be the input of a product: an activation, or anything if there are no activations."""
        return not self._activations or self.is_activation(atom)

    def differentiates(self, equation: jaxprs.Equation) -> bool:
        """Whether the function itself differentiates through an equation of the current jaxpr."""
        return self._differentiated or jaxprs.is_differentiated(equation)

    def _run(self, jaxpr: jaxprs.Jaxpr, arguments: Sequence[Any]) -> list[Any]:
        self._jaxpr = jaxpr
        variables, consts = jaxprs.inputs(jaxpr)
        environment = dict(zip(variables, [*consts, *arguments]))
        only_uses = jaxprs.only_uses(jaxpr)

        def add_up(equation: jaxprs.Equation) -> None:
            values = [jaxprs.read(environment, atom) for atom in equation.invars]
            if _addend(equation, values, only_uses) is None:
                for atom, value in zip(equation.invars, values):
                    if isinstance(value, Product):
                        environment[atom] = value.total()

        def apply(equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
            self._equation = equation
            product = _addend(equation, values, only_uses)
            if product is not None:
                return [product.plus(equation, values)]
            results = self._apply(equation, values)
            return [self._settled(result, out, only_uses) for result, out in zip(results, equation.outvars)]

        release = jaxprs.last_uses(jaxpr)
        jaxprs.evaluate(jaxprs.equations(jaxpr), environment, apply, before=add_up, release=release)
        outputs = [jaxprs.read(environment, atom) for atom in jaxprs.outputs(jaxpr)]
        return [out.total() if isinstance(out, Product) else out for out in outputs]

    def _settled(self, value: Any, variable: Any, only_uses: Mapping[Any, jaxprs.Equation | None]) -> Any:
        """An output as an array, unless its only use is one that it waits for."""
        if not isinstance(value, Output):
            return value
        waits = variable in only_uses and value.waits(self, variable, only_uses[variable])
        return value if waits else value.result(self.flatten)

    def cached(self, key: Any, make: Callable[[], Callable]) -> Callable:
        """Returns one compiled function per sub-jaxpr, so that calls outside jit compile once."""
        if self.uses is not None:
            return make()
        if key not in self._calls:
            self._calls[key] = make()
        return self._calls[key]

    def _apply(self, equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
        for value in values:
            if isinstance(value, Output):
                return [value.advance(self, equation, values)]
        name, weights = equation.primitive.name, [value for value in values if isinstance(value, Weight)]
        arrays = [v.value if isinstance(v, Weight) and v.is_merged else v for v in values]
        is_tracked = bool(weights) and all(weight.is_merged for weight in weights)
        if is_tracked and name in jaxprs.ELEMENTWISE:
            return follow(equation, values, on_arrays(equation, arrays))
        if name not in COMBINING and not is_tracked:
            # An array that was computed from weights does not make another weight's operation one of two weights.
            values = arrays
        if self._outlined and (not weights or name not in RULES):
            return follow(equation, values, list(map(jaxprs.outline, equation.outvars)))
        if not weights:
            return on_arrays(equation, values)
        reason, roles = MERGED_BECAUSE.get(name, f"there is no factored form of {name}"), {}
        of_input = True
        if name in RULES:
            recorded = len(self.uses or ())
            try:
                return RULES[name](self, equation, values)
            except CannotFactor as error:
                reason, roles = str(error), error.roles if len(weights) == 1 else {}
                of_input = error.of_input
                if self.uses is not None:  # what the rule had recorded before it gave up
                    del self.uses[recorded:]
            if name in COMBINING and not is_tracked and any(weight.is_merged for weight in weights):
                return self._apply(equation, arrays)
        notes = [
            self._note(value, equation, reason, roles, of_input) if isinstance(value, Weight) else []
            for value in values
        ]

        def merged(*values):
            return on_arrays(equation, [value.merged() if isinstance(value, Weight) else value for value in values])

        if self.uses is None:
            return recomputed(merged, *values)
        views = [merged_view(v, note) if isinstance(v, Weight) else v for v, note in zip(values, notes)]
        inner = primal(equation, views)
        if inner is None:
            return follow(equation, views, recomputed(merged, *values))
        jaxpr, inputs = inner
        if name != "pallas_call":
            return self.body(jaxpr)({}, *inputs)[0]
        self.body(jaxpr, outlined=True)({}, *inputs)
        of_inputs = any(map(self.is_activation, equation.invars))
        results = recomputed(merged, *values)
        return results if of_inputs else follow_kernel(views, results)

    def returned(
        self, equation: jaxprs.Equation, values: Sequence[Any], reason: str
    ) -> tuple[list[Any], dict[int, Weight]]:
        """The outputs of a body with weights merged, and, while uses are collected, the merged weights by position."""
        arrays, views = [], {}
        for position, value in enumerate(values):
            if isinstance(value, Output):
                value = value.result(self.flatten)
            if isinstance(value, Weight):
                indices = self._note(value, equation, reason, {}, True)
                if self.uses is not None and not value.looked_up:
                    views[position] = merged_view(value, indices)
                value = recomputed(Weight.merged, value)
            arrays.append(value)
        return arrays, views

    def materialize(
        self,
        weight: Weight,
        equation: jaxprs.Equation | None,
        reason: str,
        roles: Mapping[str, str] | None = None,
        *,
        of_input: bool = True,
    ) -> jax.Array:
        """The array that a weight stands for, and a record of it; `roles` are by label, if they are known."""
        self._note(weight, equation, reason, roles or {}, of_input)
        return recomputed(Weight.merged, weight)

    def _note(
        self,
        weight: Weight,
        equation: jaxprs.Equation | None,
        reason: str,
        roles: Mapping[str, str],
        of_input: bool,
    ) -> list[list[int]]:
        """Records that a weight becomes an array; raises if its inputs are to be read. Returns each term's uses."""
        indices = []
        where = "" if equation is None else f" ({jaxprs.describe_equation(equation)})"
        for term in weight.terms:
            if term.taps:
                raise ValueError(f"{term.path!r}: its inputs cannot be read here: {reason}{where}.")
            if term.offset is not None:
                raise ValueError(f"{term.path!r}: the weight would be merged here: {reason}{where}; {NO_BIAS}")
            if term.on_output is not None:
                use = "its rows are looked up" if _is_lookup(weight) else reason
                raise ValueError(f"{term.path!r}: the weight would be merged here: {use}{where}; {NONLINEAR}")
            (source, *_), name = term.sources, "" if equation is None else equation.primitive.name
            parts = {x: "indexed" if source.axes_of(x) & source.sliced else "out" for x, _ in weight.labels}
            if _is_lookup(weight):
                use = self.record(term, equation, parts, "a lookup: only the rows in use are computed")
            elif term.sliced and name in ("add", "add_any", "sub"):
                use = self.record(term, equation, parts, "a part that is added: all of it is computed", factored=False)
            else:
                use = self.record(term, equation, roles, reason, factored=False, of_input=of_input)
            indices.append(use)
        return indices

    def next_dropout(self, term: Term) -> Dropout | None:
        """The dropout of a term with keys that no other use of it has."""
        if term.dropout is None:
            return None
        number = Draws(tuple(self._drawn.items())).after({term.path: self._first.get(term.path, np.uint32(0))})
        self.advance(Draws(((term.path, 1),)))
        return term.dropout.fold_in(number[term.path])

    def record(
        self,
        term: Term,
        equation: jaxprs.Equation | None,
        roles: Mapping[str, str],
        reason: str,
        *,
        factored: bool = True,
        of_input: bool = True,
    ) -> list[int]:
        """Records a use of a term; `roles` are by label.

        A term that was merged before only completes the roles of that use.

        Returns:
          The indices of the uses, one for each source of the term.
        """
        if self.uses is None:
            return []
        name, where = (equation.primitive.name, jaxprs.source(equation)) if equation is not None else ("output", "")
        first = len(self.uses) if term.merge is None else term.merge
        for index, source in enumerate(term.sources, first):
            by_axis: dict[int, str] = dict.fromkeys(source.sliced, "indexed") | dict.fromkeys(source.scanned, "batch")
            for label, role in roles.items():
                for axis in source.axes_of(label):
                    by_axis[axis] = _joined(by_axis.get(axis), role)
            if term.merge is None:
                self.uses.append(Use(source.path, name, factored, reason, where, by_axis, of_input))
                continue
            use = self.uses[index]
            if of_input > use.of_input or not {"in", "out"} & set(use.roles.values()):
                self.uses[index] = dataclasses.replace(use, roles=by_axis, of_input=of_input)
        return list(range(first, first + len(term.sources)))

    def mark_biased(self, uses: Sequence[int]) -> None:
        """Adds to the records of these uses that a bias follows the product."""
        if self.uses is not None:
            for index in uses:
                reason = self.uses[index].reason.replace(", then", " + bias, then", 1)
                self.uses[index] = dataclasses.replace(self.uses[index], reason=reason)


def _is_lookup(weight: Weight) -> bool:
    """Whether the part of a weight that was sliced is used without a product: rows by index, or a row."""
    is_row = sum(size > 1 for _, size in weight.labels) <= 1
    return weight.sliced and (weight.looked_up or is_row)


def _addend(equation: jaxprs.Equation, values: Sequence[Any], once: Container[Any]) -> Product | None:
    """The product that an equation adds an independent array to, if that is the product's only use."""
    if equation.primitive.name not in ("add", "add_any"):
        return None
    for operand, (value, other) in enumerate((values, values[::-1])):
        independent = not isinstance(other, Product | Weight)
        if isinstance(value, Product) and independent and equation.invars[operand] in once:
            return value
    return None


def _joined(one: str | None, other: str) -> str:
    """The role of an axis whose parts have two: part batch and part something is that something."""
    if one is None or one in ("batch", "indexed"):
        return other
    if other in ("batch", "indexed") or one == other:
        return one
    return "in and out"
