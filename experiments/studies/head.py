"""The head that every method starts from, as a result of its own."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.baselines import head as baseline
from experiments.reports.results import Result, stored_bytes
from experiments.studies.problem import HEAD, Problem, accuracy, answers
from experiments.training.progress import bar


@dataclass(frozen=True)
class Start:
    """Where every trained method starts.

    Attributes:
      problem: What is learned.
      base: Its base with the converged head.
      result: What is known of that head.
    """

    problem: Problem
    base: dict[str, Any]
    result: Result


def run(problem: Problem, directory: Path, console: Console) -> Start:
    """Fits the head, or reads the one that `directory` holds."""
    adapter, result = directory / "adapter", directory / "result.json"
    if result.exists():
        base = lora.merge(problem.base, lora.load(adapter, problem.base))
        return Start(problem, base, Result.load(result))
    began = time.perf_counter()
    features = _features(problem, console)
    labeled = {name: (features[name], split.labels) for name, split in problem.splits.items()}
    fitted = baseline.fit(labeled["train"], labeled["validation"], len(problem.names))
    seconds = time.perf_counter() - began
    base = problem.with_head(fitted.kernel, fitted.bias)
    lora.save(adapter, problem.delta(jax.random.key(0), base, {HEAD: lora.Full()}), base=problem.base)
    found = Result(
        method="head",
        seed=0,
        trained_parameters=fitted.kernel.size + fitted.bias.size,
        adam_bytes=None,
        adapter_bytes=stored_bytes(adapter),
        seconds=seconds,
        validation_accuracy=fitted.validation_accuracy,
        test_accuracy=accuracy(features["test"] @ fitted.kernel + fitted.bias, problem.splits["test"]),
        merged_difference=0.0,
        merged_agreement=1.0,
        losses=[],
        evaluations=[],
    )
    found.save(result)
    console.print(
        f"head: C = {fitted.penalty:.2g}, validation {fitted.validation_accuracy:.1%}, {seconds:.0f} s",
        highlight=False,
    )
    return Start(problem, base, found)


def _features(problem: Problem, console: Console) -> dict[str, np.ndarray]:
    """The sentence vectors of every split, computed once."""
    apply = jax.jit(problem.apply)

    def vectors(tokens: np.ndarray, mask: np.ndarray) -> jax.Array:
        return apply(problem.base, tokens, mask)[1]

    with bar(console, "features", sum(map(len, problem.splits.values()))) as shown:
        return {
            name: answers(vectors, split, problem.lengths, advance=shown.advance)
            for name, split in problem.splits.items()
        }
