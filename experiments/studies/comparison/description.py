"""The description of a study that compares methods on a task of sentences, or pairs of sentences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

import lora_jax as lora
from experiments.reports.findings import Finding
from experiments.reports.page import Grid
from experiments.reports.results import Outcome
from experiments.studies.head import Start
from experiments.studies.problem import Problem
from experiments.studies.task import Task

ADAPTER, STEP = "adapter", "step-"


@dataclass(frozen=True)
class Row:
    """A method at one setting: a row of the table.

    Attributes:
      name: The name in the table; it differs between rows.
      spec: Recipes by pattern of paths. An empty one without a parent trains nothing: the converged head.
      rates: Peak learning rates. With several, the validation score of the first seed selects one.
      series: The line of the figure that the row belongs to.
      position: The place on the figure's horizontal axis; None is the number of trained parameters.
      paper: The paper's values, as the table shows them.
      rules: Formats of quantized weights by pattern of paths.
      examples: The number of training examples, from the beginning; None uses all.
      epochs: Passes over them; None uses the config's.
      batch_size: Examples per step; None uses the config's.
      tracked: A pattern of the paths whose adapters are also saved after every epoch; empty saves none.
      change: Changes model and base before training: `change(start, seed)`. Its `repr` states everything that it
        depends on, as that of the next fields does.
      optimizer: Wraps the optimizer: `optimizer(tx, steps)`.
      penalty: The weight of AdaLoRA's orthogonality penalty in the loss.
      parent: The name of a row whose trained adapters this row changes by `finish` instead of training.
      finish: Changes the adapters of the parent.
    """

    name: str
    spec: Mapping[str, Any]
    rates: tuple[float, ...] = ()
    series: str = ""
    position: float | None = None
    paper: str = ""
    rules: Mapping[str, Any] = field(default_factory=dict)
    examples: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    tracked: str = ""
    change: Callable[[Start, int], Start] | None = None
    optimizer: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] | None = None
    penalty: float = 0.0
    parent: str = ""
    finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Summary:
    """The results of a row.

    Attributes:
      row: The row.
      results: The outcomes by seed, at the selected learning rate; scores are NaN if training diverged. A score is the
        task's metric; the accuracy of a classification.
      contributions: What each test example contributes to the score, `float[examples]` for each seed that did not
        diverge; of the accuracy, whether it is answered correctly.
      start: The starting point of the first seed.
      directories: The directories of the runs by seed; that of the head for the head alone.
      tried: The validation score of the first seed by learning rate; NaN if training diverged.
      others: The further metrics of the task by name: their mean over these seeds in percent.
    """

    row: Row
    results: Sequence[Outcome]
    contributions: Sequence[np.ndarray] = field(repr=False, compare=False)
    start: Start = field(repr=False, compare=False)
    directories: Sequence[Path] = ()
    tried: Mapping[float, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        row: Row,
        outcomes: Sequence[Outcome],
        predictions: Sequence[np.ndarray | None],
        start: Start,
        **fields: Any,
    ) -> "Summary":
        """Returns the summary of outcomes with their scores on the test examples.

        Args:
          row: The row.
          outcomes: The outcomes by seed.
          predictions: Their predictions of the test examples; None if training diverged.
          start: The starting point of the first seed.
          **fields: Other attributes.
        """
        metrics, labels = start.problem.task.metrics, start.problem.splits["test"].labels
        tested = [
            outcome if one is None else replace(outcome, test_accuracy=metrics[0].score(one, labels))
            for outcome, one in zip(outcomes, predictions)
        ]
        finite = [one for one in predictions if one is not None]
        contributions = [metrics[0].contributions(one, labels) for one in finite]
        others = {
            metric.name: 100 * float(np.mean([metric.score(one, labels) for one in finite]))
            for metric in metrics[1:]
            if finite
        }
        return cls(row, tested, contributions, start, others=others, **fields)

    @property
    def task(self) -> Task:
        """The task."""
        return self.start.problem.task

    @property
    def title(self) -> str:
        """The name of the score, such as `test accuracy, %`."""
        return f"{self.start.problem.reported} {self.task.metric.title}, %"

    @property
    def diverged(self) -> int:
        """The number of seeds whose training diverged."""
        return len(self.results) - len(self.contributions)

    @property
    def mean(self) -> float:
        """The mean test score in percent over seeds that did not diverge; NaN without any."""
        return float(np.mean(self._scores)) if self._scores else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation of the test score in percent over seeds; 0 for one seed."""
        return float(np.std(self._scores, ddof=1)) if len(self._scores) > 1 else 0.0

    @property
    def _scores(self) -> list[float]:
        return [100 * outcome.test_accuracy for outcome in self.results if not math.isnan(outcome.test_accuracy)]

    @property
    def validation(self) -> float:
        """The mean validation score in percent over seeds that did not diverge, which selects rows; or NaN."""
        scores = [100 * outcome.validation_accuracy for outcome in self.results]
        return float(np.nanmean(scores)) if self.contributions and not np.all(np.isnan(scores)) else math.nan

    @property
    def parameters(self) -> int:
        """The number of trained parameters, without the head's; 0 for the head alone."""
        return self.results[0].trained_parameters - self.start.result.trained_parameters

    def adapter(self, seed: int = 0) -> dict[str, Any]:
        """Returns the trained adapters of a run, by the index of its seed."""
        return lora.load(self.directories[seed] / ADAPTER, self.start.problem.base)

    def snapshots(self, seed: int = 0) -> dict[int, dict[str, Any]]:
        """Returns the tracked adapters of a run after each epoch, by step."""
        directories = sorted(self.directories[seed].glob(f"{STEP}*"))
        return {int(path.name.removeprefix(STEP)): lora.load(path, self.start.problem.base) for path in directories}

    @property
    def x(self) -> float:
        """The place on the figure's horizontal axis."""
        return self.parameters if self.row.position is None else self.row.position


@dataclass(frozen=True)
class Study:
    """A study: what a paper claims, the rows that test it, and how the results are drawn and judged.

    Attributes:
      claim: The paper's claim, in one sentence.
      source: Paper and table or figure, and what the paper measured.
      rows: Returns the rows: `rows(config, problem)`.
      draw: Draws the results.
      findings: Compares the results with the claim.
      paper: The heading of the column with the paper's values; empty without such a column.
      grid: Returns the table; None is the table of scores.
      entries: Returns further entries of the JSON record.
      size: Width and height of the figure in inches.
      note: Sentences of the page that say what is trained and counted.
      apart: Whether every run trains alone, with its own time, and is evaluated after every pass, for curves.
      after: Called at the end in the first process, for what a study writes and prints beyond its page:
        `after(config, summaries, console)`.
    """

    claim: str
    source: str
    rows: Callable[[Any, Problem], Sequence[Row]]
    draw: Callable[[Figure, Sequence[Summary]], None]
    findings: Callable[[Sequence[Summary]], Sequence[Finding]]
    paper: str = ""
    grid: Callable[[Sequence[Summary]], Grid] | None = None
    entries: Callable[[Sequence[Summary]], Mapping[str, Any]] = lambda summaries: {}
    size: tuple[float, float] = (7.5, 4.6)
    note: str = "The head is trained in every row and not counted."
    apart: bool = False
    after: Callable[[Any, Sequence[Summary], Console], None] = lambda config, summaries, console: None
