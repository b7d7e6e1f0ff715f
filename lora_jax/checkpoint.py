"""Adapters on disk: arrays by Orbax, and a readable JSON that says what they are.

An adapter directory holds `adapter.json` (format version; per path the kind, axis roles and other
structure, rank and alpha, and the shape and dtype of every array, or which other it is; a fingerprint of
the base) and `arrays/` (an Orbax checkpoint). Everything that :func:`load` builds comes from these two.

A later save writes its arrays into a new directory, `arrays-…`, which `adapter.json` names. Replacing that one file is
what replaces the adapter, so that a killed process, or another one that loads or saves, meets the old adapter or the
new one. Other files in the directory stay.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lora_jax import paths
from lora_jax.adapters.protocol import KINDS, Adapter, is_adapter
from lora_jax.files import listed, naming, new_parents, replaced_file, resolved, sync_tree
from lora_jax.leaves import is_abstract
from lora_jax.locks import locked, matching

Delta = dict[str, Adapter]

FORMAT = "lora_jax adapter"
VERSION = 1
MANIFEST, ARRAYS = "adapter.json", "arrays"
SAME = "same_as"
STATE = "state"
_ATTEMPTS = 8  # to load what others replace
_TEMPORARY = r"(\.orbax-checkpoint-tmp.*)?"
_NAME = rf"{ARRAYS}(-[0-9a-f]{{32}})?"
_LEFT = rf"{ARRAYS}-[0-9a-f]{{32}}{_TEMPORARY}|\.[0-9a-f]{{32}}\.writing\.{re.escape(MANIFEST)}"


def save(directory: str | os.PathLike, delta: Delta, *, base: Any = None) -> None:
    """Writes an adapter directory, atomically: whenever the process ends, the old adapter or the new one loads.

    Where several processes run together, the one that calls this writes alone; arrays that span processes are to be
    gathered before.

    Args:
      directory: Where to; parents are made. An adapter that is there already is replaced, and other files beside it
        stay; a directory that holds something else and no adapter is refused.
      delta: Adapters with concrete arrays.
      base: The parameters that the delta was trained on. With it, a digest of each adapted weight is
        stored, so that :func:`load` can tell another base of the same shapes.

    Raises:
      ValueError: The delta is empty, or holds something that is no adapter, no array or out of this process's reach.
      FileExistsError: `directory` holds something else.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/adapter", delta)
      ...     again = load(folder + "/adapter")
      >>> bool((again["w"].a == delta["w"].a).all())
      True
    """
    write(directory, *described(delta, base))


def write(directory: str | os.PathLike, manifest: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a manifest and the arrays that it describes; see :func:`save`."""
    given, directory = directory, resolved(directory)
    _check_replaceable(directory)
    with naming(given, directory), new_parents(directory / MANIFEST), locked(directory) as alone:
        old = _current(directory)
        if alone:
            _remove_stale(directory, old)
        name = f"{ARRAYS}-{uuid.uuid4().hex}"
        try:
            with _checkpointer() as checkpointer:
                args = ocp.args.StandardSave(arrays)
                checkpointer.save(directory / name, args=args, custom_metadata={"format": FORMAT})
            sync_tree(directory / name)
            if old is None and not os.path.lexists(directory / ARRAYS):
                os.rename(directory / name, directory / ARRAYS)
                name = ARRAYS
            with replaced_file(directory / MANIFEST) as file:
                file.write_text(_readable({**manifest, "arrays": name}), encoding="utf-8")
        except BaseException:
            _remove_arrays(directory, {name} - {_current(directory)})
            raise
        _remove_arrays(directory, {old} - {None, name})


def load(directory: str | os.PathLike, base: Any = None) -> Delta:
    """Reads an adapter directory.

    Args:
      directory: From :func:`save`.
      base: The parameters that the delta is for; the fit is checked.

    Returns:
      The delta as it was saved, its arrays on the default device but not committed to it.

    Raises:
      FileNotFoundError: `directory` is no adapter directory.
      ValueError: The manifest or an array is damaged or of another version, or the delta does not fit
        `base`: the message names every path with both shapes, and weights whose values are not those
        the delta was trained on.

    Example:
      See :func:`save`.
    """
    return read(directory, base)[0]


def read(directory: str | os.PathLike, base: Any) -> tuple[Delta, dict[str, Any], dict[str, jax.Array]]:
    """The delta, the manifest, and the arrays beside those of the delta (of a training state); see :func:`load`."""
    directory = pathlib.Path(directory).absolute()
    for attempt in range(_ATTEMPTS):
        with locked(directory, shared=True) if attempt else contextlib.nullcontext():
            version = _version(directory)
            try:
                return _loaded(directory, base)
            except (ValueError, OSError):
                if attempt + 1 == _ATTEMPTS or _version(directory) == version:
                    raise
    raise AssertionError("unreachable")


