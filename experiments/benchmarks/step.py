"""Measures the cost of a LoRA training step: `python -m experiments.benchmarks.step`.

Builds GPT-2-small-shaped training steps (batch 4 × 128, float32, random weights, AdamW) with adapters of
rank 8 on all four linear weights of a block, in every variant of `step_variants`, and prints a table:

  GFLOP          operations of a step, by XLA's cost analysis of the compiled step
  peak MiB       arguments + outputs + temporaries − donated, by the compiled step's memory analysis
  median, min    seconds per step; variants alternate in one process
  trace, compile median seconds from cleared caches; variants alternate

then the ratios that have a target, each PASS or FAIL. The exit status is 1 if one fails. Takes about 4 minutes and 6 GB
on 2 CPU cores. The results are those of this machine; a CPU does not predict an accelerator.
"""

import dataclasses
import gc
import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import optax

from experiments import flags, startup
from experiments.benchmarks import gpt2_step_model as model
from experiments.benchmarks import step_variants


@dataclasses.dataclass(frozen=True)
class Config:
    """The variants and runs to measure."""

    shape: model.Shape = dataclasses.field(default_factory=model.Shape)
    """The model's sizes."""
    rank: int = 8
    """Rank of every adapter."""
    steps: int = 15
    """Timed steps of each variant."""
    compiles: int = 3
    """Timed compilations of each variant."""
    variants: tuple[str, ...] = ()
    """The variants to run; all installed ones if empty."""
    seed: int = 0
    """Random seed of weights, factors and tokens."""


@dataclasses.dataclass
class Cost:
    """The measurements of one variant."""

    flops: float = 0.0
    peak_bytes: int = 0
    trace: list[float] = dataclasses.field(default_factory=list)
    compile: list[float] = dataclasses.field(default_factory=list)
    step: list[float] = dataclasses.field(default_factory=list)

    @property
    def build(self) -> float:
        """Median seconds to trace and compile."""
        return statistics.median(map(sum, zip(self.trace, self.compile)))


@dataclasses.dataclass(frozen=True)
class Target:
    """An upper bound on the ratio of two variants' values."""

    what: str
    of: Callable[[Cost], float]
    reference: str
    limit: float
    subject: str = "lora_jax"


TARGETS = (
    Target("FLOPs", lambda cost: cost.flops, "hand-written", 1.005),
    Target("FLOPs", lambda cost: cost.flops, "full fine-tuning", 0.72),
    Target("median seconds", lambda cost: statistics.median(cost.step), "bound", 1.12),
    Target("median seconds", lambda cost: statistics.median(cost.step), "hand-written", 0.82),
    Target("trace + compile", lambda cost: cost.build, "hand-written", 1.25),
    Target("peak memory", lambda cost: cost.peak_bytes, "hand-written", 1.02),
    Target("FLOPs of DoRA", lambda cost: cost.flops, "lora_jax", 1.25, "DoRA"),
)


def make_step(parts: step_variants.Parts) -> tuple[Any, Any]:
    """Returns the step, `step(train, state, rest, batch) -> (train, state, loss)`, and the initial state."""
    tx = optax.adamw(1e-4)

    def step(train: Any, state: Any, rest: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(parts.loss)(train, rest, batch)
        updates, state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1)), tx.init(parts.train)


def build(
    make: Callable[[step_variants.Problem], step_variants.Parts], problem: step_variants.Problem, cost: Cost
) -> tuple[jax.stages.Compiled, list[Any]]:
    """Compiles a variant from cleared caches, and adds the time to `cost`.

    Returns:
      The compiled step and its four arguments.
    """
    parts = make(problem)
    step, state = make_step(parts)
    arguments = [parts.train, state, parts.rest, problem.tokens]
    gc.collect()
    jax.clear_caches()
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    cost.trace.append(middle - start)
    cost.compile.append(time.perf_counter() - middle)
    return compiled, arguments


def rotations(names: Sequence[str], count: int) -> Iterable[Sequence[str]]:
    """Yields `count` rotations of `names`, every other one reversed."""
    for i in range(count):
        start = i % len(names)
        order = [*names[start:], *names[:start]]
        yield order if i % 2 == 0 else order[::-1]


def measure(config: Config, report: Callable[[str], None]) -> dict[str, Cost]:
    """Runs every variant and returns its cost."""
    variants = step_variants.available()
    names = config.variants or tuple(variants)
    problem = step_variants.make_problem(config.shape, rank=config.rank, seed=config.seed)
    costs = {name: Cost() for name in names}

    report("compiling")
    build(variants[names[0]], problem, Cost())  # warms up: the first compilation of a process takes longer
    compiled_steps = {}
    for order in rotations(names, config.compiles):
        for name in order:
            compiled, arguments = build(variants[name], problem, costs[name])
            compiled_steps.setdefault(name, (compiled, arguments))

    for name, (compiled, arguments) in compiled_steps.items():
        memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
        if memory is None or analysis is None:
            raise RuntimeError(f"XLA provides no cost analysis on {jax.default_backend()}.")
        allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        costs[name].peak_bytes = allocated - memory.alias_size_in_bytes
        costs[name].flops = analysis["flops"]
        # A step donates its arguments, so it has copies of them.
        arguments[:2] = jax.tree.map(lambda x: x.copy(), arguments[:2])

    report("timing")
    for i, order in enumerate(rotations(names, config.steps + 1)):
        for name in order:
            compiled, arguments = compiled_steps[name]
            start = time.perf_counter()
            *arguments[:2], loss = compiled(*arguments)
            jax.block_until_ready((arguments[:2], loss))
            if i > 0:  # the first round warms up
                costs[name].step.append(time.perf_counter() - start)
    return costs


def table(costs: dict[str, Cost]) -> str:
    """Returns a line per variant."""
    lines = [f"{'':18}{'GFLOP':>9}{'peak MiB':>10}{'median s':>10}{'min s':>8}{'trace s':>9}{'compile s':>11}"]
    for name, cost in costs.items():
        step, trace, compilation = map(statistics.median, (cost.step, cost.trace, cost.compile))
        lines.append(
            f"{name:18}{cost.flops / 1e9:9.1f}{cost.peak_bytes / 2**20:10.0f}"
            f"{step:10.3f}{min(cost.step):8.3f}{trace:9.2f}{compilation:11.2f}"
        )
    return "\n".join(lines)


def verdicts(costs: dict[str, Cost]) -> list[tuple[str, bool]]:
    """Returns a line for every target whose variants ran, and whether it holds."""
    lines = []
    for target in TARGETS:
        if target.subject in costs and target.reference in costs:
            ratio = target.of(costs[target.subject]) / target.of(costs[target.reference])
            holds = ratio <= target.limit
            line = f"{target.what:16}{ratio:7.3f} × {target.reference:18}(≤ {target.limit:<5}) "
            lines.append((line + ("PASS" if holds else "FAIL"), holds))
    return lines


def main(config: Config) -> int:
    """Measures, prints, and returns the exit status."""
    variants = step_variants.available()
    unknown = [name for name in config.variants if name not in variants]
    if unknown:
        print(f"unknown variant {', '.join(unknown)}, expected one of {', '.join(variants)}", file=sys.stderr)
        return 2
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {config.shape}, rank {config.rank}")
    if "qwix" in variants:
        print(f"qwix {importlib.metadata.version('qwix')}")
    else:
        print("qwix is not installed and is omitted; `uv sync --group benchmarks` installs it.")
    costs = measure(config, lambda stage: print(f"{stage} …", flush=True))
    print(table(costs))
    lines = verdicts(costs)
    for line, _ in lines:
        print(line)
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.step"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
