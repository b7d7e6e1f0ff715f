"""`merge`: merges an adapter into a checkpoint."""

import json
import math
import shlex
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
from lora_jax.commands.biases import split_biases
from lora_jax.commands.fitting import fit_checkpoint
from lora_jax.commands.formatting import abbreviate, format_count, format_path, progress_bar
from lora_jax.commands.leaves import leaf_path
from lora_jax.commands.outputs import check_new
from lora_jax.commands.reading import (
    MODEL,
    adapter_directory,
    check_directory,
    model_config,
    open_checkpoint,
    open_peft,
)
from lora_jax.io.files import replace_directory
from lora_jax.peft import gguf, ties
from lora_jax.peft.config import CONFIG
from lora_jax.peft.rewriting import rewrite
from lora_jax.peft.tensor_files import WRITTEN_BY, ownership_test
from lora_jax.peft.tensors import INDEX, WEIGHTS, Tensors, describe_missing, model_files, read_json

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
    """Writes a checkpoint with an adapter merged into it, with the base's files and dtypes."""
    adapter = adapter_directory(adapter, progress)
    if gguf.is_gguf(base):
        raise ValueError(
            f"{base}: is a GGUF file, and a merge takes a checkpoint directory (config.json and safetensors). To apply "
            f"the adapter to this base in llama.cpp, unmerged: {_gguf_command(base, adapter)}. To merge it: python -m "
            f"experiments.run merge --model {base} --adapter {adapter}."
        )
    check_directory(base)
    copied, omitted = _other_files(base, model_files(base))
    owns = ownership_test({INDEX, *(file.name for file in copied)})
    check_new(out, MODEL, "checkpoint", owns, force, inputs=(base, adapter))
    config = model_config(base)
    with (
        open_peft(adapter, "a merge") as source,
        open_checkpoint(base) as tensors,
        replace_directory(out, MODEL, what="checkpoint", owns=owns) as fresh,
    ):
        fit = fit_checkpoint(tensors, source, config, ignore)
        delta = peft.load(source, fit.base, fit.names, ignore=ignore)
        heads = [(table, head) for head, (table, _) in fit.untied.items()]
        ties.check_shared(delta, [*_untied_copies(tensors, config, delta), *heads], tensors, config)
        ties.share_rows(delta, tensors, config)
        new = split_biases(delta, tensors, config)
        tables = {head: table for head, (table, _) in fit.untied.items()}
        for file in copied:
            shutil.copyfile(file, fresh / file.name)
        changed = dict.fromkeys(delta, False)
        larger = {
            name: delta[path].shape()
            for name in (*tensors, *tables)
            if (path := leaf_path(name)) in delta and enlarges(delta[path], tensors[tables.get(name, name)])
        }

        added = tables | new.weights
        shapes = larger | {bias: tensors[weight][:1] for bias, weight in new.weights.items()}

        def read(name: str) -> np.ndarray:
            if (weight := new.weights.get(name)) is not None:
                return np.zeros(shapes[name], tensors.read(weight, (slice(1),)).dtype)
            return tensors.read(tables.get(name, name))

        def change(name: str) -> np.ndarray | None:
            path = leaf_path(name)
            if path not in delta:
                return read(name) if name in new.weights else None
            before = read(name)
            after = merge_tensor(name, before, delta.pop(path))
            changed[path] = not np.array_equal(before, after)
            return after

        megabytes = sum(file.stat().st_size for file in tensors.files) // 2**20
        with progress_bar(progress, "merging (MiB)", megabytes) as advance:
            for file in tensors.files:
                in_file = {name: like for name, like in added.items() if tensors.file_of(like) == file}
                rewrite(
                    file,
                    fresh / file.name,
                    change,
                    lambda size: advance(size / 2**20),
                    in_file,
                    metadata=WRITTEN_BY,
                    shapes=shapes,
                )
        total = len(tensors) + len(added)
        config = _set_vocabulary(fresh, config, larger)
        config = _set_flags(fresh, config, new.flags)
        untied = _untie(fresh, tensors, config, tables, set(changed))
        _extend_index(fresh, tensors, added, shapes)
    console.print(f"{out}: {base} with {sum(changed.values())} of {format_count(total, 'tensor')} changed")
    unchanged = [path for path, differs in changed.items() if not differs]
    if len(unchanged) == len(changed):
        console.print("the merge changes nothing: every ΔW is zero, or rounds to zero in the base's dtype")
    elif unchanged:
        listed = abbreviate(format_path(path, False) for path in unchanged)
        console.print(f"{format_count(len(unchanged), 'adapted weight')} unchanged: {listed}")
    for head, (table, why) in fit.untied.items():
        console.print(f"untied: {why}; {table} and {head} are stored separately, with tie_word_embeddings false")
    for line in untied:
        console.print(line)
    if new.weights:
        count = format_count(len(new.weights), "bias tensor")
        console.print(
            f"added: {count}, zeros for layers without one in the adapter, with {' and '.join(new.flags)} true"
        )
    for name, shape in larger.items():
        console.print(f"enlarged: {name} to {shape[0]:,} rows, with the same vocab_size in {MODEL}")
    if omitted:
        console.print(f"not copied: {abbreviate(omitted)}")


