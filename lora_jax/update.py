"""The training step as a pure function, which train_step compiles and train_many maps over members."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import paths
from lora_jax.adapters.factored import compute_dtype
from lora_jax.leaves import is_array
from lora_jax.optim import join, partition
from lora_jax.optim.extra import step_arguments, update_with
from lora_jax.optim.offload import in_host_memory


def make_update(
    loss_fn: Callable,
    accumulate: int,
    axis: str | None = None,
    *,
    has_aux: bool = False,
    skip_nonfinite: bool = False,
) -> Callable:
    """Creates the update function of a loss function.

    Args:
      loss_fn: As for :func:`lora_jax.train_step`.
      accumulate: As for :func:`lora_jax.train_step`.
      axis: The mapped axis over which gradients are summed, or None.
      has_aux: As for :func:`lora_jax.train_step`.
      skip_nonfinite: As for :func:`lora_jax.train_step`.

    Returns:
      `update(tx, base, carry, batch) -> (carry, metrics, aux)`; `carry` is a tuple of the delta, the optimizer state,
      the number of completed steps and the key.
    """
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: expected a positive integer, the number of microbatches.")

    def sums(base, train, frozen, batch, key):
        """The gradients, loss sum, weight and number of invalid weights of one microbatch, and its aux."""

        def loss_sum(train):
            total, weight, aux = check_loss(loss_fn, loss_fn(base, join(train, frozen), batch, key), has_aux)
            return jnp.asarray(total, jnp.float32), (jnp.asarray(weight, jnp.float32), aux)

        (total, (weight, aux)), gradients = jax.value_and_grad(loss_sum, has_aux=True)(train)
        gradients = jax.tree.map(lambda g: g.astype(compute_dtype(g.dtype)), gradients)
        invalid = (~(jnp.isfinite(weight) & (weight >= 0))).astype(jnp.int32)
        return (gradients, total, weight, invalid), aux

    def update(tx, base, carry, batch):
        delta, opt_state, number, key = carry
        train, frozen = partition(delta)
        key, step_key = jax.random.split(key)
        if axis is not None:
            step_key = jax.random.fold_in(step_key, jax.lax.axis_index(axis))
        if accumulate == 1:
            totals, aux = sums(base, train, frozen, batch, step_key)
        else:

            def add(totals, inputs):
                index, microbatch = inputs
                terms, aux = sums(base, train, frozen, microbatch, jax.random.fold_in(step_key, index))
                return jax.tree.map(jnp.add, totals, terms), aux

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, compute_dtype(leaf.dtype)), train)
            zero = (zeros, jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))
            totals, aux = jax.lax.scan(add, zero, (jnp.arange(accumulate), _microbatches(batch, accumulate)))
        if axis is not None:
            totals = jax.lax.psum(totals, axis)
        gradients, total, weight, invalid = totals
        # The gradient of a batch of weight zero (padding only) is zero instead of NaN.
        divisor = jnp.where(weight == 0, 1.0, weight)
        gradients = jax.tree.map(lambda g, leaf: (g / divisor.astype(g.dtype)).astype(leaf.dtype), gradients, train)
        loss = total / divisor
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "weight": weight,
            "invalid_weights": invalid,
            "nonfinite": {path: _count_nonfinite(node) for path, node in gradients.items()},
        }
        updates, new_state = update_with(tx, gradients, opt_state, train, step_arguments(loss, gradients, frozen))
        new_train: Any = optax.apply_updates(train, updates)
        if skip_nonfinite:
            good = (sum(metrics["nonfinite"].values(), invalid) == 0) & jnp.isfinite(loss)
            new_train, new_state = select(good, (new_train, new_state), (train, opt_state))
            metrics["skipped"] = (~good).astype(jnp.int32)
        return (join(new_train, frozen), new_state, number + 1, key), metrics, aux

    return update


def select(choice: jax.Array, new: Any, old: Any) -> Any:
    """Returns the leaves of `new` if `choice` is true, else those of `old`; leaves in host memory stay there."""

    def pick(one, other):
        if not in_host_memory(other):
            return jnp.where(choice, one, other)
        one, other = jax.device_put((one, other), jax.memory.Space.Device)
        return jax.device_put(jnp.where(choice, one, other), jax.memory.Space.Host)

    return jax.tree.map(pick, new, old)


def check_loss(loss_fn: Callable, out: Any, has_aux: bool) -> tuple[Any, Any, Any]:
    """Returns the loss sum, its weight and the auxiliary outputs from the value of a loss function.

    Raises:
      TypeError: The loss or the weight is not a number or has the wrong dtype; `out` does not have the form that
        `has_aux` requires.
      ValueError: The loss or the weight is not a scalar.
    """
    where = f"loss_fn ({_describe(loss_fn)})"
    aux = None
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"{where} returned {_kind(out)}; with has_aux=True a step expects (loss, aux) or "
                "((loss_sum, weight), aux)."
            )
        out, aux = out
        for path, leaf in paths.flatten(aux).as_dict().items():
            if not (is_array(leaf) or isinstance(leaf, bool | int | float | complex)):
                raise TypeError(f"{where}: the auxiliary output {path!r} is {_kind(leaf)}; expected arrays or numbers.")
    if isinstance(out, tuple) and len(out) != 2:
        raise TypeError(f"{where} returned {_kind(out)}; expected a scalar loss or (loss_sum, weight).")
    total, weight = out if isinstance(out, tuple) else (out, 1.0)
    hint = "" if has_aux else "; auxiliary outputs need train_step(…, has_aux=True)"
    for name, value in (("loss", total), ("weight", weight)):
        if not (is_array(value) or isinstance(value, bool | int | float | complex)):
            raise TypeError(f"{where} returned {_kind(value)} as the {name}; expected a scalar{hint}.")
        if jnp.shape(value) != ():
            raise ValueError(
                f"{where} returned a {name} of shape {jnp.shape(value)}; expected a scalar: take a sum or a mean{hint}."
            )
        dtype = jnp.result_type(value)
        real = (jnp.floating,) if name == "loss" else (jnp.floating, jnp.integer, jnp.bool_)
        if not any(jnp.issubdtype(dtype, kind) for kind in real):
            raise TypeError(f"{where} returned a {name} of dtype {dtype}; expected a real floating-point scalar.")
    return total, weight, aux


def _kind(value: Any) -> str:
    """A description of a value for an error message."""
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}"
    return "None" if value is None else f"{type(value).__name__}"


def _describe(function: Callable) -> str:
    """A function's name, file and line."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__name__", type(function).__name__)
    return name if code is None else f"{name}, {code.co_filename}:{code.co_firstlineno}"


def _count_nonfinite(tree: Any) -> jax.Array:
    counts = [jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32) for leaf in jax.tree.leaves(tree)]
    return sum(counts, jnp.zeros((), jnp.int32))


def _microbatches(batch: Any, count: int) -> Any:
    """Reshapes `[n, …]` to `[count, n/count, …]`, with strided microbatches, which preserve a sharded axis."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch)
