"""Training states on disk: the adapter, the optimizer state, the step count and the key, without the base.

A state's directory is an adapter directory (:mod:`lora_jax.checkpoint`) whose `adapter.json` describes more arrays
under `state`: :func:`lora_jax.load` reads the adapter from it.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from lora_jax import checkpoint, checks, manifest, paths
from lora_jax.sharding import delta_shardings
from lora_jax.state import TrainState
from lora_jax.training import explaining_donation

_PREFIX = "@"  # of what is not an adapter's: '@step', '@opt_state/0/mu/…'
_KEY, _WEAK = "prng", "weak_type"


def save_state(directory: str | os.PathLike, state: TrainState) -> None:
    """Writes a training state without its base, atomically, as :func:`lora_jax.save` writes an adapter.

    Of the base a digest of each adapted weight is stored, by which :func:`restore_state` detects another base. Other
    parts of the base, such as batch statistics that training changes, are the caller's to save.

    Args:
      directory: Where to; parents are made. An adapter or a state that is there already is replaced.
      state: With concrete arrays, which this process can read: gather what spans processes first.

    Raises:
      TypeError: `state` is not a TrainState.
      ValueError: A leaf is no array or out of this process's reach.
      FileExistsError: `directory` holds something else.
      RuntimeError: The state's buffers were donated to a step.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax, tempfile
      >>> base, tx = {"w": jnp.ones((4, 4))}, optax.adamw(1e-3)
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_state(folder + "/state", state)
      ...     again = restore_state(folder + "/state", base, tx)
      >>> bool((again.delta["w"].a == state.delta["w"].a).all()), again.opt_state[0].mu["w"].a.shape
      (True, (2, 4))
    """
    if not isinstance(state, TrainState):
        hint = "; lora.save writes a delta" if isinstance(state, dict) else ""
        hint = "; save each member of many by lora.unstack" if type(state).__name__ == "TrainStates" else hint
        raise TypeError(f"save_state(directory, state): state is a TrainState; got {type(state).__name__}{hint}.")
    with explaining_donation(state, check=True):
        described, arrays = manifest.described(state.delta, state.base)
    entries: dict[str, dict[str, Any]] = {}
    for path, leaf in _rest(state).as_dict().items():
        name, entry = _PREFIX + path, {}
        if not manifest.is_in_reach(leaf):
            raise ValueError(f"The state's {path!r} lies on several processes: gather it first.")
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            raise ValueError(f"The state's {path!r} is no array but {type(leaf).__name__}.")
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            entry, leaf = {_KEY: str(jax.random.key_impl(leaf))}, jax.random.key_data(leaf)
        elif np.ndim(leaf) == 0 and jax.typeof(leaf).weak_type:
            entry = {_WEAK: True}
        arrays[name] = np.asarray(leaf)
        entries[name] = {"shape": list(arrays[name].shape), "dtype": arrays[name].dtype.name, **entry}
    checkpoint.write(directory, {**described, manifest.STATE: entries}, arrays)


def restore_state(directory: str | os.PathLike, base: Any, tx: optax.GradientTransformation) -> TrainState:
    """Reads a training state, which continues as if it had not been interrupted: on one device to the same bits.

    Args:
      directory: From :func:`save_state`.
      base: The parameters that the state was trained on; placed on a mesh, quantized, as the training needs them.
      tx: The Optax transform of the training, which gives the optimizer state its structure.

    Returns:
      The state. On a mesh its arrays are placed as `TrainState.create` places those of a delta with
      :func:`lora_jax.delta_shardings`; elsewhere they are on the default device, not committed to it.

    Raises:
      FileNotFoundError: `directory` is no adapter directory.
      ValueError: It holds an adapter without a state, is damaged, or does not fit the base or the transform: the
        message names each path with what is stored and what is expected.

    Example:
      See :func:`save_state`.
    """
    checks.path("lora.restore_state(directory, base, tx)", directory)
    delta, described, stored = checkpoint.read(directory, base)
    entries = described.get(manifest.STATE)
    if not entries:
        raise ValueError(f"{directory} holds an adapter and no training state: lora.load reads it.")
    on_mesh = [isinstance(getattr(leaf, "sharding", None), NamedSharding) for leaf in jax.tree.leaves(base)]
    if on_mesh and all(on_mesh):
        delta = jax.device_put(delta, delta_shardings(base, delta))
    try:
        values = {name: _value(array, entries[name]) for name, array in stored.items()}
        key = values[_PREFIX + "key"]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{directory}: the training state is damaged: {type(error).__name__} {error}.") from error
    fresh = TrainState.create(base, delta, tx, key)
    expected = _rest(fresh)
    _check(directory, {name.removeprefix(_PREFIX): value for name, value in values.items()}, expected.as_dict())
    rest = expected.map(lambda path, leaf: _placed(values[_PREFIX + path], leaf))
    return fresh.replace(**rest)


def _rest(state: TrainState) -> paths.FlatTree:
    """What a state holds beside base and delta."""
    return paths.flatten({"key": state.key, "opt_state": state.opt_state, "step": state.step})


def _value(array: jax.Array, entry: dict[str, Any]) -> jax.Array:
    """A stored array as it was: a typed key, or a weakly typed scalar."""
    if _KEY in entry:
        return jax.random.wrap_key_data(array, impl=entry[_KEY])
    return jnp.asarray(array.item()) if entry.get(_WEAK) else array


def _placed(value: jax.Array, like: Any) -> jax.Array:
    """A stored array where the new state's is: on its mesh or in the host's memory."""
    if like.committed or like.sharding.memory_kind != value.sharding.memory_kind:
        return jax.device_put(value, like.sharding)
    return value


def _check(directory: str | os.PathLike, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises unless what is stored has the paths, shapes and dtypes of a state that `tx` makes."""
    wrong = [f"{path!r}: not stored; tx has {_type(leaf)}" for path, leaf in expected.items() if path not in stored]
    wrong += [f"{path!r}: stored, {_type(leaf)}; tx has none" for path, leaf in stored.items() if path not in expected]
    for path in expected.keys() & stored.keys():
        if _type(stored[path]) != _type(expected[path]):
            wrong.append(f"{path!r}: stored {_type(stored[path])}; tx has {_type(expected[path])}")
    if wrong:
        listed = "\n  ".join(sorted(wrong))
        raise ValueError(
            f"The optimizer state in {os.fspath(directory)} is of another transform than tx ({len(wrong)} paths):\n"
            f"  {listed}"
        )


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
