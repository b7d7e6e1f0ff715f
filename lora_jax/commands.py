"""What the command line does: inspect, merge, convert and compare adapters on disk."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lora_jax import checkpoint, peft
from lora_jax.adapters.lowrank import LowRank
from lora_jax.adapters.protocol import Adapter
from lora_jax.files import replaced
from lora_jax.merging import distance, norm
from lora_jax.optim import partition
from lora_jax.peft import layout
from lora_jax.peft.config import CONFIG, Config
from lora_jax.peft.targets import TARGETS
from lora_jax.peft.tensors import INDEX, Tensors, model_files, write

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
_MODEL = "config.json"


def read(directory: Path, base: Path | None = None) -> dict[str, Adapter]:
    """The delta in a directory, of this library or of PEFT; PEFT's is given PyTorch's names and orientation.

    Args:
      directory: The adapter.
      base: The checkpoint that a PEFT adapter is for, if it is to be compared with it.

    Raises:
      ValueError: It is neither, is damaged, or does not fit the base.
    """
    if (directory / checkpoint.MANIFEST).is_file():
        return checkpoint.load(directory)
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory}: no adapter (it has neither {CONFIG} nor {checkpoint.MANIFEST}).")
    if base is None:
        return peft.load(directory, *layout.of_adapter(directory))
    with Tensors(model_files(base)) as tensors:
        return peft.load(directory, *layout.of_checkpoint(tensors, directory))


def inspect(directory: Path, base: Path | None, console: Console) -> None:
    """Prints what an adapter holds, and which base it fits."""
    delta = read(directory, base)
    native = (directory / checkpoint.MANIFEST).is_file()
    named = None if native else Config.read(directory).base_model_name_or_path
    console.print(f"{directory}: {'a lora_jax' if native else 'a PEFT'} adapter of {_count(len(delta), 'weight')}")
    console.print(f"for the base {named}" if named else "the base is not named", end="")
    console.print(f"; fits {base}" if base else "; it must have weights of these shapes")
    table = _table("weight", "shape", "adapter", "rank", "alpha", "scale", "norm of ΔW", "trained")
    for column in table.columns[3:]:
        column.justify = "right"
    for path, node in delta.items():
        about = node.describe()
        size = f"{norm(node):.4g}" if isinstance(node, LowRank) else ""
        table.add_row(
            _shown(path, directory),
            "×".join(map(str, node.shape())),
            node.kind,
            *(_short(about.get(name)) for name in ("rank", "alpha", "scale")),
            size,
            f"{_trained(node):,}",
        )
    console.print(table)
    console.print(f"{sum(map(_trained, delta.values())):,} trained numbers")
    if any(isinstance(node, LowRank) and not node.additive for node in delta.values()):
        console.print("the norms are those of the low-rank terms, before DoRA's magnitudes")


def merge(base: Path, adapter: Path, out: Path, *, force: bool, console: Console) -> None:
    """Writes a checkpoint with a PEFT adapter folded in, in the base's layout and dtypes."""
    if (adapter / checkpoint.MANIFEST).is_file():
        raise ValueError(f"{adapter}: {_NEEDS_NAMES}")
    _check_new(out, force, apart_from=(base, adapter))
    files = model_files(base)
    with Tensors(files) as tensors, replaced(out, _MODEL, what="checkpoint") as fresh:
        delta = peft.load(adapter, *layout.of_checkpoint(tensors, adapter))
        for file in _others(base):
            shutil.copyfile(file, fresh / file.name)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("merging", total=len(tensors))
            for file in files:
                inside = [name for name in tensors if tensors.file_of(name) == file]
                merged = {}
                for name in inside:
                    merged[name] = _merged(name, tensors.read(name), delta.get(layout.leaf_path(name)))
                    progress.advance(task)
                write(fresh / file.name, merged, tensors.metadata(inside[0]) if inside else None)
        total = len(tensors)
    console.print(f"{out}: {base} with {len(delta)} of {_count(total, 'weight')} changed")


