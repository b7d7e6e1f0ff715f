"""All uses of JAX's internals. If a JAX release changes them, only this file changes."""

import collections
import contextlib
import dataclasses
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import config as jax_config
from jax._src import core as jax_core
from jax._src import source_info_util
from jax._src.array import ArrayImpl
from jax._src.interpreters import partial_eval
from jax.experimental import compute_on as compute_on_module
from jax.extend.core import Literal, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from lora_jax.leaves import is_quantized

compute_on: Callable = getattr(compute_on_module, "compute_on2", compute_on_module.compute_on)
"""Runs a function on another compute type (the host). Newer JAX releases have another name for it."""

Jaxpr = Any
"""An open or a closed jaxpr. Newer JAX releases have one class for both."""

Equation = Any

ConcreteArray = ArrayImpl
"""The class of concrete JAX arrays. Tracers have other classes."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function without its dead code.

    Attributes:
      jaxpr: Takes the used ones of the constants and the inputs, in that order.
      consts: The used values that the function closed over.
      used: Which inputs the outputs depend on.
    """

    jaxpr: Jaxpr
    consts: tuple[Any, ...]
    used: tuple[bool, ...]

    @property
    def holds_tracers(self) -> bool:
        """Whether the function closed over tracers of an outer transformation."""
        return any(isinstance(const, jax_core.Tracer) for const in self.consts)


def trace(function: Callable[..., Sequence[jax.Array]], arguments: Sequence[Any]) -> Program:
    """Traces a function of arrays to a program.

    Args:
      function: Returns a sequence of arrays. Not cached: pass a new one for a new trace.
      arguments: Arrays, tracers or `jax.ShapeDtypeStruct`.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    consts = list(closed.consts)
    opened = partial_eval.convert_constvars_jaxpr(closed.jaxpr)
    jaxpr, used = partial_eval.dce_jaxpr(opened, [True] * len(opened.outvars))
    used_consts, used_inputs = used[: len(consts)], used[len(consts) :]
    return Program(
        jaxpr=jaxpr,
        consts=tuple(const for const, keep in zip(consts, used_consts) if keep),
        used=tuple(used_inputs),
    )


def lift_constants(
    function: Callable[..., Sequence[jax.Array]], arguments: Sequence[Any]
) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns a traced function that takes its constants as further inputs, after its own, and the constants."""
    closed = jax.make_jaxpr(function)(*arguments)
    count = len(arguments)

    def opened(*values):
        return jax_core.eval_jaxpr(closed.jaxpr, values[count:], *values[:count])

    return jax.make_jaxpr(opened)(*arguments, *closed.consts), closed.consts


def aval(leaf: Any) -> Any:
    """The type of an array, or the types of the arrays of a quantized leaf, in a trace. Hashable."""
    if not is_quantized(leaf):
        return jax.typeof(leaf)
    types = [jax.typeof(array) for array in jax.tree.leaves(leaf)]
    return tuple(leaf.shape), jnp.dtype(leaf.dtype), tuple(types)


def abstract(leaf: Any) -> Any:
    """Returns the shape and dtype of a quantized leaf's values, for a trace; returns an array itself."""
    if not is_quantized(leaf):
        return leaf
    # Where meshes have explicit axes, and inside shard_map, it says more than shape and dtype.
    return jax.eval_shape(type(leaf).dequantize, leaf)


def inputs(jaxpr: Jaxpr) -> tuple[list[Any], list[Any]]:
    """The variables of a jaxpr's constants and inputs, and the constants' values."""
    consts = list(getattr(jaxpr, "consts", ()))
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return [*inner.constvars, *inner.invars], consts


def equations(jaxpr: Jaxpr) -> Sequence[Equation]:
    return getattr(jaxpr, "jaxpr", jaxpr).eqns


def outputs(jaxpr: Jaxpr) -> Sequence[Any]:
    """The variables or literals that a jaxpr returns."""
    return getattr(jaxpr, "jaxpr", jaxpr).outvars


