"""What training steps of Llama-shaped models take: `python -m experiments.benchmarks.memory`.

Compiles for one TPU v5p chip, without one and without running them, the training steps of LLaMA's four sizes (batch
1 × 512, scanned layers, each rematerialized, rank 64 on all linear layers, AdamW with float32 moments): full
fine-tuning, LoRA, and QLoRA on NF4 with double quantization, the latter also with the optimizer's state in the host's
memory and with the base dequantized as a whole before the model. A line a step, in GB (10⁹ bytes):

  base, delta, optimizer  by XLA's analysis of the arguments, padding of their layouts included
  temporaries             XLA's `temp_size_in_bytes`
  total                   arguments + outputs + temporaries − donated
  peak                    XLA's `peak_memory_in_bytes`, what is held at the worst moment. It is the smaller of the two
                          although it counts the same arguments: temporaries include what XLA's layout of the memory
                          wastes, and more (a step compiles where less is there than its own `temp_size_in_bytes`)

and under it the same by arithmetic, whose temporaries are the inputs of the layers, float32 logits of all tokens,
gradients of what is trained, and for QLoRA the weights of one block (or of all) in the compute dtype. What is larger
than the chip by arithmetic is not compiled and has that line only. Then the temporaries by item, and what is to hold,
each PASS or FAIL; exit status 1 where one fails.

`--parts cpu` runs the same steps on a CPU in float32 at 97 million parameters, each in a process of its own, and
compares the memory that it had with XLA's analysis for CPUs. `--parts gpu` runs, of each method, the largest model
that fits this machine's GPU, with tokens a second.

About half an hour on 2 CPU cores: a minute or two a step.
"""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

import jax
from jax.experimental import topologies

from experiments import flags, settings, startup
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.benchmarks.memory_process import Figures, analyzed, apart
from experiments.benchmarks.memory_shapes import SIZES, SMALL, Shape
from experiments.benchmarks.memory_steps import make, only
from experiments.errors import UserError

TOPOLOGY = "v5p:2x2x1"
"""The smallest that can be described; steps are compiled for one of its chips."""

CHIP = 102_800_000_000
"""Bytes of a v5p that a program may have: XLA says 95.74 GiB."""

FULL, LORA, QLORA = "full fine-tuning", "LoRA", "QLoRA"
HOST, PLAIN = "QLoRA, state on the host", "QLoRA, dequantized before"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {"method": "full"},
    LORA: {"method": "lora"},
    QLORA: {"method": "qlora"},
    HOST: {"method": "qlora", "on_host": True},
    PLAIN: {"method": "qlora", "plain": True},
}

Row = tuple[str, str]
"""The name of a size and of a variant."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile and to run."""

    parts: tuple[Literal["v5p", "cpu", "gpu"], ...] = ("v5p", "cpu")
    """Compiled for a TPU; run on the CPU; run on the GPU."""
    sizes: tuple[str, ...] = tuple(SIZES)
    """Of the models."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which steps."""
    adapters: Literal["float32", "bfloat16"] = "float32"
    """Of LoRA's factors: the library's default, or the QLoRA paper's."""
    rank: int = 64
    """Of every adapter."""
    tokens: int = 512
    """Of the one sequence of a batch."""
    limit: float = 48.0
    """GB that the largest QLoRA step is to keep below."""

    def __post_init__(self) -> None:
        settings.positive(self, "rank", "tokens", "limit")
        for name, known in (("sizes", SIZES), ("variants", VARIANTS)):
            unknown = [value for value in getattr(self, name) if value not in known]
            if unknown:
                raise UserError(f"No {name[:-1]} {', '.join(unknown)}; there are: {', '.join(known)}.")

    def problem(self, shape: Shape, variant: str, *, bytes: int = 2) -> Problem:
        """A variant at a size; in float32 adapters are too."""
        adapter_bytes = 4 if bytes == 4 or self.adapters == "float32" else 2
        given = VARIANTS[variant]
        return Problem(shape, bytes=bytes, adapter_bytes=adapter_bytes, rank=self.rank, tokens=self.tokens, **given)


