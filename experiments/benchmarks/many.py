"""Measures the cost of many adapters on one base: `python -m experiments.benchmarks.many`.

Two comparisons, whose sides alternate in one process:

  forward    a GPT-2-small-shaped forward pass of 32 × 64 tokens (float32, random weights, rank 8 on all four linear
             weights of a block): a different adapter per example, by lora_jax.route, against one adapter for all.
             Ratios are medians over rounds. Also with one token per example, and on a GPU with grouped products
  training   8 adapters on the quickstart's model (query, value and head, batch 8 × 24 tokens each): simultaneously, by
             lora_jax.train_many, against 8 runs in sequence. Compilation is included, once on either side

Then the ratios that have a target, each PASS or FAIL. The exit status is 1 if one fails. Takes about 6 minutes and 5 GB
on 2 CPU cores. The results are those of this machine; a CPU does not predict an accelerator. On a GPU the target of
training is its throughput without compilation.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from experiments import flags, settings, startup
from experiments.benchmarks import gpt2_step_model as model
from experiments.benchmarks.step import rotations
from experiments.configs import quickstart
from experiments.errors import UserError
from experiments.studies.joint import loss_function
from experiments.studies.problem import Problem, load
from experiments.studies.quickstart import make_row
from experiments.training.optimizer import adam
from experiments.training.stream import Stream

ROUTED, SINGLE, GROUPED = "one adapter per example", "one adapter for all", "the same, grouped"
TOGETHER, APART = "simultaneous training", "sequential training"


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes and runs to measure."""

    shape: model.Shape = dataclasses.field(default_factory=lambda: model.Shape(batch=32, length=64))
    """The shape of the forward pass, which has as many adapters as its batch has examples."""
    rank: int = 8
    """Rank of every adapter of the forward pass."""
    rounds: int = 9
    """Number of timed forward passes of each kind."""
    trained: quickstart.Config = dataclasses.field(
        default_factory=lambda: quickstart.Config(
            train_examples=1000, validation_examples=1, test_examples=1, batch_size=8, lengths=(24,)
        )
    )
    """The model, the data and the batches of training."""
    adapters: int = 8
    """Number of adapters to train."""
    steps: int = 100
    """Steps of each training run."""
    at_once: int | None = None
    """Number of adapters that a step computes at once. None is 2 on a CPU, whose caches are small, otherwise all."""
    runs: int = 2
    """Number of timed trainings of all adapters, simultaneous and sequential."""

    def __post_init__(self) -> None:
        settings.positive(self, "rank", "rounds", "adapters", "runs")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2 (the first one compiles), not {self.steps}")
        if self.rank > self.shape.width:
            raise ValueError(f"rank must be at most the model's width ({self.shape.width}), not {self.rank}")


@dataclasses.dataclass
class Training:
    """The measurements of training all adapters, by repetition.

    Attributes:
      seconds: The time from the first trace to the last step.
      first: The time until the end of the first step.
      examples: The number of examples of the other steps.
      losses: The last loss of each adapter.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    examples: float = 0.0
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


def forwards(config: Config, length: int) -> dict[str, Callable[[], jax.Array]]:
    """Returns a function for the forward pass of each kind."""
    shape, key = config.shape, jax.random.key(0)
    base = model.make_params(key, shape)
    tokens = jax.random.randint(jax.random.fold_in(key, 1), (shape.batch, length), 0, shape.vocabulary)
    spec = {r"layers/.*/kernel": lora.LoRA(config.rank)}

    def batched(base: Any, tokens: jax.Array) -> jax.Array:
        return model.logits(base, tokens, shape)

    def single(base: Any, tokens: jax.Array) -> jax.Array:
        return model.logits(base, tokens[None], shape)[0]

    keys = jax.random.split(key, shape.batch)
    deltas = [_randomize(key, lora.init(key, base, spec, batched, tokens)) for key in keys]
    stacked, ids = lora.stack(deltas), np.random.default_rng(0).permutation(shape.batch)
    adapted = jax.jit(lora.adapt(batched))
    compiled: dict[str, Callable[[], jax.Array]] = {SINGLE: lambda: adapted(base, deltas[0], tokens)}
    kinds = {ROUTED: False, GROUPED: True} if jax.default_backend() == "gpu" else {ROUTED: False}
    for name, grouped in kinds.items():
        routed = jax.jit(lora.route(lora.adapt(single), grouped=grouped))
        compiled[name] = lambda routed=routed: routed(base, stacked, ids, tokens)
    return compiled


def _randomize(key: jax.Array, delta: dict[str, Any]) -> dict[str, Any]:
    """Replaces a delta's numbers by random ones, since zeros can be faster than trained factors."""
    train, frozen = lora.partition(delta)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(key, len(leaves))
    values = [jax.random.normal(key, leaf.shape) / leaf.shape[-1] for key, leaf in zip(keys, leaves)]
    return lora.join(jax.tree.unflatten(treedef, values), frozen)


def time_forwards(config: Config, length: int) -> dict[str, list[float]]:
    """Measures the seconds of every forward pass."""
    compiled = forwards(config, length)
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for number, order in enumerate(rotations(list(compiled), config.rounds + 1)):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(compiled[name]())
            if number > 0:  # the first round compiles
                seconds[name].append(time.perf_counter() - start)
    return seconds


