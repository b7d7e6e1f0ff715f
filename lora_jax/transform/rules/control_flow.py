"""Calls and control flow: sub-jaxprs are interpreted inside the same construct."""

from typing import Any

import jax
from jax import lax

from lora_jax.adapters.factored import Factor
from lora_jax.transform import jaxprs
from lora_jax.transform.draws import Draws
from lora_jax.transform.lazy_dequantized import LazyDequantized, recomputed
from lora_jax.transform.outputs import Output
from lora_jax.transform.registry import Evaluator, rule
from lora_jax.transform.tracking import follow_outputs, stacked_view
from lora_jax.transform.weight import CannotFactor, Weight
from lora_jax.transform.weight_views import spec_by_label

Equation = jaxprs.Equation


def _evaluate(interpreter: Evaluator, function, values):
    """The outputs of a body. Its uses of dropout keys are numbered after those before it."""
    outputs, draws = function(interpreter.numbers(values), *values)
    interpreter.advance(draws)
    return outputs


@rule("jit", "pjit")
def jit(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    jaxpr = params["jaxpr"]

    def make():
        body = interpreter.body(jaxpr)

        def call(numbers, *arguments):
            outputs, draws = body(numbers, *map(_constrained, arguments, params["in_shardings"]))
            return [_constrained(out, sharding) for out, sharding in zip(outputs, params["out_shardings"])], draws

        call.__name__ = call.__qualname__ = params["name"]
        return jax.jit(
            call,
            inline=params["inline"],
            keep_unused=params["keep_unused"],
            compiler_options=dict(params["compiler_options_kvs"]) or None,
        )

    key = (jaxpr, params["name"], params["in_shardings"], params["out_shardings"])
    return _evaluate(interpreter, interpreter.cached(key, make), values)


def _constrained(value, sharding):
    if jaxprs.is_unspecified(sharding):
        return value
    if isinstance(value, Output):
        return value.with_array(lax.with_sharding_constraint(value.array, sharding))
    if isinstance(value, Weight):
        if isinstance(value.value, LazyDequantized):  # codes keep their sharding
            return value
        return value.replace(value=lax.with_sharding_constraint(value.value, sharding))
    return lax.with_sharding_constraint(value, sharding)


@rule("remat2", "checkpoint", "remat")
def remat(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    body = jax.checkpoint(interpreter.body(params["jaxpr"]), prevent_cse=params["prevent_cse"], policy=params["policy"])
    return _evaluate(interpreter, body, values)


@rule("closed_call", "core_call")
def call(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Calls that only group equations."""
    jaxpr = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
    return _evaluate(interpreter, interpreter.body(jaxpr), values)


@rule("compute_on")
def compute_on(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    params, draws, views = equation.params, [], []
    body = jaxprs.compute_on(
        _plain_outputs(interpreter, equation, params["jaxpr"], draws, views),
        compute_type=params["compute_type"],
        out_memory_spaces=list(params["out_memory_spaces"]),
        compiler_options=params.get("compiler_options"),
    )
    outputs = body(interpreter.numbers(values), *values)
    interpreter.advance(Draws.most(draws))
    return follow_outputs(outputs, views)


@rule("cond")
def cond(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    index, *operands = values
    draws, views = [], []
    branches = [_plain_outputs(interpreter, equation, branch, draws, views) for branch in equation.params["branches"]]
    platforms = equation.params.get("branches_platforms")
    if platforms is None:
        outputs = lax.switch(index, branches, interpreter.numbers(operands), *operands)
    else:  # each is compiled for its own platforms only
        named = {name: branch for names, branch in zip(platforms, branches) for name in names or ("default",)}
        outputs = lax.platform_dependent(interpreter.numbers(operands), *operands, **named)
    interpreter.advance(Draws.most(draws))
    return follow_outputs(outputs, views)


def _plain_outputs(interpreter, equation, jaxpr, draws: list, views: list):
    """A sub-jaxpr as a function that returns arrays only; when traced, it appends draws and merged weights to lists."""
    body = interpreter.body(jaxpr)

    def call(numbers, *arguments):
        outputs, drawn = body(numbers, *arguments)
        draws.append(drawn)
        reason = f"a weight is returned from {equation.primitive.name}"
        arrays, merged = interpreter.returned(equation, outputs, reason)
        views.append(merged)
        return arrays

    return call


def _carries(interpreter, equation, carry, unchanged):
    """Splits the carry of a loop into unchanged weights, by position, and the other values.

    Returns:
      Both, and, while uses are collected, the weights that the loop changes, by position.
    """
    fixed = {i: value for i, value in enumerate(carry) if isinstance(value, Weight) and i in unchanged}
    rest = [None if position in fixed else value for position, value in enumerate(carry)]
    arrays, changed = interpreter.returned(equation, rest, "the loop changes it")
    return fixed, [value for position, value in enumerate(arrays) if position not in fixed], changed


def _join_carry(fixed, variable):
    """The whole carry of a loop."""
    rest = iter(variable)
    return [fixed[i] if i in fixed else next(rest) for i in range(len(fixed) + len(variable))]


def _unchanged(jaxpr, num_consts):
    """Carry positions that the body returns unchanged."""
    return {output for output, source in jaxprs.forwarded_outputs(jaxpr).items() if source == num_consts + output}


@rule("while")
def while_loop(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    if any(isinstance(value, Weight) and value.has_taps for value in values):
        raise CannotFactor("a while loop has no gradient, which reads the inputs")
    params = equation.params
    cond_count, body_count = params["cond_nconsts"], params["body_nconsts"]
    cond_consts = values[:cond_count]
    body_consts = values[cond_count : cond_count + body_count]
    carry = values[cond_count + body_count :]
    fixed, variable, changed = _carries(interpreter, equation, carry, _unchanged(params["body_jaxpr"], body_count))
    cond = interpreter.body(params["cond_jaxpr"])
    body = _plain_except(interpreter, equation, params["body_jaxpr"], fixed, [])
    numbers, draws = interpreter.numbers([*cond_consts, *body_consts, *fixed.values()]), []

    def condition(state):
        numbers, variable = state
        (result,), drawn = cond(numbers, *cond_consts, *_join_carry(fixed, variable))
        draws.append(drawn)
        return result

    def step(state):
        numbers, variable = state
        outputs, drawn = body(numbers, *body_consts, *_join_carry(fixed, variable))
        draws.append(drawn)
        return drawn.after(numbers), outputs

    _, results = lax.while_loop(condition, step, (numbers, variable))
    interpreter.advance(Draws.most(draws).unknown_times())
    return follow_outputs(_join_carry(fixed, results), [changed])


def _plain_except(interpreter, equation, jaxpr, fixed, views: list):
    """A loop's body, without the unchanged part of the carry among its outputs; it appends merged weights to a list."""
    body = interpreter.body(jaxpr)

    def call(numbers, *arguments):
        outputs, draws = body(numbers, *arguments)
        rest = [None if position in fixed else out for position, out in enumerate(outputs)]
        reason = f"a weight is returned from the body of {equation.primitive.name}"
        arrays, merged = interpreter.returned(equation, rest, reason)
        views.append(merged)
        return [out for position, out in enumerate(arrays) if position not in fixed], draws

    return call


@rule("scan")
def scan(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    num_consts, num_carry = jaxprs.scan_counts(equation)
    consts = values[:num_consts]
    carry = values[num_consts : num_consts + num_carry]
    xs = values[num_consts + num_carry :]
    fixed, variable, changed = _carries(interpreter, equation, carry, _unchanged(params["jaxpr"], num_consts))
    views: list[dict[int, Weight]] = []
    body = _plain_except(interpreter, equation, params["jaxpr"], fixed, views)
    sliced = [_scanned(interpreter, equation, x) if isinstance(x, Weight) else (x, None) for x in xs]
    numbers, draws = interpreter.numbers([*consts, *fixed.values(), *xs]), []

    def step(state, rows):
        numbers, variable = state
        inner = [row if restore is None else restore(row) for row, (_, restore) in zip(rows, sliced)]
        outputs, drawn = body(numbers, *consts, *_join_carry(fixed, variable), *inner)
        draws.append(drawn)
        count = num_carry - len(fixed)
        return (drawn.after(numbers), outputs[:count]), outputs[count:]

    (_, final), ys = lax.scan(
        step,
        (numbers, variable),
        [x for x, _ in sliced],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        _split_transpose=params.get("_split_transpose", False),
    )
    interpreter.advance(Draws.most(draws).times(params["length"]))
    stacks = [{i: stacked_view(view) for i, view in merged.items() if i >= num_carry} for merged in views]
    return follow_outputs([*_join_carry(fixed, final), *ys], [changed, *stacks])


def _scanned(interpreter, equation, weight: Weight):
    """A weight that a scan runs over: the arrays to slice, and the weight of one slice from them."""
    if len(weight.dims[0]) != 1:
        return interpreter.materialize(weight, equation, "the scanned axis is made of several"), None
    label = weight.dims[0][0][0]
    value = weight.value
    if isinstance(value, LazyDequantized) and not value.layers:
        _record(interpreter, weight, equation, "dequantized as a whole: its blocks have no leading axis to scan over")
        value = recomputed(lambda value: value, value)

    def lead(factor: Factor) -> Factor:
        rest = [x for x in factor.labels if x != label]
        return factor.transposed([label, *rest]) if label in factor.labels else factor

    led = weight.map_factors(lead)
    arrays = [f.array for f in led.labeled if label in f.labels]

    def restore(rows):
        row, *slices = rows
        if isinstance(value, LazyDequantized):
            row = value.with_leaf(row)
        queue = iter(slices)

        def slice_array(factor: Factor) -> Factor:
            return Factor(next(queue), factor.labels[1:]) if label in factor.labels else factor

        return led.mark_scanned(label).map_factors(slice_array).replace(value=row, dims=led.dims[1:])

    return [value.leaf if isinstance(value, LazyDequantized) else value, *arrays], restore


@rule("shard_map")
def shard_map(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    params = equation.params
    specs, arguments, rebuild, draws = [], [], [], []
    for value, spec in zip(values, params["in_specs"]):
        if isinstance(value, Weight):
            value, weight_specs = _sharded(interpreter, equation, value, spec, params["mesh"])
            leaves, treedef = jax.tree.flatten(value)
            specs.extend(weight_specs)
            arguments.extend(leaves)
            rebuild.append((treedef, len(leaves)))
        else:
            specs.append(spec)
            arguments.append(value)
            rebuild.append((None, 1))
    body = _plain_outputs(interpreter, equation, params["jaxpr"], draws, [])
    numbers = interpreter.numbers(values)

    def call(numbers, *flat):
        rest, inner = list(flat), []
        for treedef, count in rebuild:
            leaves, rest = rest[:count], rest[count:]
            inner.append(leaves[0] if treedef is None else _local(jax.tree.unflatten(treedef, leaves)))
        return body(numbers, *inner)

    mapped = jax.shard_map(
        call,
        mesh=params["mesh"],
        in_specs=(jax.sharding.PartitionSpec(), *specs),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=jaxprs.manual_axes(equation),
    )
    outputs = mapped(numbers, *arguments)
    interpreter.advance(Draws.most(draws))
    return outputs


def _record(interpreter: Evaluator, weight: Weight, equation: Equation, reason: str) -> None:
    for term in weight.terms:
        interpreter.record(term, equation, {}, reason)


def _sharded(interpreter, equation, weight: Weight, spec, mesh):
    """A weight that shard_map shards, and the specs of its leaves, from the spec of its base."""
    if weight.has_taps:
        raise CannotFactor("inside shard_map each device sees a part of the inputs")
    names = spec_by_label(weight, spec, mesh)
    partition: Any = jax.sharding.PartitionSpec

    def spec_of(factor: Factor):
        return Factor(partition(*(names.get(label) for label in factor.labels)), factor.labels)

    value, base_spec = weight.value, spec
    if isinstance(value, LazyDequantized):
        divided = value.parts(spec, mesh)
        if divided is None:
            reason = "dequantized as a whole before shard_map: a shard is no whole number of blocks"
            _record(interpreter, weight, equation, reason)
            value = recomputed(lambda value: value, value)
        else:
            value, base_spec = divided
    weight = weight.replace(value=value)
    specs = weight.map_factors(spec_of).replace(value=base_spec)
    return weight, jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, partition))


def _local(weight: Weight) -> Weight:
    """The weight of one shard: the sizes of its labels are those of the local arrays."""
    if isinstance(weight.value, LazyDequantized):
        weight = weight.replace(value=weight.value.with_leaf(weight.value.leaf))
    sizes = {label: size for factor in weight.labeled for label, size in factor.sizes.items()}
    dims = []
    for axis, size in zip(weight.dims, weight.value.shape):
        rest = 1
        for _, count in axis[1:]:
            rest *= count
        first = axis[0][0]
        dims.append(((first, sizes.get(first, size // rest)), *axis[1:]))
    return weight.replace(dims=tuple(dims))
