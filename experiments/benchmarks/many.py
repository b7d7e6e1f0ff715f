"""What many adapters over one base cost: `python -m experiments.benchmarks.many`.

Two comparisons; the sides of each take turns in one process:

  forward    a GPT-2-small-shaped forward of 32 × 64 tokens (float32, random weights, rank 8 on all four linear
             weights of a block): every example with another adapter, through lora_jax.route, against all with one.
             Ratios are medians over rounds. Beside it the same with one token each, and both with grouped products
             where there is a GPU
  training   8 adapters on the quickstart's model (query, value and head, batch 8 × 24 tokens each): at once, by
             lora_jax.train_many, against 8 runs one after the other. Compilation is included, once on either side

then the ratios that have a target, each PASS or FAIL. Exit status 1 where one fails. About 6 minutes and 5 GB on 2
CPU cores. Figures are of the machine it runs on: a CPU says nothing about an accelerator. On a GPU the target of
training is its throughput, compilation aside.
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
from experiments.studies.methods import loss_function
from experiments.studies.problem import Problem, load
from experiments.studies.quickstart import method
from experiments.training.stream import Stream

ROUTED, SINGLE, GROUPED = "an adapter an example", "one adapter for all", "the same, grouped"
TOGETHER, APART = "trained at once", "one after the other"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    shape: model.Shape = dataclasses.field(default_factory=lambda: model.Shape(batch=32, length=64))
    """Of the forward; as many adapters as its batch."""
    rank: int = 8
    """Rank of every adapter of the forward."""
    rounds: int = 9
    """Timed forwards of each kind."""
    trained: quickstart.Config = dataclasses.field(
        default_factory=lambda: quickstart.Config(
            train_examples=1000, validation_examples=1, test_examples=1, batch_size=8, lengths=(24,)
        )
    )
    """The model, the data and the batches that are trained on."""
    adapters: int = 8
    """How many are trained."""
    steps: int = 100
    """Of each training run."""
    at_once: int | None = None
    """How many are computed side by side within a step; None is 2 on a CPU, whose caches are small, else all."""
    runs: int = 2
    """Timed trainings of all adapters, at once and one after the other."""

    def __post_init__(self) -> None:
        settings.positive(self, "rank", "rounds", "adapters", "runs")
        if self.steps < 2:
            raise ValueError(f"steps must be 2 or more (the first compiles), not {self.steps}")
        if self.rank > self.shape.width:
            raise ValueError(f"rank must be at most the model's width ({self.shape.width}), not {self.rank}")


@dataclasses.dataclass
class Training:
    """What training all adapters took, by repetition.

    Attributes:
      seconds: From the first trace to the last step.
      first: Of these, until the first step was done.
      examples: How many the other steps saw.
      losses: The last loss of each adapter.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    examples: float = 0.0
    losses: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


def forwards(config: Config, length: int) -> dict[str, Callable[[], jax.Array]]:
    """The forward of each kind, ready to be called."""
    shape, key = config.shape, jax.random.key(0)
    base = model.make_params(key, shape)
    tokens = jax.random.randint(jax.random.fold_in(key, 1), (shape.batch, length), 0, shape.vocabulary)
    spec = {r"layers/.*/kernel": lora.LoRA(config.rank)}

    def batched(base: Any, tokens: jax.Array) -> jax.Array:
        return model.logits(base, tokens, shape)

    def single(base: Any, tokens: jax.Array) -> jax.Array:
        return model.logits(base, tokens[None], shape)[0]

    keys = jax.random.split(key, shape.batch)
    deltas = [_filled(key, lora.init(key, base, spec, batched, tokens)) for key in keys]
    stacked, ids = lora.stack(deltas), np.random.default_rng(0).permutation(shape.batch)
    one = jax.jit(lora.adapt(batched))
    compiled: dict[str, Callable[[], jax.Array]] = {SINGLE: lambda: one(base, deltas[0], tokens)}
    kinds = {ROUTED: False, GROUPED: True} if jax.default_backend() == "gpu" else {ROUTED: False}
    for name, grouped in kinds.items():
        routed = jax.jit(lora.route(lora.adapt(single), grouped=grouped))
        compiled[name] = lambda routed=routed: routed(base, stacked, ids, tokens)
    return compiled


def _filled(key: jax.Array, delta: dict[str, Any]) -> dict[str, Any]:
    """The delta with random numbers in place of zeros, which can be quicker than what training leaves."""
    train, frozen = lora.partition(delta)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(key, len(leaves))
    made = [jax.random.normal(key, leaf.shape) / leaf.shape[-1] for key, leaf in zip(keys, leaves)]
    return lora.join(jax.tree.unflatten(treedef, made), frozen)


