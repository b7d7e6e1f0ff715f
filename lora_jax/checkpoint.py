"""Adapters on disk: arrays by Orbax, and a readable JSON that says what they are.

An adapter directory holds `adapter.json` (format version; per path the kind, axis roles and other
structure, rank and alpha, and the shape and dtype of every array, or which other it is; a fingerprint of
the base) and `arrays/` (an Orbax checkpoint). Everything that :func:`load` builds comes from these two.

A later save writes its arrays into a new directory, `arrays-…`, which `adapter.json` names. Replacing that one file is
what replaces the adapter, so that a killed process, or another one that loads or saves, meets the old adapter or the
new one. Other files in the directory stay.
"""

import contextlib
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

from lora_jax import checks, manifest
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import Delta
from lora_jax.io.arrays import read_arrays
from lora_jax.io.files import create_parents, errors_naming, join_names, replace_file, resolve, sync_tree
from lora_jax.io.locks import lock, match_entries
from lora_jax.io.read_errors import describe_error, is_read_error, shorten
from lora_jax.manifest import ARRAYS, FORMAT, MANIFEST, NAME

_ATTEMPTS = 8  # to load what others replace
_TEMPORARY = r"(\.orbax-checkpoint-tmp.*)?"
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
      TypeError: The arguments are swapped, or the delta is no dict of adapters.
      ValueError: The delta is empty, one half of `partition`, or has arrays out of this process's reach.
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
    checks.path("lora.save(directory, delta)", directory)
    write(directory, *manifest.described(delta, base))


def write(directory: str | os.PathLike, described: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a manifest and the arrays that it describes; see :func:`save`."""
    path, directory = directory, resolve(directory)
    _check_replaceable(directory)
    with errors_naming(path, directory), create_parents(directory / MANIFEST), lock(directory) as alone:
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
            with replace_file(directory / MANIFEST) as file:
                file.write_text(manifest.readable({**described, "arrays": name}), encoding="utf-8")
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
      ValueError: The manifest or an array is damaged or of another version, or they contradict each other, or the delta
        does not fit `base`: the message names every path with both shapes, and weights whose values are not those the
        delta was trained on.

    Warns:
      BasePrecisionWarning: The base has weights that the delta was trained on in another precision, such as the floats
        of what was quantized (known where :func:`save` was given the base).

    Example:
      See :func:`save`.
    """
    checks.path("lora.load(directory, base)", directory)
    return read(directory, base)[0]


def read(directory: str | os.PathLike, base: Any) -> tuple[Delta, dict[str, Any], dict[str, jax.Array]]:
    """The delta, the manifest, and the arrays beside those of the delta (of a training state); see :func:`load`."""
    directory = pathlib.Path(directory).absolute()
    for attempt in range(_ATTEMPTS):
        with lock(directory, shared=True) if attempt else contextlib.nullcontext():
            version = _version(directory)
            try:
                return _loaded(directory, base)
            except (ValueError, OSError) as error:
                if attempt + 1 < _ATTEMPTS and _version(directory) != version:
                    continue
                if isinstance(error, ValueError) and (message := shorten(str(error))) != str(error):
                    raise ValueError(message) from error
                raise
    raise AssertionError("unreachable")


def _loaded(directory: pathlib.Path, base: Any) -> tuple[Delta, dict[str, Any], dict[str, jax.Array]]:
    stored = manifest.read(directory)
    if base is not None:
        manifest.check_fit(directory, stored, base)
    others = manifest.structs_of_state(directory / MANIFEST, stored)
    arrays = _restored(directory / stored.get("arrays", ARRAYS), manifest.structs(stored) | others)
    delta = manifest.built(directory / MANIFEST, stored, arrays)
    if base is not None:
        check_base(delta, base)
    return delta, stored, {name: arrays[name] for name in others}


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
    file = directory / MANIFEST
    if os.path.lexists(file):
        if file.is_symlink() or _current(directory) is None:
            raise FileExistsError(f"{file} was not written by lora_jax; not replaced.")
        return
    others = [path.name for path in sorted(directory.iterdir()) if not _is_left(path)]
    if others:
        raise FileExistsError(
            f"{directory} holds {join_names(others)} and is no adapter directory (it has no {MANIFEST}); not replaced."
        )


def _current(directory: pathlib.Path) -> str | None:
    """The arrays that a directory's manifest names; None without a manifest of this library."""
    try:
        stored = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        name = stored.get("arrays", ARRAYS) if stored["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and re.fullmatch(NAME, name) else None


def _remove_stale(directory: pathlib.Path, current: str | None) -> None:
    """Removes the arrays of saves that were killed; nobody else saves here, for the directory is locked."""
    left = {path.name for path in directory.iterdir() if _is_left(path) and path.is_dir()}
    _remove_arrays(directory, left - {current})


def _remove_arrays(directory: pathlib.Path, names: Collection[str | None]) -> None:
    for name in names:
        for path in match_entries(directory, rf"{name}{_TEMPORARY}"):
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
    """Writes from this process, whatever others do; unlike the asynchronous one, from several threads."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(process, {process}, f"adapter{process}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _restored(folder: pathlib.Path, expected: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays, which have the shapes and dtypes that the manifest says."""
    try:
        restored = read_arrays(folder, expected, MANIFEST)
    except BaseException as error:
        if not is_read_error(error):
            raise
        raise ValueError(f"{folder} is damaged or no Orbax checkpoint: {describe_error(error)}.") from error
    # Not committed to a device, so that they go along with a base on any mesh.
    return {name: jnp.asarray(array) for name, array in restored.items()}
