"""Reads the arrays of Orbax checkpoints with TensorStore.

Orbax reads all arrays at once in an event loop and closes the loop at the first error. The other reads then print
tracebacks, some of them after the error was handled. With the functions here damaged files raise an error and print
nothing.
"""

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorstore as ts

_DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
_MANIFEST = "manifest.ocdbt"


def open_arrays(folder: pathlib.Path, expected: Mapping[str, Any], described_in: str) -> "dict[str, ts.TensorStore]":
    """Opens the arrays of an Orbax checkpoint of a flat dict. Indexing an array reads that part only.

    Args:
      folder: The checkpoint's directory.
      expected: `{name: value}` with values of the expected shapes and dtypes.
      described_in: The file that describes them, for the message.

    Returns:
      `{name: array}`.

    Raises:
      ValueError: A file is missing or damaged, or the names, shapes or dtypes are not the expected ones.
      OSError: A file cannot be read.
    """
    import tensorstore as ts

    if not (folder / _MANIFEST).is_file():
        raise ValueError(f"{_MANIFEST} is missing")
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    opened = {}
    for ending, driver in _DRIVERS.items():
        for name in (key.removesuffix(ending) for key in keys if key.endswith(ending)):
            spec = {"driver": driver, "kvstore": {**store, "path": f"{name}/"}, "fill_missing_data_reads": False}
            opened[name] = ts.open(spec, open=True, read=True)
    stored = {name: future.result() for name, future in opened.items()}
    wrong = sorted(set(stored) ^ set(expected)) + sorted(
        name
        for name in set(stored) & set(expected)
        if (stored[name].shape, stored[name].dtype.numpy_dtype) != (expected[name].shape, expected[name].dtype)
    )
    if wrong:
        raise ValueError(f"{described_in} and {folder.name} disagree on {', '.join(map(repr, wrong[:5]))}")
    return stored


def read_arrays(folder: pathlib.Path, expected: Mapping[str, Any], described_in: str) -> dict[str, np.ndarray]:
    """Reads the arrays of an Orbax checkpoint of a flat dict; see :func:`open_arrays`."""
    reads = {name: array.read() for name, array in open_arrays(folder, expected, described_in).items()}
    return {name: future.result() for name, future in reads.items()}
