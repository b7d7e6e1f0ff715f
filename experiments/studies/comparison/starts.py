"""The converged heads from which the rows of a comparison start."""

from dataclasses import replace

from rich.console import Console

from experiments.configs.comparison import Comparison
from experiments.errors import UserError
from experiments.studies import head, provenance
from experiments.studies.comparison.description import Row
from experiments.studies.head import Start
from experiments.studies.problem import Problem, Split
from experiments.training import processes


class Starts:
    """The converged heads from which rows start: one for each number of training examples."""

    def __init__(self, problem: Problem, config: Comparison, console: Console):
        self._problem, self._config, self._console = problem, config, console
        self._starts: dict[str, Start] = {}

    def of(self, row: Row, seed: int = 0) -> Start:
        """Returns the starting point of a row.

        Args:
          row: The row.
          seed: The random seed of what the row adds to the base.
        """
        key = repr((row.examples, row.change, seed if row.change else None))
        if key not in self._starts:
            if row.change is None:
                self._starts[key] = self._fit(row.examples)
            else:
                self._starts[key] = row.change(self.of(replace(row, change=None)), seed)
        return self._starts[key]

    def _fit(self, count: int | None) -> Start:
        train = self._problem.splits["train"]
        if count is not None and count > len(train):
            raise UserError(f"{count:,} training examples are more than the {len(train):,} that are loaded")
        split = Split(train.sequences[:count], train.labels[:count])
        problem = replace(self._problem, splits=self._problem.splits | {"train": split})
        inputs = [problem.digest, problem.lengths, count]
        directory = provenance.directory(self._config.out, "head", inputs, fresh=self._config.fresh)
        with processes.first_before_others():
            return head.run(problem, directory, self._console)
