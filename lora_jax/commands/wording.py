"""How the commands say things: counts, lists, tables and a bar."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_jax.adapters.protocol import Adapter

_NUMBERS = ("rank", "alpha", "scale", "‖ΔW‖", "of ‖W‖", "‖difference‖", "relative")


def table_of(*columns: str) -> Table:
    """A table without lines; columns of numbers are on the right."""
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold", no_wrap=number > 0)
    return table


@contextlib.contextmanager
def progress_bar(console: Console, text: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar while the block runs, where somebody can see it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)


def shown(path: str, native: bool) -> str:
    """A weight's path as the adapter's own world writes it."""
    return path if native else path.replace("/", ".")


def numbered(path: str) -> list[tuple[int, str]]:
    """What sorts layer 2 before layer 10."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"([0-9]+)", path)]


def kinds_of(delta: Mapping[str, Adapter]) -> str:
    """What a delta holds: '4 weights (LoRA 3, Full 1)'."""
    counts: dict[str, int] = {}
    for node in delta.values():
        counts[node.kind] = counts.get(node.kind, 0) + 1
    listed = ", ".join(f"{kind} {number}" if len(counts) > 1 else kind for kind, number in counts.items())
    return f"{counted(len(delta), 'weight')} ({listed})"


def few(names: Any, limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def span(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def number_text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
