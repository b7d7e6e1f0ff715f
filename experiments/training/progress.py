"""Progress bars with the step, the loss, examples per second and the remaining time."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar:
    """The progress of one task, in examples.

    It is drawn on terminals only; `say` prints everywhere.
    """

    def __init__(self, progress: Progress, name: str, examples: int):
        self._progress = progress
        self._task = progress.add_task(name, total=examples, note="")

    def start_at(self, examples: int) -> None:
        """Counts the examples of an earlier process as completed, without counting them in the speed."""
        self._progress.reset(self._task, completed=examples)

    def advance(self, examples: float, note: str = "") -> None:
        """Adds completed examples, and shows `note` next to the bar."""
        self._progress.update(self._task, advance=examples, note=note)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, highlight=False)


@contextmanager
def bar(console: Console, name: str, examples: int) -> Iterator[Bar]:
    """A context in which a bar is drawn."""
    # The bar fills the rest of the width.
    columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[note]}"))
    columns = (*columns, _Speed(), TextColumn("ETA"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, name, examples)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:5,.0f} ex/s" if task.speed else "    – ex/s")