def last_uses(jaxpr: Jaxpr) -> dict[int, list[Any]]:
    """By position of an equation, the variables that no later equation uses."""
    seen = {atom for atom in outputs(jaxpr) if not isinstance(atom, Literal)}
    last: dict[int, list[Any]] = {}
    eqns = equations(jaxpr)
    for position in range(len(eqns) - 1, -1, -1):
        fresh = {atom for atom in eqns[position].invars if not isinstance(atom, Literal)} - seen
        last[position] = list(fresh)
        seen |= fresh
    return last


def only_uses(jaxpr: Jaxpr) -> dict[Any, Equation | None]:
    """For each variable of a jaxpr that occurs once, the equation that it is an operand of; None for an output."""
    uses: dict[Any, list[Equation | None]] = collections.defaultdict(list)
    for equation, atoms in [*((eqn, eqn.invars) for eqn in equations(jaxpr)), (None, outputs(jaxpr))]:
        for atom in atoms:
            if not isinstance(atom, Literal):
                uses[atom].append(equation)
    return {variable: users[0] for variable, users in uses.items() if len(users) == 1}


def is_differentiated(equation: Equation) -> bool:
    """Whether the traced function itself differentiates through an equation, by `jax.grad` or `jax.jvp`."""
    stack = equation.source_info.name_stack.stack
    return any(isinstance(entry, source_info_util.Transform) and entry.name in ("jvp", "transpose") for entry in stack)


def read(environment: dict[Any, Any], atom: Any) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, Literal) else environment[atom]


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is a literal."""
    return isinstance(atom, Literal)


ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
    convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag
    integer_pow is_finite le log log1p logistic lt max min mul name ne neg nextafter not or pow real
    reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor
    """.split()  # noqa: SIM905
)
"""Primitives that act on each element by itself. Operands are of one shape, or have axes of size one."""


def constant_axes(jaxpr: Jaxpr, atom: Any) -> frozenset[int]:
    """Axes along which a variable of a jaxpr is known to have equal entries: it was broadcast along them."""
    producers = {variable: equation for equation in equations(jaxpr) for variable in equation.outvars}

    def axes(atom: Any) -> frozenset[int]:
        every = frozenset(range(atom.aval.ndim))
        constant = frozenset(axis for axis in every if atom.aval.shape[axis] == 1)
        equation = None if isinstance(atom, Literal) else producers.get(atom)
        if equation is None:
            return every if isinstance(atom, Literal) else constant
        if equation.primitive.name == "broadcast_in_dim":
            operand, targets = equation.invars[0], equation.params["broadcast_dimensions"]
            return every - {target for axis, target in enumerate(targets) if axis not in axes(operand)}
        if equation.primitive.name in ELEMENTWISE:
            operands = [operand for operand in equation.invars if operand.aval.ndim]
            return constant | frozenset.intersection(every, *map(axes, operands))
        return constant

    return axes(atom)


_CONSTANT = ("broadcast_in_dim", "concatenate", "convert_element_type", "reshape", "squeeze")
"""Primitives by which JAX forms the indices of static slices."""


def constant(jaxpr: Jaxpr, atom: Any) -> np.ndarray | None:
    """The value of an operand that is formed from literals alone, such as the indices of a static slice; or None."""
    producers = {variable: equation for equation in equations(jaxpr) for variable in equation.outvars}

    def value(atom: Any) -> Any:
        equation = None if isinstance(atom, Literal) else producers.get(atom)
        if equation is None:
            return atom.val if isinstance(atom, Literal) else None
        operands = list(map(value, equation.invars)) if equation.primitive.name in _CONSTANT else [None]
        return None if any(operand is None for operand in operands) else bind(equation, operands)[0]

    with jax.ensure_compile_time_eval():
        result = value(atom)
        return None if result is None else np.asarray(result)


def dependents(jaxpr: Jaxpr, flags: Sequence[bool]) -> frozenset[Any]:
    """The variables of a jaxpr, and of the jaxprs in it, that depend on the flagged inputs."""
    variables: set[Any] = set()
    _mark_dependents(jaxpr, flags, variables)
    return frozenset(variables)