def chip() -> Any:
    """One v5p chip, as a device that can be compiled for.

    Raises:
      UserError: There is no compiler for TPUs.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Compiling for a TPU needs libtpu: install the `tpu` extra (uv sync --extra tpu).")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to lock
    jax.config.update("jax_platforms", "cpu")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    except Exception as error:
        raise UserError(f"libtpu describes no {TOPOLOGY}: {str(error).splitlines()[0]}") from error


def compiled(config: Config, report: Callable[[str], None]) -> dict[Row, Figures | None]:
    """XLA's figures of every step for one chip; None where it does not fit."""
    sharding, found = only(chip()), {}
    for size in config.sizes:
        for variant in config.variants:
            problem = config.problem(SIZES[size], variant)
            found[size, variant] = None
            if problem.device > CHIP:
                continue
            start = time.perf_counter()
            with contextlib.suppress(DoesNotFit), refusals():
                found[size, variant] = analyzed(make(problem, sharding, "tpu"), "tpu")
            report(f"{size}, {variant}: {time.perf_counter() - start:.0f} s")
    return found


def fits(problem: Problem, bytes: int) -> bool:
    """Whether XLA compiles a step for a chip of which only so much is there; it trades time for memory then."""
    made = make(problem, only(chip()), "tpu", ballast=CHIP - bytes)
    try:
        with refusals():
            made.lower().compile()
    except DoesNotFit:
        return False
    return True


class DoesNotFit(Exception):
    """The compiler found more than the device's memory needed."""


