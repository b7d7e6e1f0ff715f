"""Statistics for initializers: moments of the inputs of weights and gradients of a loss, in one pass over batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapters.protocol import LOOKUP
from lora_jax.initializers import GRADIENT, INPUTS, Inputs, Statistics
from lora_jax.leaves import dequantized, is_abstract, is_finite, is_quantized
from lora_jax.transform import taps
from lora_jax.transform.call import Arguments, Call
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.weight import probe


def collect_stats(
    fn: Callable,
    loss: Callable | None,
    base: Any,
    requests: Mapping[str, tuple[str, tuple[str, ...]]],
    batches: Iterable[tuple],
) -> dict[str, Statistics]:
    """Collects the requested statistics of each weight.

    Runs one compiled pass per batch for the inputs and one for the gradients. Besides the base this needs memory for an
    in × in matrix for each weight whose inputs are requested, and a float32 copy of each weight whose gradient is.

    Args:
      fn: `fn(base, *batch)`.
      loss: `loss(base, *batch)`, a scalar; for gradients.
      base: The parameters.
      requests: `{path: (statistic, role of each axis)}`; the statistic is `INPUTS` or `GRADIENT`.
      batches: An iterable of batches, which is consumed once.

    Returns:
      `{path: statistics}`: sums of the moments over the batches, or means of the gradients.

    Raises:
      ValueError: The inputs of a weight that is indexed, merged or partly contracted are requested; the base has only
        shapes; a statistic is zero or not finite.
    """
    leaves = paths.flatten(base).as_dict()
    axes = {path: roles for path, (statistic, roles) in requests.items() if statistic == INPUTS}
    for path, roles in axes.items():
        if LOOKUP in roles:
            raise ValueError(
                f"{path!r}: its inputs cannot be collected, because it is indexed (a lookup), not contracted."
            )
    for path, leaf in leaves.items():
        if is_abstract(leaf):
            raise ValueError(f"{path!r}: the function must run to collect statistics, but the base has only the shape.")
    moments = {path: taps.zeros(leaves[path].shape, roles) for path, roles in axes.items()}
    selected = [path for path, (statistic, _) in requests.items() if statistic == GRADIENT]
    sums = {path: jnp.zeros(leaves[path].shape, jnp.float32) for path in selected}
    count = 0
    add_inputs, add_gradients = _Accumulator(fn, _sum_of_outputs), _Accumulator(loss, _check_loss)
    for batch in batches:
        arguments, count = Arguments.create(base, batch, {}), count + 1
        if moments:
            moments = add_inputs(
                moments, arguments, lambda path, zeros, value: taps.with_taps(path, value, axes[path], zeros)
            )
        if sums:
            sums = add_gradients(sums, arguments, _add_zeros)
    results = {}
    for path, (statistic, roles) in requests.items():
        shape = tuple(leaves[path].shape)
        # Sums are popped, so that a sum and its result are both in memory for one weight at a time.
        if statistic == INPUTS:
            results[path] = Statistics(shape, roles, inputs=_flatten(*moments.pop(path)))
        else:
            results[path] = Statistics(shape, roles, gradient=sums.pop(path) / count)
        _check(path, results[path])
    return results


def _check(path: str, statistics: Statistics) -> None:
    """Raises `ValueError` if a statistic is zero or not finite; tracers are not checked."""
    if statistics.inputs is not None:
        values, counts = statistics.inputs.squares, statistics.inputs.count
        missing, invalid = "input", "inputs contain NaN or Inf, or values whose squares are too large for float32"
    else:
        values = counts = statistics.gradient
        missing, invalid = "nonzero gradient", "gradient contains NaN or Inf"
    assert values is not None and counts is not None
    if isinstance(values, jax.core.Tracer):
        return
    if not is_finite(values):
        raise ValueError(f"{path!r}: the {invalid}.")
    if not jnp.any(counts):
        raise ValueError(f"{path!r}: no {missing} was seen: the outputs do not depend on it differentiably.")


class _Accumulator:
    """Adds the gradients of a function's result for a batch to sums. Compiled once for each kind of batch."""

    def __init__(self, fn: Callable | None, result: Callable[[Any], jax.Array]):
        self.fn = fn
        self.result = result
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, sums, arguments: Arguments, insert: Callable[[str, Any, Any], Any]):
        """Adds gradients with respect to zeros like `sums`; `insert(path, zeros, value)` adds these to a weight."""
        key = arguments.key()
        if key is None or key not in self._compiled:
            assert self.fn is not None
            call = Call.trace(self.fn, arguments)

            def result(zeros, arrays):
                values = list(arrays)
                for position, path in enumerate(call.paths):
                    if path in zeros:
                        values[position] = insert(path, zeros[path], values[position])
                    elif is_quantized(values[position]):
                        values[position] = probe(path, values[position])
                return self.result(call.evaluate(Interpreter(), values))

            def accumulate(sums, arrays):
                gradients = jax.grad(result)(jax.tree.map(jnp.zeros_like, sums), arrays)
                return jax.tree.map(jnp.add, sums, gradients)

            self._compiled[key] = jax.jit(accumulate, donate_argnums=0)
        return self._compiled[key](sums, arguments.arrays)


def _add_zeros(path: str, zeros: jax.Array, value: Any) -> jax.Array:
    """Adds zeros to the weight, whose gradient is that of the weight."""
    del path
    return dequantized(value) + zeros.astype(value.dtype)


def _sum_of_outputs(outputs: Any) -> jax.Array:
    """The sum of all floating-point outputs."""
    arrays = [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]
    floats = [leaf for leaf in arrays if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not floats:
        raise ValueError(
            "The function returns no floats; inputs of weights are collected by differentiating its outputs."
        )
    return sum((jnp.sum(jnp.real(leaf).astype(jnp.float32)) for leaf in floats), jnp.zeros((), jnp.float32))


def _check_loss(loss: Any) -> jax.Array:
    if not isinstance(loss, jax.Array) or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"prepare(loss=…): expected a scalar float from loss(base, *batch), got {jax.tree.map(jnp.shape, loss)}."
        )
    return loss


def _flatten(squares: jax.Array, total: jax.Array, count: jax.Array) -> Inputs:
    """Flattens the batch axes and the in axes to one each."""
    batch = count.size
    size = total.size // batch
    return Inputs(squares.reshape(batch, size, size), total.reshape(batch, size), count.reshape(batch))
