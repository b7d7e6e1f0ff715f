"""Optimizer state in host memory, streamed through the device by each update."""

from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import optax

from lora_jax.leaves import is_array
from lora_jax.optim.extra import check_transform, update_with
from lora_jax.transform import jaxprs

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"

AHEAD = 2
"""Number of leaves loaded before the first of them has to be stored: one is loaded while another is stored.

Up to 4, memory grows in proportion; from 6 on, XLA's scheduler for TPUs keeps half of all state on the device.
"""


def host_offloaded(
    tx: optax.GradientTransformation, *, min_size: int = 100_000
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the large leaves of its state are stored in host memory.

    An update copies them to the device, runs `tx`, and copies the new state back. The results equal those of `tx`.
    Leaves keep their sharding; only their memory kind changes, to 'pinned_host'. This is the counterpart of paged
    optimizers: it saves the state's memory on the device at the cost of transferring all of it in both directions.

    Under jit the state is streamed: the transfer of a leaf to the device starts when the second leaf before it has been
    stored, so that about five are on the device at a time. This requires that `tx` works leaf by leaf, as Adam does,
    also after clipping by the gradients' norm. Computations over the whole state (a norm of the moments or of Adam's
    updates, operands of a `lax.cond`) need all of it on the device at once.

    Donated state is updated in place, as in :func:`lora_jax.train_step`. If you call the transform in your own jit,
    donate the parameters too, and return parameters and state in the order of the arguments: JAX pairs donated buffers
    by shape only, and state that is paired with parameters ends up in the wrong memory (on a CPU the process aborts).

    Args:
      tx: Any Optax transform; it receives its state on the device. Wrap the innermost transform: `optax.MultiSteps`,
        whose state is an operand of a `lax.cond`, and `lora.optimizer` go around this one.
      min_size: Minimum number of elements of a leaf that is stored in host memory.

    Returns:
      A transform with the state of `tx`. State on the device (restored from a checkpoint) is also accepted, and moves
      to host memory. Neither pmap nor :func:`lora_jax.train_many` supports state in host memory.

    Raises:
      ValueError: (from `init`) The devices have no pinned host memory.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones((512, 512)), "bias": jnp.ones(512)}
      >>> tx = host_offloaded(optax.sgd(0.1, momentum=0.9))
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params))
      >>> {leaf.shape: leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
      {(512,): 'device', (512, 512): 'pinned_host'}

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §3, Paged Optimizers
    """
    check_transform(tx, "host_offloaded")

    def is_large(leaf) -> bool:
        return leaf.size >= min_size

    def init(params):
        _check_backend()
        state = tx.init(params)
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, HOST) if is_array(leaf) and is_large(leaf) else leaf, state
        )

    def update(updates, state, params=None, **extra):
        leaves, treedef = jax.tree.flatten((updates, state, params, extra))
        indices = [index for index, leaf in enumerate(leaves) if is_array(leaf)]
        arrays = [leaves[index] for index in indices]
        results = []

        def flat(*arrays):
            by_index = dict(enumerate(leaves)) | dict(zip(indices, arrays))
            updates, state, params, extra = jax.tree.unflatten(treedef, by_index.values())
            result = update_with(tx, updates, state, params, extra)
            results.append(result)
            return jax.tree.leaves(result)

        def inlined(*arrays):
            program = jaxprs.trace(flat, arrays)
            return _evaluate_inlined(program.jaxpr, _program_inputs(program, arrays))

        program = jaxprs.trace(inlined, [jax.eval_shape(_load, x) if in_host_memory(x) else x for x in arrays])
        count = len(jax.tree.leaves(results[-1][0]))
        inputs = _program_inputs(program, arrays)
        out = _stream(program.jaxpr, inputs, lambda index, leaf: index >= count and is_large(leaf))
        return jax.tree.unflatten(jax.tree.structure(results[-1]), out)

    return optax.GradientTransformationExtraArgs(init, update)


def _stream(jaxpr: jaxprs.Jaxpr, arrays: Sequence[Any], to_host: Callable[[int, Any], bool]) -> list[Any]:
    """Evaluates a jaxpr some of whose inputs are in host memory, with few of them on the device at a time.

    Args:
      jaxpr: Expects all of its inputs on the device.
      arrays: The inputs, on the device or in host memory.
      to_host: `to_host(index, output)` returns whether an output goes to host memory.
    """
    variables, consts = jaxprs.inputs(jaxpr)
    values = dict(zip(variables, [*consts, *arrays]))
    equations, outputs = jaxprs.equations(jaxpr), jaxprs.outputs(jaxpr)
    on_host = {variable for variable in variables if in_host_memory(values[variable])}

    # A stage begins when a leaf is loaded, and runs the equations that need it and no later leaf.
    order = _order_of_use(equations, outputs, on_host)
    stage = {variable: number for number, variable in enumerate(order, 1)}
    steps: list[list[Any]] = [[] for _ in range(len(order) + 1)]
    for equation in equations:
        number = max((stage[atom] for atom in equation.invars if _is_variable(atom) and atom in stage), default=0)
        stage.update(dict.fromkeys(equation.outvars, number))
        steps[number].append(equation)
    stores: list[list[int]] = [[] for _ in steps]  # by stage, the outputs that go to the host after it
    for index, atom in enumerate(outputs):
        if _is_variable(atom) and to_host(index, atom.aval):
            stores[stage.get(atom, 0)].append(index)

    stored: dict[int, Any] = {}
    for number, equations in enumerate(steps):
        if number:
            leaf = values[order[number - 1]]
            before = [stored[index] for index in stores[number - AHEAD]] if number >= AHEAD else []
            if before and isinstance(leaf, jax.core.Tracer):
                leaf, *_ = jax.lax.optimization_barrier((leaf, *before))
            values[order[number - 1]] = _load(leaf)
        jaxprs.evaluate(equations, values)
        for index in stores[number]:
            stored[index] = jax.device_put(values[outputs[index]], HOST)
    return [stored[index] if index in stored else jaxprs.read(values, atom) for index, atom in enumerate(outputs)]


def _program_inputs(program: jaxprs.Program, arrays: Sequence[Any]) -> list[Any]:
    """Returns the inputs of a program's jaxpr: the used ones of its constants and of the arrays."""
    return [*program.consts, *(array for array, used in zip(arrays, program.used) if used)]


def _evaluate_inlined(jaxpr: jaxprs.Jaxpr, arrays: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with the functions that it calls by `jit` inlined."""
    variables, consts = jaxprs.inputs(jaxpr)
    values = dict(zip(variables, [*consts, *arrays]))

    def apply(equation, operands):
        if _is_plain_call(equation):
            return _evaluate_inlined(equation.params["jaxpr"], operands)
        return jaxprs.bind(equation, operands)

    jaxprs.evaluate(jaxprs.equations(jaxpr), values, apply)
    return [jaxprs.read(values, atom) for atom in jaxprs.outputs(jaxpr)]


def _is_plain_call(equation: Any) -> bool:
    """Returns whether an equation is a `jit` without shardings."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    shardings = (*equation.params["in_shardings"], *equation.params["out_shardings"])
    return all(map(jaxprs.is_unspecified, shardings))


def _order_of_use(equations: Sequence[Any], outputs: Sequence[Any], variables: Set[Any]) -> list[Any]:
    """Returns variables in the order of first use when the outputs are computed one after another, depth first."""
    producers = {variable: equation for equation in equations for variable in equation.outvars}
    order, visited, stack = [], set(), list(reversed(outputs))
    while stack:
        atom = stack.pop()
        if not _is_variable(atom) or atom in visited:
            continue
        visited.add(atom)
        if atom in producers:
            stack.extend(reversed(producers[atom].invars))
        elif atom in variables:
            order.append(atom)
    return order


def _is_variable(atom: Any) -> bool:
    return not jaxprs.is_literal(atom)


def in_host_memory(array: Any) -> bool:
    """Returns whether an array or a tracer is in host memory."""
    return jax.typeof(array).memory_space == HOST


def _load(array: Any) -> jax.Array:
    return jax.device_put(array, DEVICE)


def _check_backend() -> None:
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
        raise ValueError(
            f"host_offloaded: {device.platform} devices have no memory of the kind {KIND!r}, only "
            f"{', '.join(map(repr, kinds))}."
        )
