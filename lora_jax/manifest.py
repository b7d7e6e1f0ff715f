"""`adapter.json`: what an adapter directory says of itself, and whether that is true of the arrays and of a base."""

import dataclasses
import hashlib
import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.adapters import fingerprints
from lora_jax.adapters.consistency import check_adapter, check_adapters, check_static_fields
from lora_jax.adapters.protocol import KINDS, Delta
from lora_jax.io.read_errors import describe_error
from lora_jax.leaves import is_abstract, is_quantized

FORMAT = "lora_jax adapter"
VERSION = 1
MANIFEST, ARRAYS = "adapter.json", "arrays"
NAME = rf"{ARRAYS}(-[0-9a-f]{{32}})?"
"""Of the directory of arrays that a manifest names."""

SAME, STATE = "same_as", "state"


class BasePrecisionWarning(UserWarning, ValueError):
    """An adapter is loaded for its base in another precision. Where warnings are errors, a `ValueError`.

    Example:
      >>> import tempfile, warnings, jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> small = lora.quantize(base, {"w": lora.NF4(axes=("in", "out"))})
      >>> delta = lora.init(jax.random.key(1), small, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     lora.save(folder, delta, base=small)
      ...     delta = lora.load(folder, base)
      >>> [warning.category.__name__ for warning in caught]
      ['BasePrecisionWarning']
    """


def described(delta: Delta, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest of a delta, and the flat dict of its arrays."""
    if delta is None or (isinstance(delta, Mapping) and not delta):
        raise ValueError("There is nothing to save: a delta is a dict with at least one adapter.")
    check_adapters(delta)
    weights = None if base is None else paths.flatten(base).as_dict()
    adapters: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    stored_names: dict[tuple, str] = {}  # a frozen matrix that several adapters hold (VeRA's pair) is written once
    for path, node in delta.items():
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
                stored_as = name
                if not field.metadata["trained"] and value.ndim > 1:
                    stored_as = stored_names.setdefault((value.shape, value.dtype, _digest(value)), name)
                if stored_as == name:
                    arrays[name] = np.asarray(value)
                else:
                    leaves[field.name][SAME] = stored_as
            elif value is not None or not field.kw_only:
                raise ValueError(f"delta[{path!r}].{field.name} is no array but {type(value).__name__}.")
        adapters[path] = {
            "kind": node.kind,
            **node.describe(),
            "weight_shape": list(node.shape()),
            "structure": structure,
            "arrays": leaves,
        }
    of_base: dict[str, Any] = {path: {"shape": entry["weight_shape"]} for path, entry in adapters.items()}
    if weights is not None:
        for path, entry in of_base.items():
            if path not in weights:
                raise ValueError(f"The base lacks {path!r}; {paths.nearest(path, list(weights))}.")
            entry |= _identity(weights[path])
    manifest = {"format": FORMAT, "version": VERSION, "adapters": adapters, "base": of_base}
    return manifest | {"sha256": _digest_of_entries(adapters)}, arrays


def _identity(weight: Any) -> dict[str, Any]:
    """What tells a weight of a base from others: a digest of its bytes, and a sketch that other precisions keep."""
    entry: dict[str, Any] = {"dtype": weight.dtype.name}
    if is_quantized(weight):
        entry["quantized"] = repr(weight)
    if not _is_readable(weight):
        return entry | {"sha256": None}
    sketch = np.asarray(fingerprints.sketch(weight), np.float64)
    return entry | {"sha256": _digest(weight), "sketch": [float(f"{number:.7g}") for number in sketch]}


def is_in_reach(array: Any) -> bool:
    """Whether this process has all values of an array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def _is_readable(weight: Any) -> bool:
    return not is_abstract(weight) and all(map(is_in_reach, jax.tree.leaves(weight)))


def _digest(weight: Any) -> str | None:
    """A digest of a weight's bytes, or of its codes and scales; None where this process does not have the values."""
    if not _is_readable(weight):
        return None
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weight):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _digest_of_entries(adapters: Mapping[str, Any]) -> str:
    """A digest of what adapters are built from, so that no edit of it makes another adapter unnoticed."""
    built = {path: [entry[name] for name in ("kind", "structure", "arrays")] for path, entry in adapters.items()}
    return hashlib.sha256(json.dumps(built, sort_keys=True).encode()).hexdigest()


