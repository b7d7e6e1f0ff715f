"""The converged head from which every method starts."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.baselines import head as baseline
from experiments.reports.results import Outcome, stored_bytes
from experiments.studies.problem import HEAD, PREDICTIONS, Problem, answers
from experiments.training.progress import bar


@dataclass(frozen=True)
class Start:
    """The starting point of every trained method.

    Attributes:
      problem: The model and the task.
      base: The base with the converged head.
      result: The result of the head alone.
      directory: The directory of the head, with its adapter.
    """

    problem: Problem
    base: dict[str, Any]
    result: Outcome
    directory: Path


def run(problem: Problem, directory: Path, console: Console) -> Start:
    """Fits the head, or reads it from `directory`."""
    adapter, stored = directory / "adapter", directory / "result.json"
    if stored.exists():
        base = lora.merge(problem.base, lora.load(adapter, problem.base))
        return Start(problem, base, Outcome.load(stored), directory)
    started = time.perf_counter()
    features = _features(problem, console)
    labeled = {name: (features[name], split.labels) for name, split in problem.splits.items()}
    if problem.task.is_regression:
        fitted = baseline.fit_regression(labeled["train"], labeled["validation"])
    else:
        fitted = baseline.fit(labeled["train"], labeled["validation"], len(problem.names))
    seconds = time.perf_counter() - started

    def outputs(split: str) -> np.ndarray:
        return features[split] @ fitted.kernel + fitted.bias

    def score(split: str) -> float:
        return problem.task.score(outputs(split), problem.splits[split].labels)

    base = problem.with_head(fitted.kernel, fitted.bias)
    lora.save(adapter, problem.delta(jax.random.key(0), base, {HEAD: lora.Full()}), base=problem.base)
    result = Outcome(
        method="head",
        seed=0,
        trained_parameters=fitted.kernel.size + fitted.bias.size,
        adapter_bytes=stored_bytes(adapter),
        seconds=seconds,
        validation_accuracy=score("validation"),
        lr=None,
        test_accuracy=score("test"),
    )
    np.save(directory / PREDICTIONS, problem.task.predict(outputs("test")))
    result.save(stored)
    console.print(
        f"head: C = {fitted.penalty:.2g}, validation {result.validation_accuracy:.1%}, {seconds:.0f} s",
        highlight=False,
    )
    return Start(problem, base, result, directory)


def _features(problem: Problem, console: Console) -> dict[str, np.ndarray]:
    """Computes the sentence vectors of every split."""
    apply = jax.jit(problem.apply)

    def vectors(tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
        return apply(problem.base, tokens, mask)[1]

    with bar(console, "features", sum(map(len, problem.splits.values()))) as progress:
        return {
            name: answers(vectors, split, problem.lengths, advance=progress.advance)
            for name, split in problem.splits.items()
        }
