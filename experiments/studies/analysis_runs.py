"""Training runs that keep the adapters of chosen weights after every epoch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.reports.results import read_json, write_json
from experiments.studies.head import Start
from experiments.studies.methods import Method, loss_function
from experiments.studies.problem import accuracy, answers
from experiments.training import loop, outputs
from experiments.training import mesh as meshes
from experiments.training.loop import plan_steps
from experiments.training.mesh import MeshSizes
from experiments.training.progress import bar
from experiments.training.run import TrainingRun
from experiments.training.stream import Stream


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: Of its method.
      seed: Of the initial factors and the order of the examples.
      deltas: The adapters of the watched weights, by step.
      accuracy: On validation, at the end.
    """

    name: str
    seed: int
    deltas: dict[int, dict[str, Any]]
    accuracy: float

    @property
    def last(self) -> dict[str, Any]:
        """The adapters at the end."""
        return self.deltas[max(self.deltas)]


def trained(
    start: Start,
    method: Method,
    seed: int,
    watched: list[str],
    *,
    directory: Path,
    checkpoint_every: int,
    console: Console,
) -> Run:
    """Trains a method, or goes on with it, or reads what `directory` holds of it.

    Args:
      start: The base with the head that training starts from.
      method: What to train.
      seed: Of the initial factors and the order of the examples.
      watched: Paths of the weights whose adapters are kept.
      directory: Of this run alone.
      checkpoint_every: Steps between checkpoints.
      console: Where the bar is drawn.
    """
    finished = directory / "history.json"
    if not finished.exists():
        _train(start, method, seed, watched, directory, checkpoint_every, console)
    evaluations = read_json(finished, lambda content: [(step, accuracy) for step, accuracy in content["evaluations"]])
    steps = [step for step, _ in evaluations if step]
    deltas = {step: lora.load(_snapshot(directory, step), start.problem.base) for step in steps}
    return Run(method.name, seed, deltas, evaluations[-1][1])


def _train(
    start: Start,
    method: Method,
    seed: int,
    watched: list[str],
    directory: Path,
    checkpoint_every: int,
    console: Console,
) -> None:
    problem, base, splits = start.problem, start.base, start.problem.splits
    init_key, train_key = jax.random.split(jax.random.key(seed))
    delta = problem.delta(init_key, base, method.spec)
    stream = Stream(splits["train"].sequences, splits["train"].labels, problem.lengths, method.batch_size, seed)
    total, due = plan_steps(method.epochs, stream.steps_per_epoch)
    tx = method.optimizer(total)
    adapted = jax.jit(lora.adapt(problem.apply))

    def evaluate(state: lora.TrainState) -> float:
        kept = {path: state.delta[path] for path in watched}
        lora.save(_snapshot(directory, int(state.step)), kept, base=problem.base)

        def logits(*inputs: np.ndarray) -> jax.Array:
            return adapted(base, state.delta, *inputs)[0]

        return accuracy(answers(logits, splits["validation"], problem.lengths), splits["validation"])

    run = TrainingRun(
        directory, meshes.make_mesh(MeshSizes()), {"method": repr(method), "seed": seed}, checkpoint_every
    )
    with bar(console, f"{method.name} (seed {seed})", method.epochs * len(splits["train"])) as shown:
        _, history = loop.train(
            run,
            lora.train_step(loss_function(problem.apply, method.label_smoothing), tx),
            lora.TrainState.create(base, delta, tx, train_key),
            stream,
            total,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=evaluate,
            format_score="{:.1%}".format,
            bar=shown,
        )
    write_json(directory / "history.json", asdict(history))
    outputs.clear(directory, "checkpoints")


def _snapshot(directory: Path, step: int) -> Path:
    return directory / f"step-{step:05}"
