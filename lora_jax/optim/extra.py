"""Optax transforms and the extra arguments that they take."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def update_with(
    tx: optax.GradientTransformation, updates: Any, state: Any, params: Any, extra: dict[str, Any]
) -> tuple[Any, Any]:
    """`tx.update` with those of the extra arguments that it takes.

    A transform without extra arguments gets none. Inside `optax.chain` one that takes no `value=`
    (`optax.contrib.sam`) shows only when it is called, so the call decides.

    Args:
      tx: An Optax transform, or an object with `init` and `update` (`optax.MultiSteps`).
      updates: Gradients.
      state: From `tx.init`.
      params: The parameters.
      extra: Extra arguments by name.

    Returns:
      What `tx.update` returns.

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
    raise TypeError(f"{where}: tx is an Optax transform; got {name or type(tx).__name__}{hint}.")


def init_for(tx: optax.GradientTransformation, train: Any, where: str) -> Any:
    """`tx.init(train)`; a failure other than a `ValueError`, which explains itself, becomes :func:`refusal`."""
    try:
        return tx.init(train)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise refusal(error, where) from error


def check_serves(tx: optax.GradientTransformation, train: Any, frozen: Any, where: str) -> None:
    """Raises unless a training step can call `tx.update`. The update is traced, not run.

    Args:
      tx: An Optax transform.
      train: The trained half of a delta.
      frozen: The other half.
      where: The beginning of the message.

    Raises:
      ValueError: The update fails: it needs parameters of another form (`optax.lookahead`) or a function of
        the parameters (`optax.lbfgs`, line searches, opaque `optax.contrib.sam`).
    """

    def update(train, frozen):
        extra = step_arguments(jnp.zeros((), jnp.float32), train, frozen)
        return update_with(tx, train, tx.init(train), train, extra)

    if not jax.tree.leaves(train):  # nothing trains, and some transforms take no empty tree
        return
    # One adapter of each shape, for a trace of hundreds takes seconds; all of them where that is not enough, as for
    # transforms that look for paths.
    alike = {(jax.tree.structure(node), *map(jax.typeof, jax.tree.leaves(node))): path for path, node in train.items()}
    some = sorted(alike.values())
    for chosen in ([some] if len(some) < len(train) else []) + [list(train)]:
        try:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                jax.eval_shape(update, *({path: half[path] for path in chosen} for half in (train, frozen)))
        except Exception as error:  # whatever the transform raises: its message is passed on
            if chosen is not some:
                raise refusal(error, where) from error
        else:
            return


def refusal(error: Exception, where: str) -> ValueError:
    """The error for a transform that fails on the trained half of a delta."""
    return ValueError(
        f"{where}: this Optax transform cannot be used in a training step ({type(error).__name__}: {error}). A step "
        "calls update(gradients, state, params) with value=, grad= and frozen= where it takes them: a transform that "
        "needs another form of parameters (optax.lookahead) or a function (value_fn of optax.lbfgs and line searches, "
        "grad_fn of opaque sam) cannot be served; use one that does not (optax.adamw, transparent optax.contrib.sam, "
        "optax.lbfgs(linesearch=None))."
    )


def step_arguments(value: Any, gradients: Any, frozen: Any) -> dict[str, Any]:
    """The extra arguments that a training step passes to a transform."""
    return {"value": value, "grad": gradients, "frozen": frozen}
