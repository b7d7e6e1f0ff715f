"""Parses the groups of devices that exchange data, in every form in which XLA prints them."""

import math
import re

import numpy as np

_LIST = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>[^)]*(?:\([\d,]*\))?)\))? \{(?P<over>[^}]*)\}"
)
_DEVICES = re.compile(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_OVER = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Returns the groups of a collective.

    Args:
      attributes: The instruction's attributes, with `replica_groups=` as a list (`{{0,1},{2,3}}`), as an iota
        (`[2,4]<=[4,2]T(1,0)`), or as axes of a mesh (`mesh['x'=2,'y'=4] {'y'}`).
      devices: The number of devices, which form one group if the list is empty.

    Returns:
      The numbers of devices, `int[groups, members]`.

    Raises:
      ValueError: The groups are missing or have an unknown form.

    Example:
      >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
      [[0, 2], [1, 3]]
    """
    if match := _IOTA.search(attributes):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    if match := _MESH.search(attributes):
        return _over_axes(match)
    if match := _LIST.search(attributes):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        return np.array(groups) if groups else np.arange(devices)[None]
    raise ValueError(f"replica_groups have an unknown form: {attributes[:200]!r}.")


def pairs(attributes: str) -> np.ndarray:
    """Returns the senders and receivers of a collective-permute, `int[pairs, 2]`.

    Raises:
      ValueError: The attribute is missing.
    """
    match = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if match is None:
        raise ValueError(f"No source_target_pairs: {attributes[:200]!r}.")
    return np.array(_PAIR.findall(match[1]), int).reshape(-1, 2)


def _over_axes(match: re.Match) -> np.ndarray:
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match["axes"])}
    if match["ids"] is None:
        devices = np.arange(math.prod(axes.values()))
    else:
        numbering = _DEVICES.match(match["ids"])
        if numbering is None:
            raise ValueError(f"device_ids have an unknown form: {match['ids']!r}.")
        devices = _iota(numbering[1], numbering[2])
    over = {name: (int(before or 1), int(size or axes[name])) for name, before, size in _OVER.findall(match["over"])}
    # A part of an axis, `'x':(2)4`, splits the axis into three: before the part, the part, and after it.
    sizes, group, rest = [], [], []
    for name, size in axes.items():
        before, part = over.get(name, (size, 1))
        rest += [len(sizes), len(sizes) + 2]
        group.append(len(sizes) + 1)
        sizes += [before, part, size // (before * part)]
    shaped = devices.reshape(sizes).transpose(rest + group)
    return shaped.reshape(-1, math.prod(sizes[axis] for axis in group))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Returns numbers from 0 in the order of a transposed array."""
    shape = _numbers(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
