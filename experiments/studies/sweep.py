"""LoRA's rank and learning rate: every pair of a grid trained at once, the best one tried on test."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.sweep import Config
from experiments.errors import UserError
from experiments.reports.grid import draw_grid, grid_table
from experiments.reports.results import read_json, write_json
from experiments.studies import head, provenance
from experiments.studies.head import Start
from experiments.studies.methods import loss_function
from experiments.studies.problem import HEAD, Problem, accuracy, answers, load
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.loop import plan_steps, train
from experiments.training.mesh import MeshSizes
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import TrainingRun
from experiments.training.stream import Stream

_QUERY_VALUE = r"attention/(query|value)/kernel"


@dataclass(frozen=True)
class Sweep:
    """What a sweep has found.

    Attributes:
      grid: (rank, learning rate) of each adapter.
      validation_accuracy: Of each adapter; None where its training diverged.
      chosen: The place of the best one.
      test_accuracy: Of the best one.
      head_accuracy: On validation, of the head alone that training starts from.
      losses: The mean over adapters, of every step.
      seconds: Training and its evaluations, compilation included.
    """

    grid: list[tuple[int, float]]
    validation_accuracy: list[float | None]
    chosen: int
    test_accuracy: float
    head_accuracy: float
    losses: list[float]
    seconds: float


@outputs.exclusive
def run(config: Config) -> Sweep:
    """Trains the grid, shows the table, writes JSON, heat map and the chosen adapter.

    Raises:
      UserError: The model or the data are missing or malformed, a rank is above the weights', or all diverged.
    """
    outputs.claim(config.out, "run.json", "sweep.png")
    console = processes.console()
    limits = {
        "train": config.train_examples,
        "validation": config.validation_examples,
        "test": config.test_examples,
    }
    problem = load(config.model, config.data, limits, config.lengths, report=console.print)
    for rank in config.ranks:
        problem.check(f"ranks {rank}", _spec(config, rank))
    start = head.run(problem, _directory(config, "head", [problem.digest, config.lengths]), console)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_NUMBERS}
    directory = _directory(config, "sweep", [problem.digest, settings])
    stored = directory / "result.json"
    if stored.exists():
        found = read_json(stored, lambda content: Sweep(**content))
    else:
        found = _trained(config, start, directory, console)
    _show(config, found, directory, console)
    return found


_NOT_NUMBERS = ("out", "fresh", "model", "data", "checkpoint_every")
"""What of a config does not decide the numbers, or is in the digest."""


def _trained(config: Config, start: Start, directory: Path, console: Console) -> Sweep:
    problem, splits = start.problem, start.problem.splits
    deltas = _deltas(config, start)
    stream = Stream(splits["train"].sequences, splits["train"].labels, problem.lengths, config.batch_size, config.seed)
    steps, due = plan_steps(config.epochs, stream.steps_per_epoch)

    def tx(lr):
        return adam(lr, steps, warmup=config.warmup, clip=config.clip)

    keys = jax.random.split(jax.random.key(config.seed), len(deltas))
    rates = [lr for _, lr in config.grid]
    states = lora.TrainStates.create(start.base, deltas, tx, keys, {"lr": rates})
    step = lora.train_many(loss_function(problem.apply, config.label_smoothing), tx, batch_axes=None)
    accuracies, measured = _accuracies(problem), dict[int, np.ndarray]()

    def evaluate(states: lora.TrainStates) -> float:
        scores = measured[_done(states)] = accuracies(states)
        return float(np.nanmax(scores))

    run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every)
    with bar(console, f"{len(deltas)} adapters", config.epochs * len(splits["train"])) as shown:
        states, history = train(
            run,
            _stopping(step),
            states,
            stream,
            steps,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=evaluate,
            format_score="{:.1%} at best".format,
            bar=shown,
        )
    if _done(states) not in measured:  # resumed behind the last step
        evaluate(states)
    scores = measured[_done(states)]
    chosen = int(np.nanargmax(scores))
    best = lora.unstack(states.delta, deltas)[chosen]
    lora.save(directory / "adapter", best, base=problem.base)
    adapted = jax.jit(lora.adapt(problem.apply))
    logits = answers(lambda *inputs: adapted(start.base, best, *inputs)[0], splits["test"], problem.lengths)
    found = Sweep(
        grid=config.grid,
        validation_accuracy=[None if np.isnan(score) else float(score) for score in scores],
        chosen=chosen,
        test_accuracy=accuracy(logits, splits["test"]),
        head_accuracy=start.result.validation_accuracy,
        losses=history.losses,
        seconds=history.seconds,
    )
    write_json(directory / "result.json", asdict(found))
    outputs.clear(directory, "checkpoints")
    return found


def _done(states: lora.TrainStates) -> int:
    return int(states.step.max())


def _spec(config: Config, rank: int) -> dict[str, Any]:
    return {_QUERY_VALUE: lora.LoRA(rank=rank, alpha=config.alpha), HEAD: lora.Full()}


def _deltas(config: Config, start: Start) -> list[dict[str, Any]]:
    """An adapter for each pair of the grid. Those of one rank start from the same factors."""
    key = jax.random.key(config.seed)
    by_rank = {rank: start.problem.delta(key, start.base, _spec(config, rank)) for rank in config.ranks}
    return [by_rank[rank] for rank, _ in config.grid]


def _stopping(step: Callable) -> Callable:
    """The step of all adapters as the loop takes it; an adapter whose loss is not finite is stopped."""

    def stepping(states: lora.TrainStates, batch: Any) -> tuple[lora.TrainStates, dict[str, Any]]:
        states, metrics = step(states, batch)
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"]) & np.asarray(states.active)
        if not finite.any():
            raise UserError("every adapter of the grid diverged, try smaller learning rates")
        means = {name: np.mean(np.asarray(metrics[name])[finite]) for name in ("loss", "grad_norm")}
        return replace(states, active=jnp.asarray(finite)), means

    return stepping


def _accuracies(problem: Problem) -> Callable[[lora.TrainStates], np.ndarray]:
    """The accuracy of every adapter on validation; NaN for those that were stopped."""
    adapted = jax.jit(jax.vmap(lora.adapt(problem.apply), in_axes=(None, 0, None, None), out_axes=1))
    split = problem.splits["validation"]

    def of(states: lora.TrainStates) -> np.ndarray:
        logits = answers(lambda *inputs: adapted(states.base, states.delta, *inputs)[0], split, problem.lengths)
        right = logits.argmax(axis=-1) == split.labels[:, None]
        return np.where(np.asarray(states.active), right.mean(axis=0), np.nan)

    return of


def _show(config: Config, found: Sweep, directory: Path, console: Console) -> None:
    scores = np.array(found.validation_accuracy, float).reshape(len(config.ranks), -1)
    rank, lr = found.grid[found.chosen]
    ranks, rates = [f"{rank}" for rank in config.ranks], [f"{lr:g}" for lr in config.learning_rates]
    console.print()
    console.print("validation accuracy by rank (down) and learning rate (across)")
    console.print(grid_table(scores, ranks, rates, "rank"))
    console.print(
        f"chosen: rank {rank}, learning rate {lr:g}, validation {scores.flat[found.chosen]:.1%}, test "
        f"{found.test_accuracy:.1%}; the head alone: validation {found.head_accuracy:.1%}",
        highlight=False,
    )
    console.print(f"{len(found.grid)} adapters trained in {found.seconds:.0f} s", highlight=False)
    draw_grid(
        config.out / "sweep.png",
        scores,
        ranks,
        rates,
        labels=("rank", "peak learning rate"),
        chosen=divmod(found.chosen, len(rates)),
        title=f"LoRA: {config.model} on {config.data}",
    )
    record = {
        "config": asdict(config),
        "versions": provenance.versions(),
        "devices": [device.device_kind for device in jax.devices()],
        "result": asdict(found),
        "adapter": str(directory / "adapter"),
    }
    write_json(config.out / "run.json", record)
    console.print(f"written to {config.out}: run.json, sweep.png and the chosen adapter", highlight=False)


def _directory(config: Config, name: str, everything: Any) -> Path:
    return provenance.directory(config.out, name, everything, fresh=config.fresh)
