"""`merge`: a checkpoint with an adapter folded in."""

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import peft
from lora_jax.adapters.full import enlarges
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands import biases, fitting_methods, layout
from lora_jax.commands.outputs import check_new
from lora_jax.commands.reading import MODEL, adapter_directory, check_directory, check_peft, model_config, opened
from lora_jax.commands.wording import counted, few, progress_bar, shown
from lora_jax.io.files import replace_directory
from lora_jax.peft import ties
from lora_jax.peft.config import CONFIG
from lora_jax.peft.tensors import (
    INDEX,
    WEIGHTS,
    WRITTEN_BY,
    Tensors,
    absent,
    model_files,
    read_json,
    rewrite,
    written_here,
)

_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    force: bool,
    ignore: Sequence[str] = (),
    console: Console,
    progress: Console,
) -> None:
    """Writes a checkpoint with a PEFT adapter folded in, in the base's files and dtypes."""
    adapter = adapter_directory(adapter, progress)
    check_peft(adapter, "a merge")
    check_directory(base)
    copied, left_out = _others(base, model_files(base))
    owns = written_here({INDEX, *(file.name for file in copied)})
    check_new(out, MODEL, "checkpoint", owns, force, apart_from=(base, adapter))
    config = model_config(base)
    with opened(base) as tensors, replace_directory(out, MODEL, what="checkpoint", owns=owns) as fresh:
        fit = fitting_methods.of_checkpoint(tensors, adapter, config, ignore)
        delta = peft.load(adapter, fit.base, fit.names, ignore=ignore)
        heads = [(table, head) for head, (table, _) in fit.untied.items()]
        ties.check_shared(delta, [*_parted(tensors, config, delta), *heads], tensors, config)
        ties.share_rows(delta, tensors, config)
        new = biases.separated(delta, tensors, config)
        tables = {head: table for head, (table, _) in fit.untied.items()}
        for file in copied:
            shutil.copyfile(file, fresh / file.name)
        changed = dict.fromkeys(delta, False)
        larger = {
            name: delta[path].shape()
            for name in (*tensors, *tables)
            if (path := layout.leaf_path(name)) in delta and enlarges(delta[path], tensors[tables.get(name, name)])
        }

        added = tables | new.weights
        shapes = larger | {bias: tensors[weight][:1] for bias, weight in new.weights.items()}

        def read(name: str) -> np.ndarray:
            if (weight := new.weights.get(name)) is not None:
                return np.zeros(shapes[name], tensors.read(weight, (slice(1),)).dtype)
            return tensors.read(tables.get(name, name))

        def change(name: str) -> np.ndarray | None:
            path = layout.leaf_path(name)
            if path not in delta:
                return read(name) if name in new.weights else None
            before = read(name)
            after = merged(name, before, delta.pop(path))
            changed[path] = not np.array_equal(before, after)
            return after

        megabytes = sum(file.stat().st_size for file in tensors.files) // 2**20
        with progress_bar(progress, "merging (MiB)", megabytes) as advance:
            for file in tensors.files:
                beside = {name: like for name, like in added.items() if tensors.file_of(like) == file}
                rewrite(
                    file,
                    fresh / file.name,
                    change,
                    lambda size: advance(size / 2**20),
                    beside,
                    metadata=WRITTEN_BY,
                    shapes=shapes,
                )
        total = len(tensors) + len(added)
        config = _enlarged(fresh, config, larger)
        config = _flagged(fresh, config, new.flags)
        apart = _untie(fresh, tensors, config, tables, set(changed))
        _list(fresh, tensors, added, shapes)
    console.print(f"{out}: {base} with {sum(changed.values())} of {counted(total, 'tensor')} changed")
    same = [path for path, differs in changed.items() if not differs]
    if len(same) == len(changed):
        console.print("the merge changes nothing: every ΔW is zero, or lost in rounding to the base's dtype")
    elif same:
        console.print(f"{counted(len(same), 'adapted weight')} as before: {few(shown(x, False) for x in same)}")
    for head, (table, why) in fit.untied.items():
        console.print(f"untied: {why}; {table} and {head} are stored apart, with tie_word_embeddings false")
    for line in apart:
        console.print(line)
    if new.weights:
        count = counted(len(new.weights), "bias tensor")
        console.print(f"added: {count}, zeros where the adapter has none, with {' and '.join(new.flags)} true")
    for name, shape in larger.items():
        console.print(f"enlarged: {name} has {shape[0]:,} rows, and so has vocab_size in {MODEL}")
    if left_out:
        console.print(f"not copied: {few(left_out)}")


