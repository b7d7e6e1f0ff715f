"""Text formats of the commands' output: counts, lists, tables and a progress bar."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lora_jax.adapters.protocol import Adapter

_NUMBERS = ("rank", "alpha", "scale", "‖ΔW‖", "of ‖W‖", "‖difference‖", "relative")


def make_table(*columns: str) -> Table:
    """Makes a table without lines; columns of numbers are right-aligned."""
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold", no_wrap=number > 0)
    return table


@contextlib.contextmanager
def progress_bar(console: Console, text: str, total: float) -> Iterator[Callable[[float], None]]:
    """Shows a progress bar while the block runs, if the console is a terminal; yields a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda amount: progress.advance(task, amount)


def format_path(path: str, native: bool) -> str:
    """Formats a weight's path as the adapter's library does: lora_jax's with slashes, PyTorch's with dots."""
    return path if native else path.replace("/", ".")


def natural_order(path: str) -> list[tuple[int, str]]:
    """A sort key that orders layer 2 before layer 10."""
    return [(int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"([0-9]+)", path)]


def summarize_kinds(delta: Mapping[str, Adapter]) -> str:
    """Summarizes a delta: '4 weights (LoRA 3, Full 1)'."""
    counts: dict[str, int] = {}
    for node in delta.values():
        counts[node.kind] = counts.get(node.kind, 0) + 1
    listed = ", ".join(f"{kind} {number}" if len(counts) > 1 else kind for kind, number in counts.items())
    return f"{format_count(len(delta), 'weight')} ({listed})"


def abbreviate(names: Any, limit: int = 3) -> str:
    """Lists the first names, and the number of further ones."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def format_range(values: list[int]) -> str:
    """Formats the smallest and the largest of some values."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def format_shape(shape: tuple[int, ...]) -> str:
    """Formats a shape: '4×6'."""
    return "×".join(map(str, shape))


def format_count(number: int, what: str) -> str:
    """Formats a count with its noun: '1 weight', '1,000 weights'."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_number(value: Any) -> str:
    """Formats a number with six digits; empty for None."""
    return "" if value is None else f"{value:.6g}"
