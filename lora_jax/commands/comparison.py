"""`diff`: how two adapters differ."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_jax.adapters.full import Replacement, RowReplacement
from lora_jax.adapters.lowrank import LowRank
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands.inspection import euclidean
from lora_jax.commands.reading import adapter_directory, is_native, read
from lora_jax.commands.wording import (
    counted,
    kinds_of,
    number_text,
    numbered,
    progress_bar,
    shape_text,
    shown,
    table_of,
)
from lora_jax.merging import distance, norm
from lora_jax.peft import layout
from lora_jax.peft.config import TOKENS
from lora_jax.peft.opening import config_of

_WITHOUT_SHAPES = f"diff compares adapters of lora_jax and of PEFT's LORA and {TOKENS}"


def diff(one: Path, other: Path, console: Console, progress: Console, *, ignore: Sequence[str] = ()) -> bool:
    """Prints how two adapters differ; returns whether they do."""
    one, other = adapter_directory(one, progress), adapter_directory(other, progress)
    native = is_native(one), is_native(other)
    if native[0] != native[1]:
        raise ValueError(f"{one} and {other}: one is of PEFT, the other of lora_jax; their weights have other names.")
    first, second = (read(directory, ignore, _WITHOUT_SHAPES) for directory in (one, other))
    paths = sorted({*first, *second}, key=numbered)
    table = table_of("weight", "first", "second", "‖difference‖", "relative")
    different = 0
    with progress_bar(progress, "comparing", len(paths)) as advance:
        for path in paths:
            x, y = first.get(path), second.get(path)
            if x is None or y is None or not _same(x, y):
                different += 1
                table.add_row(shown(path, native[0]), *_said(x, y), *_apart(x, y))
            advance(1)
    stored = [] if any(native) else [*_copies_apart(one, other, ignore), *_configs_apart(one, other)]
    if different:
        console.print(table)
        console.print()
    console.print(
        f"different: {different} of {counted(len(paths), 'weight')}" if different else f"the same: {kinds_of(first)}"
    )
    for line in stored:
        console.print(line)
    return bool(different or stored)


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal, bit for bit."""
    return type(one) is type(other) and not _differing(one, other)


def _differing(one: Adapter, other: Adapter) -> list[str]:
    """The fields in which two adapters of one kind differ."""
    names = [field.name for field in dataclasses.fields(one)]  # pyrefly: ignore[bad-argument-type]
    pairs = {name: [np.asarray(getattr(node, name)) for node in (one, other)] for name in names}
    return [name for name, (x, y) in pairs.items() if x.dtype != y.dtype or not np.array_equal(x, y)]


def _said(one: Adapter | None, other: Adapter | None) -> tuple[str, str]:
    """Two adapters in words: what each is, and those facts in which they differ."""
    abouts = [_facts(node) if node is not None else {} for node in (one, other)]
    shown = ("rank", "scale", "rows")
    keys = [k for k in dict.fromkeys((*abouts[0], *abouts[1])) if k in shown or abouts[0].get(k) != abouts[1].get(k)]
    texts = []
    for node, about in zip((one, other), abouts):
        facts = [f"{key} {about[key]}" for key in keys if key in about and ((one and other) or key in shown)]
        texts.append("–" if node is None else " ".join((node.kind, *facts)))
    return texts[0], texts[1]


def _facts(node: Adapter) -> dict[str, str]:
    facts = {name: number_text(value) for name, value in node.describe().items()}
    if (bias := getattr(node, "bias", None)) is not None:
        facts["‖bias‖"] = f"{euclidean(bias):.4g}"
    arrays = [getattr(node, field) for field in ("a", "rows", "value") if hasattr(node, field)]
    return facts | {"shape": shape_text(node.shape()), "dtype": arrays[0].dtype.name if arrays else ""}


def _apart(one: Adapter | None, other: Adapter | None) -> tuple[str, str]:
    """The norm of the difference of two adapters, and relative to the first's."""
    if one is None or other is None or one.shape() != other.shape():
        return "", ""
    if all(node.additive or isinstance(node, LowRank) for node in (one, other)) and one.axes == other.axes:
        gap, size = distance(one, other), norm(one)
    elif isinstance(one, Replacement) and isinstance(other, Replacement):
        gap, size = euclidean(_float64(one.value) - _float64(other.value)), euclidean(one.value)
    elif isinstance(one, RowReplacement) and isinstance(other, RowReplacement) and np.array_equal(one.ids, other.ids):
        gap, size = euclidean(_float64(one.rows) - _float64(other.rows)), euclidean(one.rows)
    else:
        return "", ""
    return f"{gap:.4g}", f"{gap / size:.2%}" if size else ""


def _copies_apart(one: Path, other: Path, ignore: Sequence[str]) -> list[str]:
    """Lines about embeddings that only one of two PEFT adapters holds whole, or that differ."""
    lines = []
    bases = [layout.of_adapter(directory, ignore)[0] for directory in (one, other)]
    held = [layout.copies(directory, ignore) for directory in (one, other)]
    for name in dict.fromkeys((*held[0], *held[1])):
        where = [name in names for names in held]
        if not all(where):
            lines.append(f"{name} is stored whole in {one if where[0] else other} only")
        elif not np.array_equal(bases[0][layout.leaf_path(name)], bases[1][layout.leaf_path(name)]):
            lines.append(f"{name}, stored whole in both, differs")
    return lines


def _configs_apart(one: Path, other: Path) -> list[str]:
    """Lines about what two configs make of the same tensors: as which modules PEFT saves them, and for which task."""
    lines = []
    configs = [config_of(directory) for directory in (one, other)]
    for name in ("modules_to_save", "task_type"):
        first, second = (getattr(config, name) for config in configs)
        if name == "modules_to_save":
            first, second = sorted(first), sorted(second)
        if first != second:
            lines.append(f"{name} is {first} in {one}, {second} in {other}")
    return lines


def _float64(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float64)
