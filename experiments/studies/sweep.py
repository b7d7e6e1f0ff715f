"""Trains a grid of LoRA's rank and learning rate at once, and evaluates the best adapter on test examples."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.sweep import Config
from experiments.reports.grid import draw_grid, grid_table
from experiments.reports.results import read_json, write_json
from experiments.studies import head, provenance
from experiments.studies.head import Start
from experiments.studies.joint import train_jointly
from experiments.studies.problem import HEAD, accuracy, answers, load
from experiments.tasks import examples
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.mesh import MeshSizes
from experiments.training.run import TrainingRun

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
    specs, rates = [_spec(config, rank) for rank, _ in config.grid], [lr for _, lr in config.grid]
    run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every)
    joint = train_jointly(start, specs, rates, config, run, console)
    scores = joint.accuracies("validation", splits["validation"].labels)
    chosen = int(np.nanargmax(scores))
    best = joint.deltas[chosen]
    lora.save(directory / "adapter", best, base=problem.base)
    adapted = jax.jit(lora.adapt(problem.apply))
    logits = answers(lambda *inputs: adapted(start.base, best, *inputs)[0], splits["test"], problem.lengths)
    sweep = Sweep(
        grid=config.grid,
        validation_accuracy=[None if np.isnan(score) else float(score) for score in scores],
        chosen=chosen,
        test_accuracy=accuracy(logits, splits["test"]),
        head_accuracy=start.result.validation_accuracy,
        losses=joint.history.losses,
        seconds=joint.history.seconds,
    )
    write_json(directory / "result.json", asdict(sweep))
    outputs.clear(directory, "checkpoints")
    return sweep


def _spec(config: Config, rank: int) -> dict[str, Any]:
    return {_QUERY_VALUE: lora.LoRA(rank=rank, alpha=config.alpha), HEAD: lora.Full()}


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
