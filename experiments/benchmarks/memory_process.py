"""Measures the memory and the time of one training step in a separate process; the last line is JSON.

`experiments.benchmarks.memory` starts it for every step, so that no step counts the memory of another.
"""

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from experiments.aot.memory import argument_bytes, memory_analysis
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.benchmarks.memory_shapes import Shape
from experiments.benchmarks.memory_steps import Step, fill, make_step, on_device, quantized_leaves

# Returns large buffers to the system when they are freed, so that resident memory is allocated memory.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Bytes of a step, from XLA's analysis of the compiled step and from measurements.

    Attributes:
      base: The parameters on the device.
      delta: The adapters on the device.
      optimizer: The optimizer's state on the device.
      temporaries: All that the step allocates beyond its arguments and outputs (`temp_size_in_bytes`).
      device: All bytes on the device: arguments, outputs and temporaries; donated bytes count once.
      peak: The peak on the device (`peak_memory_in_bytes` without `host`); 0 if XLA does not report it.
      host: Arguments in the host's memory.
      quantized: The quantized leaves of the base.
      measured: The measured memory of the running step; 0 if it did not run.
      seconds: The time of the fastest step; 0 if it did not run.
    """

    base: int
    delta: int
    optimizer: int
    temporaries: int
    device: int
    peak: int
    host: int
    quantized: int
    measured: int = 0
    seconds: float = 0.0

    @property
    def peak_temporaries(self) -> int:
        """The memory beyond the arguments at the peak."""
        return max(self.peak - (self.device - self.temporaries), 0)


def analyze_step(step: Step, platform: str) -> Figures:
    """Compiles a step for the devices of its shapes, and returns XLA's analysis."""
    memory = memory_analysis(step.lower())
    parts = {name: argument_bytes(tree) for name, tree in step.parts().items()}
    return Figures(
        **{name: device for name, (device, _) in parts.items()},
        temporaries=memory.temp_size_in_bytes,
        device=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        # XLA's peak includes arguments in the host's memory; on a CPU it excludes temporaries.
        peak=0 if platform == "cpu" else memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        host=memory.host_argument_size_in_bytes,
        quantized=argument_bytes(quantized_leaves(step.state.base))[0],
    )


def run(problem: Problem, steps: int = 3) -> Figures:
    """Analyzes and measures a step on this process's first device.

    The first step compiles. The memory is that of later steps, relative to that before their arguments are created.
    """
    device = jax.devices()[0]
    step = make_step(problem, on_device(device), device.platform)  # pyrefly: ignore[bad-argument-type]
    figures = analyze_step(step, device.platform)
    if device.platform == "cpu":
        _run(step, 1)  # compiles, and starts the threads
        before = _resident(trim=True)
        seconds, peak = _run(step, steps)
        measured = peak - before
    else:
        seconds, _ = _run(step, steps + 1)
        measured = device.memory_stats()["peak_bytes_in_use"]
    return dataclasses.replace(figures, measured=measured, seconds=seconds)


def _run(step: Step, steps: int) -> tuple[float, int]:
    """Returns the seconds of the fastest step, and the peak memory of this process during the steps."""
    state, batch = fill((step.state, step.batch))
    gc.collect()
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step.step(state, batch))
        seconds.append(time.perf_counter() - start)
    return min(seconds), _status("VmHWM") if on_cpu else 0


def _resident(*, trim: bool) -> int:
    """Returns the resident memory of this process in bytes, without freed memory."""
    gc.collect()
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}.")
    return 1024 * int(match[1])


def run_in_process(problem: Problem, platform: str | None = None, steps: int = 3) -> Figures | str:
    """Calls :func:`run` in a separate process; returns the last line of its error if it fails."""
    arguments = json.dumps({"problem": dataclasses.asdict(problem), "steps": steps})
    environment = os.environ | ENVIRONMENT | ({} if platform is None else {"JAX_PLATFORMS": platform})
    command = [sys.executable, "-m", "experiments.benchmarks.memory_process", arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        return next((line for line in reversed(process.stderr.splitlines()) if line.strip()), "no message")
    return Figures(**json.loads(process.stdout.splitlines()[-1]))


def main(arguments: str) -> None:
    """Runs the problem of a JSON and prints its figures as JSON."""
    content: dict[str, Any] = json.loads(arguments)
    fields = content["problem"]
    problem = Problem(**fields | {"shape": Shape(**fields["shape"])})
    print(json.dumps(dataclasses.asdict(run(problem, content["steps"]))))


if __name__ == "__main__":
    main(sys.argv[1])
