"""The identity of the base that an adapter was trained on: digests and sketches of its weights."""

import hashlib
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import paths
from lora_jax.adapters import fingerprints
from lora_jax.leaves import is_abstract, is_quantized


class BasePrecisionWarning(UserWarning, ValueError):
    """Warns that an adapter is loaded for its base in another precision. As an error it is a `ValueError`.

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


def describe_weight(weight: Any) -> dict[str, Any]:
    """Returns the manifest's entry for a weight of the base.

    The digest of its bytes identifies the weight; the sketch recognizes it in other precisions.
    """
    entry: dict[str, Any] = {"dtype": weight.dtype.name}
    if is_quantized(weight):
        entry["quantized"] = repr(weight)
    if not _is_readable(weight):
        return entry | {"sha256": None}
    sketch = np.asarray(fingerprints.sketch(weight), np.float64)
    return entry | {"sha256": digest_of(weight), "sketch": [float(f"{number:.7g}") for number in sketch]}


def check_base_identity(directory: pathlib.Path, entries: Mapping[str, Any], base: Any) -> None:
    """Raises `ValueError` unless a base is the one that an adapter was trained on; warns of another precision.

    Args:
      directory: The adapter's directory, for the message.
      entries: The manifest's entries of the base's weights.
      base: The base.
    """
    leaves = paths.flatten(base).as_dict()
    problems, precisions = [], {}
    for path, entry in entries.items():
        shape = tuple(entry["shape"])
        if path not in leaves:
            problems.append(f"{path!r}: for shape {shape}, but the base lacks it ({paths.nearest(path, list(leaves))})")
        elif tuple(leaves[path].shape) != shape:
            problems.append(f"{path!r}: for shape {shape}, but the base has {tuple(leaves[path].shape)}")
        elif None not in (digests := (entry.get("sha256"), digest_of(leaves[path]))) and digests[0] != digests[1]:
            stored, current = (_precision(weight) for weight in (entry, describe_weight(leaves[path])))
            distance = _distance(entry.get("sketch"), leaves[path])
            if stored == current or distance is None or distance > fingerprints.FAR:
                problems.append(f"{path!r}: of shape {shape} in both, but trained on other values than the base's")
            elif distance > fingerprints.ROUNDING:
                precisions[path] = stored, current
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"The adapter in {directory} does not fit the base ({len(problems)} paths):\n  {lines}")
    if precisions:
        path, (stored, current) = next(iter(precisions.items()))
        warnings.warn(
            f"The adapter in {directory} was trained on {stored} at {path!r} ({len(precisions)} such paths), but this "
            f"base has {current} there: the outputs differ by the rounding between them. To reproduce the outputs, "
            "quantize the base by the same rules (lora_jax.quantize), or merge into lora_jax.dequantize(quantized).",
            BasePrecisionWarning,
            stacklevel=4,
        )


def is_addressable(array: Any) -> bool:
    """Whether this process has all values of an array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def digest_of(weight: Any) -> str | None:
    """Returns a digest of a weight's bytes, or of its codes and scales; None if this process lacks the values."""
    if not _is_readable(weight):
        return None
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weight):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _is_readable(weight: Any) -> bool:
    return not is_abstract(weight) and all(map(is_addressable, jax.tree.leaves(weight)))


def _precision(entry: Mapping[str, Any]) -> str:
    """The format of a weight's numbers, for the message."""
    return str(entry.get("quantized") or entry.get("dtype"))


def _distance(sketch: Any, leaf: Any) -> float | None:
    """The distance of a weight from that of a stored sketch, relative to its norm; None without a valid sketch."""
    if not isinstance(sketch, list) or len(sketch) != fingerprints.SIZE:
        return None
    if not all(isinstance(number, float | int) for number in sketch):
        return None
    stored, current = np.asarray(sketch, np.float64), np.asarray(fingerprints.sketch(leaf), np.float64)
    norm = max(np.linalg.norm(stored), np.linalg.norm(current))
    return float(np.linalg.norm(stored - current) / norm) if norm else 0.0
