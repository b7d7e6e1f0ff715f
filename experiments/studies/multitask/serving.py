"""One batch with the test examples of all tasks, each row with the adapter of its task, next to separate calls."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.multitask import Config
from experiments.studies.multitask.problems import Task
from experiments.tasks.batching import Planned, assemble
from experiments.training.progress import bar


@dataclass(frozen=True)
class Served:
    """What one batch for all tasks gives and costs.

    Attributes:
      difference: The largest absolute difference of its logits to those of each adapter alone.
      agreement: The fraction of the rows for which both predict the same class.
      together: The median seconds of a batch.
      separately: The median seconds of one call for each adapter on the same rows.
    """

    difference: float
    agreement: float
    together: float
    separately: float


def serve(tasks: Sequence[Task], deltas: Sequence[dict[str, Any]], config: Config, console: Console) -> Served:
    """Answers the test examples of all tasks together and separately."""
    base, apply = tasks[0].problem.base, tasks[0].problem.apply
    stacked = lora.stack(deltas)
    one_example = lora.adapt(lambda base, tokens, mask: apply(base, tokens[None], mask[None])[0][0])
    routed = lora.route(jax.jit(one_example))
    adapted = jax.jit(lora.adapt(lambda base, tokens, mask: apply(base, tokens, mask)[0]))
    ids = np.repeat(np.arange(len(tasks)), config.rows)

    def together(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        return np.asarray(routed(base, stacked, ids, *map(np.concatenate, zip(*parts))))

    def separately(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        return np.concatenate([np.asarray(adapted(base, delta, *part)) for delta, part in zip(deltas, parts)])

    batches = _batches(tasks, config.rows)
    for call in (together, separately):
        call(batches[0])  # compiles
    seconds: dict[Callable, list[float]] = {together: [], separately: []}
    differences, agreements = [], []
    with bar(console, "answers", config.repeats * len(batches)) as progress:
        for number, parts in enumerate(batches * config.repeats):
            order = (together, separately) if number % 2 else (separately, together)
            logits = {}
            for call in order:
                began = time.perf_counter()
                logits[call] = call(parts)
                seconds[call].append(time.perf_counter() - began)
            one, other = logits.values()
            differences.append(np.abs(one - other).max())
            agreements.append(np.mean(one.argmax(-1) == other.argmax(-1)))
            progress.advance(1)
    return Served(
        float(max(differences)),
        float(np.mean(agreements)),
        float(np.median(seconds[together])),
        float(np.median(seconds[separately])),
    )


def _batches(tasks: Sequence[Task], rows: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Returns batches with tokens and mask of `rows` test examples of each task; the last one is filled up."""
    splits = [task.problem.splits["test"] for task in tasks]
    return [
        [
            _arrays(split, np.arange(start, start + rows) % len(split), task.problem.lengths[0])
            for split, task in zip(splits, tasks)
        ]
        for start in range(0, len(splits[0]), rows)
    ]


def _arrays(split: Any, indices: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    batch = assemble(Planned(indices, length), split.sequences, split.labels, len(indices))
    return batch["tokens"], batch["mask"]
