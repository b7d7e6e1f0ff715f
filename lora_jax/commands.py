"""What the command line does: inspect, merge, convert and compare adapters on disk."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_jax import checkpoint, peft
from lora_jax.adapters.full import Replacement, RowReplacement
from lora_jax.adapters.lowrank import LowRank
from lora_jax.adapters.offset import Addition
from lora_jax.adapters.protocol import Adapter
from lora_jax.files import replaced
from lora_jax.merging import distance, norm
from lora_jax.optim import partition
from lora_jax.peft import layout
from lora_jax.peft.config import CONFIG, Config
from lora_jax.peft.targets import MAX_LORA_RANKS, TARGETS
from lora_jax.peft.tensors import (
    INDEX,
    WEIGHTS,
    Tensors,
    absent,
    check_index,
    model_files,
    pickle_beside,
    read_json,
    rewrite,
)

MODEL = "config.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


# What the commands read.


def read(directory: Path, base: Path | None = None) -> dict[str, Adapter]:
    """The delta in a directory, of this library or of PEFT; PEFT's is given PyTorch's names and orientation.

    Args:
      directory: The adapter.
      base: The checkpoint that a PEFT adapter is for, if it is to be compared with it.

    Raises:
      ValueError: It is neither, is damaged, or does not fit the base.
    """
    native = is_native(directory)
    if base is None:
        return checkpoint.load(directory) if native else peft.load(directory, *layout.of_adapter(directory))
    if native:
        raise ValueError(f"{directory}: {_NEEDS_NAMES.format('its fit')}")
    with opened(base) as tensors:
        return peft.load(directory, *layout.of_checkpoint(tensors, directory, _model_type(base)))


def is_native(directory: Path) -> bool:
    """Whether an adapter is of this library; otherwise it is of PEFT.

    Raises:
      ValueError: It is neither.
    """
    _check_directory(directory)
    if (directory / checkpoint.MANIFEST).is_file():
        return True
    if (directory / CONFIG).is_file():
        return False
    inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    hint = f"; there is one in {', '.join(inside[:3])}" if inside else pickle_beside(directory)
    if (directory / CONFIG).is_symlink():
        raise ValueError(absent(directory / CONFIG))
    raise ValueError(f"{directory}: no adapter (it has neither {CONFIG} nor {checkpoint.MANIFEST}){hint}.")


@contextlib.contextmanager
def opened(base: Path) -> Iterator[Tensors]:
    """The tensors of a checkpoint in Hugging Face layout.

    Raises:
      ValueError: It is none, or its files are damaged or do not go together.
    """
    _check_directory(base)
    with Tensors(model_files(base)) as tensors:
        check_index(tensors)
        yield tensors


# The commands.


def inspect(directory: Path, base: Path | None, console: Console, progress: Console) -> None:
    """Prints what an adapter holds, and which base it fits."""
    native, delta = is_native(directory), read(directory, base)
    sizes = _sizes(delta, base, progress)
    console.print(f"{directory}: {'a lora_jax' if native else 'a PEFT'} adapter of {_kinds(delta)}")
    for line in _about_base(directory, base, native):
        console.print(line)
    console.print()
    table = _table("weight", "shape", "adapter", "rank", "alpha", "scale", "‖ΔW‖", *(["of ‖W‖"] if base else []))
    table.add_column("trained", justify="right")
    for path, node in sorted(delta.items(), key=lambda item: _numbered(item[0])):
        about, (change, weight) = node.describe(), sizes[path]
        table.add_row(
            _shown(path, native),
            _times(node.shape()),
            node.kind,
            *(_short(about.get(name)) for name in ("rank", "alpha", "scale")),
            "" if change is None else f"{change:.4g}",
            *([f"{change / weight:.2%}" if change is not None and weight else ""] if base else []),
            f"{_trained(node):,}",
        )
    console.print(table)
    console.print()
    console.print(f"{sum(map(_trained, delta.values())):,} trained numbers")
    ranks = [node.rank for node in delta.values() if isinstance(node, LowRank)]
    if ranks:
        console.print(f"rank {_range(ranks)}{_for_vllm(delta, max(ranks))}")
    if not base and any(isinstance(node, LowRank) and not node.additive for node in delta.values()):
        console.print("‖ΔW‖ of a DoRA adapter is that of its low-rank term; with --base also its magnitudes count")
    still = [path for path, (change, _) in sizes.items() if change == 0 and _is_whole(delta[path], base)]
    if len(still) == len(delta):
        console.print("every ΔW is zero: this adapter changes nothing")
    elif still:
        console.print(f"ΔW is zero for {_count(len(still), 'weight')}: {_first(_shown(x, native) for x in still)}")


def merge(base: Path, adapter: Path, out: Path, *, force: bool, console: Console, progress: Console) -> None:
    """Writes a checkpoint with a PEFT adapter folded in, in the base's files and dtypes."""
    if is_native(adapter):
        raise ValueError(f"{adapter}: {_NEEDS_NAMES.format('a merge')}")
    _check_directory(base)
    _check_new(out, (MODEL, (WEIGHTS, INDEX)), "checkpoint", force, apart_from=(base, adapter))
    with opened(base) as tensors, replaced(out, MODEL, what="checkpoint") as fresh:
        weights, names = layout.of_checkpoint(tensors, adapter, _model_type(base))
        delta = peft.load(adapter, weights, names)
        tied = {weight.path for weight in names.weights if weight.tied}
        head = _untied_by_adapter(base, tensors, {p for p, x in delta.items() if isinstance(x, LowRank)} - tied)
        copied, left_out = _others(base, tensors)
        for file in copied:
            shutil.copyfile(file, fresh / file.name)
        changed = dict.fromkeys(delta, False)

        def change(name: str) -> np.ndarray | None:
            path = layout.leaf_path(name)
            if path not in delta:
                return None
            before = tensors.read(name)
            after = merged(name, before, delta.pop(path))
            changed[path] = not np.array_equal(before, after)
            return after

        megabytes = sum(file.stat().st_size for file in tensors.files) // 2**20
        with _bar(progress, "merging (MiB)", megabytes) as advance:
            for file in tensors.files:
                rewrite(file, fresh / file.name, change, lambda size: advance(size / 2**20))
        total = len(tensors)
    console.print(f"{out}: {base} with {sum(changed.values())} of {_count(total, 'tensor')} changed")
    same = [path for path, differs in changed.items() if not differs]
    if len(same) == len(changed):
        console.print("the merge changes nothing: every ΔW is zero, or lost in rounding to the base's dtype")
    elif same:
        console.print(f"{_count(len(same), 'adapted weight')} as before: {_first(_shown(x, False) for x in same)}")
    if head:
        console.print(
            f"{head} is also the output head (tied): merged, the adapter changes both; unmerged, the lookup only"
        )
    if left_out:
        console.print(f"not copied: {_first(left_out)}")