def readable(manifest: dict[str, Any]) -> str:
    """Indented JSON with lists of plain values (shapes, roles) on one line."""
    text = json.dumps(manifest, indent=2)
    return re.sub(
        r"\[[^\[\]{}]*\]", lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text
    )


def read(directory: pathlib.Path) -> dict[str, Any]:
    """The manifest of an adapter directory, of which every entry has the fields of its kind.

    Raises:
      FileNotFoundError: There is none.
      ValueError: It is damaged, of another version, or contradicts itself.
    """
    file = directory / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{directory} is no adapter directory: it has no {MANIFEST}.")
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
    adapters, of_base = (_object(str(file), manifest, name) for name in ("adapters", "base"))
    for path, entry in adapters.items():
        _check_entry(f"{file}: {path!r}", entry, adapters)
    for path in of_base:
        _sizes(f"{file}: the shape of {path!r} in 'base'", _object(f"{file}: 'base'", of_base, path).get("shape"))
    return manifest


def _object(where: str, parent: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object in another; raises where it is missing or something else."""
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
        raise ValueError(f"{where} is of the kind {_short(kind)}; known are {', '.join(sorted(KINDS))}.")
    arrays, structure = (_object(where, entry, name) for name in ("arrays", "structure"))
    _sizes(f"{where}: weight_shape", entry.get("weight_shape"))
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind])}  # pyrefly: ignore[bad-argument-type]
    expected = {group: {name for name, field in fields.items() if mark in field.metadata} for group, mark in _GROUPS}
    optional = {name for name, field in fields.items() if field.kw_only}
    stored = {"arrays": set(arrays), "structure": set(structure)}
    if any(not expected[group] - optional <= stored[group] <= expected[group] for group in stored):
        have, needed = (sorted(groups["arrays"] | groups["structure"]) for groups in (stored, expected))
        raise ValueError(f"{where} ({kind}) has the fields {have}; expected {needed}.")
    for name, array in arrays.items():
        shape, dtype, other = _array(f"{where}: {name!r}", array)
        if other is None:
            continue
        path, _, field = other.rpartition(":")
        twin = adapters.get(path)
        twin = twin["arrays"].get(field) if isinstance(twin, dict) and isinstance(twin.get("arrays"), dict) else None
        if twin is None or _array(f"{where}: {other!r}", twin) != (shape, dtype, None):
            raise ValueError(f"{where}: {other!r} does not stand for an array that is the same as its {name}.")


_GROUPS = (("arrays", "trained"), ("structure", "static"))


def _array(where: str, array: Any) -> tuple[tuple[int, ...], np.dtype, str | None]:
    """Shape and dtype of an array, and which other it is."""
    if not isinstance(array, dict) or not isinstance(array.get("dtype"), str):
        raise ValueError(f"{where} is {_short(array)}; expected an object with 'shape' and 'dtype'.")
    same = array.get(SAME)
    if same is not None and not isinstance(same, str):
        raise ValueError(f"{where}: {SAME} is {_short(same)}; expected the name of an array.")
    try:
        dtype = np.dtype(array["dtype"])
    except (TypeError, ValueError, SyntaxError):
        raise ValueError(f"{where} has the dtype {_short(array['dtype'])}, which does not exist.") from None
    return _sizes(f"{where}: shape", array.get("shape")), dtype, same


def structs(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every stored array, by name."""
    return {
        f"{path}:{name}": jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["dtype"]))
        for path, entry in manifest["adapters"].items()
        for name, array in entry["arrays"].items()
        if array.get(SAME) is None
    }


