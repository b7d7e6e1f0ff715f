"""Checkpoints of a training run: the state's arrays beside a JSON of what has been measured."""

from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.errors import UserError

S = TypeVar("S")


class Checkpoints:
    """Saves `(state, history)` by step and restores the last one that was written whole.

    Only arrays are stored, in the order of the state's leaves: structure and everything static come from the
    state that the same settings build anew. A context manager: leaving it waits for what is being written.

    Args:
      directory: Made where it does not exist.
      every: Steps between checkpoints.
    """

    def __init__(self, directory: Path, every: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=every)
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, step: int, state: Any, history: dict[str, Any], *, force: bool = False) -> None:
        """Saves in the background where `step` is due; with `force`, always and before returning."""
        if self._manager.latest_step() == step or not (force or self._manager.should_save(step)):
            return
        arrays = {f"{i:05}": _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        content = {"history": history, "shapes": _shapes(arrays)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), content=ocp.args.JsonSave(content))
        self._manager.save(step, args=args, force=force)
        if force:
            self._manager.wait_until_finished()

    def restore(self, state: S) -> tuple[S, dict[str, Any] | None]:
        """The last checkpoint in the structure of `state`, with its history; `(state, None)` without one.

        Raises:
          UserError: The checkpoint does not fit or cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return state, None
        leaves, structure = jax.tree.flatten(state)
        arrays = {f"{i:05}": _plain(leaf) for i, leaf in enumerate(leaves)}
        # Orbax cuts or pads an array to the shape that is asked for: shapes are compared first.
        try:
            content = self._restore(step, content=ocp.args.JsonRestore())["content"]
            if content["shapes"] != _shapes(arrays):
                raise ValueError("it is of another model or method")
            found = self._restore(step, state=ocp.args.StandardRestore(arrays))["state"]
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self._directory}: the checkpoint of step {step} cannot be resumed ({reason}); --fresh starts over"
            ) from error
        restored = [_like(leaf, found[name]) for leaf, name in zip(leaves, arrays)]
        return jax.tree.unflatten(structure, restored), content["history"]

    def _restore(self, step: int, **args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**args))


def _shapes(arrays: dict[str, Any]) -> list[list[Any]]:
    return [[*array.shape, str(array.dtype)] for array in arrays.values()]


def _plain(leaf: Any) -> Any:
    """An array that can be stored: a typed key as its integers."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _like(leaf: Any, stored: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(leaf))
    return stored
