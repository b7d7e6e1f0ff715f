"""Measures the memory of training steps of Llama-shaped models: `python -m experiments.benchmarks.memory`.

Compiles the training steps of LLaMA's four sizes ahead of time for one TPU v5p chip (batch 1 × 512, scanned and
rematerialized layers, rank 64 on all linear layers, AdamW with float32 moments): full fine-tuning, LoRA, and QLoRA on
NF4 with double quantization, the latter also with the optimizer's state in the host's memory and with the whole base
dequantized before the model is called. Each step has a line, in GB (10⁹ bytes):

  base, delta, optimizer  XLA's analysis of the arguments, including the padding of their layouts
  temporaries             XLA's `temp_size_in_bytes`
  total                   arguments + outputs + temporaries − donated
  peak                    XLA's `peak_memory_in_bytes`. It is smaller than the total although it counts the same
                          arguments: temporaries include fragmentation, and more (a step compiles with less memory than
                          its own `temp_size_in_bytes`)

and a second line with an estimate, whose temporaries are the inputs of the layers, float32 logits of all tokens,
gradients, and for QLoRA the weights of one block (or of all) in the compute dtype. Steps whose estimate exceeds the
chip are not compiled and have the second line only. Then the temporaries by item, and the checks, each PASS or FAIL.
The exit status is 1 if one fails.

`--parts cpu` runs the same steps on a CPU in float32 with 97 million parameters, each in a separate process, and
compares the measured memory with XLA's analysis for CPUs. `--parts gpu` runs the largest model of each method that fits
this machine's GPU, and prints tokens per second.

Takes about half an hour on 2 CPU cores, a minute or two per step.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

import jax

from experiments import flags, settings, startup
from experiments.aot import topology
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.benchmarks.memory_process import Figures, analyze_step, run_in_process
from experiments.benchmarks.memory_shapes import SIZES, SMALL, Shape
from experiments.benchmarks.memory_steps import make_step, on_device
from experiments.errors import UserError

TOPOLOGY = "v5p:2x2x1"
"""The smallest slice; steps are compiled for one of its chips."""

CHIP = 102_800_000_000
"""Bytes of a v5p that are available to a program: 95.74 GiB, as XLA reports."""

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
    """The steps to compile and to run."""

    parts: tuple[Literal["v5p", "cpu", "gpu"], ...] = ("v5p", "cpu")
    """Compile for a TPU (v5p), run on the CPU, run on the GPU."""
    sizes: tuple[str, ...] = tuple(SIZES)
    """The sizes of models."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """The kinds of steps."""
    adapters: Literal["float32", "bfloat16"] = "float32"
    """The dtype of LoRA's factors: the library's default, or the QLoRA paper's."""
    rank: int = 64
    """The rank of every adapter."""
    tokens: int = 512
    """The length of the only sequence of a batch."""
    limit: float = 48.0
    """The maximum memory of the largest QLoRA step, in GB."""

    def __post_init__(self) -> None:
        settings.positive(self, "rank", "tokens", "limit")
        for name, choices in (("sizes", SIZES), ("variants", VARIANTS)):
            unknown = [value for value in getattr(self, name) if value not in choices]
            if unknown:
                raise UserError(f"unknown {name[:-1]} {', '.join(unknown)}, expected one of {', '.join(choices)}")

    def problem(self, shape: Shape, variant: str, *, bytes: int = 2) -> Problem:
        """Returns the problem of a variant and a size; with float32 weights, adapters are float32 too."""
        adapter_bytes = 4 if bytes == 4 or self.adapters == "float32" else 2
        fields = VARIANTS[variant]
        return Problem(shape, bytes=bytes, adapter_bytes=adapter_bytes, rank=self.rank, tokens=self.tokens, **fields)


def chip() -> Any:
    """Returns a v5p chip as a device to compile for.

    Raises:
      UserError: libtpu is not installed.
    """
    return topology.describe(TOPOLOGY).devices[0]


