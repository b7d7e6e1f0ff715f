"""`inspect`: what an adapter holds, and which base it fits."""

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
from lora_jax.commands import layout
from lora_jax.commands.reading import adapter_directory, fitted, is_native, opened, read
from lora_jax.commands.wording import (
    counted,
    few,
    kinds_of,
    number_text,
    numbered,
    progress_bar,
    shape_text,
    shown,
    span,
    table_of,
)
from lora_jax.merging import norm
from lora_jax.optim import partition
from lora_jax.peft.config import CONFIG
from lora_jax.peft.opening import config_of
from lora_jax.peft.targets import MAX_LORA_RANKS
from lora_jax.peft.tensors import (
    read_json,
)


def inspect(
    directory: Path, base: Path | None, console: Console, progress: Console, *, ignore: Sequence[str] = ()
) -> None:
    """Prints what an adapter holds, and which base it fits."""
    directory = adapter_directory(directory, progress)
    native = is_native(directory)
    delta, untied = fitted(directory, base, ignore) if base else (read(directory, ignore), {})
    sizes = _sizes(delta, base, {head: table for head, (table, _) in untied.items()}, progress)
    console.print(f"{directory}: {'a lora_jax' if native else 'a PEFT'} adapter of {kinds_of(delta)}")
    for line in _about_base(directory, base, native, ignore):
        console.print(line)
    for head, (table, why) in untied.items():
        console.print(f"unties {head} from {table}: {why}")
    console.print()
    table = table_of("weight", "shape", "adapter", "rank", "alpha", "scale", "‖ΔW‖", *(["of ‖W‖"] if base else []))
    table.add_column("trained", justify="right")
    for path, node in sorted(delta.items(), key=lambda item: numbered(item[0])):
        about, (change, weight) = node.describe(), sizes[path]
        table.add_row(
            shown(path, native),
            shape_text(node.shape()),
            node.kind,
            *(number_text(about.get(name)) for name in ("rank", "alpha", "scale")),
            "" if change is None else f"{change:.4g}",
            *([f"{change / weight:.2%}" if change is not None and weight else ""] if base else []),
            f"{_trained(node):,}",
        )
    console.print(table)
    console.print()
    console.print(f"{sum(map(_trained, delta.values())):,} trained numbers")
    ranks = [node.rank for node in delta.values() if isinstance(node, LoRAAdapter)]
    if ranks:
        console.print(f"rank {span(ranks)}{_for_vllm(delta, max(ranks))}")
    if not base and any(isinstance(node, LoRAAdapter) and not node.additive for node in delta.values()):
        console.print("‖ΔW‖ of a DoRA adapter is that of its low-rank term; with --base also its magnitudes count")
    still = [path for path, (change, _) in sizes.items() if change == 0 and _is_whole(delta[path], base)]
    if len(still) == len(delta):
        console.print("every ΔW is zero: this adapter changes nothing")
    elif still:
        console.print(f"ΔW is zero for {counted(len(still), 'weight')}: {few(shown(x, native) for x in still)}")


def _about_base(directory: Path, base: Path | None, native: bool, ignore: Sequence[str]) -> Iterator[str]:
    if native:
        known = read_json(directory / checkpoint.MANIFEST).get("base", {})
        digests = sum(bool(entry.get("sha256")) for entry in known.values())
        yield "base: weights of the paths and shapes below" + (
            f", {digests} of them known by digest" if digests else ""
        )
        return
    named = read_json(directory / CONFIG).get("base_model_name_or_path") if (directory / CONFIG).is_file() else None
    yield f"base: {named}, says the adapter" if named else "base: not named"
    if base:
        yield f"fits {base}"
        return
    yield "fits a checkpoint with weights of the names and shapes below; --base tries one"
    if names := layout.copies(directory, ignore):
        yield f"also holds {few(names)} whole, as PEFT does for embeddings; --base tells whether it was trained"
    targets = config_of(directory).target_parameters
    if len({name.rpartition(".")[0] for name in targets}) < len(targets):
        yield "which parameter of a module has which factors is taken from the config's order; --base tells"


def _for_vllm(delta: Mapping[str, Adapter], rank: int) -> str:
    """What vLLM needs for an adapter; empty where it takes none such."""
    if not all(node.kind == "LoRA" for node in delta.values()) or rank > MAX_LORA_RANKS[-1]:
        return ""
    return f"; vLLM needs a max_lora_rank of at least {min(n for n in MAX_LORA_RANKS if n >= rank)}"


def _sizes(
    delta: Mapping[str, Adapter], base: Path | None, copies: Mapping[str, str], progress: Console
) -> dict[str, tuple]:
    """Per path the norm of ΔW and, with a base, that of W; None where it takes a base to tell.

    Args:
      delta: Of the adapter.
      base: The checkpoint.
      copies: Tensors that the checkpoint does not store, with those whose values they have.
      progress: Where a bar is drawn.
    """
    found: dict[str, tuple[float | None, float | None]] = {}
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar(progress, "measuring", len(delta)))
        tensors = stack.enter_context(opened(base)) if base else None
        stored = {layout.leaf_path(name): name for name in tensors} if tensors else {}
        stored |= {layout.leaf_path(name): like for name, like in copies.items()}
        for path, node in delta.items():
            change = norm(node) if node.additive or isinstance(node, LoRAAdapter) else None
            weight = None
            if tensors:
                value = tensors.read(stored[path]).astype(np.float32)
                weight = euclidean(value)
                if change is None or not node.additive:
                    change = euclidean(np.asarray(node.merge(jnp.asarray(value))) - value)
            found[path] = change, weight
            advance(1)
    return found


def _is_whole(node: Adapter, base: Path | None) -> bool:
    """Whether the norm that is shown is all that the adapter does."""
    return base is not None or node.additive


def euclidean(value: Any) -> float:
    """The root of the sum of squares, in float64."""
    return float(np.linalg.norm(np.asarray(value, np.float64).ravel()))


def _trained(node: Adapter) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(partition({"": node})[0]))