def structs_of_state(file: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a training state beside its delta, by name."""
    if STATE not in manifest:
        return {}
    entries = _object(str(file), manifest, STATE)
    arrays = {name: _array(f"{file}: {name!r}", entry) for name, entry in entries.items()}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype, _) in arrays.items()}


def built(file: pathlib.Path, manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> Delta:
    """The delta that a manifest describes, of these arrays.

    Raises:
      ValueError: An entry contradicts its arrays (the axes, blocks or sizes, or what it tells readers, rank and alpha)
        or the entry of its base, or was changed.
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
                    f"weight_shape is {entry['weight_shape']}; its arrays fit a weight of shape {node.shape()}."
                )
            for name, value in node.describe().items():
                if name in entry and json.dumps(entry[name]) != json.dumps(value):
                    raise ValueError(f"{name} is {_short(entry[name])}; by its arrays it is {value}.")
        except ValueError as error:
            raise ValueError(f"{file}: {path!r} ({entry['kind']}): {error}") from None
        delta[path] = node
    shapes = {path: entry["weight_shape"] for path, entry in manifest["adapters"].items()}
    if different := sorted(set(shapes) ^ set(manifest["base"])):
        raise ValueError(f"{file}: 'adapters' and 'base' name different paths, {different[0]!r} for one.")
    if different := [path for path in shapes if shapes[path] != manifest["base"][path]["shape"]]:
        raise ValueError(f"{file}: {different[0]!r} has one shape in 'adapters' and another in 'base'.")
    if manifest.get("sha256") not in (None, _digest_of_entries(manifest["adapters"])):
        raise ValueError(f"{file} was changed after it was written: its 'sha256' is not that of its adapters.")
    return delta


def check_fit(directory: pathlib.Path, manifest: Mapping[str, Any], base: Any) -> None:
    """Raises where a base is not the one that a manifest's adapters were trained on; warns of another precision."""
    leaves = paths.flatten(base).as_dict()
    wrong, other = [], {}
    for path, entry in manifest["base"].items():
        shape = tuple(entry["shape"])
        if path not in leaves:
            wrong.append(f"{path!r}: for shape {shape}, but the base lacks it ({paths.nearest(path, list(leaves))})")
        elif tuple(leaves[path].shape) != shape:
            wrong.append(f"{path!r}: for shape {shape}, but the base has {tuple(leaves[path].shape)}")
        elif None not in (digests := (entry.get("sha256"), _digest(leaves[path]))) and digests[0] != digests[1]:
            before, now = (_precision(weight) for weight in (entry, _identity(leaves[path])))
            distance = _distance(entry.get("sketch"), leaves[path])
            if before == now or distance is None or distance > fingerprints.FAR:
                wrong.append(f"{path!r}: of shape {shape} in both, but trained on other values than the base's")
            elif distance > fingerprints.ROUNDING:
                other[path] = before, now
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(f"The adapter in {directory} does not fit the base ({len(wrong)} paths):\n  {listed}")
    if other:
        path, (before, now) = next(iter(other.items()))
        warnings.warn(
            f"The adapter in {directory} was trained on {before} at {path!r} ({len(other)} such paths), and this base "
            f"has {now} there: the outputs differ by the rounding between them. For those that it was trained with, "
            "quantize the base by the same rules (lora_jax.quantize), or merge into lora_jax.dequantize(quantized).",
            BasePrecisionWarning,
            stacklevel=4,
        )


def _precision(entry: Mapping[str, Any]) -> str:
    """How a weight is stored, in words."""
    return str(entry.get("quantized") or entry.get("dtype"))


def _distance(sketch: Any, leaf: Any) -> float | None:
    """How far a weight is from the one of a stored sketch, relative to its norm; None where there is no sketch."""
    if not isinstance(sketch, list) or len(sketch) != fingerprints.SIZE:
        return None
    if not all(isinstance(number, float | int) for number in sketch):
        return None
    stored, have = np.asarray(sketch, np.float64), np.asarray(fingerprints.sketch(leaf), np.float64)
    size = max(np.linalg.norm(stored), np.linalg.norm(have))
    return float(np.linalg.norm(stored - have) / size) if size else 0.0


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"
