"""Trains an adapter for each task in one step, and a full model for each task one after another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.baselines.specs import LINEAR
from experiments.configs.multitask import Config
from experiments.errors import UserError
from experiments.reports.results import Outcome, stored_bytes
from experiments.studies import head, provenance
from experiments.studies.head import Start
from experiments.studies.joint import average_members, loss_function, train_jointly
from experiments.studies.multitask.problems import Task
from experiments.studies.problem import HEAD, Split, accuracy, answers
from experiments.tasks.batching import Batch
from experiments.training import mesh as meshes
from experiments.training import outputs
from experiments.training.loop import plan_steps, train
from experiments.training.mesh import MeshSizes
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import TrainingRun
from experiments.training.stream import Stream

_AT_ONCE = 2  # members that train in parallel on a CPU; see experiments/benchmarks/RESULTS.md
_SETTINGS = ("seed", "epochs", "batch_size", "length", "rank", "alpha", "lr", "full_lr", "warmup", "clip")


class Streams:
    """Batches of several tasks: leaves are `[tasks, batch, …]`.

    Args:
      streams: The batches of each task, as many per pass.
    """

    def __init__(self, streams: Sequence[Stream]):
        self._streams = streams
        self.batch_size, self.steps_per_epoch = streams[0].batch_size, streams[0].steps_per_epoch

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns the given rows of every task's batch of a step."""
        batches = [stream.rows(step, rows) for stream in self._streams]
        return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def examples(self, step: int) -> int:
        """Returns the number of examples in the batches of a step."""
        return sum(stream.examples(step) for stream in self._streams)

    def tokens(self, step: int) -> int:
        """Returns the number of tokens, without padding, in the batches of a step."""
        return sum(stream.tokens(step) for stream in self._streams)

    def labels(self, step: int) -> int:
        """Returns the number of labels in the batches of a step."""
        return sum(stream.labels(step) for stream in self._streams)


def fit_heads(tasks: Sequence[Task], config: Config, console: Console) -> list[Start]:
    """Fits the head of each task, from which the other methods start, or reads it."""
    starts = []
    for task in tasks:
        inputs = [task.problem.digest, config.length, len(task.problem.names)]
        starts.append(head.run(task.problem, _directory(config, f"head-{task.name}", inputs), console))
    return starts


def train_adapters(
    tasks: Sequence[Task], starts: Sequence[Start], config: Config, console: Console
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """Trains the adapters of all tasks in one step, resumes their run, or reads them.

    Returns:
      The outcome and the adapter of each task.

    Raises:
      UserError: The training of a task diverged.
    """
    settings = [*_settings(config), *(task.problem.digest for task in tasks)]
    directories = [_directory(config, f"adapter-{task.name}", [task.name, *settings]) for task in tasks]
    if not all((directory / "result.json").exists() for directory in directories):
        began, group = time.perf_counter(), _directory(config, "adapters", settings)
        run = TrainingRun(group, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every)
        deltas = _fit(tasks, starts, config, run, console)
        seconds = (time.perf_counter() - began) / len(tasks)
        adapted = jax.jit(lora.adapt(tasks[0].problem.apply))
        for task, directory, delta in zip(tasks, directories, deltas):
            _store(task, directory, adapted, delta, seconds, config, "adapter", config.lr)
        outputs.remove(group)
    outcomes = [Outcome.load(directory / "result.json") for directory in directories]
    return outcomes, [lora.load(path / "adapter", task.problem.base) for path, task in zip(directories, tasks)]


def _fit(
    tasks: Sequence[Task], starts: Sequence[Start], config: Config, run: TrainingRun, console: Console
) -> list[dict[str, Any]]:
    spec = {LINEAR: lora.LoRA(config.rank, alpha=config.alpha), HEAD: lora.Full()}
    keys = jax.random.split(jax.random.key(config.seed), len(starts))
    deltas = [start.problem.delta(key, start.base, spec) for start, key in zip(starts, keys)]
    problem = starts[0].problem
    parts = [start.problem.splits["train"] for start in starts]
    streams = Streams(
        [Stream(part.sequences, part.labels, problem.lengths, config.batch_size, config.seed) for part in parts]
    )
    total, _ = plan_steps(config.epochs, streams.steps_per_epoch)
    tx = adam(config.lr, total, warmup=config.warmup, clip=config.clip)
    step = lora.train_many(
        loss_function(problem.apply, config.label_smoothing),
        tx,
        at_once=_AT_ONCE if jax.default_backend() == "cpu" else None,
    )
    with bar(console, f"{len(deltas)} adapters", config.epochs * sum(map(len, parts))) as progress:
        states, _ = train(
            run,
            average_members(step, run.mesh),
            lora.TrainStates.create(problem.base, deltas, tx, keys),  # the deltas replace the head
            streams,
            total,
            due=set(),
            score=None,
            evaluate=lambda states: 0.0,
            format_score=str,
            bar=progress,
        )
    if diverged := [task.name for task, active in zip(tasks, np.asarray(states.active)) if not active]:
        raise UserError(f"the adapters of {', '.join(diverged)} diverged; try a smaller --lr")
    return lora.unstack(states.delta, deltas)


def _store(
    task: Task,
    directory: Path,
    adapted: Callable,
    delta: dict[str, Any],
    seconds: float,
    config: Config,
    method: str,
    lr: float,
) -> None:
    problem = task.problem

    def score(split: Split) -> float:
        return accuracy(answers(lambda *args: adapted(problem.base, delta, *args)[0], split, problem.lengths), split)

    lora.save(directory / "adapter", delta, base=problem.base)
    Outcome(
        method=method,
        seed=config.seed,
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0])),
        adapter_bytes=stored_bytes(directory / "adapter"),
        seconds=seconds,
        validation_accuracy=score(problem.splits["validation"]),
        test_accuracy=score(problem.splits["test"]),
        lr=lr,
    ).save(directory / "result.json")


def train_full(tasks: Sequence[Task], starts: Sequence[Start], config: Config, console: Console) -> list[Outcome]:
    """Trains a full model for each task, resumes their runs, or reads their results."""
    outcomes: list[Outcome] = []
    for task, start in zip(tasks, starts):
        inputs = [task.name, *_settings(config), task.problem.digest, len(task.problem.names)]
        directory = _directory(config, f"full-{task.name}", inputs)
        if not (directory / "result.json").exists():
            method = f"full fine-tuning, {task.name}"
            console.print(method, highlight=False)
            run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every)
            joint = train_jointly(start, [{"": lora.Full()}], [config.full_lr], config, run, console, once=True)
            adapted, seconds = jax.jit(lora.adapt(task.problem.apply)), joint.history.seconds
            _store(task, directory, adapted, joint.deltas[0], seconds, config, method, config.full_lr)
            outputs.clear(directory, "checkpoints")
        outcomes.append(Outcome.load(directory / "result.json"))
    return outcomes


def _settings(config: Config) -> list[Any]:
    """Returns the settings that affect the results of all runs."""
    return [getattr(config, name) for name in _SETTINGS]


def _directory(config: Config, name: str, inputs: list[Any]) -> Path:
    return provenance.directory(config.out, name, inputs, fresh=config.fresh)
