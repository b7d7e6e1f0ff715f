"""What data tells of weights: moments of their inputs and gradients of a loss, over batches that are seen once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapters.protocol import LOOKUP
from lora_jax.initializers import GRADIENT, INPUTS, Inputs, Reading
from lora_jax.leaves import dequantized, is_abstract, is_quantized
from lora_jax.renamed import module_getattr
from lora_jax.transform import taps
from lora_jax.transform.call import Arguments, Call
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.weight import probe


def collect_stats(
    fn: Callable,
    loss: Callable | None,
    base: Any,
    wanted: Mapping[str, tuple[str, tuple[str, ...]]],
    batches: Iterable[tuple],
) -> dict[str, Reading]:
    """Reads what is wanted of each weight.

    One compiled pass a batch for the inputs, one for the gradients. Held beside the base: an in × in matrix for each
    weight whose inputs are read, a float32 copy of each weight whose gradient is read.

    Args:
      fn: `fn(base, *batch)`.
      loss: `loss(base, *batch)`, a scalar; for gradients.
      base: The parameters.
      wanted: By path, `INPUTS` or `GRADIENT`, and the role of each axis.
      batches: Consumed once.

    Returns:
      By path, sums over the batches of the moments, means of the gradients.

    Raises:
      ValueError: A weight is indexed, merged or contracted in part where its inputs are wanted; the base has a
        shape only; nothing was captured, or NaN or Inf.
    """
    leaves = paths.flatten(base).as_dict()
    axes = {path: roles for path, (what, roles) in wanted.items() if what == INPUTS}
    for path, roles in axes.items():
        if LOOKUP in roles:
            raise ValueError(f"{path!r}: its inputs cannot be read: it is indexed (a lookup), not contracted.")
    for path, leaf in leaves.items():
        if is_abstract(leaf):
            raise ValueError(f"{path!r}: to read data the function is run; the base has the shape only.")
    moments = {path: taps.zeros(leaves[path].shape, roles) for path, roles in axes.items()}
    chosen = [path for path, (what, _) in wanted.items() if what == GRADIENT]
    sums = {path: jnp.zeros(leaves[path].shape, jnp.float32) for path in chosen}
    count = 0
    of_inputs, of_loss = _Accumulated(fn, _sum_of_outputs), _Accumulated(loss, _scalar)
    for batch in batches:
        arguments, count = Arguments.create(base, batch, {}), count + 1
        if moments:
            moments = of_inputs(
                moments, arguments, lambda path, zeros, value: taps.with_taps(path, value, axes[path], zeros)
            )
        if sums:
            sums = of_loss(sums, arguments, _moved)
    readings = {}
    for path, (what, roles) in wanted.items():
        shape = tuple(leaves[path].shape)
        # Sums leave their dict as their readings are made: both are not held for more than one weight.
        if what == INPUTS:
            readings[path] = Reading(shape, roles, inputs=_flat(*moments.pop(path)))
        else:
            readings[path] = Reading(shape, roles, gradient=sums.pop(path) / count)
        _check(path, readings[path])
    return readings


def _check(path: str, reading: Reading) -> None:
    """Raises where nothing was read, or what no factors can be made of; while tracing, everything passes."""
    if reading.inputs is not None:
        values, seen = reading.inputs.squares, reading.inputs.count
        nothing, bad = "input was seen", "inputs hold NaN or Inf, or values whose squares are too large for float32"
    else:
        values = seen = reading.gradient
        nothing, bad = "gradient but zero was seen", "gradient holds NaN or Inf"
    assert values is not None and seen is not None
    if isinstance(values, jax.core.Tracer):
        return
    if not jnp.isfinite(values).all():
        raise ValueError(f"{path!r}: the {bad}.")
    if not jnp.any(seen):
        raise ValueError(f"{path!r}: no {nothing}: it does not act on the outputs in a way that can be differentiated.")


class _Accumulated:
    """Adds the gradients of a function's result, a batch at a time, to sums; compiled once for each kind of batch."""

    def __init__(self, fn: Callable | None, result: Callable[[Any], jax.Array]):
        self.fn = fn
        self.result = result
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, sums, arguments: Arguments, enter: Callable[[str, Any, Any], Any]):
        """Gradients with respect to zeros like `sums`, which `enter(path, zeros, value)` brings into each weight."""
        key = arguments.key()
        if key is None or key not in self._compiled:
            assert self.fn is not None
            call = Call.trace(self.fn, arguments)

            def result(zeros, arrays):
                values = list(arrays)
                for position, path in enumerate(call.paths):
                    if path in zeros:
                        values[position] = enter(path, zeros[path], values[position])
                    elif is_quantized(values[position]):
                        values[position] = probe(path, values[position])
                return self.result(call.evaluate(Interpreter(), values))

            def added(sums, arrays):
                gradients = jax.grad(result)(jax.tree.map(jnp.zeros_like, sums), arrays)
                return jax.tree.map(jnp.add, sums, gradients)

            self._compiled[key] = jax.jit(added, donate_argnums=0)
        return self._compiled[key](sums, arguments.arrays)


def _moved(path: str, zeros: jax.Array, value: Any) -> jax.Array:
    """The weight plus zeros, whose gradient is the weight's."""
    del path
    return dequantized(value) + zeros.astype(value.dtype)


def _sum_of_outputs(outputs: Any) -> jax.Array:
    """A number that every float output has a part in."""
    arrays = [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]
    floats = [leaf for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not floats:
        raise ValueError(
            "The function returns no floats; inputs of weights are read by differentiating what it returns."
        )
    return sum((jnp.sum(jnp.real(leaf).astype(jnp.float32)) for leaf in floats), jnp.zeros((), jnp.float32))


def _scalar(loss: Any) -> jax.Array:
    if not isinstance(loss, jax.Array) or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"prepare(loss=…): loss(base, *batch) is a scalar float; it returned {jax.tree.map(jnp.shape, loss)}."
        )
    return loss


def _flat(squares: jax.Array, total: jax.Array, count: jax.Array) -> Inputs:
    """Batch axes and in axes flattened to one each."""
    batch = count.size
    size = total.size // batch
    return Inputs(squares.reshape(batch, size, size), total.reshape(batch, size), count.reshape(batch))


__getattr__ = module_getattr(__name__, capture="collect_stats")
