"""The runs of a comparison: trained together where they can be, cached by their settings, and resumed."""

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.comparison import Comparison
from experiments.errors import UserError
from experiments.models import bert
from experiments.reports.page import changed_flags
from experiments.reports.results import Outcome, stored_bytes
from experiments.studies import provenance
from experiments.studies.comparison.description import ADAPTER, STEP, Row, Summary
from experiments.studies.comparison.members import Key, Member, kind
from experiments.studies.comparison.starts import Starts
from experiments.studies.head import Start
from experiments.studies.joint import Diverged, train_jointly
from experiments.studies.problem import PREDICTIONS, Problem
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.run import TrainingRun
from lora_jax.io import replace_file

_SHARED = ("seed", "epochs", "batch_size", "warmup", "label_smoothing", "clip")
"""The settings of a config that affect every run."""
_AT_ONCE = 2  # members that train in parallel on a CPU; see experiments/benchmarks/RESULTS.md


def run_rows(
    rows: Sequence[Row], problem: Problem, config: Comparison, console: Console, *, apart: bool = False
) -> list[Summary]:
    """Trains, resumes or reads all runs of a comparison.

    Args:
      rows: The rows; rows without learning rates are the converged head.
      problem: The model and the task.
      config: The settings that all runs share.
      console: The output.
      apart: See :class:`experiments.studies.comparison.description.Study`.

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
    program = _Program(starts, config, console, apart)
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

    def __init__(self, starts: Starts, config: Comparison, console: Console, apart: bool):
        self._starts, self._config, self._console, self._apart = starts, config, console, apart
        self._mesh = meshes.make_mesh(config.mesh)
        self._total, self._done, self._seconds, self._trained = 0, 0, 0.0, 0
        self._directories: dict[tuple[str, str], Path] = {}

    def announce(self, total: int) -> None:
        """Prints the number of runs, and about how long they take."""
        self._total = total
        minutes = "" if changed_flags(self._config) else f"; about {self._config.MINUTES} minutes on 2 CPU cores"
        runs = "1 run" if total == 1 else f"{total} runs"
        self._console.print(f"{runs}{minutes}; after an interruption, the same command resumes", soft_wrap=True)

    def run(self, members: Iterable[Member]) -> dict[Key, Outcome]:
        """Returns the result of each member."""
        results: dict[Key, Outcome] = {}
        groups: dict[str, list[Member]] = {}
        for member in members:
            stored = self.directory(member) / "result.json"
            if processes.exists(stored):
                results[member.key] = Outcome.load(stored)
                self._done += 1
            else:
                groups.setdefault(repr(member.key) if self._apart else kind(member), []).append(member)
        for group in groups.values():
            results |= self._train(group)
        return results

    def summarize_head(self, row: Row) -> Summary:
        """Returns the summary of a row that trains nothing: the converged head."""
        start = self._starts.of(row)
        predictions = self._predict(start, start.directory, lambda: (start.base, {}))
        return Summary.of(row, [start.result], [predictions], start, directories=[start.directory])

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
        if not processes.exists(stored):
            delta = row.finish(lora.load(self.directory(parent) / ADAPTER, start.problem.base))
            self._write(member, directory, delta, math.nan, start, 0.0)
        return directory, Outcome.load(stored)

    def _test(self, member: Member, directory: Path) -> np.ndarray:
        """Returns the predictions of the stored adapter of a run for the test examples."""
        start = self._starts.of(member.row, member.seed)

        def load() -> tuple[Any, dict[str, Any]]:
            return self._base(member), meshes.gather(lora.load(directory / ADAPTER, start.problem.base))

        return self._predict(start, directory, load)

    def _predict(self, start: Start, directory: Path, load: Callable[[], tuple[Any, dict[str, Any]]]) -> np.ndarray:
        """Returns the predictions that a directory stores; computes them from base and adapters the first time."""
        path = directory / PREDICTIONS
        if not processes.exists(path):
            outputs = start.problem.outputs(*load(), "test", self._mesh)
            processes.write(partial(_save, path, start.problem.task.predict(outputs)))
        return np.load(path)

    def _base(self, member: Member) -> Any:
        """Returns the base of a run, which may be quantized."""
        start, rules = self._starts.of(member.row, member.seed), member.row.rules
        base = meshes.put_weights(self._mesh, bert.AXES, start.base)
        return start.problem.quantize(base, rules) if rules else base

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
        config, alone = self._config, len(group) == 1
        settings = [self._settings(member) for member in group]
        directory = self.directory(group[0]) if alone else self._clear_once("group", settings)
        profile = config.profiled_steps()
        run = TrainingRun(directory, self._mesh, asdict(config), config.checkpoint_every, profile=profile)
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
                once=not (group[0].row.tracked or self._apart),
                snapshot=partial(self._save_step, group, start) if group[0].row.tracked else None,
                wrap=group[0].row.optimizer,
                penalty=group[0].row.penalty,
                weight_decay=config.weight_decay,
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
        finish = partial(outputs.clear, directory, "checkpoints") if alone else partial(outputs.remove, directory)
        processes.write(finish)
        self._done, self._trained = last, self._trained + len(group)
        self._seconds += time.perf_counter() - began
        return results

    def _save_step(self, group: Sequence[Member], start: Start, step: int, deltas: Sequence[dict[str, Any]]) -> None:
        for member, delta in zip(group, deltas):
            tracked = {path: node for path, node in delta.items() if re.search(member.row.tracked, path)}
            self._save(self.directory(member) / f"{STEP}{step:05}", tracked, start)

    def _save(self, directory: Path, delta: dict[str, Any], start: Start) -> None:
        delta = meshes.gather(delta)
        processes.write(lambda: lora.save(directory, delta, base=start.problem.base))

    def _write_diverged(self, member: Member, start: Start) -> Outcome:
        delta = jax.eval_shape(
            lambda base: start.problem.delta(jax.random.key(0), base, member.row.spec), start.problem.base
        )
        return self._write_outcome(member, self.directory(member), delta, math.nan, 0.0)

    def _write(
        self, member: Member, directory: Path, delta: dict[str, Any], score: float, start: Start, seconds: float
    ) -> Outcome:
        self._save(directory / ADAPTER, delta, start)  # the delta replaces the head
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
        processes.write(lambda: outcome.save(directory / "result.json"))
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


def _save(path: Path, array: np.ndarray) -> None:
    with replace_file(path) as file:
        np.save(file, array)
