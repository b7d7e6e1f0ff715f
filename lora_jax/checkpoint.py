"""Saves and loads adapters: arrays in an Orbax checkpoint, and a JSON file that describes them.

An adapter directory contains `adapter.json` and `arrays/`, an Orbax checkpoint. `adapter.json` has the format version;
for each path the kind, axis roles and other structure, rank and alpha, and the shape and dtype of every array or the
name of the array that is stored in its place; and digests of the base. :func:`load` reads nothing else. The
file may have the weights' names in PyTorch, for the command line.

A later save writes its arrays to a new directory, `arrays-…`, which `adapter.json` names. Replacing this one file
replaces the adapter: if a process is killed, or several load and save, each reads the old or the new adapter. Other
files in the directory stay.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks, manifest
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import Delta
from lora_jax.base_identity import check_base_identity
from lora_jax.io.arrays import read_arrays
from lora_jax.io.files import create_parents, errors_naming, join_names, replace_file, resolve, sync_tree
from lora_jax.io.locks import lock, match_entries
from lora_jax.io.read_errors import describe_error, is_read_error, shorten
from lora_jax.manifest import ARRAYS, FORMAT, MANIFEST, NAME

if TYPE_CHECKING:
    from lora_jax.peft.names import Names

_ATTEMPTS = 8  # to load an adapter that other processes replace
_TEMPORARY = r"(\.orbax-checkpoint-tmp.*)?"
_UNFINISHED = rf"{ARRAYS}-[0-9a-f]{{32}}{_TEMPORARY}|\.[0-9a-f]{{32}}\.writing\.{re.escape(MANIFEST)}"


def save(directory: str | os.PathLike, delta: Delta, *, base: Any = None, names: "Names | None" = None) -> None:
    """Saves an adapter atomically: if the process is killed, the directory has the old or the new adapter.

    With several processes, only the one that calls this function writes. Gather arrays that span processes first.

    Args:
      directory: The directory, which is created with its parents. An adapter in it is replaced, and other files next to
        the adapter stay. It is an error if the directory has other files and no adapter.
      delta: Adapters with concrete arrays.
      base: The parameters that the delta was trained on. With it a digest of each adapted weight is stored, so that
        :func:`load` detects another base of the same shapes.
      names: The names of the base's weights in PyTorch, which the command line needs to merge the adapter into a
        checkpoint, to convert it, and to compare it with adapters of PEFT.

    Raises:
      TypeError: The arguments are swapped, or the delta is not a dict of adapters.
      ValueError: The delta is empty or one half of `partition`, or this process cannot read its arrays.
      FileExistsError: `directory` has other files and no adapter.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(folder + "/adapter", delta)
      ...     loaded = load(folder + "/adapter")
      >>> bool((loaded["w"].a == delta["w"].a).all())
      True
    """
    checks.path("lora.save(directory, delta)", directory)
    description, arrays = manifest.describe(delta, base)
    if names is not None:
        from lora_jax.peft.names import check_names
        from lora_jax.peft.stored_names import describe_names

        check_names("lora.save(directory, delta, names=names)", names)
        description[manifest.NAMES] = describe_names(names)
    write(directory, description, arrays)


def write(directory: str | os.PathLike, description: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a manifest and the arrays that it describes; see :func:`save`."""
    path, directory = directory, resolve(directory)
    _check_replaceable(directory)
    with errors_naming(path, directory), create_parents(directory / MANIFEST), lock(directory) as is_locked:
        old = _current_arrays(directory)
        if is_locked:
            _remove_stale(directory, old)
        name = f"{ARRAYS}-{uuid.uuid4().hex}"
        try:
            _write_arrays(directory / name, arrays)
            sync_tree(directory / name)
            if old is None and not os.path.lexists(directory / ARRAYS):
                os.rename(directory / name, directory / ARRAYS)
                name = ARRAYS
            with replace_file(directory / MANIFEST) as file:
                file.write_text(manifest.to_json({**description, "arrays": name}), encoding="utf-8")
        except BaseException:
            _remove_arrays(directory, {name} - {_current_arrays(directory)})
            raise
        _remove_arrays(directory, {old} - {None, name})


def load(directory: str | os.PathLike, base: Any = None) -> Delta:
    """Loads an adapter.

    Args:
      directory: A directory written by :func:`save`.
      base: The parameters to use the delta with. If given, the delta is checked against them.

    Returns:
      The saved delta, with uncommitted arrays on the default device.

    Raises:
      FileNotFoundError: `directory` is not an adapter directory.
      ValueError: The manifest or an array is damaged, of another version or inconsistent, or the delta does not fit
        `base`. The message lists every path with both shapes, and the weights whose values are not those that the delta
        was trained on.

    Warns:
      BasePrecisionWarning: The delta was trained on weights of the base in another precision, for example quantized
        (detected if the base was passed to :func:`save`).

    Example:
      See :func:`save`.
    """
    checks.path("lora.load(directory, base)", directory)
    return read(directory, base)[0]


