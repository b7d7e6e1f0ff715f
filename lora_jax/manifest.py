"""`adapter.json`: the description of an adapter's structure, arrays and base, and its checks."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.adapters.consistency import check_adapter, check_adapters, check_static_fields
from lora_jax.adapters.protocol import KINDS, Delta
from lora_jax.base_identity import describe_weight, digest_of, is_addressable
from lora_jax.io.read_errors import describe_error
from lora_jax.renamed import module_getattr

FORMAT = "lora_jax adapter"
VERSION = 1
MANIFEST, ARRAYS = "adapter.json", "arrays"
NAME = rf"{ARRAYS}(-[0-9a-f]{{32}})?"
"""Matches the directory of arrays that a manifest names."""

SAME, STATE, NAMES = "same_as", "state", "names"


def describe(delta: Delta, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the manifest of a delta, and `{name: array}` of its arrays."""
    if delta is None or (isinstance(delta, Mapping) and not delta):
        raise ValueError("The delta is empty; expected a dict with at least one adapter.")
    check_adapters(delta)
    weights = None if base is None else paths.flatten(base).as_dict()
    adapters: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    stored_names: dict[tuple, str] = {}  # a frozen matrix that adapters share (VeRA's pair) is written once
    for path, node in delta.items():
        leaves, structure = {}, {}
        for field in dataclasses.fields(node):  # pyrefly: ignore[bad-argument-type]
            value = getattr(node, field.name)
            if "static" in field.metadata:
                structure[field.name] = value
            elif isinstance(value, jax.Array | np.ndarray) and not isinstance(value, jax.core.Tracer):
                if not is_addressable(value):
                    raise ValueError(f"delta[{path!r}].{field.name} spans several processes; gather it first.")
                name = f"{path}:{field.name}"
                leaves[field.name] = {"shape": list(value.shape), "dtype": value.dtype.name}
                stored_as = name
                if not field.metadata["trained"] and value.ndim > 1:
                    stored_as = stored_names.setdefault((value.shape, value.dtype, digest_of(value)), name)
                if stored_as == name:
                    arrays[name] = np.asarray(value)
                else:
                    leaves[field.name][SAME] = stored_as
            elif value is not None or not field.kw_only:
                raise ValueError(f"delta[{path!r}].{field.name} is not an array: got {type(value).__name__}.")
        adapters[path] = {
            "kind": node.kind,
            **node.describe(),
            "weight_shape": list(node.shape()),
            "structure": structure,
            "arrays": leaves,
        }
    base_entries: dict[str, Any] = {path: {"shape": entry["weight_shape"]} for path, entry in adapters.items()}
    if weights is not None:
        for path, entry in base_entries.items():
            if path not in weights:
                raise ValueError(f"The base lacks {path!r}; {paths.nearest(path, list(weights))}.")
            entry |= describe_weight(weights[path])
    manifest = {"format": FORMAT, "version": VERSION, "adapters": adapters, "base": base_entries}
    return manifest | {"sha256": _digest_of_entries(adapters)}, arrays