def _mark_dependents(jaxpr: Jaxpr, flags: Sequence[bool], variables: set[Any]) -> None:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    variables |= {variable for variable, flag in zip(inner.invars, flags) if flag}
    for equation in inner.eqns:
        flags = [not isinstance(atom, Literal) and atom in variables for atom in equation.invars]
        if any(flags):
            variables |= set(equation.outvars)
        if equation.primitive.name == "while":
            _mark_while(equation, flags, variables)
            continue
        for body in jax_core.jaxprs_in_params(equation.params):
            operands = flags[len(flags) - len(body.invars) :] if equation.primitive.name == "cond" else flags
            if len(operands) != len(body.invars):
                operands = [any(flags)] * len(body.invars)  # which operand is which input is not known
            if equation.primitive.name == "scan":
                _mark_loop(body, operands, *scan_counts(equation), variables)
            else:
                _mark_dependents(body, operands, variables)


def _mark_while(equation: Equation, flags: list[bool], variables: set[Any]) -> None:
    params = equation.params
    cond, body = (getattr(params[name], "jaxpr", params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    conds, consts = params["cond_nconsts"], params["body_nconsts"]
    inside = _mark_loop(body, flags[conds:], consts, len(flags) - conds - consts, variables)
    _mark_dependents(cond, [*flags[:conds], *inside[consts:]], variables)


def _mark_loop(body: Jaxpr, flags: list[bool], first: int, count: int, variables: set[Any]) -> list[bool]:
    """Marks a loop's body until no further part of its carry depends on the flagged inputs; returns its inputs' flags.

    Args:
      body: The jaxpr of one iteration.
      flags: Of its inputs.
      first: The position of the carry among them.
      count: How many they are.
      variables: Where dependent variables are added.
    """
    while True:
        _mark_dependents(body, flags, variables)
        carried = [not isinstance(atom, Literal) and atom in variables for atom in body.outvars[:count]]
        joined = [*flags[:first], *map(operator.or_, flags[first : first + count], carried), *flags[first + count :]]
        if joined == flags:
            return flags
        flags = joined


def kernel_blocks(equation: Equation) -> list[tuple[int, ...]]:
    """For each input of a Pallas kernel, the axes of the operand that a block of it has."""
    mapping = equation.params["grid_mapping"]
    return [
        tuple(axis for axis, size in enumerate(block.block_shape) if "Squeezed" not in type(size).__name__)
        for block in mapping.block_mappings[: mapping.num_inputs]
    ]


def indexed_axes(equation: Equation) -> tuple[int, ...] | None:
    """The axes of a reference that an equation `get` indexes by a scalar; None if it indexes by arrays."""
    axes: tuple[int, ...] = ()
    for indexer in jax.tree.unflatten(equation.params["tree"], equation.invars[1:]):
        if axes or getattr(indexer, "int_indexer_shape", None) != ():
            return None
        axes = tuple(axis for axis, index in enumerate(indexer.indices) if not hasattr(index, "start"))
    return axes


def outline(variable: Any) -> jax.Array | None:
    """Returns zeros of the shape of a variable (or of what a reference refers to); None if it is not numeric."""
    aval = getattr(variable.aval, "inner_aval", variable.aval)
    dtype = getattr(aval, "dtype", None)
    if not isinstance(dtype, np.dtype) or not hasattr(aval, "shape"):
        return None
    return jnp.zeros(aval.shape, dtype)


def is_dropped(variable: Any) -> bool:
    """Whether an output of an equation is unused."""
    return isinstance(variable, jax_core.DropVar)


@contextlib.contextmanager
def context(equation: Equation) -> Iterator[None]:
    """The name stack, source line, mesh and `compute_on` marks that an equation was traced under."""
    stack = source_info_util.current_name_stack() + equation.source_info.name_stack
    with (
        source_info_util.user_context(equation.source_info.traceback, name_stack=stack),
        equation.ctx.manager,
    ):
        yield


def bind(equation: Equation, values: Sequence[Any], **changes: Any) -> list[Any]:
    """Binds an equation's primitive to other operands, with its parameters and these `changes`."""
    parameters = equation.primitive.get_bind_params(equation.params | changes)
    result = equation.primitive.bind(*values, **parameters)
    return list(result) if equation.primitive.multiple_results else [result]


def evaluate(
    equations: Iterable[Equation],
    environment: dict[Any, Any],
    apply: Callable[[Equation, list[Any]], Sequence[Any]] = bind,
    *,
    before: Callable[[Equation], None] = lambda equation: None,
    release: Mapping[int, Iterable[Any]] = MappingProxyType({}),
) -> None:
    """Evaluates equations in order, each under its own context.

    Args:
      equations: The equations.
      environment: Values by variable; the results are added to it.
      apply: `apply(equation, operands)` returns the results of an equation.
      before: Called before the operands of an equation are read, outside its context.
      release: By position of an equation, the variables that leave the environment after it.
    """
    for position, equation in enumerate(equations):
        before(equation)
        operands = [read(environment, atom) for atom in equation.invars]
        with context(equation):
            results = apply(equation, operands)
        environment.update(zip(equation.outvars, results))
        for variable in release.get(position, ()):
            del environment[variable]


def source(equation: Equation) -> str:
    """Where in the user's code an equation comes from: `model.py:12 (fn)`."""
    text = source_info_util.summarize(equation.source_info)
    match = re.fullmatch(r"(.*?):(\d+)(?::\d+)*(?: \((.*)\))?", text)
    if match is None:
        return text
    file, line, function = match.groups()
    name = (function or "").rsplit(".", 1)[-1]
    return f"{os.path.basename(file)}:{line}" + (f" ({name})" if name else "")


def describe_equation(equation: Equation) -> str:
    """The operation of an equation and where it comes from: `dot_general at model.py:12 (fn)`."""
    return f"{equation.primitive.name} at {source(equation)}"


def scan_counts(equation: Equation) -> tuple[int, int]:
    """The numbers of constants and carries of a scan."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def forwarded_outputs(jaxpr: Jaxpr) -> dict[int, int]:
    """The outputs that are unchanged inputs: `{output: input}`, also through calls of jit."""
    variables, consts = inputs(jaxpr)
    origin = {variable: position - len(consts) for position, variable in enumerate(variables)}
    for equation in equations(jaxpr):
        if equation.primitive.name in ("jit", "pjit"):
            for out, source in forwarded_outputs(equation.params["jaxpr"]).items():
                atom = equation.invars[source]
                if not isinstance(atom, Literal) and atom in origin:
                    origin[equation.outvars[out]] = origin[atom]
    return {
        out: origin[atom]
        for out, atom in enumerate(outputs(jaxpr))
        if not isinstance(atom, Literal) and origin.get(atom, -1) >= 0
    }


def varying_together(arrays: Sequence[Any], others: Any) -> list[Any]:
    """Inside `shard_map`: the arrays, varying over every mesh axis that a leaf of `others` varies over."""
    axes = _varying(others)
    if not axes:
        return list(arrays)
    return jax.tree.map(lambda array: varying_over(array, axes), list(arrays))


def varying_over(array: jax.Array, axes: Iterable[str]) -> jax.Array:
    """Inside `shard_map`: an array, varying over these mesh axes too."""
    missing = tuple(axis for axis in axes if axis not in _varying(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def varying_like(other: Any, shape: Sequence[int], dtype: Any) -> Any:
    """The type of a result that, inside `shard_map`, varies over the mesh axes that an operand's type varies over."""
    if other.mat.empty:
        return jax_core.ShapedArray(tuple(shape), dtype)
    sharding = other.sharding.update(spec=jax.P(*[None] * len(shape)))
    return jax_core.ShapedArray(tuple(shape), dtype, sharding=sharding, manual_axis_type=other.mat)


def _varying(tree: Any) -> frozenset[str]:
    """The mesh axes that the arrays of a tree vary over, inside `shard_map`."""
    return frozenset().union(*(jax.typeof(array).mat.varying for array in jax.tree.leaves(tree)))


def zeros(aval: Any) -> jax.Array:
    """Zeros of a type: with its sharding on a mesh of explicit axes, and as varying as it is inside `shard_map`."""
    with jax.sharding.use_abstract_mesh(aval.sharding.mesh):
        array = jax.lax.full(aval.shape, 0, aval.dtype, sharding=None if aval.sharding.mesh.empty else aval.sharding)
        return jax.lax.pcast(array, tuple(aval.mat.varying), to="varying") if aval.mat.varying else array


def manual_axes(equation: Equation) -> Any:
    """Returns the mesh axes over which a `shard_map` is manual; JAX 0.10.0 has another name for them."""
    return equation.params["newly_manual_axes" if "newly_manual_axes" in equation.params else "manual_axes"]


def is_for_one_device(context: Any) -> bool:
    """Whether the program being lowered runs on one device, and is not partitioned by the compiler."""
    axes = context.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        return set(axes.manual_axes) == set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) == 1


def is_unspecified(sharding: Any) -> bool:
    """Whether a sharding parameter of jit is unspecified."""
    return sharding is None or type(sharding).__name__ in ("UnspecifiedValue", "AUTO")


def is_staged() -> bool:
    """Whether operations are staged (by `jit`, `scan`, …) instead of run, also inside a derivative or `vmap`."""
    trace = jax_core.trace_ctx.trace
    while type(trace).__name__ in ("JVPTrace", "LinearizeTrace", "BatchTrace"):
        trace = trace.parent_trace
    return not isinstance(trace, jax_core.EvalTrace)


def trace_context() -> Any:
    """The global state that a trace depends on: configuration, mesh, axis names. Hashable."""
    return jax_config.trace_context()


as_function: Callable[[Jaxpr], Callable[..., list[Any]]] = jaxpr_as_fun
"""A closed jaxpr as a function from its inputs to the list of its outputs."""

is_linear_input: Callable[[Any], bool] = ad.is_undefined_primal
"""Whether a transpose rule has to return a cotangent for an operand. Such an operand has an `aval` and no value."""

instantiate: Callable[[Any], jax.Array] = ad.instantiate_zeros
"""A tangent or cotangent as an array, also if it is a symbolic zero."""


def is_symbolic_zero(tangent: Any) -> bool:
    """Whether a tangent or cotangent is known to be zero without being an array."""
    return type(tangent) is ad.Zero


def define_primitive(
    name: str,
    evaluate: Callable,
    *,
    abstract_eval: Callable,
    jvp: Callable,
    transpose: Callable,
    batch: Callable,
    multiple_results: bool = False,
    lower: Mapping[str, Callable[[Any], Callable]] | None = None,
) -> Primitive:
    """Defines a primitive that every transformation of JAX accepts.

    Args:
      name: Its name in jaxprs.
      evaluate: `evaluate(*operands, **params)`; also what is lowered.
      abstract_eval: `abstract_eval(*avals, **params)` returns the type of each result.
      jvp: `jvp(primals, tangents, **params)` returns results and their tangents.
      transpose: `transpose(cotangent, *operands, **params)` returns a cotangent or None for each operand.
      batch: `batch(operands, axes, **params)` returns batched results and their axes.
      multiple_results: Whether the results are a list.
      lower: By platform, a function from the lowering context to what is lowered instead of `evaluate`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch

    def lowering(choose):
        def lowered(context, *operands, **params):
            return mlir.lower_fun(choose(context), multiple_results=multiple_results)(context, *operands, **params)

        return lowered

    mlir.register_lowering(primitive, lowering(lambda context: evaluate))
    for platform, choose in (lower or {}).items():
        mlir.register_lowering(primitive, lowering(choose), platform=platform)
    return primitive
