"""One training step in a process of its own: what it takes, and how long; JSON on its last line.

Started by `experiments.benchmarks.memory` for every step that runs, so that no step counts the memory of another.
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
from experiments.benchmarks.memory_steps import Made, filled, make, only, quantized

# Large buffers go back to the system when they are freed, so that what is resident is what is held.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Bytes of a step, from XLA's analysis of what it compiled, and what was measured.

    Attributes:
      base: On the device, like the next two.
      delta: The adapters.
      optimizer: The optimizer's state.
      temporaries: All that the step allocates beside its arguments and outputs (`temp_size_in_bytes`).
      device: All bytes on the device: arguments, outputs and temporaries, what is donated once.
      peak: What is held on the device at the worst moment (`peak_memory_in_bytes`, less `host`); 0 where XLA does not
        say.
      host: Of arguments in the host's memory.
      quantized: Of the quantized leaves of the base.
      measured: Of the running step; 0 where it did not run.
      seconds: Of the fastest step; 0 likewise.
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
    def beside(self) -> int:
        """What is held beside the arguments at the worst moment."""
        return max(self.peak - (self.device - self.temporaries), 0)


def analyzed(made: Made, platform: str) -> Figures:
    """What XLA says of a step for the devices of its shapes. Compiles it."""
    memory = memory_analysis(made.lower())
    parts = {name: argument_bytes(tree) for name, tree in made.parts().items()}
    return Figures(
        **{name: device for name, (device, _) in parts.items()},
        temporaries=memory.temp_size_in_bytes,
        device=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        # XLA's peak counts arguments in the host's memory too, and on a CPU it leaves the temporaries out.
        peak=0 if platform == "cpu" else memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes,
        host=memory.host_argument_size_in_bytes,
        quantized=argument_bytes(quantized(made.state.base))[0],
    )


def ran(problem: Problem, steps: int = 3) -> Figures:
    """What a step on this process's first device takes, by analysis and by measurement.

    The first step compiles; memory is that of later ones, measured from before their arguments were made.
    """
    device = jax.devices()[0]
    made = make(problem, only(device), device.platform)  # pyrefly: ignore[bad-argument-type]
    figures = analyzed(made, device.platform)
    if device.platform == "cpu":
        _run(made, 1)  # compiles, and starts the threads
        before = _resident(trim=True)
        seconds, peak = _run(made, steps)
        measured = peak - before
    else:
        seconds, _ = _run(made, steps + 1)
        measured = device.memory_stats()["peak_bytes_in_use"]
    return dataclasses.replace(figures, measured=measured, seconds=seconds)


def _run(made: Made, steps: int) -> tuple[float, int]:
    """The seconds of the fastest step, and the most memory that this process had during the steps."""
    state, batch = filled((made.state, made.batch))
    gc.collect()
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(made.step(state, batch))
        seconds.append(time.perf_counter() - start)
    return min(seconds), _status("VmHWM") if on_cpu else 0


def _resident(*, trim: bool) -> int:
    """Bytes of this process in memory, without what it has freed."""
    gc.collect()
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}.")
    return 1024 * int(found[1])


def apart(problem: Problem, platform: str | None = None) -> Figures | str:
    """:func:`ran` in a process of its own; the last line of its error where it fails."""
    given = json.dumps(dataclasses.asdict(problem))
    environment = os.environ | ENVIRONMENT | ({} if platform is None else {"JAX_PLATFORMS": platform})
    command = [sys.executable, "-m", "experiments.benchmarks.memory_process", given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def main(given: str) -> None:
    """Runs the problem that a JSON describes and prints its figures as one."""
    fields: dict[str, Any] = json.loads(given)
    problem = Problem(**fields | {"shape": Shape(**fields["shape"])})
    print(json.dumps(dataclasses.asdict(ran(problem))))


if __name__ == "__main__":
    main(sys.argv[1])
