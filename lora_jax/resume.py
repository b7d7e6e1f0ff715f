"""Saves and restores training states: the adapter, the optimizer state, the step count and the key, not the base.

The directory of a state is an adapter directory (:mod:`lora_jax.checkpoint`) whose `adapter.json` has a further entry,
`state`, that describes the other arrays. :func:`lora_jax.load` reads the adapter from it.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import checkpoint, checks, manifest, paths
from lora_jax.base_identity import is_addressable
from lora_jax.meshes import mesh_sharding
from lora_jax.sharding import delta_shardings
from lora_jax.state import TrainState
from lora_jax.step_checks import explain_donation

_PREFIX = "@"  # of arrays of the state outside its delta: '@step', '@opt_state/0/mu/…'
_KEY, _WEAK = "prng", "weak_type"


def save_state(directory: str | os.PathLike, state: TrainState) -> None:
    """Saves a training state without its base, atomically, as :func:`lora_jax.save` saves an adapter.

    A digest of each adapted weight of the base is stored, by which :func:`restore_state` detects another base. The
    caller must save other parts of the base that training changes, such as batch statistics.

    Args:
      directory: The directory, which is created with its parents. An adapter or a state in it is replaced.
      state: A state of concrete arrays that this process can read. Gather arrays that span processes first.

    Raises:
      TypeError: `state` is not a TrainState.
      ValueError: A leaf is not an array, or this process cannot read it.
      FileExistsError: `directory` contains other files and no adapter.
      RuntimeError: The state's buffers were donated to a step.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax, tempfile
      >>> base, tx = {"w": jnp.ones((4, 4))}, optax.adamw(1e-3)
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_state(folder + "/state", state)
      ...     restored = restore_state(folder + "/state", base, tx)
      >>> bool((restored.delta["w"].a == state.delta["w"].a).all()), restored.opt_state[0].mu["w"].a.shape
      (True, (2, 4))
    """
    if not isinstance(state, TrainState):
        hint = "; lora.save writes a delta" if isinstance(state, dict) else ""
        hint = "; save each member of many by lora.unstack" if type(state).__name__ == "TrainStates" else hint
        raise TypeError(f"save_state(directory, state): expected a TrainState, got {type(state).__name__}{hint}.")
    with explain_donation(state, check=True):
        description, arrays = manifest.describe(state.delta, state.base)
    entries: dict[str, dict[str, Any]] = {}
    for path, leaf in _other_leaves(state).as_dict().items():
        name, entry = _PREFIX + path, {}
        if not is_addressable(leaf):
            raise ValueError(f"The state's {path!r} spans several processes; gather it first.")
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            raise ValueError(f"The state's {path!r} is not an array: got {type(leaf).__name__}.")
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            entry, leaf = {_KEY: str(jax.random.key_impl(leaf))}, jax.random.key_data(leaf)
        elif np.ndim(leaf) == 0 and jax.typeof(leaf).weak_type:
            entry = {_WEAK: True}
        arrays[name] = np.asarray(leaf)
        entries[name] = {"shape": list(arrays[name].shape), "dtype": arrays[name].dtype.name, **entry}
    checkpoint.write(directory, {**description, manifest.STATE: entries}, arrays)


def restore_state(directory: str | os.PathLike, base: Any, tx: optax.GradientTransformation) -> TrainState:
    """Restores a training state. Training continues as if not interrupted; on one device bit for bit.

    Args:
      directory: A directory written by :func:`save_state`.
      base: The parameters that the state was trained on, sharded and quantized as the training needs them.
      tx: The Optax transform of the training, which determines the structure of the optimizer state.

    Returns:
      The state. If the base is on a mesh, its arrays have the shardings that `TrainState.create` gives the state of a
      delta with :func:`lora_jax.delta_shardings`. Otherwise they are uncommitted on the default device.

    Raises:
      FileNotFoundError: `directory` is not an adapter directory.
      ValueError: The directory has an adapter without a state, is damaged, or does not fit the base or the transform.
        The message lists each path with the stored and the expected shape and dtype.

    Example:
      See :func:`save_state`.
    """
    checks.path("lora.restore_state(directory, base, tx)", directory)
    delta, description, stored = checkpoint.read(directory, base)
    entries = description.get(manifest.STATE)
    if not entries:
        raise ValueError(f"{directory} has an adapter but no training state; read it with lora.load.")
    shardings = [mesh_sharding(leaf) for leaf in jax.tree.leaves(base)]
    if shardings and None not in shardings:
        delta = jax.device_put(delta, delta_shardings(base, delta))
    try:
        values = {name: _restore_value(array, entries[name]) for name, array in stored.items()}
        key = values[_PREFIX + "key"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{directory}: the training state is damaged: {type(error).__name__} {error}.") from error
    initial = TrainState.create(base, delta, tx, key)
    expected = _other_leaves(initial)
    _check(directory, {name.removeprefix(_PREFIX): value for name, value in values.items()}, expected.as_dict())
    return initial.replace(**expected.map(lambda path, leaf: _put_like(values[_PREFIX + path], leaf)))


def _other_leaves(state: TrainState) -> paths.FlatTree:
    """The leaves of a state outside its base and delta."""
    return paths.flatten({"key": state.key, "opt_state": state.opt_state, "step": state.step})


def _restore_value(array: jax.Array, entry: dict[str, Any]) -> jax.Array:
    """Restores a typed key or a weakly typed scalar from its stored array."""
    if _KEY in entry:
        return jax.random.wrap_key_data(array, impl=entry[_KEY])
    return jnp.asarray(array.item()) if entry.get(_WEAK) else array


def _put_like(value: jax.Array, like: Any) -> jax.Array:
    """Puts a stored array on the devices and in the memory of another one."""
    if like.committed or like.sharding.memory_kind != value.sharding.memory_kind:
        return jax.device_put(value, like.sharding)
    return value


def _check(directory: str | os.PathLike, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises `ValueError` unless the stored arrays have the paths, shapes and dtypes of a state of `tx`."""
    problems = [f"{path!r}: not stored; tx has {_type(expected[path])}" for path in expected.keys() - stored.keys()]
    problems += [f"{path!r}: stored, {_type(stored[path])}; tx has none" for path in stored.keys() - expected.keys()]
    for path in expected.keys() & stored.keys():
        if _type(stored[path]) != _type(expected[path]):
            problems.append(f"{path!r}: stored {_type(stored[path])}; tx has {_type(expected[path])}")
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ValueError(
            f"The optimizer state in {os.fspath(directory)} belongs to another transform than tx ({len(problems)} "
            f"paths):\n  {lines}"
        )


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