@contextlib.contextmanager
def refusals() -> Generator[None]:
    """Tells the compiler's one expected error from all others."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error


def table(config: Config, found: Mapping[Row, Figures | None]) -> str:
    """Two lines a step, XLA's and the arithmetic's, in GB."""
    names = ("base", "delta", "optimizer", "temporaries", "total", "peak", "on host")
    lines = [f"{'GB':34}" + "".join(f"{name:>12}" for name in names)]
    for (size, variant), figures in found.items():
        problem = config.problem(SIZES[size], variant)
        moments, host = (0, problem.moments) if problem.on_host else (problem.moments, 0)
        if figures is not None:
            shown = (figures.base, figures.delta, figures.optimizer, figures.temporaries, figures.device, figures.peak)
            lines.append(f"{size:4} {variant:29}" + _gigabytes(*shown, figures.host))
        else:
            lines.append(f"{size:4} {variant:29}   beyond one chip, does not compile:")
        shown = (problem.base, problem.delta, moments, problem.temporaries, problem.device)
        lines.append(f"{'':5}{'by arithmetic':29}" + _gigabytes(*shown) + f"{'':12}" + _gigabytes(host))
    return "\n".join(lines)


def items(config: Config, found: Mapping[Row, Figures | None]) -> str:
    """QLoRA's temporaries by item beside XLA's, in GB."""
    names = ("inputs", "logits", "a block", "sum", "gradients", "sum", "XLA's", "at its peak", "dequantized")
    lines = [f"{'GB':6}" + "".join(f"{name:>12}" for name in names)]
    for size in config.sizes:
        figures, plain = found.get((size, QLORA)), found.get((size, PLAIN))
        if figures is None:
            continue
        parts = config.problem(SIZES[size], QLORA).items
        bound, gradients = needed(parts), parts["gradients"]
        shown = (parts["activations"], parts["logits"], parts["weights"], bound, gradients, bound + gradients)
        line = f"{size:6}" + _gigabytes(*shown, figures.temporaries, figures.beside)
        lines.append(line + (f"{'–':>12}" if plain is None else _gigabytes(plain.temporaries)))
    return "\n".join(lines)


def needed(parts: Mapping[str, int]) -> int:
    """The temporaries of a step but for the gradients of what is trained."""
    return sum(count for name, count in parts.items() if name != "gradients")


def _gigabytes(*counts: int) -> str:
    return "".join(f"{count / 1e9:12.3f}" for count in counts)


def verdict(what: str, value: float, limit: float, unit: str = "GB") -> bool:
    """Prints whether a figure keeps to its limit."""
    holds = value <= limit
    print(f"{what:74}{value:9.3f} {unit} (≤ {limit:.3f}) {'PASS' if holds else 'FAIL'}")
    return holds


def verdicts(config: Config, found: Mapping[Row, Figures | None]) -> bool:
    """Prints what is to hold of the compiled steps; returns whether all does."""
    held = []
    for size in config.sizes:
        shape, figures, host = SIZES[size], found.get((size, QLORA)), found.get((size, HOST))
        if figures is None:
            continue
        each = figures.quantized / (shape.layers * shape.block)
        held.append(verdict(f"{size}: quantized leaves, a parameter", each, 0.53, "bytes"))
        parts = config.problem(shape, QLORA).items
        bound, gradients = needed(parts) / 1e9, parts["gradients"] / 1e9
        held.append(verdict(f"{size}: temporaries / inputs + logits + a block", figures.temporaries / 1e9, bound))
        beside = "held beside the arguments at the peak"
        held.append(verdict(f"{size}: {beside} / the same", figures.beside / 1e9, bound))
        held.append(verdict(f"{size}: {beside} / the same + gradients", figures.beside / 1e9, bound + gradients))
        if host is not None:
            held.append(
                verdict(f"{size}: the optimizer's state on the device, state on the host", host.optimizer / 1e9, 0.001)
            )
    largest, limit = config.sizes[-1], int(1e9 * config.limit)
    for variant in (QLORA, HOST):
        figures = found.get((largest, variant))
        if figures is not None:
            held.append(verdict(f"{largest}, {variant}: total", figures.device / 1e9, config.limit))
            held.append(verdict(f"{largest}, {variant}: peak", figures.peak / 1e9, config.limit))
            there = fits(config.problem(SIZES[largest], variant), limit)
            print(f"{largest}, {variant}: compiles where {config.limit:g} GB are there: {'PASS' if there else 'FAIL'}")
            held.append(there)
    return all(held)


def on_cpu(config: Config) -> bool:
    """Prints what steps take that run on the CPU; returns whether it is what XLA says, to 15 %."""
    print(f"\nfloat32, {SMALL}, {SMALL.parameters:,} parameters, on a CPU")
    print(f"{'MB':34}{'XLA':>10}{'measured':>10}{'ratio':>8}{'s a step':>10}")
    held = []
    for variant in config.variants:
        if VARIANTS[variant].get("on_host"):  # a CPU's memory is the host's
            continue
        figures = apart(config.problem(SMALL, variant, bytes=4), "cpu")
        if isinstance(figures, str):
            raise UserError(f"The step of {variant} failed: {figures}")
        ratio = figures.measured / figures.device
        held.append(abs(ratio - 1) <= 0.15)
        shown = f"{figures.device / 1e6:10.0f}{figures.measured / 1e6:10.0f}{ratio:8.3f}{figures.seconds:10.2f}"
        print(f"{variant:34}{shown}  (1 ± 0.15) {'PASS' if held[-1] else 'FAIL'}", flush=True)
    return all(held)


def on_gpu(config: Config) -> None:
    """Prints what the largest model of each method takes that fits the GPU, and its speed."""
    # Each step has a process of its own; this one takes no memory from it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"There is no GPU here, only {device.device_kind}.")
    memory = device.memory_stats()["bytes_limit"]
    print(f"\n{device.device_kind}, {memory / 1e9:.1f} GB for programs")
    print(f"{'GB':34}{'XLA':>12}{'measured':>12}{'tokens/s':>10}")
    for variant in config.variants:
        for size in reversed(config.sizes):
            problem = config.problem(SIZES[size], variant)
            if problem.device > memory:
                continue
            figures = apart(problem)
            if isinstance(figures, str):
                print(f"{size:4} {variant:29}{figures[:80]}", flush=True)
                continue
            speed = config.tokens / figures.seconds
            print(
                f"{size:4} {variant:29}" + _gigabytes(figures.device, figures.measured) + f"{speed:10.0f}", flush=True
            )
            break


def main(config: Config) -> int:
    """Compiles, runs, prints, and returns the exit status."""
    held = []
    print(f"jax {jax.__version__}, rank {config.rank}, {config.adapters} adapters, batch 1 × {config.tokens}")
    try:
        if "gpu" in config.parts:  # first: what compiles for TPUs keeps this process off the GPU
            on_gpu(config)
        if "v5p" in config.parts:
            found = compiled(config, lambda line: print(f"{line} …", file=sys.stderr, flush=True))
            print(table(config, found), items(config, found), sep="\n\n")
            print()
            held.append(verdicts(config, found))
        if "cpu" in config.parts:
            held.append(on_cpu(config))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(held) else 1


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.memory"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