def time_training(config: Config, problem: Problem) -> dict[str, Training]:
    """Measures simultaneous and sequential training of all adapters, from cleared caches."""
    members, trained = range(config.adapters), config.trained
    row = make_row("lora", trained)
    tx = adam(row.rates[0], config.steps, warmup=trained.warmup, clip=trained.clip)
    loss = loss_function(problem.apply, trained.label_smoothing)
    keys = jax.random.split(jax.random.key(0), config.adapters)
    deltas = [problem.delta(key, problem.base, row.spec) for key in keys]
    train = problem.splits["train"]
    streams = [Stream(train.sequences, train.labels, problem.lengths, trained.batch_size, seed) for seed in members]
    batches = [[stream[step] for step in range(config.steps)] for stream in streams]
    results = {APART: Training(), TOGETHER: Training()}

    def apart(mark: Callable[[], None]) -> list[float]:
        step, losses = lora.train_step(loss, tx), []
        for delta, key, member_batches in zip(deltas, keys, batches):
            state, last = lora.TrainState.create(problem.base, delta, tx, key), math.nan
            for batch in member_batches:
                state, metrics = step(state, batch)
                last = float(metrics["loss"])
                mark()
            losses.append(last)
        return losses

    def together(mark: Callable[[], None]) -> list[float]:
        side_by_side = config.at_once or (2 if jax.default_backend() == "cpu" else None)
        step = lora.train_many(loss, tx, at_once=side_by_side)
        states, losses = lora.TrainStates.create(problem.base, deltas, tx, keys), []
        for each in zip(*batches):
            states, metrics = step(states, jax.tree.map(lambda *leaves: np.stack(leaves), *each))
            losses = metrics["loss"].tolist()
            mark()
        return losses

    sides = {APART: apart, TOGETHER: together}
    for order in rotations(list(sides), config.runs):
        for name in order:
            jax.clear_caches()
            marks = [time.perf_counter()]
            results[name].losses = np.array(sides[name](lambda marks=marks: marks.append(time.perf_counter())))
            results[name].first.append(marks[1] - marks[0])
            results[name].seconds.append(marks[-1] - marks[0])
            total, steps = config.adapters * config.steps * trained.batch_size, len(marks) - 1
            results[name].examples = total * (steps - 1) / steps
    return results


def report_forward(title: str, seconds: dict[str, list[float]]) -> float:
    """Prints a line per kind; returns the median ratio of one adapter per example to one for all."""
    print(f"\n{title:34}{'median s':>10}{'min s':>10}{'ratio':>8}")
    ratio = {}
    for name, values in seconds.items():
        ratio[name] = statistics.median(value / single for value, single in zip(values, seconds[SINGLE]))
        print(f"  {name:32}{statistics.median(values):10.4f}{min(values):10.4f}{ratio[name]:8.3f}")
    return ratio[ROUTED]


def report_training(title: str, results: dict[str, Training]) -> tuple[float, float]:
    """Prints a line per side; returns the ratios of their seconds and of their throughputs after compilation."""
    print(f"\n{title:34}{'median s':>10}{'min s':>10}{'first step s':>14}{'examples/s':>12}")
    total, speed = {}, {}
    for name, side in results.items():
        total[name] = statistics.median(side.seconds)
        speed[name] = side.examples / statistics.median(a - b for a, b in zip(side.seconds, side.first))
        first = statistics.median(side.first)
        print(f"  {name:32}{total[name]:10.2f}{min(side.seconds):10.2f}{first:14.2f}{speed[name]:12.0f}")
    difference = np.abs(results[TOGETHER].losses - results[APART].losses).max()
    print(f"  last losses differ by {difference:.1e} at most")
    return total[TOGETHER] / total[APART], speed[TOGETHER] / speed[APART]


def verdict(what: str, ratio: float, limit: float, *, least: bool = False) -> bool:
    """Prints whether a ratio is within its limit."""
    holds = ratio >= limit if least else ratio <= limit
    print(f"{what:50}{ratio:7.3f} × ({'≥' if least else '≤'} {limit:<5}) {'PASS' if holds else 'FAIL'}")
    return holds


def main(config: Config) -> int:
    """Measures, prints, and returns the exit status."""
    trained, shape = config.trained, config.shape
    limits = {split: getattr(trained, f"{split}_examples") for split in ("train", "validation", "test")}
    try:
        problem = load(trained.model, trained.data, limits, trained.lengths, report=print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {shape}, rank {config.rank}")
    passed = []
    forward = report_forward(f"forward, {shape.batch} × {shape.length} tokens", time_forwards(config, shape.length))
    report_forward(f"forward, {shape.batch} × 1 token", time_forwards(config, 1))
    title = f"training {config.adapters} × {config.steps} steps of {trained.batch_size} × {trained.lengths[-1]}"
    seconds, throughput = report_training(title, time_training(config, problem))
    print()
    passed.append(verdict(f"forward: {ROUTED} / {SINGLE}", forward, 1.15))
    if jax.default_backend() == "gpu":
        passed.append(verdict("training: throughput, simultaneous / sequential", throughput, 2.0, least=True))
    else:
        passed.append(verdict("training: seconds, simultaneous / sequential", seconds, 1.0))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.many"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
