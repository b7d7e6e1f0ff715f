"""Calls Optax transforms with the extra arguments that they accept, and checks that a training step can use them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def update_with(
    tx: optax.GradientTransformation, updates: Any, state: Any, params: Any, extra: dict[str, Any]
) -> tuple[Any, Any]:
    """Calls `tx.update` with the extra arguments that it accepts.

    A transform inside `optax.chain` that does not accept `value=` (`optax.contrib.sam`) is only detected by calling
    it, so rejected arguments are dropped one by one.

    Args:
      tx: An Optax transform, or an object with `init` and `update` (`optax.MultiSteps`).
      updates: Gradients.
      state: From `tx.init`.
      params: The parameters.
      extra: Extra arguments by name.

    Returns:
      The updates and the new state.

    Example:
      >>> import optax, jax.numpy as jnp
      >>> tx = optax.sgd(0.5)
      >>> update_with(tx, jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), {"value": 0.0})[0].tolist()
      [-0.5]
    """
    if isinstance(tx, optax.GradientTransformation):
        tx = optax.with_extra_args_support(tx)
    extra = dict(extra)
    while True:
        try:
            return tx.update(updates, state, params, **extra)
        except TypeError as error:
            name = _UNEXPECTED.search(str(error))
            if name is None or name[1] not in extra:
                raise
            del extra[name[1]]


def check_transform(tx: Any, where: str) -> None:
    """Raises `TypeError` unless `tx` is an Optax transform."""
    if callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)):
        return
    name = getattr(tx, "__name__", None)
    hint = f"; call it: {name}(learning_rate)" if callable(tx) and name else "; for example optax.adamw(1e-4)"
    raise TypeError(f"{where}: expected tx to be an Optax transform; got {name or type(tx).__name__}{hint}.")


def init_optimizer(tx: optax.GradientTransformation, train: Any, where: str) -> Any:
    """Returns `tx.init(train)`. Errors other than a `ValueError` are raised as :func:`unsupported`."""
    try:
        return tx.init(train)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise unsupported(error, where) from error


def check_usable(tx: optax.GradientTransformation, train: Any, frozen: Any, where: str) -> None:
    """Raises an error unless a training step can call `tx.update`. The update is traced, not run.

    Args:
      tx: An Optax transform.
      train: The trainable half of a delta.
      frozen: The frozen half.
      where: The beginning of the message.

    Raises:
      ValueError: The update fails: it needs parameters of another form (`optax.lookahead`) or a function of
        the parameters (`optax.lbfgs`, line searches, opaque `optax.contrib.sam`).
    """

    def update(train, frozen):
        extra = step_arguments(jnp.zeros((), jnp.float32), train, frozen)
        return update_with(tx, train, tx.init(train), train, extra)

    if not jax.tree.leaves(train):  # some transforms do not accept an empty tree
        return
    # Try one adapter of each shape first, since tracing hundreds takes seconds. If that fails, try all of them: some
    # transforms require certain paths.
    by_type = {(jax.tree.structure(x), *map(jax.typeof, jax.tree.leaves(x))): path for path, x in train.items()}
    sample = sorted(by_type.values())
    for subset in ([sample] if len(sample) < len(train) else []) + [list(train)]:
        try:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                jax.eval_shape(update, *({path: half[path] for path in subset} for half in (train, frozen)))
        except Exception as error:  # any error of the transform: its message is included
            if subset is not sample:
                raise unsupported(error, where) from error
        else:
            return


def unsupported(error: Exception, where: str) -> ValueError:
    """Returns the error for a transform that fails on the trainable half of a delta."""
    return ValueError(
        f"{where}: this Optax transform cannot be used in a training step ({type(error).__name__}: {error}). A step "
        "calls update(gradients, state, params), with value=, grad= and frozen= if accepted. Transforms that need "
        "another form of parameters (optax.lookahead) or a function (value_fn of optax.lbfgs and line searches, "
        "grad_fn of opaque sam) are not supported; use optax.adamw, transparent optax.contrib.sam, or "
        "optax.lbfgs(linesearch=None), for example."
    )


def step_arguments(value: Any, gradients: Any, frozen: Any) -> dict[str, Any]:
    """Returns the extra arguments that a training step passes to a transform."""
    return {"value": value, "grad": gradients, "frozen": frozen}
