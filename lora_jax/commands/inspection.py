"""`inspect`: describes an adapter, and which base it fits."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import checkpoint
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands.formatting import (
    abbreviate,
    format_count,
    format_number,
    format_path,
    format_range,
    format_shape,
    make_table,
    natural_order,
    progress_bar,
    summarize_kinds,
)
from lora_jax.commands.layout import find_copies
from lora_jax.commands.leaves import leaf_path
from lora_jax.commands.reading import (
    GGUF,
    NATIVE,
    adapter_directory,
    describe_kind,
    load_on_checkpoint,
    open_checkpoint,
    read,
)
from lora_jax.merging import norm
from lora_jax.optim import partition
from lora_jax.peft import gguf
from lora_jax.peft.config import CONFIG
from lora_jax.peft.opening import read_config
from lora_jax.peft.targets import MAX_LORA_RANKS
from lora_jax.peft.tensors import (
    read_json,
)


def inspect(
    directory: Path, base: Path | None, console: Console, progress: Console, *, ignore: Sequence[str] = ()
) -> None:
    """Prints the content of an adapter, and which base it fits."""
    if gguf.is_gguf(directory):
        _check_no_base(directory, base)
    else:
        directory = adapter_directory(directory, progress)
    kind = describe_kind(directory)
    native = kind == NATIVE and base is None  # on a checkpoint it has the checkpoint's names
    delta, untied = load_on_checkpoint(directory, base, ignore) if base else (read(directory, ignore), {})
    sizes = _sizes(delta, base, {head: table for head, (table, _) in untied.items()}, progress)
    console.print(f"{directory}: a {kind} adapter of {summarize_kinds(delta)}")
    for line in _about_base(directory, base, kind, ignore):
        console.print(line)
    for head, (table, why) in untied.items():
        console.print(f"unties {head} from {table}: {why}")
    console.print()
    table = make_table("weight", "shape", "adapter", "rank", "alpha", "scale", "‖ΔW‖", *(["of ‖W‖"] if base else []))
    table.add_column("trained", justify="right")
    for path, node in sorted(delta.items(), key=lambda item: natural_order(item[0])):
        facts, (change, weight) = node.describe(), sizes[path]
        table.add_row(
            format_path(path, native),
            format_shape(node.shape()),
            node.kind,
            *(format_number(facts.get(name)) for name in ("rank", "alpha", "scale")),
            "" if change is None else f"{change:.4g}",
            *([f"{change / weight:.2%}" if change is not None and weight else ""] if base else []),
            f"{_trained(node):,}",
        )
    console.print(table)
    console.print()
    console.print(f"{sum(map(_trained, delta.values())):,} trained numbers")
    ranks = [node.rank for node in delta.values() if isinstance(node, LoRAAdapter)]
    if ranks:
        console.print(f"rank {format_range(ranks)}{_for_vllm(delta, max(ranks))}")
    if not base and any(isinstance(node, LoRAAdapter) and not node.additive for node in delta.values()):
        console.print("‖ΔW‖ of a DoRA adapter is that of its low-rank term; with --base it includes the magnitudes")
    unchanged = [path for path, (change, _) in sizes.items() if change == 0 and _has_exact_norm(delta[path], base)]
    if len(unchanged) == len(delta):
        console.print("every ΔW is zero: this adapter changes nothing")
    elif unchanged:
        listed = abbreviate(format_path(x, native) for x in unchanged)
        console.print(f"ΔW is zero for {format_count(len(unchanged), 'weight')}: {listed}")


def _check_no_base(file: Path, base: Path | None) -> None:
    if base is not None:
        raise ValueError(
            f"{file}: a GGUF file is inspected without --base; lora-jax convert --target peft --base checks its fit."
        )


def _about_base(directory: Path, base: Path | None, kind: str, ignore: Sequence[str]) -> Iterator[str]:
    if kind == GGUF:
        yield "base: weights of the names and shapes below, in llama.cpp"
        return
    if kind == NATIVE:
        weights = read_json(directory / checkpoint.MANIFEST).get("base", {})
        digests = sum(bool(entry.get("sha256")) for entry in weights.values())
        with_digest = f", {digests} of them with a digest" if digests else ""
        yield f"base: weights of the paths and shapes below{with_digest}" if base is None else f"fits {base}"
        if checkpoint.read_names(directory) is not None:
            yield "has PyTorch's names of the weights, for merge and convert"
        return
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    name = config.get("base_model_name_or_path")
    yield f"base: {name}, according to the adapter" if name else "base: not named"
    if base:
        yield f"fits {base}"
        return
    yield "fits a checkpoint with weights of the names and shapes below; --base tries one"
    if names := find_copies(directory, ignore):
        listed = abbreviate(names)
        yield f"also stores {listed} in full, as PEFT does for embeddings; --base shows whether it was trained"
    targets = read_config(directory).target_parameters
    if len({name.rpartition(".")[0] for name in targets}) < len(targets):
        yield "assumes that the factors of a module's parameters are in the config's order; --base checks it"


def _for_vllm(delta: Mapping[str, Adapter], rank: int) -> str:
    """The rank that vLLM needs for an adapter; empty if it does not support the adapter."""
    if not all(node.kind == "LoRA" for node in delta.values()) or rank > MAX_LORA_RANKS[-1]:
        return ""
    return f"; vLLM needs a max_lora_rank of at least {min(n for n in MAX_LORA_RANKS if n >= rank)}"


def _sizes(
    delta: Mapping[str, Adapter], base: Path | None, copies: Mapping[str, str], progress: Console
) -> dict[str, tuple]:
    """Returns the norms of ΔW and of W, by path; None for norms that require a base, if there is none.

    Args:
      delta: The adapter.
      base: The checkpoint.
      copies: Tensors that the checkpoint does not store, with the stored tensors that provide their values.
      progress: The console for the progress bar.
    """
    norms: dict[str, tuple[float | None, float | None]] = {}
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar(progress, "measuring", len(delta)))
        tensors = stack.enter_context(open_checkpoint(base)) if base else None
        stored = {leaf_path(name): name for name in tensors} if tensors else {}
        stored |= {leaf_path(name): like for name, like in copies.items()}
        for path, node in delta.items():
            change = norm(node) if node.additive or isinstance(node, LoRAAdapter) else None
            weight = None
            if tensors:
                value = tensors.read(stored[path]).astype(np.float32)
                weight = euclidean(value)
                if change is None or not node.additive:
                    change = euclidean(np.asarray(node.merge(jnp.asarray(value))) - value)
            norms[path] = change, weight
            advance(1)
    return norms


def _has_exact_norm(node: Adapter, base: Path | None) -> bool:
    """Whether the printed norm of ΔW covers everything that the adapter does."""
    return base is not None or node.additive


def euclidean(value: Any) -> float:
    """Returns the Euclidean norm, computed in float64."""
    return float(np.linalg.norm(np.asarray(value, np.float64).ravel()))


def _trained(node: Adapter) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(partition({"": node})[0]))
