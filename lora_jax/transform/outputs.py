"""The output of a product, to which an adapter's function of the output has not been applied yet.

The function acts on what the layer returns, so the bias comes first. Between a product and its bias a program may
transpose, reshape or cast the output, and return it from a call (`jnp.einsum` is one; `jax.vmap` of a layer moves the
axis of examples). The output is carried through these with the labels of its axes, as weights are.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.adapters.factored import Factor, explicit_sharding, is_factor, placed
from lora_jax.adapters.protocol import IN, OUT
from lora_jax.transform import jaxprs
from lora_jax.transform.contraction_axes import Axes, Pairs
from lora_jax.transform.registry import RULES, Evaluator
from lora_jax.transform.weight import CannotFactor, Weight, value_size

VIEWS = (
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "name",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "sharding_constraint",
    "squeeze",
    "transpose",
)
"""Primitives that may stand between a product and its bias."""


def acts_on_output(interpreter: Evaluator, equation: jaxprs.Equation, weight: Weight, axes: Axes) -> bool:
    """Whether an adapter has a function of the output, which then has to be the output of the whole layer.

    Raises:
      CannotFactor: The product is with a part of the weight, its transpose, or several weights.
      ValueError: The function that is adapted is the derivative of another one.
    """
    for term in weight.terms:
        if term.on_output is None:
            continue
        if len(weight.terms) > 1:
            raise CannotFactor("it is joined with other weights")
        if interpreter.differentiates(equation):
            raise ValueError(
                f"{term.path!r}: the function differentiates {jaxprs.describe_equation(equation)} itself, "
                "and this derivative is that of the base without the adapter, which is not linear. Adapt what it "
                "differentiates: jax.grad(lora.adapt(f)), not lora.adapt(jax.grad(f))."
            )
        if axes.chosen:
            raise CannotFactor("each row of the input chooses a matrix, and would choose a function of its output")
        for source in term.sources:
            by_role = {role: {axis for axis, r in enumerate(source.roles) if r == role} for role in (IN, OUT)}
            inputs, outputs = (by_role[role] - source.sliced for role in (IN, OUT))
            if value_size(axes.summed) != term.inputs or any(
                not source.axes_of(label) or source.axes_of(label) - inputs for label, size in axes.summed if size > 1
            ):
                raise CannotFactor(f"the product sums over other elements than the {term.inputs} inputs of the layer")
            outs = (pair for pair in (*axes.batch, *axes.free) if source.axes_of(pair[0]) & outputs)
            if value_size(outs) != term.outputs:
                raise CannotFactor(f"the product has a part of the {term.outputs} outputs of the layer")
        return True
    return False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """An output to which a function will be applied. It is a pytree, so it leaves jit, remat, ….

    Attributes:
      view: The output in place of the base weight, with the labels of its axes; its only term has the function.
      uses: The indices of the recorded uses of the weight.
      precision: Of the product.
    """

    view: Weight
    uses: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    precision: Any = dataclasses.field(metadata={"static": True})

    @property
    def array(self) -> jax.Array:
        """The output as it is so far."""
        return self.view.value  # pyrefly: ignore[bad-return]

    def with_array(self, array: jax.Array) -> "Output":
        """The same with another array of the same axes."""
        return dataclasses.replace(self, view=self.view.replace(value=array))

    def waits(self, interpreter: Evaluator, variable: Any, equation: jaxprs.Equation | None) -> bool:
        """Whether the function is applied later.

        Args:
          interpreter: Of the current jaxpr.
          variable: The output in this jaxpr.
          equation: Its only use there; None if the jaxpr returns it.
        """
        if equation is None or equation.primitive.name in VIEWS:
            return True
        return equation.primitive.name in ("add", "add_any") and self._is_bias(interpreter, variable, equation)

    def _is_bias(self, interpreter: Evaluator, variable: Any, equation: jaxprs.Equation) -> bool:
        """Whether an addition adds parameters that are the same for all tokens."""
        (bias,) = (atom for atom in equation.invars if atom is not variable)
        if jaxprs.is_literal(bias) or interpreter.is_activation(bias):
            return False
        if equation.outvars[0].aval.shape != self.array.shape:
            return False
        constant, labels = interpreter.constant_axes(bias), self._labels
        varying = [pairs for axis, pairs in enumerate(self.view.dims) if bias.aval.ndim and axis not in constant]
        return all(label in labels for pairs in varying for label, size in pairs if size > 1)

    def advance(self, interpreter: Evaluator, equation: jaxprs.Equation, values: Sequence[Any]) -> Any:
        """The result of the equation that it waits for: the output under one more view, or an array."""
        if equation.primitive.name not in VIEWS:
            operands = [
                interpreter.materialize(value, equation, "it is the bias of an output that is adapted")
                if isinstance(value, Weight)
                else self.array
                if value is self
                else value
                for value in values
            ]
            (total,) = jaxprs.bind(equation, operands)
            interpreter.mark_biased(self.uses)
            return self.with_array(total).result(interpreter.flatten)
        try:
            (view,) = RULES[equation.primitive.name](interpreter, equation, [self.view])
        except CannotFactor:
            return jaxprs.bind(equation, [self.result(interpreter.flatten)])[0]
        return dataclasses.replace(self, view=view)

    def result(self, flatten: bool) -> jax.Array:
        """The output plus what the function returns for it; `flatten` makes neighboring token axes one."""
        array, function = self.array, self.view.terms[0].on_output
        assert function is not None
        sharding, pairs = explicit_sharding(array), self.view.labels
        if flatten and sharding is None:
            pairs = _grouped(pairs, self._labels)
        y = Factor(array.reshape([size for _, size in pairs]), tuple(label for label, _ in pairs))
        change = function(y, self.precision).transposed(y.labels).array.astype(array.dtype)
        return array + placed(change, sharding, array.shape)

    @property
    def _labels(self) -> set[str]:
        """The labels of the weight that the function acts on."""
        return {label for factor in jax.tree.leaves(self.view.terms, is_leaf=is_factor) for label in factor.labels}


def _grouped(pairs: Pairs, labels: set[str]) -> Pairs:
    """The axes, with neighboring ones that have none of the labels made one."""
    runs = ((is_token, list(run)) for is_token, run in itertools.groupby(pairs, lambda pair: pair[0] not in labels))
    return [pair for is_token, run in runs for pair in ([(run[0][0], value_size(run))] if is_token else run)]
