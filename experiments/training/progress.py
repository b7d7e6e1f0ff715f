"""Progress with the step, the loss, the speed and the remaining time: bars on terminals, elsewhere lines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_INTERVAL = 15  # seconds between lines, after those of the first two steps


class Bar:
    """The progress of one task, in examples: a bar on terminals, elsewhere a line at intervals."""

    def __init__(self, progress: Progress, name: str, examples: int):
        self._progress = progress
        self._task = progress.add_task(name, total=examples, note="")
        self._mark = self._printed = time.monotonic()
        self._steps, self._examples = 0, 0.0  # of this process

    def start_at(self, examples: int) -> None:
        """Counts the examples of an earlier process as completed, without counting them in the speed."""
        self._progress.reset(self._task, completed=examples)

    def advance(self, examples: float, note: str = "") -> None:
        """Adds the examples of a completed step, and shows `note`."""
        self._progress.update(self._task, advance=examples, note=note)
        if self._progress.disable:
            self._advance_lines(examples, note)

    def _advance_lines(self, examples: float, note: str) -> None:
        now = time.monotonic()
        self._steps, self._examples = self._steps + 1, self._examples + examples
        if now - self._printed >= (1 if self._steps <= 2 else _INTERVAL):
            self.say(f"  {note}  {self._pace(now)}")
            self._printed = now
        if self._steps == 1:  # its time is mostly that of compilation
            self._mark, self._examples = now, 0.0

    def _pace(self, now: float) -> str:
        """Returns the time of a step, and of the rest at the present speed."""
        seconds = now - self._mark
        if self._steps == 1:
            return f"{seconds:.0f} s with compilation"
        task = next(task for task in self._progress.tasks if task.id == self._task)
        rest = seconds * task.remaining / self._examples if task.remaining and self._examples else 0.0
        return f"{seconds / (self._steps - 1):.2g} s/step, {format_duration(rest)} left"

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, highlight=False, soft_wrap=True)


def format_duration(seconds: float) -> str:
    """Formats a duration in two digits or so.

    Example:
      >>> format_duration(38), format_duration(300), format_duration(10_000)
      ('38 s', '5 min', '2.8 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def bar(console: Console, name: str, examples: int) -> Iterator[Bar]:
    """A context in which a bar is drawn."""
    # The bar fills the rest of the width.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        TextColumn("{task.fields[note]}", markup=False),
    )
    columns = (*columns, _Speed(), TextColumn("ETA"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, name, examples)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:5,.0f} ex/s" if task.speed else "    – ex/s")
