"""Copies a safetensors file with the values of some tensors changed."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_CHUNK = 16 * 2**20


def rewrite(
    source: Path,
    target: Path,
    change: Callable[[str], np.ndarray | None],
    advance: Callable[[int], None] = lambda size: None,
    added: Mapping[str, str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Copies a safetensors file, tensor by tensor, with the values of some tensors changed.

    Unchanged tensors are copied as bytes, so any dtype is preserved. At most one tensor is in memory.

    Args:
      source: A file that :class:`Tensors` opens.
      target: The new file.
      change: Returns the new value of a tensor, in its dtype; None to preserve it.
      advance: Called with the number of bytes written since the last call.
      added: New tensors after the others: by name, the tensor that each starts as a copy of.
      metadata: Added to the source's metadata.
      shapes: The shapes of tensors whose new values have other shapes.

    Raises:
      OSError: A file cannot be read or written.
    """
    with open(source, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        start = old.tell()
        metadata = {"format": "pt", **header.pop("__metadata__", {}), **(metadata or {})}
        copies = sorted(((name, name, entry) for name, entry in header.items()), key=lambda x: x[2]["data_offsets"])
        copies += [(name, like, header[like]) for name, like in (added or {}).items()]
        written, end = {}, 0
        for name, _, entry in copies:
            first, last = entry["data_offsets"]
            shape, size = tuple(entry["shape"]), last - first
            if shapes is not None and name in shapes:
                shape, size = shapes[name], size * math.prod(shapes[name]) // math.prod(shape)
            written[name] = entry | {"shape": list(shape), "data_offsets": [end, end := end + size]}
        fields = {"__metadata__": metadata, **written}
        content = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        new.write(len(content).to_bytes(8, "little") + content)
        for name, source_name, entry in copies:
            begin, end = entry["data_offsets"]
            value = change(name)
            if value is not None:
                data = np.ascontiguousarray(value).tobytes()
                first, last = written[name]["data_offsets"]
                if len(data) != last - first:
                    raise ValueError(f"{name!r}: expected {last - first} bytes, got {len(data)}.")
                new.write(data)
                advance(len(data))
                continue
            old.seek(start + begin)
            while begin < end:
                data = old.read(min(_CHUNK, end - begin))
                if not data:
                    raise OSError(f"{source}: ended while {source_name!r} was read.")
                new.write(data)
                advance(len(data))
                begin += len(data)