def convert(
    directory: Path, out: Path, *, target: str, base: Path | None = None, force: bool, console: Console
) -> None:
    """Writes a PEFT adapter again for another reader."""
    if is_native(directory):
        raise ValueError(f"{directory}: {_NEEDS_NAMES.format('a conversion')}")
    config = Config.read(directory)
    if base is None and (names := layout.copies(directory)):
        raise ValueError(
            f"{directory}: holds {_first(names)} whole, as PEFT does for embeddings; only the base tells whether it "
            "was trained: give --base."
        )
    if base:
        _check_directory(base)
    _check_new(out, (CONFIG,), "adapter", force, apart_from=(directory, *([base] if base else [])))
    with contextlib.ExitStack() as stack:
        if base is None:
            weights, names = layout.of_adapter(directory)
        else:
            weights, names = layout.of_checkpoint(stack.enter_context(opened(base)), directory, _model_type(base))
        delta = peft.load(directory, weights, names)
        about = {"base_model": config.base_model_name_or_path, "task_type": config.task_type}
        with replaced(out, CONFIG, what="adapter") as fresh:
            peft.save(fresh, delta, names, target=target, **about)
    console.print(f"{out}: {_kinds(delta)}, written for {TARGETS[target].reader}")


def diff(one: Path, other: Path, console: Console, progress: Console) -> bool:
    """Prints how two adapters differ; returns whether they do."""
    native = is_native(one), is_native(other)
    if native[0] != native[1]:
        raise ValueError(f"{one} and {other}: one is of PEFT, the other of lora_jax; their weights have other names.")
    first, second = read(one), read(other)
    paths = sorted({*first, *second}, key=_numbered)
    table = _table("weight", "first", "second", "‖difference‖", "relative")
    different = 0
    with _bar(progress, "comparing", len(paths)) as advance:
        for path in paths:
            x, y = first.get(path), second.get(path)
            if x is None or y is None or not _same(x, y):
                different += 1
                table.add_row(_shown(path, native[0]), *_said(x, y), *_apart(x, y))
            advance(1)
    stored = [] if any(native) else _copies_apart(one, other)
    if different:
        console.print(table)
        console.print()
    console.print(
        f"different: {different} of {_count(len(paths), 'weight')}" if different else f"the same: {_kinds(first)}"
    )
    for line in stored:
        console.print(line)
    return bool(different or stored)