def _enlarged(directory: Path, config: dict[str, Any], larger: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of a written checkpoint, whose vocabulary is that of the adapter where it is larger."""
    if not larger or not config:
        return config
    rows = max(shape[0] for shape in larger.values())
    inner = [name for name in ("text_config",) if isinstance(config.get(name), dict)]
    content = config | {name: config[name] | {"vocab_size": rows} for name in inner}
    content |= {"vocab_size": rows} if "vocab_size" in config or not inner else {}
    (directory / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _flagged(directory: Path, config: dict[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """The config of a written checkpoint with flags set."""
    if not flags:
        return config
    content = config | dict.fromkeys(flags, True)
    (directory / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _list(directory: Path, tensors: Tensors, added: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Lists added tensors in the index of a written checkpoint.

    Args:
      directory: Of the checkpoint.
      tensors: Those of the base.
      added: The names, each with that of a tensor in the same file, of the same dtype.
      shapes: Of those whose shape is another.
    """
    index = directory / INDEX
    if not added or not index.is_file():
        return
    content = read_json(index)
    content["weight_map"] |= {name: tensors.file_of(like).name for name, like in added.items()}
    if isinstance(size := content.get("metadata", {}).get("total_size"), int):
        for name, like in added.items():
            size += tensors.bytes(like) * math.prod(shapes.get(name, tensors[like])) // math.prod(tensors[like])
        content["metadata"]["total_size"] = size
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _untie(
    directory: Path, tensors: Tensors, config: dict[str, Any], tables: dict[str, str], adapted: set[str]
) -> list[str]:
    """Marks a written checkpoint whose head is not its embedding any more.

    Returns:
      What to say of heads that the base stores, as copies of the embedding.
    """
    stored = _parted(tensors, config, adapted)
    if (tables or stored) and config:
        inner = [name for name in ("text_config",) if isinstance(config.get(name), dict)]
        nested = {name: config[name] | {"tie_word_embeddings": False} for name in inner}
        content = config | nested | {"tie_word_embeddings": False}
        (directory / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [f"untied: {table} and {head} differ now; tie_word_embeddings is false" for table, head in stored]


def _parted(tensors: Tensors, config: dict[str, Any], adapted: Collection[str]) -> list[tuple[str, str]]:
    """Embeddings and heads that a base stores as copies, and of which one is adapted."""
    return [
        (table, head)
        for table in tensors
        if (head := ties.tied_head(table, config)) in tensors
        and (layout.leaf_path(table) in adapted) != (layout.leaf_path(head) in adapted)
    ]


def merged(name: str, value: np.ndarray, node: Adapter) -> np.ndarray:
    """One tensor with its adapter, computed in float32 and cast to what is stored.

    Raises:
      ValueError: NaN or Inf is in the weight, or would be in the result.
    """
    if not np.isfinite(value.astype(np.float32)).all():
        raise ValueError(f"{name!r} of the base holds NaN or Inf; nothing is merged into it.")
    wide = np.asarray(node.merge(jnp.asarray(value, jnp.float32)))
    with np.errstate(over="ignore"):  # told below
        result = wide.astype(value.dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        largest = np.max(np.abs(wide))
        raise ValueError(f"{name!r} would hold NaN or Inf: the merged weight is up to {largest:.4g}, as {value.dtype}.")
    if value.dtype.itemsize > 4:  # what the adapter leaves alone keeps its bits
        result = np.where(wide == value.astype(np.float32), value, result)
    return result


def _others(base: Path, weights: list[Path]) -> tuple[list[Path], list[str]]:
    """The files beside a checkpoint's weights that belong to a merged one, and what does not."""
    copied, left_out = [], []
    sharded = weights[0].name != WEIGHTS
    for path in sorted(base.iterdir()):
        if path.is_symlink() and not path.exists():
            raise ValueError(absent(path))
        if path.is_file() and (path.name == INDEX if path.name.endswith(".index.json") else True):
            if path.name == INDEX and not sharded:
                continue
            if path.suffix not in _NOT_COPIED and path.name != CONFIG:
                copied.append(path)
            elif path not in weights:
                left_out.append(path.name)
        elif path.is_dir() and not path.name.startswith("."):
            left_out.append(f"{path.name}/")
    return copied, left_out
