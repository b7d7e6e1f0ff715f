"""Progress bars: step, loss, examples a second and the time that is left."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar:
    """One running task, in examples.

    On a terminal it is drawn as a bar; elsewhere only `say` is heard.
    """

    def __init__(self, progress: Progress, name: str, examples: int):
        self._progress = progress
        self._task = progress.add_task(name, total=examples, note="")

    def start_at(self, examples: int) -> None:
        """Counts what an earlier process did as done, without letting it make the speed look better."""
        self._progress.reset(self._task, completed=examples)

    def advance(self, examples: float, note: str = "") -> None:
        """Counts `examples` more as done; `note` stands beside the bar until the next one."""
        self._progress.update(self._task, advance=examples, note=note)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, highlight=False)


@contextmanager
def bar(console: Console, name: str, examples: int) -> Iterator[Bar]:
    """A bar that is drawn while the `with` block runs."""
    # 80 columns in all; a longer name or note takes from the bar.
    columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[note]}"))
    columns = (*columns, _Speed(), TextColumn("ETA"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, name, examples)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:5,.0f} ex/s" if task.speed else "    – ex/s")
