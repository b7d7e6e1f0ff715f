"""The runs of a comparison: trained together where they can be, cached by their settings, and resumed."""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.comparison import Comparison
from experiments.errors import UserError
from experiments.reports.results import Outcome, stored_bytes
from experiments.studies import provenance
from experiments.studies.comparison.description import ADAPTER, STEP, Row, Summary
from experiments.studies.comparison.starts import Starts
from experiments.studies.head import Start
from experiments.studies.joint import Diverged, train_jointly
from experiments.studies.problem import Problem, answers
from experiments.training import mesh as meshes
from experiments.training import outputs
from experiments.training.mesh import MeshSizes
from experiments.training.run import TrainingRun
from lora_jax.io import replace_file

_SHARED = ("seed", "epochs", "batch_size", "warmup", "label_smoothing", "clip")
"""The settings of a config that affect every run."""
_LARGE = 64  # ranks up to which adapters are padded to train together
_AT_ONCE = 2  # members that train in parallel on a CPU; see experiments/benchmarks/RESULTS.md


class Key(NamedTuple):
    """The name of a run's row, its peak learning rate, and its random seed."""

    row: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Member:
    """A run: a row with one learning rate and one seed.

    Attributes:
      row: The row.
      rate: The peak learning rate.
      seed: The random seed of the initial factors and the order of the examples.
    """

    row: Row
    rate: float
    seed: int

    @property
    def key(self) -> Key:
        """What identifies the run."""
        return Key(self.row.name, self.rate, self.seed)


def run_rows(rows: Sequence[Row], problem: Problem, config: Comparison, console: Console) -> list[Summary]:
    """Trains, resumes or reads all runs of a comparison.

    Args:
      rows: The rows; rows without learning rates are the converged head.
      problem: The model and the task.
      config: The settings that all runs share.
      console: The output.

    Raises:
      UserError: The spec of a row does not fit the base, or all runs of a group diverged.
    """
    names = [row.name for row in rows]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"two rows would be the same: {repeated[0]}; all settings of a list must differ")
    by_name = {row.name: row for row in rows}
    trained = [row for row in rows if row.rates]
    for row in trained:  # before the head is fitted
        if row.change is None and not any(recipe.reads for recipe in row.spec.values()):
            problem.check(row.name, row.spec)
    starts = Starts(problem, config, console)
    program = _Program(starts, config, console)
    seeds = range(config.seed, config.seed + config.seeds)
    first = [Member(row, rate, seeds[0]) for row in trained for rate in row.rates]
    program.announce(len(first) + len(trained) * len(seeds[1:]))
    results = program.run(first)
    rates = {row.name: _best_rate(row, seeds[0], results) for row in trained}
    for seed in seeds[1:]:
        results |= program.run([Member(row, rates[row.name], seed) for row in trained])
    if results and all(np.isnan(outcome.validation_accuracy) for outcome in results.values()):
        raise UserError("all adapters diverged; try smaller learning rates")
    summaries = []
    for row in rows:
        source = by_name[row.parent] if row.parent else row
        if not source.rates:
            summaries.append(program.summarize_head(row))
            continue
        members = [Member(source, rates[source.name], seed) for seed in seeds]
        tried = {rate: results[Key(source.name, rate, seeds[0])].validation_accuracy for rate in source.rates}
        summaries.append(program.summarize(row, members, [results[member.key] for member in members], tried))
    return summaries


def _best_rate(row: Row, seed: int, results: Mapping[Key, Outcome]) -> float:
    """Returns the learning rate with the best validation score; the first one of equal ones."""
    scores = [results[Key(row.name, rate, seed)].validation_accuracy for rate in row.rates]
    return row.rates[int(np.argmax(np.nan_to_num(scores, nan=-np.inf)))]