def _loaded(directory: pathlib.Path, base: Any) -> tuple[Delta, dict[str, Any], dict[str, jax.Array]]:
    manifest = _manifest(directory)
    entries = manifest["adapters"]
    wanted = {
        f"{path}:{name}": jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["dtype"]))
        for path, entry in entries.items()
        for name, array in entry["arrays"].items()
        if SAME not in array
    }
    others = _structs(directory / MANIFEST, manifest.get(STATE, {}))
    if base is not None:
        _check_fit(directory, manifest, base)
    arrays = _restored(directory / manifest.get("arrays", ARRAYS), wanted | others)
    delta = {}
    for path, entry in entries.items():
        cls = KINDS[entry["kind"]]
        leaves = {name: arrays[array.get(SAME, f"{path}:{name}")] for name, array in entry["arrays"].items()}
        delta[path] = cls(**leaves, **{name: _tuples(value) for name, value in entry["structure"].items()})
    return delta, manifest, {name: arrays[name] for name in others}


def _structs(file: pathlib.Path, entries: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays of a training state."""
    try:
        return {
            name: jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["dtype"]))
            for name, array in entries.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__} {error}.") from error


def _version(directory: pathlib.Path) -> tuple[int, int] | None:
    """What tells one `adapter.json` from another that replaced it."""
    with contextlib.suppress(OSError):
        status = (directory / MANIFEST).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _check_replaceable(directory: pathlib.Path) -> None:
    """Raises `FileExistsError` unless the directory is new, empty or holds an adapter that :func:`save` wrote."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is no directory; not replaced.")
    manifest = directory / MANIFEST
    if os.path.lexists(manifest):
        if manifest.is_symlink() or _current(directory) is None:
            raise FileExistsError(f"{manifest} was not written by lora_jax; not replaced.")
        return
    others = [path.name for path in sorted(directory.iterdir()) if not _is_left(path)]
    if others:
        raise FileExistsError(
            f"{directory} holds {listed(others)} and is no adapter directory (it has no {MANIFEST}); not replaced."
        )


def _current(directory: pathlib.Path) -> str | None:
    """The arrays that a directory's manifest names; None without a manifest of this library."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        name = manifest.get("arrays", ARRAYS) if manifest["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and re.fullmatch(_NAME, name) else None


def _remove_stale(directory: pathlib.Path, current: str | None) -> None:
    """Removes the arrays of saves that were killed; nobody else saves here, for the directory is locked."""
    left = {path.name for path in directory.iterdir() if _is_left(path) and path.is_dir()}
    _remove_arrays(directory, left - {current})


def _remove_arrays(directory: pathlib.Path, names: Collection[str | None]) -> None:
    for name in names:
        for path in matching(directory, rf"{name}{_TEMPORARY}"):
            if path.is_symlink():
                continue
            if path.name == ARRAYS:  # half removed, only its name would tell whose it was
                path = path.rename(directory / f"{ARRAYS}-{uuid.uuid4().hex}")
            shutil.rmtree(path, ignore_errors=True)


def _is_left(path: pathlib.Path) -> bool:
    """Whether a killed process may have left an entry of an adapter directory."""
    if path.name != ARRAYS:
        return re.fullmatch(_LEFT, path.name) is not None
    try:
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
        return metadata["custom_metadata"]["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _checkpointer() -> ocp.Checkpointer:
    """Reads and writes from this process, whatever others do; unlike the asynchronous one, from several threads."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(process, {process}, f"adapter{process}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def described(delta: Delta, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest and the flat dict of arrays."""
    if isinstance(delta, str | os.PathLike):
        raise TypeError("save takes the directory first: lora.save(directory, delta).")
    if not isinstance(delta, Mapping) or not delta:
        raise ValueError("There is nothing to save: a delta is a dict with at least one adapter.")
    weights = None if base is None else paths.flatten(base).as_dict()
    adapters: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    known: dict[tuple, str] = {}  # a frozen matrix that several adapters hold (VeRA's pair) is written once
    for path, node in delta.items():
        if not is_adapter(node):
            raise ValueError(f"delta[{path!r}] is no adapter but {type(node).__name__}.")
        if any(leaf is None for leaf in jax.tree.leaves(node, is_leaf=lambda leaf: leaf is None)):
            raise ValueError(f"delta[{path!r}] is one half of partition(); save join(train, frozen).")
        leaves, structure = {}, {}
        for field in dataclasses.fields(node):  # pyrefly: ignore[bad-argument-type]
            value = getattr(node, field.name)
            if "static" in field.metadata:
                structure[field.name] = value
            elif isinstance(value, jax.Array | np.ndarray) and not isinstance(value, jax.core.Tracer):
                if not is_in_reach(value):
                    raise ValueError(f"delta[{path!r}].{field.name} lies on several processes: gather it first.")
                name = f"{path}:{field.name}"
                leaves[field.name] = {"shape": list(value.shape), "dtype": value.dtype.name}
                own = name
                if not field.metadata["trained"] and value.ndim > 1:
                    own = known.setdefault((value.shape, value.dtype, _digest(value)), name)
                if own == name:
                    arrays[name] = np.asarray(value)
                else:
                    leaves[field.name][SAME] = own
            else:
                raise ValueError(f"delta[{path!r}].{field.name} is no array but {type(value).__name__}.")
        adapters[path] = {
            "kind": node.kind,
            **node.describe(),
            "weight_shape": list(node.shape()),
            "structure": structure,
            "arrays": leaves,
        }
    fingerprint: dict[str, Any] = {path: {"shape": entry["weight_shape"]} for path, entry in adapters.items()}
    if weights is not None:
        for path, entry in fingerprint.items():
            if path not in weights:
                raise ValueError(f"The base lacks {path!r}; {paths.nearest(path, list(weights))}.")
            entry |= {"dtype": weights[path].dtype.name, "sha256": _digest(weights[path])}
    return {"format": FORMAT, "version": VERSION, "adapters": adapters, "base": fingerprint}, arrays


def is_in_reach(array: Any) -> bool:
    """Whether this process has all values of an array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def _digest(weight: Any) -> str | None:
    """A digest of a weight's bytes, or of its codes and scales; None where this process does not have the values."""
    if is_abstract(weight) or not all(map(is_in_reach, jax.tree.leaves(weight))):
        return None
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weight):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _readable(manifest: dict[str, Any]) -> str:
    """Indented JSON with lists of plain values (shapes, roles) on one line."""
    text = json.dumps(manifest, indent=2)
    return re.sub(
        r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )


