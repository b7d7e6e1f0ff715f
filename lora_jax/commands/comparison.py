"""`diff`: how two adapters differ."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands import layout
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
from lora_jax.peft import keys
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
    stored = (
        []
        if any(native)
        else [
            *_copies_apart((one, other), (first, second), ignore),
            *_configs_apart((one, other), {*first, *second}),
        ]
    )
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
    if all(node.additive or isinstance(node, LoRAAdapter) for node in (one, other)) and one.axes == other.axes:
        gap, size = distance(one, other), norm(one)
    elif isinstance(one, FullAdapter) and isinstance(other, FullAdapter):
        gap, size = euclidean(_float64(one.value) - _float64(other.value)), euclidean(one.value)
    elif isinstance(one, RowsAdapter) and isinstance(other, RowsAdapter) and np.array_equal(one.ids, other.ids):
        gap, size = euclidean(_float64(one.rows) - _float64(other.rows)), euclidean(one.rows)
    else:
        return "", ""
    return f"{gap:.4g}", f"{gap / size:.2%}" if size else ""


def _copies_apart(
    directories: tuple[Path, Path], deltas: tuple[Mapping[str, Adapter], Mapping[str, Adapter]], ignore: Sequence[str]
) -> list[str]:
    """Lines about matrices that only one of two PEFT adapters holds whole, or that differ.

    What only one holds beside factors is the base's: :func:`lora_jax.peft.load` takes nothing else there.
    """
    lines = []
    bases = [layout.of_adapter(directory, ignore)[0] for directory in directories]
    held = [layout.copies(directory, ignore) for directory in directories]
    for name in dict.fromkeys((*held[0], *held[1])):
        where, path = [name in names for names in held], layout.leaf_path(name)
        if all(where):
            if not np.array_equal(bases[0][path], bases[1][path]):
                lines.append(f"{name}, stored whole in both, differs")
        elif path not in deltas[where.index(True)]:
            lines.append(
                f"{directories[where.index(True)]} holds {name} whole without modules_to_save: only the base tells "
                "whether it was trained"
            )
    return lines


def _configs_apart(directories: tuple[Path, Path], paths: Collection[str]) -> list[str]:
    """Lines about what two configs make of the same tensors: as which modules PEFT saves them, and for which task."""
    lines = []
    one, other = directories
    first, second = (config_of(directory) for directory in directories)
    modules = [keys.split_name(path.replace("/", "."))[0] for path in paths]
    saved = [[keys.saved_as(x, config.modules_to_save) for x in modules] for config in (first, second)]
    if saved[0] != saved[1]:
        lists = [sorted(set(config.modules_to_save)) for config in (first, second)]
        lines.append(f"modules_to_save is {lists[0]} in {one}, {lists[1]} in {other}")
    if first.task_type != second.task_type:
        lines.append(f"task_type is {first.task_type} in {one}, {second.task_type} in {other}")
    return lines


def _float64(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float64)