def _gguf_command(base: Path, adapter: Path) -> str:
    return shlex.join(
        ["lora-jax", "convert", str(adapter), "adapter.gguf", "--target", "gguf-file", "--base", str(base)]
    )


def _set_vocabulary(directory: Path, config: dict[str, Any], larger: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sets the vocabulary size of a written checkpoint to the adapter's, if that is larger; returns the config."""
    if not larger or not config:
        return config
    rows = max(shape[0] for shape in larger.values())
    inner = [name for name in ("text_config",) if isinstance(config.get(name), dict)]
    content = config | {name: config[name] | {"vocab_size": rows} for name in inner}
    content |= {"vocab_size": rows} if "vocab_size" in config or not inner else {}
    (directory / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _set_flags(directory: Path, config: dict[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """Sets flags in the config of a written checkpoint; returns the config."""
    if not flags:
        return config
    content = config | dict.fromkeys(flags, True)
    (directory / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content


def _extend_index(
    directory: Path, tensors: Tensors, added: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Adds new tensors to the index of a written checkpoint.

    Args:
      directory: The checkpoint.
      tensors: The base's tensors.
      added: The new names, each with the name of a tensor of the same file and dtype.
      shapes: The shapes of tensors whose shape differs from that tensor's.
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
    """Sets `tie_word_embeddings` to false in a written checkpoint whose head now differs from its embedding.

    Returns:
      Messages about heads that the base stores as copies of the embedding.
    """
    stored = _untied_copies(tensors, config, adapted)
    if (tables or stored) and config:
        inner = [name for name in ("text_config",) if isinstance(config.get(name), dict)]
        nested = {name: config[name] | {"tie_word_embeddings": False} for name in inner}
        content = config | nested | {"tie_word_embeddings": False}
        (directory / MODEL).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [f"untied: {table} and {head} differ now; tie_word_embeddings is false" for table, head in stored]


def _untied_copies(tensors: Tensors, config: dict[str, Any], adapted: Collection[str]) -> list[tuple[str, str]]:
    """Returns embeddings and heads of which the base stores copies, and the adapter changes only one."""
    return [
        (table, head)
        for table in tensors
        if (head := ties.tied_head(table, config)) in tensors
        and (leaf_path(table) in adapted) != (leaf_path(head) in adapted)
    ]


def merge_tensor(name: str, value: np.ndarray, node: Adapter) -> np.ndarray:
    """Merges an adapter into a tensor, in float32, and casts the result to the stored dtype.

    Raises:
      ValueError: The weight or the result has NaN or Inf.
    """
    if not np.isfinite(value.astype(np.float32)).all():
        raise ValueError(f"{name!r} of the base holds NaN or Inf; nothing is merged into it.")
    wide = np.asarray(node.merge(jnp.asarray(value, jnp.float32)))
    with np.errstate(over="ignore"):  # reported below
        result = wide.astype(value.dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        largest = np.max(np.abs(wide))
        raise ValueError(f"{name!r} would hold NaN or Inf: the merged weight is up to {largest:.4g}, as {value.dtype}.")
    if value.dtype.itemsize > 4:  # preserves the bits of unchanged values
        result = np.where(wide == value.astype(np.float32), value, result)
    return result


def _other_files(base: Path, weights: list[Path]) -> tuple[list[Path], list[str]]:
    """Returns the other files of a checkpoint that a merged one needs, and the names of those that it does not."""
    copied, omitted = [], []
    sharded = weights[0].name != WEIGHTS
    for path in sorted(base.iterdir()):
        if path.is_symlink() and not path.exists():
            raise ValueError(describe_missing(path))
        if path.is_file() and (path.name == INDEX if path.name.endswith(".index.json") else True):
            if path.name == INDEX and not sharded:
                continue
            if path.suffix not in _NOT_COPIED and path.name != CONFIG:
                copied.append(path)
            elif path not in weights:
                omitted.append(path.name)
        elif path.is_dir() and not path.name.startswith("."):
            omitted.append(f"{path.name}/")
    return copied, omitted
