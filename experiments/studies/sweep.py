"""Trains a grid of LoRA's rank and learning rate at once, and evaluates the best adapter on test examples."""

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
from experiments.tasks import examples
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
    """The result of a sweep.

    Attributes:
      grid: The pair (rank, learning rate) of each adapter.
      validation_accuracy: The validation accuracy of each adapter; None if its training diverged.
      chosen: The index of the best adapter.
      test_accuracy: The test accuracy of the best adapter.
      head_accuracy: The validation accuracy of the head alone, from which training starts.
      losses: The mean loss over adapters of every step.
      seconds: Time of training and evaluation, including compilation.
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
    """Trains or resumes the grid, prints a table, and writes a JSON record, a heat map and the best adapter.

    Raises:
      UserError: Model or data are missing or malformed, a rank exceeds that of the weights, or all adapters diverged.
    """
    outputs.claim(config.out, "run.json", "sweep.png")
    console = processes.console()
    problem = load(config.model, config.data, examples.limits(config), config.lengths, report=console.print)
    for rank in config.ranks:
        problem.check(f"ranks {rank}", _spec(config, rank))
    start = head.run(problem, _directory(config, "head", [problem.digest, config.lengths]), console)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_NUMBERS}
    directory = _directory(config, "sweep", [problem.digest, settings])
    stored = directory / "result.json"
    if stored.exists():
        sweep = read_json(stored, lambda content: Sweep(**content))
    else:
        sweep = _train(config, start, directory, console)
    _show(config, sweep, directory, console)
    return sweep


_NOT_NUMBERS = ("out", "fresh", "model", "data", "checkpoint_every")
"""Settings that do not affect the results, or that the digest covers."""


def _train(config: Config, start: Start, directory: Path, console: Console) -> Sweep:
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
    accuracies, scores_at = _accuracies(problem), dict[int, np.ndarray]()

    def evaluate(states: lora.TrainStates) -> float:
        scores = scores_at[_last_step(states)] = accuracies(states)
        return float(np.nanmax(scores))

    run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every)
    with bar(console, f"{len(deltas)} adapters", config.epochs * len(splits["train"])) as progress:
        states, history = train(
            run,
            _stop_diverged(step),
            states,
            stream,
            steps,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=evaluate,
            format_score="{:.1%} at best".format,
            bar=progress,
        )
    if _last_step(states) not in scores_at:  # resumed after the last step
        evaluate(states)
    scores = scores_at[_last_step(states)]
    chosen = int(np.nanargmax(scores))
    best = lora.unstack(states.delta, deltas)[chosen]
    lora.save(directory / "adapter", best, base=problem.base)
    adapted = jax.jit(lora.adapt(problem.apply))
    logits = answers(lambda *inputs: adapted(start.base, best, *inputs)[0], splits["test"], problem.lengths)
    sweep = Sweep(
        grid=config.grid,
        validation_accuracy=[None if np.isnan(score) else float(score) for score in scores],
        chosen=chosen,
        test_accuracy=accuracy(logits, splits["test"]),
        head_accuracy=start.result.validation_accuracy,
        losses=history.losses,
        seconds=history.seconds,
    )
    write_json(directory / "result.json", asdict(sweep))
    outputs.clear(directory, "checkpoints")
    return sweep


def _last_step(states: lora.TrainStates) -> int:
    return int(states.step.max())


def _spec(config: Config, rank: int) -> dict[str, Any]:
    return {_QUERY_VALUE: lora.LoRA(rank=rank, alpha=config.alpha), HEAD: lora.Full()}


def _deltas(config: Config, start: Start) -> list[dict[str, Any]]:
    """Initializes an adapter for each pair of the grid. Adapters of the same rank start from the same factors."""
    key = jax.random.key(config.seed)
    by_rank = {rank: start.problem.delta(key, start.base, _spec(config, rank)) for rank in config.ranks}
    return [by_rank[rank] for rank, _ in config.grid]


def _stop_diverged(step: Callable) -> Callable:
    """Wraps the step of all adapters for the training loop; it deactivates adapters whose loss is not finite."""

    def wrapped(states: lora.TrainStates, batch: Any) -> tuple[lora.TrainStates, dict[str, Any]]:
        states, metrics = step(states, batch)
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"]) & np.asarray(states.active)
        if not finite.any():
            raise UserError("all adapters diverged; try smaller learning rates")
        means = {name: np.mean(np.asarray(metrics[name])[finite]) for name in ("loss", "grad_norm")}
        return replace(states, active=jnp.asarray(finite)), means

    return wrapped


def _accuracies(problem: Problem) -> Callable[[lora.TrainStates], np.ndarray]:
    """Returns a function from states to the validation accuracy of each adapter; NaN if it diverged."""
    adapted = jax.jit(jax.vmap(lora.adapt(problem.apply), in_axes=(None, 0, None, None), out_axes=1))
    split = problem.splits["validation"]

    def evaluate(states: lora.TrainStates) -> np.ndarray:
        logits = answers(lambda *inputs: adapted(states.base, states.delta, *inputs)[0], split, problem.lengths)
        right = logits.argmax(axis=-1) == split.labels[:, None]
        return np.where(np.asarray(states.active), right.mean(axis=0), np.nan)

    return evaluate


def _show(config: Config, sweep: Sweep, directory: Path, console: Console) -> None:
    scores = np.array(sweep.validation_accuracy, float).reshape(len(config.ranks), -1)
    rank, lr = sweep.grid[sweep.chosen]
    ranks, rates = [f"{rank}" for rank in config.ranks], [f"{lr:g}" for lr in config.learning_rates]
    console.print()
    console.print("validation accuracy by rank (down) and learning rate (across)")
    console.print(grid_table(scores, ranks, rates, "rank"))
    console.print(
        f"chosen: rank {rank}, learning rate {lr:g}, validation {scores.flat[sweep.chosen]:.1%}, test "
        f"{sweep.test_accuracy:.1%}; the head alone: validation {sweep.head_accuracy:.1%}",
        highlight=False,
    )
    console.print(f"{len(sweep.grid)} adapters trained in {sweep.seconds:.0f} s", highlight=False)
    draw_grid(
        config.out / "sweep.png",
        scores,
        ranks,
        rates,
        labels=("rank", "peak learning rate"),
        chosen=divmod(sweep.chosen, len(rates)),
        title=f"LoRA: {config.model} on {config.data}",
    )
    record = provenance.record(config, result=asdict(sweep), adapter=str(directory / "adapter"))
    write_json(config.out / "run.json", record)
    console.print(f"written to {config.out}: run.json, sweep.png and the chosen adapter", highlight=False)


def _directory(config: Config, name: str, inputs: Any) -> Path:
    return provenance.directory(config.out, name, inputs, fresh=config.fresh)
