"""The reference of an objective: the base, a snapshot of the delta, another adapter, or another model."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.objectives.log_probabilities import Batch, LogProbs


class Frozen(NamedTuple):
    """A base and a reference, in place of the base of a `lora_jax.TrainState`.

    A step receives it as an argument, preserves its shardings, and never changes or donates it. A base alone has the
    reference `{}`, which is the base itself. `lora_jax.save_state` and `restore_state` take the state with the base
    alone.

    Attributes:
      base: The frozen parameters.
      reference: A delta for the same base, or what an objective calls its teacher.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> base = {"w": jnp.ones((4, 4))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = lora.TrainState.create(base, delta, optax.sgd(0.1), jax.random.key(1))
      >>> state = state.replace(base=Frozen(base, reference=delta))  # the delta at the start: `create` copies it
      >>> sorted(split(state.base)[1])
      ['w']
      >>> alone = state.replace(base=state.base.base)  # to save it
    """

    base: Any
    reference: Any


def split(base: Any) -> tuple[Any, Any]:
    """Returns a base and its reference, through which no gradient flows."""
    return (base.base, jax.lax.stop_gradient(base.reference)) if isinstance(base, Frozen) else (base, {})


def check_reference(delta: Any, reference: Any) -> None:
    """Raises an error if the delta needs a base that `lora_jax.prepare` changed, and the reference does not.

    Such a base without an adapter is not the model that training starts from.

    Raises:
      ValueError: Names a path and what to do.
    """
    for path, node in delta.items():
        if getattr(node, "fingerprint", None) is not None and path not in reference:
            raise ValueError(
                f"{path!r}: lora_jax.prepare moved a part of this weight into its adapter, so the reference, which "
                "does not adapt it, is not the model that training starts from. Use a snapshot of the delta: "
                "state.replace(base=Frozen(base, reference=delta))."
            )


def log_ratios(log_probs: LogProbs, base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Returns the policy's log-probability of each label minus the reference's, `float32[*rows, tokens]`.

    The differences of tokens are summed, not the sums subtracted: at the start they are zero up to the rounding of one
    token, however long the text is.

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      base: The base, or :class:`Frozen`.
      delta: The policy.
      batch: Rows of tokens; see :func:`reference_log_probs`.
      key: A key for dropout, or None.

    Raises:
      ValueError: See :func:`reference_log_probs`.
    """
    policy = log_probs(split(base)[0], delta, batch, key)
    return policy - reference_log_probs(log_probs, base, delta, batch, policy)


def reference_log_probs(log_probs: LogProbs, base: Any, delta: Any, batch: Batch, policy: jax.Array) -> jax.Array:
    """Returns the log-probabilities of the reference, through which no gradient flows.

    Those of a reference that equals the delta bit for bit are the policy's: XLA may compile the same function to other
    roundings where it is differentiated.

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      base: The base, or :class:`Frozen`.
      delta: The policy.
      batch: Rows of tokens. If it has `reference_log_probs`, from `log_probs(base, reference, batch)` (computed once
        for all epochs), they are the result.
      policy: The log-probabilities of the policy.

    Raises:
      ValueError: The delta needs a base that `lora_jax.prepare` changed, and the reference does not.
    """
    if "reference_log_probs" in batch:
        return batch["reference_log_probs"]
    base, reference = split(base)
    check_reference(delta, reference)
    values = jax.lax.stop_gradient(log_probs(base, reference, batch, None))
    if getattr(log_probs, "dropout", False) or not _same_shapes(delta, reference):
        return values
    return jnp.where(_equal(delta, reference), jax.lax.stop_gradient(policy), values)


def _same_shapes(delta: Any, reference: Any) -> bool:
    """Whether two deltas have the same structure, shapes and dtypes."""
    leaves, others = jax.tree.leaves(delta), jax.tree.leaves(reference)
    return jax.tree.structure(delta) == jax.tree.structure(reference) and all(
        leaf.shape == other.shape and leaf.dtype == other.dtype for leaf, other in zip(leaves, others)
    )


def _equal(delta: Any, reference: Any) -> jax.Array:
    """Whether all leaves of two deltas of the same shapes are equal, a boolean scalar."""
    leaves = jax.tree.map(lambda leaf, other: jnp.all(leaf == other), delta, reference)
    return functools.reduce(jnp.logical_and, jax.tree.leaves(leaves), jnp.bool_(True))
