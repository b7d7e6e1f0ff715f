"""Measures how long `import lora_jax` takes beyond its dependencies: `python -m experiments.benchmarks.imports`.

New processes import JAX, Flax and Optax, and in alternation lora_jax too; the figures are medians. `--details` lists
the modules that take longest. The exit status is 1 if the difference of the processor times is above 0.3 s.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

OTHERS = "import jax, flax.nnx, optax"
PROGRAMS = {"jax, flax.nnx, optax": OTHERS, "and lora_jax": f"{OTHERS}, lora_jax"}
LIMIT = 0.3


def measure(program: str) -> tuple[float, float]:
    """Runs a program in a new process; returns its elapsed and its processor time in seconds."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    elapsed, after = time.perf_counter() - start, os.times()
    times = (after.children_user - before.children_user, after.children_system - before.children_system)
    return elapsed, sum(times)


def slowest_modules(count: int) -> list[tuple[float, str]]:
    """Returns the milliseconds of the modules of lora_jax that take longest, without what they import."""
    program = [sys.executable, "-X", "importtime", "-c", f"{OTHERS}, lora_jax"]
    run = subprocess.run(program, check=True, capture_output=True, text=True)
    rows = re.findall(r"^import time: +(\d+) \| +\d+ \| +(lora_jax\S*)$", run.stderr, re.MULTILINE)
    return sorted(((int(microseconds) / 1000, name) for microseconds, name in rows), reverse=True)[:count]


def main(rounds: int, details: bool) -> int:
    """Measures, prints, and returns the exit status."""
    for program in PROGRAMS.values():  # compiles the modules and reads the files
        measure(program)
    times = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, program in PROGRAMS.items():
            times[name].append(measure(program))
    print(f"{'median of ' + str(rounds):24}{'elapsed s':>12}{'processor s':>14}")
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    for name, (elapsed, processor) in medians.items():
        print(f"{name:24}{elapsed:12.3f}{processor:14.3f}")
    first, second = medians.values()
    elapsed, processor = (after - before for before, after in zip(first, second))
    passed = processor <= LIMIT
    print(f"{'difference':24}{elapsed:12.3f}{processor:14.3f}  (≤ {LIMIT} s) {'PASS' if passed else 'FAIL'}")
    if details:
        print("\n".join(f"{milliseconds:8.1f} ms  {name}" for milliseconds, name in slowest_modules(15)))
    return 0 if passed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="number of processes of each kind (default 9)")
    parser.add_argument("--details", action="store_true", help="list the modules that take longest")
    arguments = parser.parse_args()
    sys.exit(main(arguments.rounds, arguments.details))
