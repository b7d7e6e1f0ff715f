"""One training step as a pure function, which train_step compiles and train_many maps over members."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adapters.factored import compute_dtype
from lora_jax.optim import join, partition


def update_of(loss_fn: Callable, accumulate: int, axis: str | None = None) -> Callable:
    """Makes the step of a loss function.

    Args:
      loss_fn: As for :func:`lora_jax.train_step`.
      accumulate: Likewise.
      axis: The mapped axis over whose devices gradients are summed, or None.

    Returns:
      `update(tx, base, moving, batch) -> (moving, metrics)`; `moving` is the delta, the optimizer state, the number
      of steps done and the key.
    """
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate={accumulate!r}: the number of microbatches is a positive integer.")

    def sums(base, train, frozen, batch, key):
        """The gradient of the loss sum, the loss sum and the weight of one microbatch."""

        def summed(train):
            out = loss_fn(base, join(train, frozen), batch, key)
            if isinstance(out, tuple) and len(out) != 2:
                raise ValueError(f"loss_fn returned {len(out)} values; expected a loss, or (loss_sum, weight).")
            total, weight = out if isinstance(out, tuple) else (out, 1.0)
            if not all(isinstance(value, jax.Array | np.ndarray | float | int) for value in (total, weight)):
                raise ValueError(
                    f"loss_fn returned {type(total).__name__} and {type(weight).__name__}; expected scalars."
                )
            for name, value in (("loss", total), ("weight", weight)):
                if jnp.shape(value) != ():
                    raise ValueError(f"loss_fn returned a {name} of shape {jnp.shape(value)}; expected a scalar.")
            return jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)

        (total, weight), gradients = jax.value_and_grad(summed, has_aux=True)(train)
        return jax.tree.map(lambda g: g.astype(compute_dtype(g.dtype)), gradients), total, weight

    def update(tx, base, moving, batch):
        delta, opt_state, number, key = moving
        train, frozen = partition(delta)
        key, use = jax.random.split(key)
        if axis is not None:
            use = jax.random.fold_in(use, jax.lax.axis_index(axis))
        if accumulate == 1:
            totals = sums(base, train, frozen, batch, use)
        else:

            def add(totals, inputs):
                index, part = inputs
                more = sums(base, train, frozen, part, jax.random.fold_in(use, index))
                return jax.tree.map(jnp.add, totals, more), None

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, compute_dtype(leaf.dtype)), train)
            zero = (zeros, jnp.zeros(()), jnp.zeros(()))
            totals, _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), _microbatches(batch, accumulate)))
        if axis is not None:
            totals = jax.lax.psum(totals, axis)
        gradients, total, weight = totals
        # A batch of weight zero (padding only) has no gradient, rather than one that is not a number.
        divisor = jnp.where(weight == 0, 1.0, weight)
        gradients = jax.tree.map(lambda g, leaf: (g / divisor.astype(g.dtype)).astype(leaf.dtype), gradients, train)
        metrics = {
            "loss": total / divisor,
            "grad_norm": optax.tree.norm(gradients),
            "weight": weight,
            "nonfinite": {path: _count_nonfinite(node) for path, node in gradients.items()},
        }
        change = optax.with_extra_args_support(tx).update
        updates, opt_state = change(gradients, opt_state, train, value=total / divisor, grad=gradients, frozen=frozen)
        moved: Any = optax.apply_updates(train, updates)
        return (join(moved, frozen), opt_state, number + 1, key), metrics

    return update


def _count_nonfinite(tree: Any) -> jax.Array:
    counts = [jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32) for leaf in jax.tree.leaves(tree)]
    return sum(counts, jnp.zeros((), jnp.int32))


def _microbatches(batch: Any, count: int) -> Any:
    """`[n, …]` to `[count, n/count, …]`; examples are dealt out in turn, so that a sharded axis stays so."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch)