class _Program:
    """Runs members in groups that train together."""

    def __init__(self, starts: Starts, config: Comparison, console: Console):
        self._starts, self._config, self._console = starts, config, console
        self._total, self._done, self._seconds, self._trained = 0, 0, 0.0, 0
        self._directories: dict[tuple[str, str], Path] = {}
        self._adapted: dict[int, Callable] = {}
        self._heads: dict[str, np.ndarray] = {}  # predictions

    def announce(self, total: int) -> None:
        """Prints the number of runs, and about how long they take."""
        self._total = total
        usual = not self._config.fast and not self._config.paper
        minutes = f"; with the default settings about {self._config.MINUTES} minutes" if usual else ""
        self._console.print(f"{total} runs{minutes}; after an interruption, the same command resumes", soft_wrap=True)

    def run(self, members: Iterable[Member]) -> dict[Key, Outcome]:
        """Returns the result of each member."""
        results: dict[Key, Outcome] = {}
        groups: dict[str, list[Member]] = {}
        for member in members:
            stored = self.directory(member) / "result.json"
            if stored.exists():
                results[member.key] = Outcome.load(stored)
                self._done += 1
            else:
                groups.setdefault(_kind(member), []).append(member)
        for group in groups.values():
            results |= self._train(group)
        return results

    def summarize_head(self, row: Row) -> Summary:
        """Returns the summary of a row that trains nothing: the converged head."""
        start = self._starts.of(row)
        key = repr(row.examples)
        if key not in self._heads:
            self._heads[key] = self._predict(start, start.base, {})
        return Summary.of(row, [start.result], [self._heads[key]], start)

    def summarize(
        self, row: Row, members: Sequence[Member], outcomes: Sequence[Outcome], tried: Mapping[float, float]
    ) -> Summary:
        """Returns the summary of a row: its runs, or those of its parent with changed adapters, are tested.

        Args:
          row: The row.
          members: The runs of the row or of its parent, one for each seed.
          outcomes: Their outcomes.
          tried: The validation score of the first seed by learning rate.
        """
        start = self._starts.of(row, members[0].seed)
        directories = [self.directory(member) for member in members]
        tested, predictions = [], []
        for index, (member, outcome) in enumerate(zip(members, outcomes)):
            if np.isnan(outcome.validation_accuracy):
                tested.append(replace(outcome, method=row.name))
                predictions.append(None)
                continue
            if row.parent:
                directories[index], outcome = self._finish(row, member)
            tested.append(outcome)
            predictions.append(self._test(member, directories[index]))
        return Summary.of(row, tested, predictions, start, directories=directories, tried=tried)

    def _finish(self, row: Row, parent: Member) -> tuple[Path, Outcome]:
        """Changes the adapters of a parent; returns their directory and outcome, without a test."""
        assert row.finish is not None
        start, member = self._starts.of(parent.row, parent.seed), Member(row, parent.rate, parent.seed)
        directory = self._make_directory(member, [*self._settings(parent), repr(row.finish)])
        stored = directory / "result.json"
        if not stored.exists():
            delta = row.finish(lora.load(self.directory(parent) / ADAPTER, start.problem.base))
            self._write(member, directory, delta, math.nan, start, 0.0)
        return directory, Outcome.load(stored)

    def _test(self, member: Member, directory: Path) -> np.ndarray:
        """Returns the predictions of the stored adapter of a run for the test examples."""
        path = directory / "test_predictions.npy"
        if not path.exists():
            start = self._starts.of(member.row, member.seed)
            delta = lora.load(directory / ADAPTER, start.problem.base)
            predictions = self._predict(start, self._base(member), delta)
            with replace_file(path) as file:
                np.save(file, predictions)
        return np.load(path)

    def _predict(self, start: Start, base: Any, delta: dict[str, Any]) -> np.ndarray:
        split = start.problem.splits["test"]
        adapted = self._adapted.setdefault(id(start.problem.apply), jax.jit(lora.adapt(start.problem.apply)))
        outputs = answers(lambda *inputs: adapted(base, delta, *inputs)[0], split, start.problem.lengths)
        return start.problem.task.predict(outputs)

    def _base(self, member: Member) -> Any:
        """Returns the base of a run, which may be quantized."""
        start, rules = self._starts.of(member.row, member.seed), member.row.rules
        return start.problem.quantize(start.base, rules) if rules else start.base

    def _train(self, group: Sequence[Member]) -> dict[Key, Outcome]:
        first, last = self._done + 1, self._done + len(group)
        left = ""
        if self._trained:
            minutes = (self._total - self._done) * self._seconds / self._trained / 60
            left = f"; about {max(1, round(minutes))} min left"
        names = list(dict.fromkeys(member.row.name for member in group))
        title = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        which = f"run {first}" if first == last else f"runs {first} to {last}"
        self._console.print(f"{which} of {self._total}: {title}, seed {group[0].seed}{left}", highlight=False)
        start = self._starts.of(group[0].row, group[0].seed)
        directory = self._clear_once("group", [self._settings(member) for member in group])
        run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(self._config), self._config.checkpoint_every)
        began = time.perf_counter()
        try:
            joint = train_jointly(
                replace(start, base=self._base(group[0])),
                [member.row.spec for member in group],
                [member.rate for member in group],
                self._shared(group[0]),
                run,
                self._console,
                at_once=_AT_ONCE if jax.default_backend() == "cpu" else None,
                once=not group[0].row.tracked,
                snapshot=partial(self._save_step, group, start) if group[0].row.tracked else None,
                wrap=group[0].row.optimizer,
                penalty=group[0].row.penalty,
                weight_decay=self._config.weight_decay,
            )
        except Diverged:
            self._console.print(f"  diverged: {title}")
            results = {member.key: self._write_diverged(member, start) for member in group}
        else:
            scores = joint.scores(start.problem.splits["validation"].labels)
            seconds = joint.history.seconds / len(group)
            results = {
                member.key: self._write(member, self.directory(member), delta, float(score), start, seconds)
                for member, delta, score in zip(group, joint.deltas, scores)
            }
        outputs.remove(directory)
        self._done, self._trained = last, self._trained + len(group)
        self._seconds += time.perf_counter() - began
        return results

    def _save_step(self, group: Sequence[Member], start: Start, step: int, deltas: Sequence[dict[str, Any]]) -> None:
        for member, delta in zip(group, deltas):
            tracked = {path: node for path, node in delta.items() if re.search(member.row.tracked, path)}
            lora.save(self.directory(member) / f"{STEP}{step:05}", tracked, base=start.problem.base)

    def _write_diverged(self, member: Member, start: Start) -> Outcome:
        delta = jax.eval_shape(
            lambda base: start.problem.delta(jax.random.key(0), base, member.row.spec), start.problem.base
        )
        return self._write_outcome(member, self.directory(member), delta, math.nan, 0.0)

    def _write(
        self, member: Member, directory: Path, delta: dict[str, Any], score: float, start: Start, seconds: float
    ) -> Outcome:
        lora.save(directory / ADAPTER, delta, base=start.problem.base)  # the delta replaces the head
        return self._write_outcome(member, directory, delta, score, seconds)

    def _write_outcome(
        self, member: Member, directory: Path, delta: dict[str, Any], score: float, seconds: float
    ) -> Outcome:
        outcome = Outcome(
            method=member.row.name,
            seed=member.seed,
            trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0])),
            adapter_bytes=stored_bytes(directory / ADAPTER),
            seconds=seconds,
            validation_accuracy=score,
            test_accuracy=math.nan,
            lr=member.rate,
        )
        outcome.save(directory / "result.json")
        return outcome

    def directory(self, member: Member) -> Path:
        """Returns the directory of a run."""
        return self._make_directory(member, self._settings(member))

    def _make_directory(self, member: Member, inputs: list[Any]) -> Path:
        name = re.sub(r"\W+", "-", member.row.name.lower()).strip("-")
        return self._clear_once(f"{name}-lr-{member.rate:g}-seed{member.seed}", inputs)

    def _clear_once(self, title: str, inputs: list[Any]) -> Path:
        """Returns a directory, which `fresh` clears the first time."""
        key = (title, repr(inputs))
        if key not in self._directories:
            self._directories[key] = provenance.directory(self._config.out, title, inputs, fresh=self._config.fresh)
        return self._directories[key]

    def _settings(self, member: Member) -> list[Any]:
        """Returns everything that determines the result of a run."""
        row, problem = member.row, self._starts.of(member.row, member.seed).problem
        what = [row.spec, row.rules, row.examples, row.tracked, row.change, row.optimizer, row.penalty]
        shared = [getattr(self._shared(member), name) for name in _SHARED]
        decay = [self._config.weight_decay] if self._config.weight_decay else []  # so that older runs are read
        return [problem.digest, problem.lengths, *map(repr, what), member.rate, *shared, *decay]

    def _shared(self, member: Member) -> Comparison:
        """Returns the config with the seed, the epochs and the batch size of a run."""
        row, config = member.row, self._config
        epochs = config.epochs if row.epochs is None else row.epochs
        batch_size = config.batch_size if row.batch_size is None else row.batch_size
        return replace(config, seed=member.seed, epochs=epochs, batch_size=batch_size)


def _kind(member: Member) -> str:
    """Returns what must be equal for runs that train together.

    Adapters that differ in rank or paths are stacked, with zeros where a member has none. Large ranks would cost the
    others too much, and adapters as large as their weights train together only if their patterns are the same.
    """
    row = member.row
    whole = {pattern: recipe for pattern, recipe in row.spec.items() if isinstance(recipe, lora.Full | lora.Rows)}
    kinds = sorted({repr(_without_rank(recipe)) for recipe in row.spec.values()})
    data = (row.rules, row.examples, row.epochs, row.batch_size, member.seed)
    return repr((kinds, whole, data, row.tracked, row.change, row.optimizer, row.penalty))


def _without_rank(recipe: Any) -> Any:
    return replace(recipe, rank=1) if 1 <= getattr(recipe, "rank", 0) <= _LARGE else recipe
