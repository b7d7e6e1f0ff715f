"""What the reports of all runs that train a decoder hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from experiments.reports.results import read_record
from experiments.training.run import History


def show_not_exported(adapter: Path, console: Console) -> None:
    """Prints why there is no PEFT export of weights that are trained in full."""
    console.print(
        "PEFT's format holds no weights that are trained in full; the model to serve is written by "
        f"python -m experiments.run merge --adapter {adapter}",
        highlight=False,
        soft_wrap=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The result of a run.

    Attributes:
      settings: The settings that affect the results.
      trained_parameters: Number of trained scalars.
      seconds: Time of training and evaluation, including compilation.
      losses: The loss of every training step.
      evaluations: Pairs (step, held-out measure).
      texts: Tuples of a prompt and answers to it.
      ended: Why training ended early; None if it did not.
    """

    settings: dict[str, Any]
    trained_parameters: int
    seconds: float
    losses: list[float]
    evaluations: list[tuple[int, float]]
    texts: list[tuple[str, ...]]
    ended: str | None = None

    @property
    def history(self) -> History:
        """The measurements in the form of the training loop."""
        return History(self.losses, self.evaluations, self.seconds)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a report that the study wrote."""
        return read_record(path, cls, {"evaluations": tuple, "texts": tuple})
