"""`diff`: compares two adapters."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_jax import checkpoint
from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands.formatting import (
    format_count,
    format_number,
    format_path,
    format_shape,
    make_table,
    natural_order,
    progress_bar,
    summarize_kinds,
)
from lora_jax.commands.inspection import euclidean
from lora_jax.commands.layout import find_copies, infer_base
from lora_jax.commands.leaves import leaf_path
from lora_jax.commands.reading import GGUF, NATIVE, PEFT, adapter_directory, describe_kind, open_peft, read
from lora_jax.merging import distance, norm
from lora_jax.peft import gguf, keys
from lora_jax.peft.config import TOKENS
from lora_jax.peft.opening import read_config

_UNSUPPORTED = f"diff compares adapters of lora_jax and of PEFT's LORA and {TOKENS}"


def diff(one: Path, other: Path, console: Console, progress: Console, *, ignore: Sequence[str] = ()) -> bool:
    """Prints the differences of two adapters; returns whether there are any."""
    one, other = (path if gguf.is_gguf(path) else adapter_directory(path, progress) for path in (one, other))
    kinds = [describe_kind(path) for path in (one, other)]
    if GGUF in kinds and kinds != [GGUF, GGUF]:
        raise ValueError(
            f"{one} and {other}: one is a GGUF file, with the names of llama.cpp; lora-jax convert writes the other as "
            "one (--target gguf-file)."
        )
    if kinds[0] == kinds[1]:
        return _diff(one, other, kinds[0], console, progress, ignore)
    if checkpoint.read_names((one, other)[kinds.index(NATIVE)]) is None:
        raise ValueError(
            f"{one} and {other}: one is of PEFT, the other of lora_jax, and their weights have different names; "
            "lora_jax.save(…, names=names) stores those of PyTorch, for comparisons."
        )
    with open_peft(one, "a comparison") as first, open_peft(other, "a comparison") as second:
        return _diff(first, second, PEFT, console, progress, ignore)


def _diff(one: Path, other: Path, kind: str, console: Console, progress: Console, ignore: Sequence[str]) -> bool:
    """Prints the differences of two adapters of one kind."""
    first, second = (read(directory, ignore, _UNSUPPORTED) for directory in (one, other))
    paths = sorted({*first, *second}, key=natural_order)
    table = make_table("weight", "first", "second", "‖difference‖", "relative")
    different = 0
    with progress_bar(progress, "comparing", len(paths)) as advance:
        for path in paths:
            x, y = first.get(path), second.get(path)
            if x is None or y is None or not _same(x, y):
                different += 1
                table.add_row(format_path(path, kind == NATIVE), *_describe(x, y), *_format_distance(x, y))
            advance(1)
    further = []
    if kind == PEFT:
        further += _compare_copies((one, other), (first, second), ignore)
        further += _compare_configs((one, other), {*first, *second})
    if different:
        console.print(table)
        console.print()
    console.print(
        f"different: {different} of {format_count(len(paths), 'weight')}"
        if different
        else f"the same: {summarize_kinds(first)}"
    )
    for line in further:
        console.print(line)
    return bool(different or further)


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal, bit for bit."""
    if type(one) is not type(other):
        return False
    names = [field.name for field in dataclasses.fields(one)]  # pyrefly: ignore[bad-argument-type]
    pairs = [[np.asarray(getattr(node, name)) for node in (one, other)] for name in names]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def _describe(one: Adapter | None, other: Adapter | None) -> tuple[str, str]:
    """Describes two adapters: the kind of each, and the facts in which they differ."""
    first, second = (_facts(node) if node is not None else {} for node in (one, other))
    always = ("rank", "scale", "rows")
    keys = [k for k in dict.fromkeys((*first, *second)) if k in always or first.get(k) != second.get(k)]
    texts = []
    for node, facts in ((one, first), (other, second)):
        listed = [f"{key} {facts[key]}" for key in keys if key in facts and ((one and other) or key in always)]
        texts.append("–" if node is None else " ".join((node.kind, *listed)))
    return texts[0], texts[1]


def _facts(node: Adapter) -> dict[str, str]:
    facts = {name: format_number(value) for name, value in node.describe().items()}
    if (bias := getattr(node, "bias", None)) is not None:
        facts["‖bias‖"] = f"{euclidean(bias):.4g}"
    arrays = [getattr(node, field) for field in ("a", "rows", "value") if hasattr(node, field)]
    return facts | {"shape": format_shape(node.shape()), "dtype": arrays[0].dtype.name if arrays else ""}


def _format_distance(one: Adapter | None, other: Adapter | None) -> tuple[str, str]:
    """Formats the norm of the difference of two adapters, and its ratio to the first's norm."""
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


def _compare_copies(
    directories: tuple[Path, Path], deltas: tuple[Mapping[str, Adapter], Mapping[str, Adapter]], ignore: Sequence[str]
) -> list[str]:
    """Compares the matrices that two PEFT adapters store in full without `modules_to_save`.

    A matrix that only one of them stores in addition to factors is the base's: :func:`lora_jax.peft.load` accepts no
    other.
    """
    lines = []
    bases = [infer_base(directory, ignore)[0] for directory in directories]
    stored = [find_copies(directory, ignore) for directory in directories]
    for name in dict.fromkeys((*stored[0], *stored[1])):
        is_stored, path = [name in names for names in stored], leaf_path(name)
        if all(is_stored):
            if not np.array_equal(bases[0][path], bases[1][path]):
                lines.append(f"{name}, stored in full in both, differs")
        elif path not in deltas[is_stored.index(True)]:
            lines.append(
                f"{directories[is_stored.index(True)]} stores {name} in full without modules_to_save: only the base "
                "shows whether it was trained"
            )
    return lines


def _compare_configs(directories: tuple[Path, Path], paths: Collection[str]) -> list[str]:
    """Compares what two configs define for the same tensors: the modules that PEFT saves, and the task."""
    lines = []
    one, other = directories
    first, second = (read_config(directory) for directory in directories)
    modules = [keys.split_name(path.replace("/", "."))[0] for path in paths]
    saved = [[keys.saved_module(x, config.modules_to_save) for x in modules] for config in (first, second)]
    if saved[0] != saved[1]:
        lists = [sorted(set(config.modules_to_save)) for config in (first, second)]
        lines.append(f"modules_to_save is {lists[0]} in {one}, {lists[1]} in {other}")
    if first.task_type != second.task_type:
        lines.append(f"task_type is {first.task_type} in {one}, {second.task_type} in {other}")
    return lines


def _float64(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float64)
