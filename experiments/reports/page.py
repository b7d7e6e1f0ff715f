"""The results of a study: a page in Markdown with its figure, and a JSON record."""

import dataclasses
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.reports import findings
from experiments.reports.findings import Finding
from experiments.reports.results import without_nan, write_json
from lora_jax.io import replace_file

FILES = ("README.md", "figure.png", "run.json")
_NOT_SHOWN = ("out", "fresh", "checkpoint_every")


@dataclass(frozen=True)
class Grid:
    """A table of text; the first column is the name of the row.

    Attributes:
      header: The names of the columns.
      rows: The cells.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Returns the table in Markdown.

        Example:
          >>> print(Grid(["method", "score"], [["LoRA", "1.0"]]).markdown(), end="")
          | method | score |
          | --- | ---: |
          | LoRA | 1.0 |
        """
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

    def table(self) -> Table:
        """Returns the table for the screen; names of columns are in several lines if they are wider than the cells."""
        result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(self.header):
            width = max(1, *map(len, name.split()), *(len(row[index]) for row in self.rows))
            heading = "\n".join(textwrap.wrap(name, width))
            result.add_column(heading, justify="right" if index else "left", no_wrap=bool(index))
        for row in self.rows:
            result.add_row(*row)
        return result


@dataclass(frozen=True)
class Page:
    """The results of a study.

    Attributes:
      claim: The paper's claim, in one sentence.
      source: Paper and table or figure, and what the paper measured.
      conditions: Sentences that say what was measured, on which data and for how long.
      grid: The table.
      findings: What was and was not observed.
      draw: Draws the figure.
      entries: Other entries of the JSON record.
      size: Width and height of the figure in inches.
    """

    claim: str
    source: str
    conditions: str
    grid: Grid
    findings: Sequence[Finding]
    draw: Callable[[Figure], None]
    entries: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[float, float] = (7.5, 4.6)

    def publish(self, config: Any, record: Mapping[str, Any], console: Console) -> None:
        """Prints table and findings, and writes page, figure and record to `config.out`.

        Args:
          config: The config of the study, in a module with the name of its command.
          record: What every record has: the config, versions and devices.
          console: The output.
        """
        out: Path = config.out
        console.print(self.grid.table())
        findings.show(self.findings, console)
        figure = Figure(figsize=self.size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        figure.savefig(out / "figure.png")
        entries = {
            "claim": self.claim,
            "source": self.source,
            "findings": [asdict(finding) for finding in self.findings],
        }
        write_json(out / "run.json", without_nan({**record, **entries, **self.entries}))
        machine = f"Machine: {', '.join(dict.fromkeys(record['devices']))}; jax {record['versions']['jax']}."
        with replace_file(out / "README.md") as file:
            file.write_text(self._text(config, machine), encoding="utf-8")
        console.print(f"written to {out}: {', '.join(FILES)}", highlight=False)

    def _text(self, config: Any, machine: str) -> str:
        verdicts = [f"- **{finding.verdict}**: {finding.claim}. {finding.evidence}" for finding in self.findings]
        parts = [
            f"# {command_name(config)}",
            f"{self.claim.rstrip('.')} ({self.source}).",
            f"    {command(config)}",
            f"{self.conditions} {machine}",
            self.grid.markdown().rstrip("\n"),
            "\n".join(verdicts),
            f"![{self.claim}](figure.png)",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def command_name(config: Any) -> str:
    """Returns the name of a config on the command line."""
    return type(config).__module__.rpartition(".")[2].replace("_", "-")


def command(config: Any) -> str:
    """Returns the command line of a config, with the flags that differ from the defaults.

    Example:
      >>> from experiments.configs.which_weights import Config
      >>> command(Config(seeds=2, lengths=(14, 20)))
      'python -m experiments.run which-weights --seeds 2 --lengths 14 20'
      >>> command(Config(fast=True, batch_size=8))
      'python -m experiments.run which-weights --fast --batch-size 8'
    """
    return " ".join([f"python -m experiments.run {command_name(config)}", *changed_flags(config)])


def changed_flags(config: Any) -> list[str]:
    """Returns the flags that differ from the defaults, or from the values that `--paper` and `--fast` set."""
    fast = {"fast": True} if getattr(config, "fast", False) else {}
    usual = vars(type(config)(**fast))
    if getattr(config, "paper", None):  # these three choose the other values
        usual = vars(config.preset()) | {name: usual[name] for name in ("paper", "model", "data")}
    return ["--fast"] * len(fast) + _flags(config, usual)


def _flags(config: Any, usual: Mapping[str, Any], prefix: str = "--") -> list[str]:
    """Returns the flags of the fields that differ from usual values; those of a group follow its name and a dot."""
    words: list[str] = []
    for entry in dataclasses.fields(config):
        value, flag = getattr(config, entry.name), prefix + entry.name.strip("_").replace("_", "-")
        if entry.name in _NOT_SHOWN or value == usual[entry.name]:
            continue
        if dataclasses.is_dataclass(value):
            words += _flags(value, vars(usual[entry.name]), f"{flag}.")
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *(shlex.quote(str(part)) for part in (value if isinstance(value, tuple) else [value]))]
    return words