def compile_steps(config: Config, report: Callable[[str], None]) -> dict[Row, Figures | None]:
    """Returns XLA's analysis of every step for one chip; None if it does not fit."""
    sharding, results = on_device(chip()), {}
    for size in config.sizes:
        for variant in config.variants:
            problem = config.problem(SIZES[size], variant)
            results[size, variant] = None
            if problem.device > CHIP:
                continue
            start = time.perf_counter()
            with contextlib.suppress(DoesNotFit), memory_errors():
                results[size, variant] = analyze_step(make_step(problem, sharding, "tpu"), "tpu")
            report(f"{size}, {variant}: {time.perf_counter() - start:.0f} s")
    return results


def fits(problem: Problem, bytes: int) -> bool:
    """Whether XLA compiles a step for a chip with `bytes` of memory, for which it trades time for memory."""
    step = make_step(problem, on_device(chip()), "tpu", ballast=CHIP - bytes)
    try:
        with memory_errors():
            step.lower().compile()
    except DoesNotFit:
        return False
    return True


class DoesNotFit(Exception):
    """The step needs more than the device's memory."""


@contextlib.contextmanager
def memory_errors() -> Generator[None]:
    """A context that converts the compiler's out-of-memory error to a DoesNotFit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error)) from error


def table(config: Config, results: Mapping[Row, Figures | None]) -> str:
    """Returns two lines per step, XLA's analysis and the estimate, in GB."""
    names = ("base", "delta", "optimizer", "temporaries", "total", "peak", "on host")
    lines = [f"{'GB':34}" + "".join(f"{name:>12}" for name in names)]
    for (size, variant), figures in results.items():
        problem = config.problem(SIZES[size], variant)
        moments, host = (0, problem.moments) if problem.on_host else (problem.moments, 0)
        if figures is not None:
            values = (figures.base, figures.delta, figures.optimizer, figures.temporaries, figures.device, figures.peak)
            lines.append(f"{size:4} {variant:29}" + _gigabytes(*values, figures.host))
        else:
            lines.append(f"{size:4} {variant:29}   exceeds one chip, does not compile:")
        values = (problem.base, problem.delta, moments, problem.temporaries, problem.device)
        lines.append(f"{'':5}{'estimate':29}" + _gigabytes(*values) + f"{'':12}" + _gigabytes(host))
    return "\n".join(lines)


def items(config: Config, results: Mapping[Row, Figures | None]) -> str:
    """Returns QLoRA's estimated temporaries by item, and XLA's, in GB."""
    names = ("inputs", "logits", "a block", "sum", "gradients", "sum", "XLA's", "at its peak", "dequantized")
    lines = [f"{'GB':6}" + "".join(f"{name:>12}" for name in names)]
    for size in config.sizes:
        figures, plain = results.get((size, QLORA)), results.get((size, PLAIN))
        if figures is None:
            continue
        parts = config.problem(SIZES[size], QLORA).items
        bound, gradients = sum_without_gradients(parts), parts["gradients"]
        values = (parts["activations"], parts["logits"], parts["weights"], bound, gradients, bound + gradients)
        line = f"{size:6}" + _gigabytes(*values, figures.temporaries, figures.peak_temporaries)
        lines.append(line + (f"{'–':>12}" if plain is None else _gigabytes(plain.temporaries)))
    return "\n".join(lines)


def sum_without_gradients(parts: Mapping[str, int]) -> int:
    """Returns the temporaries of a step without gradients."""
    return sum(count for name, count in parts.items() if name != "gradients")


def _gigabytes(*counts: int) -> str:
    return "".join(f"{count / 1e9:12.3f}" for count in counts)


def verdict(what: str, value: float, limit: float, unit: str = "GB") -> bool:
    """Prints whether a value is within its limit."""
    holds = value <= limit
    print(f"{what:74}{value:9.3f} {unit} (≤ {limit:.3f}) {'PASS' if holds else 'FAIL'}")
    return holds


