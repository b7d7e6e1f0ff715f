"""Optimizer state in host memory, which each update streams through the device."""

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
"""How many leaves come to the device before the first of them has to be back: one arrives while another leaves.

More take memory in proportion up to 4; from 6 on XLA's scheduler for TPUs keeps half of all state on the device.
"""


def host_offloaded(
    tx: optax.GradientTransformation, *, min_size: int = 100_000
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the large leaves of its state live in the host's memory.

    An update brings them to the device, runs `tx`, and puts what it returns back. The numbers are those of `tx`. Leaves
    keep their sharding; only their memory kind is another, 'pinned_host'. This is the counterpart of paged optimizers:
    it saves the state's memory on the device, and costs the time in which all of it travels both ways.

    Under jit the state streams: a leaf begins to move to the device when the second one before it is back, so that
    about five are there at a time. This holds as far as `tx` works leaf by leaf, which Adam does, after a clip by the
    gradients' norm too. What can only be computed from all of the state (a norm of the moments or of Adam's updates,
    what a `lax.cond` takes) has to have all of it on the device at once.

    Donated state is updated in place, as in :func:`lora_jax.train_step`. A jit of your own donates the parameters too,
    and returns them and the state in the order in which it takes them: JAX pairs buffers by shape alone, and state that
    it pairs with other parameters ends in the wrong memory (on a CPU the process aborts).

    Args:
      tx: Any Optax transform; it finds its state on the device. Wrap the innermost: `optax.MultiSteps`, whose state
        is a `lax.cond`'s, and `lora.optimizer` go around this.
      min_size: Elements from which on a leaf is large. Smaller ones stay on the device.

    Returns:
      A transform with the state of `tx`. State that is on the device (restored so from a checkpoint) is taken too, and
      goes to the host. Neither pmap nor :func:`lora_jax.train_many` can hold state in host memory.

    Raises:
      ValueError: (from `init`) The backend's devices have no pinned host memory.

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
        places = [place for place, leaf in enumerate(leaves) if is_array(leaf)]
        arrays = [leaves[place] for place in places]
        results = []

        def flat(*arrays):
            given = dict(enumerate(leaves)) | dict(zip(places, arrays))
            updates, state, params, extra = jax.tree.unflatten(treedef, given.values())
            result = update_with(tx, updates, state, params, extra)
            results.append(result)
            return jax.tree.leaves(result)

        def inlined(*arrays):
            program = jaxprs.trace(flat, arrays)
            return _evaluated(program.jaxpr, _given(program, arrays))

        program = jaxprs.trace(inlined, [jax.eval_shape(_loaded, x) if in_host_memory(x) else x for x in arrays])
        moved, state = results[-1]
        count = len(jax.tree.leaves(moved))
        out = _streamed(program.jaxpr, _given(program, arrays), lambda place, leaf: place >= count and is_large(leaf))
        return jax.tree.unflatten(jax.tree.structure((moved, state)), out)

    return optax.GradientTransformationExtraArgs(init, update)


def _streamed(jaxpr: jaxprs.Jaxpr, arrays: Sequence[Any], returns: Callable[[int, Any], bool]) -> list[Any]:
    """The outputs of a jaxpr some of whose inputs are on the host, in an order that needs few of them at a time.

    Args:
      jaxpr: Its inputs are all on the device.
      arrays: Its inputs, where they are.
      returns: `returns(place, output)`: whether an output goes to the host.
    """
    variables, consts = jaxprs.inputs(jaxpr)
    values = dict(zip(variables, [*consts, *arrays]))
    equations, outputs = jaxprs.equations(jaxpr), jaxprs.outputs(jaxpr)
    absent = {variable for variable in variables if in_host_memory(values[variable])}

    # A stage begins with the arrival of a leaf and runs all that needs it and those before.
    order = _first_needed(equations, outputs, absent)
    stage = {variable: number for number, variable in enumerate(order, 1)}
    steps: list[list[Any]] = [[] for _ in range(len(order) + 1)]
    for equation in equations:
        number = max((stage[atom] for atom in equation.invars if _is_variable(atom) and atom in stage), default=0)
        stage.update(dict.fromkeys(equation.outvars, number))
        steps[number].append(equation)
    leaving: list[list[int]] = [[] for _ in steps]
    for place, atom in enumerate(outputs):
        if _is_variable(atom) and returns(place, atom.aval):
            leaving[stage.get(atom, 0)].append(place)

    stored: dict[int, Any] = {}
    for number, equations in enumerate(steps):
        if number:
            leaf = values[order[number - 1]]
            before = [stored[place] for place in leaving[number - AHEAD]] if number >= AHEAD else []
            if before and isinstance(leaf, jax.core.Tracer):
                leaf, *_ = jax.lax.optimization_barrier((leaf, *before))
            values[order[number - 1]] = _loaded(leaf)
        for equation in equations:
            with jaxprs.context(equation):
                operands = [jaxprs.read(values, atom) for atom in equation.invars]
                values.update(zip(equation.outvars, jaxprs.bind(equation, operands)))
        for place in leaving[number]:
            stored[place] = jax.device_put(values[outputs[place]], HOST)
    return [stored[place] if place in stored else jaxprs.read(values, atom) for place, atom in enumerate(outputs)]


def _given(program: jaxprs.Program, arrays: Sequence[Any]) -> list[Any]:
    """What the jaxpr of a program takes, when the program is given these arrays."""
    return [*program.consts, *(array for array, keep in zip(arrays, program.used) if keep)]


def _evaluated(jaxpr: jaxprs.Jaxpr, arrays: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr, equation by equation, those of the functions that it calls by `jit` included."""
    variables, consts = jaxprs.inputs(jaxpr)
    values = dict(zip(variables, [*consts, *arrays]))
    for equation in jaxprs.equations(jaxpr):
        operands = [jaxprs.read(values, atom) for atom in equation.invars]
        with jaxprs.context(equation):
            if _is_plain_call(equation):
                results = _evaluated(equation.params["jaxpr"], operands)
            else:
                results = jaxprs.bind(equation, operands)
        values.update(zip(equation.outvars, results))
    return [jaxprs.read(values, atom) for atom in jaxprs.outputs(jaxpr)]


def _is_plain_call(equation: Any) -> bool:
    """Whether an equation is a `jit` that says nothing of shardings."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    shardings = (*equation.params["in_shardings"], *equation.params["out_shardings"])
    return all(map(jaxprs.is_unspecified, shardings))


def _first_needed(equations: Sequence[Any], outputs: Sequence[Any], wanted: Set[Any]) -> list[Any]:
    """Variables in the order in which computing one output after another asks for them, depth first."""
    maker = {variable: equation for equation in equations for variable in equation.outvars}
    found, seen, stack = [], set(), list(reversed(outputs))
    while stack:
        atom = stack.pop()
        if not _is_variable(atom) or atom in seen:
            continue
        seen.add(atom)
        if atom in maker:
            stack.extend(reversed(maker[atom].invars))
        elif atom in wanted:
            found.append(atom)
    return found


def _is_variable(atom: Any) -> bool:
    return not jaxprs.is_literal(atom)


def in_host_memory(array: Any) -> bool:
    """Whether an array, or a tracer of one, is in the host's memory rather than the device's."""
    return jax.typeof(array).memory_space == HOST


def _loaded(array: Any) -> jax.Array:
    return jax.device_put(array, DEVICE)


def _check_backend() -> None:
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND not in kinds:
        raise ValueError(
            f"host_offloaded: {device.platform} devices have no memory of the kind {KIND!r}, only "
            f"{', '.join(map(repr, kinds))}."
        )