def _digest_of_entries(adapters: Mapping[str, Any]) -> str:
    """A digest of the parts of entries that adapters are built from, which detects edits of them."""
    parts = {path: [entry[name] for name in ("kind", "structure", "arrays")] for path, entry in adapters.items()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def to_json(manifest: dict[str, Any]) -> str:
    """Returns indented JSON with lists of plain values (shapes, roles) on one line."""
    text = json.dumps(manifest, indent=2)
    return re.sub(
        r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )


def read(directory: pathlib.Path) -> dict[str, Any]:
    """Reads the manifest of an adapter directory, and checks that every entry has the fields of its kind.

    Raises:
      FileNotFoundError: The directory has no manifest.
      ValueError: The manifest is damaged, of another version, or inconsistent.
    """
    file = directory / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is not an adapter directory: it has no {MANIFEST}.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {describe_error(error)}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is not the manifest of a {FORMAT}.")
    if manifest.get("version") != VERSION or isinstance(manifest["version"], bool):
        raise ValueError(f"{file} has format version {_short(manifest.get('version'))}; this release reads {VERSION}.")
    name = manifest.get("arrays", ARRAYS)
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ValueError(f"{file}: 'arrays' is {_short(name)}; expected the name of a directory of arrays beside it.")
    adapters, base_entries = (_object(str(file), manifest, name) for name in ("adapters", "base"))
    for path, entry in adapters.items():
        _check_entry(f"{file}: {path!r}", entry, adapters)
    for path in base_entries:
        entry = _object(f"{file}: 'base'", base_entries, path)
        _sizes(f"{file}: the shape of {path!r} in 'base'", entry.get("shape"))
    return manifest


def _object(where: str, parent: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns an object in another; raises if it is missing or not an object."""
    value = parent.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name!r} is {_short(value)}; expected an object.")
    return value


def _sizes(where: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise ValueError(f"{where} is {_short(value)}; expected a list of sizes.")
    return tuple(value)


def _check_entry(where: str, entry: Any, adapters: Mapping[str, Any]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_short(entry)}; expected an object.")
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"{where} has kind {_short(kind)}, which no adapter class that is imported has; "
            f"{paths.nearest(str(kind), sorted(KINDS))}. Import the module that defines it."
        )
    arrays, structure = (_object(where, entry, name) for name in ("arrays", "structure"))
    _sizes(f"{where}: weight_shape", entry.get("weight_shape"))
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind])}  # pyrefly: ignore[bad-argument-type]
    expected = {group: {name for name, field in fields.items() if mark in field.metadata} for group, mark in _GROUPS}
    optional = {name for name, field in fields.items() if field.kw_only}
    stored = {"arrays": set(arrays), "structure": set(structure)}
    if any(not expected[group] - optional <= stored[group] <= expected[group] for group in stored):
        stored_names, expected_names = (sorted(groups["arrays"] | groups["structure"]) for groups in (stored, expected))
        raise ValueError(f"{where} ({kind}) has the fields {stored_names}; expected {expected_names}.")
    for name, array in arrays.items():
        shape, dtype, other = _array(f"{where}: {name!r}", array)
        if other is None:
            continue
        path, _, field = other.rpartition(":")
        twin = adapters.get(path)
        twin = twin["arrays"].get(field) if isinstance(twin, dict) and isinstance(twin.get("arrays"), dict) else None
        if twin is None or _array(f"{where}: {other!r}", twin) != (shape, dtype, None):
            raise ValueError(f"{where}: {SAME} of {name!r} is {other!r}, not an array of its shape and dtype.")


_GROUPS = (("arrays", "trained"), ("structure", "static"))


def _array(where: str, array: Any) -> tuple[tuple[int, ...], np.dtype, str | None]:
    """Returns the shape and dtype of an array, and the name of the array that is stored in its place."""
    if not isinstance(array, dict) or not isinstance(array.get("dtype"), str):
        raise ValueError(f"{where} is {_short(array)}; expected an object with 'shape' and 'dtype'.")
    same = array.get(SAME)
    if same is not None and not isinstance(same, str):
        raise ValueError(f"{where}: {SAME} is {_short(same)}; expected the name of an array.")
    try:
        dtype = np.dtype(array["dtype"])
    except (TypeError, ValueError, SyntaxError):
        raise ValueError(f"{where} has the dtype {_short(array['dtype'])}, which is not a dtype.") from None
    return _sizes(f"{where}: shape", array.get("shape")), dtype, same


def structs(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every stored array by name."""
    return {
        f"{path}:{name}": jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["dtype"]))
        for path, entry in manifest["adapters"].items()
        for name, array in entry["arrays"].items()
        if array.get(SAME) is None
    }


def state_structs(file: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every array of a training state, other than its delta, by name."""
    if STATE not in manifest:
        return {}
    entries = _object(str(file), manifest, STATE)
    arrays = {name: _array(f"{file}: {name!r}", entry) for name, entry in entries.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype, _) in arrays.items()}


def build(file: pathlib.Path, manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> Delta:
    """Builds the delta that a manifest describes from its arrays.

    Raises:
      ValueError: An entry contradicts its arrays (axes, blocks, sizes, rank or alpha) or the entry of its base, or has
        been edited.
    """
    delta = {}
    for path, entry in manifest["adapters"].items():
        leaves = {name: arrays[array.get(SAME) or f"{path}:{name}"] for name, array in entry["arrays"].items()}
        try:
            node = KINDS[entry["kind"]](
                **leaves, **{name: _tuples(value) for name, value in entry["structure"].items()}
            )
            check_static_fields(node)
            check_adapter(node)
            if list(node.shape()) != entry["weight_shape"]:
                raise ValueError(
                    f"weight_shape is {entry['weight_shape']}; the arrays are for a weight of shape {node.shape()}."
                )
            for name, value in node.describe().items():
                if name in entry and json.dumps(entry[name]) != json.dumps(value):
                    raise ValueError(f"{name} is {_short(entry[name])}; the arrays give {value}.")
        except ValueError as error:
            raise ValueError(f"{file}: {path!r} ({entry['kind']}): {error}") from None
        delta[path] = node
    shapes = {path: entry["weight_shape"] for path, entry in manifest["adapters"].items()}
    if different := sorted(set(shapes) ^ set(manifest["base"])):
        raise ValueError(f"{file}: 'adapters' and 'base' have different paths, such as {different[0]!r}.")
    if different := [path for path in shapes if shapes[path] != manifest["base"][path]["shape"]]:
        raise ValueError(f"{file}: {different[0]!r} has one shape in 'adapters' and another in 'base'.")
    if manifest.get("sha256") not in (None, _digest_of_entries(manifest["adapters"])):
        raise ValueError(f"{file} has been edited: its 'sha256' is not that of its adapters.")
    return delta


def _tuples(value: Any) -> Any:
    """Converts the lists of JSON to tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


__getattr__ = module_getattr(__name__, BasePrecisionWarning="lora_jax.BasePrecisionWarning")
