"""Training runs that save the adapters of selected weights after every epoch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.reports.results import read_json, write_json
from experiments.studies.head import Start
from experiments.studies.methods import Method, fit
from experiments.studies.problem import accuracy, answers
from experiments.training import mesh as meshes
from experiments.training import outputs
from experiments.training.mesh import MeshSizes
from experiments.training.run import TrainingRun


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: The name of the method.
      seed: The random seed of the initial factors and the order of the examples.
      deltas: The adapters of the tracked weights by step.
      accuracy: The validation accuracy at the end.
    """

    name: str
    seed: int
    deltas: dict[int, dict[str, Any]]
    accuracy: float

    @property
    def last(self) -> dict[str, Any]:
        """The adapters at the end."""
        return self.deltas[max(self.deltas)]


def run_method(
    start: Start,
    method: Method,
    seed: int,
    tracked: list[str],
    *,
    directory: Path,
    checkpoint_every: int,
    console: Console,
) -> Run:
    """Trains a method, resumes its run, or reads the result of a finished run.

    Args:
      start: The starting point.
      method: The method.
      seed: Random seed of the initial factors and the order of the examples.
      tracked: Paths of the weights whose adapters are saved.
      directory: The directory of this run.
      checkpoint_every: Steps between checkpoints.
      console: The output of the progress bar.
    """
    finished = directory / "history.json"
    if not finished.exists():
        _train(start, method, seed, tracked, directory, checkpoint_every, console)
    evaluations = read_json(finished, lambda content: [(step, accuracy) for step, accuracy in content["evaluations"]])
    steps = [step for step, _ in evaluations if step]
    deltas = {step: lora.load(_snapshot(directory, step), start.problem.base) for step in steps}
    return Run(method.name, seed, deltas, evaluations[-1][1])


def _train(
    start: Start,
    method: Method,
    seed: int,
    tracked: list[str],
    directory: Path,
    checkpoint_every: int,
    console: Console,
) -> None:
    problem, base, splits = start.problem, start.base, start.problem.splits
    adapted = jax.jit(lora.adapt(problem.apply))

    def evaluate(state: lora.TrainState) -> float:
        delta = {path: state.delta[path] for path in tracked}
        lora.save(_snapshot(directory, int(state.step)), delta, base=problem.base)

        def logits(*inputs: np.ndarray) -> jax.Array:
            return adapted(base, state.delta, *inputs)[0]

        return accuracy(answers(logits, splits["validation"], problem.lengths), splits["validation"])

    run = TrainingRun(
        directory, meshes.make_mesh(MeshSizes()), {"method": repr(method), "seed": seed}, checkpoint_every
    )
    _, history = fit(start, base, method, seed, run, console, evaluate=evaluate)
    write_json(directory / "history.json", asdict(history))
    outputs.clear(directory, "checkpoints")


def _snapshot(directory: Path, step: int) -> Path:
    return directory / f"step-{step:05}"