def time_forwards(config: Config, length: int) -> dict[str, list[float]]:
    """Seconds of every forward."""
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
    """Both ways to train all adapters, from cleared caches."""
    members, trained = range(config.adapters), config.trained
    chosen = method("lora", trained)
    tx, loss = chosen.optimizer(config.steps), loss_function(problem.apply, trained.label_smoothing)
    keys = jax.random.split(jax.random.key(0), config.adapters)
    deltas = [problem.delta(key, problem.base, chosen.spec) for key in keys]
    train = problem.splits["train"]
    streams = [Stream(train.sequences, train.labels, problem.lengths, trained.batch_size, seed) for seed in members]
    batches = [[stream[step] for step in range(config.steps)] for stream in streams]
    found = {APART: Training(), TOGETHER: Training()}

    def apart(done: Callable[[], None]) -> list[float]:
        step, losses = lora.train_step(loss, tx), []
        for delta, key, mine in zip(deltas, keys, batches):
            state, last = lora.TrainState.create(problem.base, delta, tx, key), math.nan
            for batch in mine:
                state, metrics = step(state, batch)
                last = float(metrics["loss"])
                done()
            losses.append(last)
        return losses

    def together(done: Callable[[], None]) -> list[float]:
        side_by_side = config.at_once or (2 if jax.default_backend() == "cpu" else None)
        step = lora.train_many(loss, tx, at_once=side_by_side)
        states, losses = lora.TrainStates.create(problem.base, deltas, tx, keys), []
        for each in zip(*batches):
            states, metrics = step(states, jax.tree.map(lambda *leaves: np.stack(leaves), *each))
            losses = metrics["loss"].tolist()
            done()
        return losses

    sides = {APART: apart, TOGETHER: together}
    for order in rotations(list(sides), config.runs):
        for name in order:
            jax.clear_caches()
            marks = [time.perf_counter()]
            found[name].losses = np.array(sides[name](lambda marks=marks: marks.append(time.perf_counter())))
            found[name].first.append(marks[1] - marks[0])
            found[name].seconds.append(marks[-1] - marks[0])
            total, steps = config.adapters * config.steps * trained.batch_size, len(marks) - 1
            found[name].examples = total * (steps - 1) / steps
    return found


def report_forward(title: str, seconds: dict[str, list[float]]) -> float:
    """Prints a line a kind; returns the median over rounds of an adapter an example against one for all."""
    print(f"\n{title:34}{'median s':>10}{'min s':>10}{'ratio':>8}")
    ratio = {}
    for name, values in seconds.items():
        ratio[name] = statistics.median(one / other for one, other in zip(values, seconds[SINGLE]))
        print(f"  {name:32}{statistics.median(values):10.4f}{min(values):10.4f}{ratio[name]:8.3f}")
    return ratio[ROUTED]


def report_training(title: str, found: dict[str, Training]) -> tuple[float, float]:
    """Prints a line a side; returns the ratios of their seconds, and of their examples a second once compiled."""
    print(f"\n{title:34}{'median s':>10}{'min s':>10}{'first step s':>14}{'examples/s':>12}")
    total, speed = {}, {}
    for name, side in found.items():
        total[name] = statistics.median(side.seconds)
        speed[name] = side.examples / statistics.median(a - b for a, b in zip(side.seconds, side.first))
        first = statistics.median(side.first)
        print(f"  {name:32}{total[name]:10.2f}{min(side.seconds):10.2f}{first:14.2f}{speed[name]:12.0f}")
    difference = np.abs(found[TOGETHER].losses - found[APART].losses).max()
    print(f"  last losses differ by {difference:.1e} at most")
    return total[TOGETHER] / total[APART], speed[TOGETHER] / speed[APART]


def verdict(what: str, ratio: float, limit: float, *, least: bool = False) -> bool:
    """Prints whether a ratio keeps to its limit."""
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
    held = []
    forward = report_forward(f"forward, {shape.batch} × {shape.length} tokens", time_forwards(config, shape.length))
    report_forward(f"forward, {shape.batch} × 1 token", time_forwards(config, 1))
    title = f"training {config.adapters} × {config.steps} steps of {trained.batch_size} × {trained.lengths[-1]}"
    seconds, throughput = report_training(title, time_training(config, problem))
    print()
    held.append(verdict(f"forward: {ROUTED} / {SINGLE}", forward, 1.15))
    if jax.default_backend() == "gpu":
        held.append(verdict("training: throughput at once / apart", throughput, 2.0, least=True))
    else:
        held.append(verdict("training: seconds at once / apart", seconds, 1.0))
    return 0 if all(held) else 1


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.many"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