# Merging.


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


def _others(base: Path, tensors: Tensors) -> tuple[list[Path], list[str]]:
    """The files beside a checkpoint's weights that belong to a merged one, and what does not."""
    copied, left_out = [], []
    sharded = tensors.files[0].name != WEIGHTS
    for path in sorted(base.iterdir()):
        if path.is_symlink() and not path.exists():
            raise ValueError(absent(path))
        if path.is_file() and (path.name == INDEX if path.name.endswith(".index.json") else True):
            if path.name == INDEX and not sharded:
                continue
            if path.suffix not in _NOT_COPIED and path.name != CONFIG:
                copied.append(path)
            elif path not in tensors.files:
                left_out.append(path.name)
        elif path.is_dir() and not path.name.startswith("."):
            left_out.append(f"{path.name}/")
    return copied, left_out


def _untied_by_adapter(base: Path, tensors: Tensors, adapted: set[str]) -> str:
    """The adapted table that the model's head shares, and the adapter does not know of; empty where there is none."""
    config = _model_config(base)
    kinds = [str(x) for x in config.get("architectures") or []]
    has_head = any(x.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")) for x in kinds)
    if not has_head or config.get("tie_word_embeddings") is False or "lm_head.weight" in tensors:
        return ""
    tables = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight")
    return next((name for name in tensors if name.endswith(tables) and layout.leaf_path(name) in adapted), "")


# What is refused before any work.


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{path}: is a file, expected the directory that it is in.")
        if path.is_symlink():
            raise ValueError(absent(path))
        raise ValueError(f"{path}: no such directory (names on a hub are not looked up).")


def _check_new(out: Path, known_by: tuple, what: str, force: bool, apart_from: tuple[Path, ...]) -> None:
    """Raises `ValueError` where an output must not be written.

    Args:
      out: The output.
      known_by: Files by which a directory of the same kind is known; of a tuple, one is enough.
      what: The kind.
      force: Whether one of the same kind is replaced.
      apart_from: What is read.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(absent(out))
    target = out.resolve()
    for given in apart_from:
        source = given.resolve()
        if target == source or source in target.parents or target in source.parents:
            relation = "be" if target == source else "be inside of" if source in target.parents else "hold"
            raise ValueError(f"{out}: the output may not {relation} {given}, which is read.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    alike = [any((out / x).is_file() for x in (names if isinstance(names, tuple) else (names,))) for names in known_by]
    if not all(alike):
        raise ValueError(f"{out} exists and is no {what}; nothing replaces it.")
    if folders := [path.name for path in sorted(out.iterdir()) if path.is_dir()]:
        raise ValueError(f"{out} exists and holds other directories ({_first(folders)}); nothing replaces it.")
    if not force:
        raise ValueError(f"{out} exists; --force replaces it.")


_NEEDS_NAMES = (
    "{} takes a PEFT adapter; this one of lora_jax has the paths of a JAX model, and lora_jax.peft.save(…, names) "
    "writes it for PyTorch."
)


# What is told.


def _about_base(directory: Path, base: Path | None, native: bool) -> Iterator[str]:
    if native:
        known = read_json(directory / checkpoint.MANIFEST).get("base", {})
        digests = sum(bool(entry.get("sha256")) for entry in known.values())
        yield "base: weights of the paths and shapes below" + (
            f", {digests} of them known by digest" if digests else ""
        )
        return
    named = Config.read(directory).base_model_name_or_path
    yield f"base: {named}, says the adapter" if named else "base: not named"
    if base:
        yield f"fits {base}"
        return
    yield "fits a checkpoint with weights of the names and shapes below; --base tries one"
    if names := layout.copies(directory):
        yield f"also holds {_first(names)} whole, as PEFT does for embeddings; --base tells whether it was trained"
    targets = Config.read(directory).target_parameters
    if len({name.rpartition(".")[0] for name in targets}) < len(targets):
        yield "which parameter of a module has which factors is taken from the config's order; --base tells"


def _for_vllm(delta: Mapping[str, Adapter], rank: int) -> str:
    """What vLLM needs for an adapter; empty where it takes none such."""
    if not all(node.kind == "LoRA" for node in delta.values()) or rank > MAX_LORA_RANKS[-1]:
        return ""
    return f"; vLLM needs a max_lora_rank of at least {min(n for n in MAX_LORA_RANKS if n >= rank)}"


def _sizes(delta: Mapping[str, Adapter], base: Path | None, progress: Console) -> dict[str, tuple]:
    """Per path the norm of ΔW and, with a base, that of W; None where it takes a base to tell."""
    found: dict[str, tuple[float | None, float | None]] = {}
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(_bar(progress, "measuring", len(delta)))
        tensors = stack.enter_context(opened(base)) if base else None
        stored = {layout.leaf_path(name): name for name in tensors} if tensors else {}
        for path, node in delta.items():
            change = norm(node) if isinstance(node, LowRank) else None
            if isinstance(node, Addition):
                change = _norm(node.merge(jnp.zeros(node.shape(), jnp.float32)))
            weight = None
            if tensors:
                value = tensors.read(stored[path]).astype(np.float32)
                weight = _norm(value)
                if change is None or not node.additive:
                    change = _norm(np.asarray(node.merge(jnp.asarray(value))) - value)
            found[path] = change, weight
            advance(1)
    return found


def _is_whole(node: Adapter, base: Path | None) -> bool:
    """Whether the norm that is shown is all that the adapter does."""
    return base is not None or node.additive


def _norm(value: Any) -> float:
    return float(np.linalg.norm(np.asarray(value, np.float64).ravel()))


@contextlib.contextmanager
def _bar(console: Console, text: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar while the block runs, where somebody can see it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)


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
    facts = {name: _short(value) for name, value in node.describe().items()}
    arrays = [getattr(node, field) for field in ("a", "rows", "value") if hasattr(node, field)]
    return facts | {"shape": _times(node.shape()), "dtype": arrays[0].dtype.name if arrays else ""}


def _apart(one: Adapter | None, other: Adapter | None) -> tuple[str, str]:
    """The norm of the difference of two adapters, and relative to the first's."""
    if one is None or other is None or one.shape() != other.shape():
        return "", ""
    if isinstance(one, LowRank) and isinstance(other, LowRank) and one.axes == other.axes:
        gap, size = distance(one, other), norm(one)
    elif isinstance(one, Replacement) and isinstance(other, Replacement):
        gap, size = _norm(_float64(one.value) - _float64(other.value)), _norm(one.value)
    elif isinstance(one, RowReplacement) and isinstance(other, RowReplacement) and np.array_equal(one.ids, other.ids):
        gap, size = _norm(_float64(one.rows) - _float64(other.rows)), _norm(one.rows)
    elif isinstance(one, Addition) and isinstance(other, Addition):
        terms = [np.asarray(node.merge(jnp.zeros(node.shape(), jnp.float32))) for node in (one, other)]
        gap, size = _norm(terms[0] - terms[1]), _norm(terms[0])
    else:
        return "", ""
    return f"{gap:.4g}", f"{gap / size:.2%}" if size else ""


def _copies_apart(one: Path, other: Path) -> list[str]:
    """Lines about embeddings that only one of two PEFT adapters holds whole, or that differ."""
    lines = []
    bases = [layout.of_adapter(directory)[0] for directory in (one, other)]
    held = [layout.copies(directory) for directory in (one, other)]
    for name in dict.fromkeys((*held[0], *held[1])):
        where = [name in names for names in held]
        if not all(where):
            lines.append(f"{name} is stored whole in {one if where[0] else other} only")
        elif not np.array_equal(bases[0][layout.leaf_path(name)], bases[1][layout.leaf_path(name)]):
            lines.append(f"{name}, stored whole in both, differs")
    return lines


def _float64(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float64)


def _model_config(base: Path) -> dict[str, Any]:
    return read_json(base / MODEL) if (base / MODEL).is_file() else {}


def _model_type(base: Path) -> str:
    return str(_model_config(base).get("model_type") or "")


def _trained(node: Adapter) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(partition({"": node})[0]))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold", no_wrap=number > 0)
    return table


_NUMBERS = ("rank", "alpha", "scale", "‖ΔW‖", "of ‖W‖", "‖difference‖", "relative")


def _shown(path: str, native: bool) -> str:
    """A weight's path as the adapter's own world writes it."""
    return path if native else path.replace("/", ".")


def _numbered(path: str) -> list[tuple[int, str]]:
    """What sorts layer 2 before layer 10."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"([0-9]+)", path)]


def _kinds(delta: Mapping[str, Adapter]) -> str:
    """What a delta holds: '4 weights (LoRA 3, Full 1)'."""
    counts: dict[str, int] = {}
    for node in delta.values():
        counts[node.kind] = counts.get(node.kind, 0) + 1
    listed = ", ".join(f"{kind} {number}" if len(counts) > 1 else kind for kind, number in counts.items())
    return f"{_count(len(delta), 'weight')} ({listed})"


def _first(names: Any, limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