def read_names(directory: pathlib.Path) -> "Names | None":
    """Returns the names of the weights in PyTorch; None for an adapter that was saved without them.

    Raises:
      ValueError: The manifest is damaged.
    """
    from lora_jax.peft.stored_names import parse_names

    content = manifest.read(directory).get(manifest.NAMES)
    return None if content is None else parse_names(str(directory / MANIFEST), content)


def read(directory: str | os.PathLike, base: Any) -> tuple[Delta, dict[str, Any], dict[str, jax.Array]]:
    """Returns the delta, the manifest, and the other arrays of a training state; see :func:`load`."""
    directory = pathlib.Path(directory).absolute()
    for attempt in range(_ATTEMPTS):
        with lock(directory, shared=True) if attempt else contextlib.nullcontext():
            version = _version(directory)
            try:
                return _read(directory, base)
            except (ValueError, OSError) as error:
                if attempt + 1 < _ATTEMPTS and _version(directory) != version:
                    continue
                if isinstance(error, ValueError) and (message := shorten(str(error))) != str(error):
                    raise ValueError(message) from error
                raise
    raise AssertionError("unreachable")


def _read(directory: pathlib.Path, base: Any) -> tuple[Delta, dict[str, Any], dict[str, jax.Array]]:
    stored = manifest.read(directory)
    if base is not None:
        check_base_identity(directory, stored["base"], base)
    others = manifest.state_structs(directory / MANIFEST, stored)
    arrays = _read_arrays(directory / stored.get("arrays", ARRAYS), manifest.structs(stored) | others)
    delta = manifest.build(directory / MANIFEST, stored, arrays)
    if base is not None:
        check_base(delta, base)
    return delta, stored, {name: arrays[name] for name in others}


def _version(directory: pathlib.Path) -> tuple[int, int] | None:
    """Identifies an `adapter.json`, so that its replacement is detected."""
    with contextlib.suppress(OSError):
        status = (directory / MANIFEST).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _check_replaceable(directory: pathlib.Path) -> None:
    """Raises `FileExistsError` unless the directory is new or empty or has an adapter that :func:`save` wrote."""
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is not a directory; not replaced.")
    file = directory / MANIFEST
    if os.path.lexists(file):
        if file.is_symlink() or _current_arrays(directory) is None:
            raise FileExistsError(f"{file} was not written by lora_jax; not replaced.")
        return
    others = [path.name for path in sorted(directory.iterdir()) if not _is_unfinished(path)]
    if others:
        raise FileExistsError(
            f"{directory} contains {join_names(others)} and is not an adapter directory (it has no {MANIFEST}); not "
            "replaced."
        )


def _current_arrays(directory: pathlib.Path) -> str | None:
    """The directory of arrays that the manifest names; None without a manifest of this library."""
    try:
        stored = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        name = stored.get("arrays", ARRAYS) if stored["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return name if isinstance(name, str) and re.fullmatch(NAME, name) else None


def _remove_stale(directory: pathlib.Path, current: str | None) -> None:
    """Removes the arrays of killed saves. The directory is locked, so that no other process saves to it."""
    stale = {path.name for path in directory.iterdir() if _is_unfinished(path) and path.is_dir()}
    _remove_arrays(directory, stale - {current})


def _remove_arrays(directory: pathlib.Path, names: Collection[str | None]) -> None:
    for name in names:
        for path in match_entries(directory, rf"{name}{_TEMPORARY}"):
            if path.is_symlink():
                continue
            if path.name == ARRAYS:  # keeps the owner known if the removal is interrupted
                path = path.rename(directory / f"{ARRAYS}-{uuid.uuid4().hex}")
            shutil.rmtree(path, ignore_errors=True)


def _is_unfinished(path: pathlib.Path) -> bool:
    """Whether an entry of an adapter directory may be from a killed process."""
    if path.name != ARRAYS:
        return re.fullmatch(_UNFINISHED, path.name) is not None
    try:
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text(encoding="utf-8"))
        return metadata["custom_metadata"]["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write_arrays(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an Orbax checkpoint, in this process only.

    The checkpointer can be used from several threads, unlike the asynchronous one.
    """
    import orbax.checkpoint as ocp  # takes half a second

    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(process, {process}, f"adapter{process}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(arrays), custom_metadata={"format": FORMAT})


def _read_arrays(folder: pathlib.Path, expected: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the arrays, and checks their shapes and dtypes against the manifest."""
    try:
        arrays = read_arrays(folder, expected, MANIFEST)
    except BaseException as error:
        if not is_read_error(error):
            raise
        raise ValueError(f"{folder} is damaged or not an Orbax checkpoint: {describe_error(error)}.") from error
    # Uncommitted, so that they can be used with a base on any mesh.
    return {name: jnp.asarray(array) for name, array in arrays.items()}