def verdicts(config: Config, results: Mapping[Row, Figures | None]) -> bool:
    """Prints the checks of the compiled steps; returns whether all pass."""
    passed = []
    for size in config.sizes:
        shape, figures, host = SIZES[size], results.get((size, QLORA)), results.get((size, HOST))
        if figures is None:
            continue
        bytes_per_parameter = figures.quantized / (shape.layers * shape.block)
        passed.append(verdict(f"{size}: quantized leaves, per parameter", bytes_per_parameter, 0.53, "bytes"))
        parts = config.problem(shape, QLORA).items
        bound, gradients = sum_without_gradients(parts) / 1e9, parts["gradients"] / 1e9
        passed.append(verdict(f"{size}: temporaries / inputs + logits + a block", figures.temporaries / 1e9, bound))
        subject = "memory beyond the arguments at the peak"
        passed.append(verdict(f"{size}: {subject} / the same", figures.peak_temporaries / 1e9, bound))
        passed.append(
            verdict(f"{size}: {subject} / the same + gradients", figures.peak_temporaries / 1e9, bound + gradients)
        )
        if host is not None:
            passed.append(
                verdict(f"{size}: the optimizer's state on the device, state on the host", host.optimizer / 1e9, 0.001)
            )
    largest, limit = config.sizes[-1], int(1e9 * config.limit)
    for variant in (QLORA, HOST):
        figures = results.get((largest, variant))
        if figures is not None:
            passed.append(verdict(f"{largest}, {variant}: total", figures.device / 1e9, config.limit))
            passed.append(verdict(f"{largest}, {variant}: peak", figures.peak / 1e9, config.limit))
            holds = fits(config.problem(SIZES[largest], variant), limit)
            print(f"{largest}, {variant}: compiles with {config.limit:g} GB: {'PASS' if holds else 'FAIL'}")
            passed.append(holds)
    return all(passed)


def on_cpu(config: Config) -> bool:
    """Prints the memory of steps on the CPU; returns whether it is within 15 % of XLA's analysis."""
    print(f"\nfloat32, {SMALL}, {SMALL.parameters:,} parameters, on a CPU")
    print(f"{'MB':34}{'XLA':>10}{'measured':>10}{'ratio':>8}{'s/step':>10}")
    passed = []
    for variant in config.variants:
        if VARIANTS[variant].get("on_host"):  # the CPU's memory is the host's
            continue
        figures = run_in_process(config.problem(SMALL, variant, bytes=4), "cpu")
        if isinstance(figures, str):
            raise UserError(f"The step of {variant} failed: {figures}")
        ratio = figures.measured / figures.device
        passed.append(abs(ratio - 1) <= 0.15)
        values = f"{figures.device / 1e6:10.0f}{figures.measured / 1e6:10.0f}{ratio:8.3f}{figures.seconds:10.2f}"
        print(f"{variant:34}{values}  (1 ± 0.15) {'PASS' if passed[-1] else 'FAIL'}", flush=True)
    return all(passed)


def on_gpu(config: Config) -> None:
    """Prints the memory and the speed of the largest model of each method that fits the GPU."""
    # Each step runs in a separate process; this process allocates no memory of the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(f"no GPU, only {device.device_kind}")
    memory = device.memory_stats()["bytes_limit"]
    print(f"\n{device.device_kind}, {memory / 1e9:.1f} GB for programs")
    print(f"{'GB':34}{'XLA':>12}{'measured':>12}{'tokens/s':>10}")
    for variant in config.variants:
        for size in reversed(config.sizes):
            problem = config.problem(SIZES[size], variant)
            if problem.device > memory:
                continue
            figures = run_in_process(problem)
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
    passed = []
    print(f"jax {jax.__version__}, rank {config.rank}, {config.adapters} adapters, batch 1 × {config.tokens}")
    try:
        if "gpu" in config.parts:  # first, since compiling for TPUs disables the GPU in this process
            on_gpu(config)
        if "v5p" in config.parts:
            results = compile_steps(config, lambda line: print(f"{line} …", file=sys.stderr, flush=True))
            print(table(config, results), items(config, results), sep="\n\n")
            print()
            passed.append(verdicts(config, results))
        if "cpu" in config.parts:
            passed.append(on_cpu(config))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(passed) else 1


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.memory"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
