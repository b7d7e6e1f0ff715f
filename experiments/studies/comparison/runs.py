"""The runs of a comparison: trained together where they can be, cached by their settings, and resumed."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
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
from experiments.studies.joint import Joint, train_jointly
from experiments.studies.problem import Problem, Split, accuracy, answers
from experiments.training import mesh as meshes
from experiments.training import outputs
from experiments.training.mesh import MeshSizes
from experiments.training.run import TrainingRun

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
    if len({row.name for row in rows}) < len(rows):
        raise ValueError(f"The names of rows must differ, got {[row.name for row in rows]}")
    starts = Starts(problem, config, console)
    by_name = {row.name: row for row in rows}
    trained = [row for row in rows if row.rates]
    for row in trained:
        if not any(recipe.reads for recipe in row.spec.values()):
            starts.of(row).problem.check(row.name, row.spec)
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
        start = starts.of(row)
        source = by_name[row.parent] if row.parent else row
        if not source.rates:
            summaries.append(Summary(row, [start.result], start.result.trained_parameters, start))
            continue
        members = [Member(source, rates[source.name], seed) for seed in seeds]
        outcomes = [results[member.key] for member in members]
        directories = [program.directory(member) for member in members]
        if row.parent:
            changed = [program.finish(row, member) for member in members]
            outcomes, directories = [outcome for outcome, _ in changed], [directory for _, directory in changed]
        tried = {rate: results[Key(source.name, rate, seeds[0])].validation_accuracy for rate in source.rates}
        summaries.append(Summary(row, outcomes, start.result.trained_parameters, start, directories, tried))
    return summaries


def _best_rate(row: Row, seed: int, results: Mapping[Key, Outcome]) -> float:
    """Returns the learning rate with the best validation accuracy; the first one of equal ones."""
    scores = [results[Key(row.name, rate, seed)].validation_accuracy for rate in row.rates]
    return row.rates[int(np.argmax(np.nan_to_num(scores, nan=-1.0)))]


class _Program:
    """Runs members in groups that train together."""

    def __init__(self, starts: Starts, config: Comparison, console: Console):
        self._starts, self._config, self._console = starts, config, console
        self._total, self._done, self._seconds, self._trained = 0, 0, 0.0, 0

    def announce(self, total: int) -> None:
        """Prints the number of runs."""
        self._total = total
        minutes = f", about {self._config.MINUTES} minutes on 2 CPU cores" if not self._config.fast else ""
        self._console.print(f"{total} runs{minutes}; after an interruption, the same command resumes")

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

    def finish(self, row: Row, parent: Member) -> tuple[Outcome, Path]:
        """Returns the outcome of adapters that a row changes after training, and their directory."""
        assert row.finish is not None
        start, member = self._starts.of(parent.row, parent.seed), Member(row, parent.rate, parent.seed)
        directory = self._make_directory(member, [*self._settings(parent), repr(row.finish)])
        stored = directory / "result.json"
        if not stored.exists():
            began = time.perf_counter()
            delta = row.finish(lora.load(self.directory(parent) / ADAPTER, start.problem.base))
            adapted = jax.jit(lora.adapt(start.problem.apply))

            def accuracy_of(split: Split) -> float:
                def logits(*inputs: np.ndarray) -> jax.Array:
                    return adapted(start.base, delta, *inputs)[0]

                return accuracy(answers(logits, split, start.problem.lengths), split)

            scores = {name: accuracy_of(start.problem.splits[name]) for name in ("validation", "test")}
            self._write(member, directory, delta, scores, start, time.perf_counter() - began)
        return Outcome.load(stored), directory

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
        began, start = time.perf_counter(), self._starts.of(group[0].row, group[0].seed)
        directory = provenance.directory(
            self._config.out, "group", [self._settings(member) for member in group], fresh=self._config.fresh
        )
        run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(self._config), self._config.checkpoint_every)
        base = start.problem.quantize(start.base, rules) if (rules := group[0].row.rules) else start.base
        joint = train_jointly(
            replace(start, base=base),
            [member.row.spec for member in group],
            [member.rate for member in group],
            self._shared(group[0]),
            run,
            self._console,
            at_once=_AT_ONCE if jax.default_backend() == "cpu" else None,
            once=not group[0].row.tracked,
            test=partial(_best_of_rows, group),
            snapshot=partial(self._save_step, group, start) if group[0].row.tracked else None,
            wrap=group[0].row.optimizer,
            penalty=group[0].row.penalty,
        )
        seconds = time.perf_counter() - began
        results = {
            member.key: self._store(member, index, joint, start, seconds / len(group))
            for index, member in enumerate(group)
        }
        outputs.remove(directory)
        self._done, self._trained, self._seconds = last, self._trained + len(group), self._seconds + seconds
        return results

    def _save_step(self, group: Sequence[Member], start: Start, step: int, deltas: Sequence[dict[str, Any]]) -> None:
        for member, delta in zip(group, deltas):
            tracked = {path: node for path, node in delta.items() if re.search(member.row.tracked, path)}
            lora.save(self.directory(member) / f"{STEP}{step:05}", tracked, base=start.problem.base)

    def _store(self, member: Member, index: int, joint: Joint, start: Start, seconds: float) -> Outcome:
        scores = {
            split: float(joint.accuracies(split, start.problem.splits[split].labels)[index]) for split in joint.logits
        }
        return self._write(member, self.directory(member), joint.deltas[index], scores, start, seconds)

    def _write(
        self,
        member: Member,
        directory: Path,
        delta: dict[str, Any],
        scores: Mapping[str, float],
        start: Start,
        seconds: float,
    ) -> Outcome:
        lora.save(directory / ADAPTER, delta, base=start.problem.base)  # the delta replaces the head
        train, _ = lora.partition(delta)
        outcome = Outcome(
            method=member.row.name,
            seed=member.seed,
            trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(train)),
            adapter_bytes=stored_bytes(directory / ADAPTER),
            seconds=seconds,
            validation_accuracy=scores["validation"],
            test_accuracy=scores["test"],
            lr=member.rate,
        )
        outcome.save(directory / "result.json")
        return outcome

    def directory(self, member: Member) -> Path:
        """Returns the directory of a run."""
        return self._make_directory(member, self._settings(member))

    def _make_directory(self, member: Member, inputs: list[Any]) -> Path:
        name = re.sub(r"\W+", "-", member.row.name.lower()).strip("-")
        title = f"{name}-lr-{member.rate:g}-seed{member.seed}"
        return provenance.directory(self._config.out, title, inputs, fresh=self._config.fresh)

    def _settings(self, member: Member) -> list[Any]:
        """Returns everything that determines the result of a run."""
        row, problem = member.row, self._starts.of(member.row, member.seed).problem
        what = [row.spec, row.rules, row.examples, row.tracked, row.change, row.optimizer, row.penalty]
        shared = [getattr(self._shared(member), name) for name in _SHARED]
        return [problem.digest, problem.lengths, *map(repr, what), member.rate, *shared]

    def _shared(self, member: Member) -> Comparison:
        """Returns the config with the seed and the epochs of a run."""
        epochs = self._config.epochs if member.row.epochs is None else member.row.epochs
        return replace(self._config, seed=member.seed, epochs=epochs)


def _best_of_rows(group: Sequence[Member], accuracies: np.ndarray) -> list[int]:
    """Returns the index of the best member of each row; of equal ones the first."""
    scores = np.nan_to_num(accuracies, nan=-1.0)
    best: dict[str, int] = {}
    for index, member in enumerate(group):
        name = member.row.name
        best[name] = index if name not in best or scores[index] > scores[best[name]] else best[name]
    return list(best.values())


def _kind(member: Member) -> str:
    """Returns what must be equal for runs that train together.

    Adapters that differ in rank or paths are stacked, with zeros where a member has none. Large ranks would cost the
    others too much, and adapters as large as their weights train together only if their patterns are the same.
    """
    row = member.row
    whole = {pattern: recipe for pattern, recipe in row.spec.items() if isinstance(recipe, lora.Full | lora.Rows)}
    kinds = sorted({repr(_without_rank(recipe)) for recipe in row.spec.values()})
    shared = (row.rules, row.examples, row.epochs, row.tracked, row.change, row.optimizer, row.penalty, member.seed)
    return repr((kinds, whole, shared))


def _without_rank(recipe: Any) -> Any:
    return replace(recipe, rank=1) if 1 <= getattr(recipe, "rank", 0) <= _LARGE else recipe