def _manifest(directory: pathlib.Path) -> dict[str, Any]:
    file = directory / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is no adapter directory: it has no {MANIFEST}.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not the manifest of a {FORMAT}.")
    if manifest.get("version") != VERSION:
        raise ValueError(f"{file} has format version {manifest.get('version')}; this release reads {VERSION}.")
    try:
        _check_entries(file, manifest["adapters"])
        if not all(isinstance(known["shape"], list) for known in manifest["base"].values()):
            raise TypeError("a shape is no list")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {type(error).__name__} {error}.") from error
    return manifest


def _check_entries(file: pathlib.Path, entries: dict[str, Any]) -> None:
    for path, entry in entries.items():
        cls = KINDS.get(entry["kind"])
        if cls is None:
            raise ValueError(
                f"{file}: {path!r} is of the kind {entry['kind']!r}; known are {', '.join(sorted(KINDS))}."
            )
        fields = {field.name for field in dataclasses.fields(cls)}  # pyrefly: ignore[bad-argument-type]
        stored = {*entry["arrays"], *entry["structure"]}
        if fields != stored:
            raise ValueError(
                f"{file}: {path!r} ({entry['kind']}) has the fields {sorted(stored)}; expected {sorted(fields)}."
            )
        for array in entry["arrays"].values():
            np.dtype(array["dtype"]), tuple(array["shape"])
            if SAME in array:
                path, _, name = array[SAME].rpartition(":")
                other = entries[path]["arrays"][name]
                if SAME in other or (other["shape"], other["dtype"]) != (array["shape"], array["dtype"]):
                    raise ValueError(f"{file}: {array[SAME]!r} does not stand for an array that is the same as it.")


def _check_fit(directory: pathlib.Path, manifest: dict[str, Any], base: Any) -> None:
    leaves = paths.flatten(base).as_dict()
    wrong = []
    for path, known in manifest["base"].items():
        shape = tuple(known["shape"])
        if path not in leaves:
            wrong.append(f"{path!r}: for shape {shape}, but the base lacks it ({paths.nearest(path, list(leaves))})")
        elif tuple(leaves[path].shape) != shape:
            wrong.append(f"{path!r}: for shape {shape}, but the base has {tuple(leaves[path].shape)}")
        elif None not in (digests := (known.get("sha256"), _digest(leaves[path]))) and digests[0] != digests[1]:
            wrong.append(f"{path!r}: of shape {shape} in both, but trained on other values than the base's")
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(f"The adapter in {directory} does not fit the base ({len(wrong)} paths):\n  {listed}")


def _restored(folder: pathlib.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays, after a comparison of what is stored with what the manifest says."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=device) for name, struct in wanted.items()
    }
    with _checkpointer() as checkpointer:
        try:
            stored = dict(checkpointer.metadata(folder).item_metadata.items())
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder} is damaged or no Orbax checkpoint: {error}") from error
        wrong = sorted(set(stored) ^ set(wanted))
        wrong += sorted(
            name
            for name, struct in wanted.items()
            if name in stored
            and (tuple(stored[name].shape), np.dtype(stored[name].dtype)) != (struct.shape, struct.dtype)
        )
        if wrong:
            raise ValueError(
                f"{folder.parent}: {MANIFEST} and {folder.name} disagree on {', '.join(map(repr, wrong[:5]))}."
            )
        try:
            restored = checkpointer.restore(folder, args=ocp.args.StandardRestore(target))
        except Exception as error:
            raise ValueError(f"{folder} cannot be read: {error}") from error
    # Not committed to a device, so that they go along with a base on any mesh.
    return {name: jnp.asarray(np.asarray(array)) for name, array in restored.items()}


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