def convert(directory: Path, out: Path, *, target: str, force: bool, console: Console) -> None:
    """Writes a PEFT adapter again for another reader."""
    if (directory / checkpoint.MANIFEST).is_file():
        raise ValueError(f"{directory}: {_NEEDS_NAMES}")
    _check_new(out, force, apart_from=(directory,))
    base, names = layout.of_adapter(directory)
    config = Config.read(directory)
    peft.save(
        out,
        peft.load(directory, base, names),
        names,
        target=target,
        base_model=config.base_model_name_or_path,
        task_type=config.task_type,
    )
    console.print(f"{out}: written for {TARGETS[target].reader}")


def diff(one: Path, other: Path, console: Console) -> bool:
    """Prints how two adapters differ; returns whether they do."""
    deltas = read(one), read(other)
    table = _table("weight", "first", "second", "difference of ΔW", "relative")
    different = 0
    for path in dict.fromkeys((*deltas[0], *deltas[1])):
        nodes = [delta.get(path) for delta in deltas]
        if all(node is not None for node in nodes) and _same(*nodes):
            continue
        different += 1
        table.add_row(_shown(path, one), *map(_said, nodes), *_apart(*nodes))
    if different:
        console.print(table)
    total = len(dict.fromkeys((*deltas[0], *deltas[1])))
    console.print(f"{different} of {total} weights differ" if different else f"the same, on {total} weights")
    return bool(different)


_NEEDS_NAMES = (
    "an adapter of lora_jax has the paths of a JAX model; lora_jax.peft.save(…, names) writes it for PyTorch first."
)


def _merged(name: str, value: np.ndarray, node: Adapter | None) -> np.ndarray:
    """One tensor with its adapter, computed in float32 and cast to what is stored."""
    if node is None:
        return value
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name!r} is stored as {value.dtype}: a quantised weight is not merged into.")
    if not np.isfinite(value.astype(np.float32)).all():
        raise ValueError(f"{name!r} of the base holds NaN or Inf.")
    merged = np.asarray(node.merge(jnp.asarray(value, jnp.float32))).astype(value.dtype)
    if not np.isfinite(merged.astype(np.float32)).all():
        raise ValueError(f"{name!r} would hold NaN or Inf: the merged weight is too large for {value.dtype}.")
    return merged


def _others(base: Path) -> list[Path]:
    """The files of a checkpoint that are no weights: config, tokenizer, the index of the shards."""
    files = [file for file in sorted(base.iterdir()) if file.is_file() and file.suffix not in _WEIGHTS]
    return [file for file in files if not re.search(r"\.index\.json$", file.name) or file.name == INDEX]


def _check_new(out: Path, force: bool, apart_from: tuple[Path, ...]) -> None:
    target = out.resolve()
    for given in apart_from:
        if target == given.resolve() or given.resolve() in target.parents:
            raise ValueError(f"{out}: the output may not be, or be inside of, {given}.")
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; --force replaces it.")


def _trained(node: Adapter) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(partition({"": node})[0]))


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    return table


def _shown(path: str, directory: Path) -> str:
    """A weight's path as the adapter's own world writes it."""
    return path if (directory / checkpoint.MANIFEST).is_file() else path.replace("/", ".")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"


def _same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal, bit for bit."""
    if type(one) is not type(other):
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__]
    return all(
        np.array_equal(np.asarray(x), np.asarray(y)) and getattr(x, "dtype", None) == getattr(y, "dtype", None)
        for x, y in pairs
    )


def _said(node: Adapter | None) -> str:
    if node is None:
        return "–"
    about: Mapping[str, Any] = node.describe()
    return " ".join([node.kind, *(f"{name} {_short(about[name])}" for name in ("rank", "scale") if name in about)])


def _apart(one: Adapter | None, other: Adapter | None) -> tuple[str, str]:
    """The norm of the difference of two low-rank terms, and relative to the first's."""
    if not isinstance(one, LowRank) or not isinstance(other, LowRank) or one.shape() != other.shape():
        return "", ""
    gap, size = distance(one, other), norm(one)
    return f"{gap:.4g}", f"{gap / size:.2%}" if size else ""
