"""What the machine has: installed packages, accelerators and free memory, found without JAX."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tensorstore", "rich")
"""The packages that this library needs."""

EXTRAS = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "gguf": ("gguf",)}
"""The packages that show that an extra is installed; one of them suffices."""

_DEVICES = Path("/dev")
_MEMORY = Path("/proc/meminfo")


def version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def old_packages() -> list[str]:
    """Returns a sentence for each package that is older than this library needs."""
    try:
        requirements = importlib.metadata.requires("lora-jax") or ()
    except importlib.metadata.PackageNotFoundError:  # a directory on the path
        return []
    sentences = []
    for requirement in requirements:
        if match := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
            package, oldest = match.groups()
            current = version(package)
            if current is not None and _numbers(current) < _numbers(oldest):
                sentences.append(f"{package} {current} is older than {oldest}, the oldest version that is supported")
    return sentences


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)][:3]


def extra_packages() -> Mapping[str, str | None]:
    """Returns the package that shows that an extra is installed, with its version; None for an extra that is not."""
    names = {extra: [package for package in packages if version(package)] for extra, packages in EXTRAS.items()}
    return {extra: f"{packages[0]} {version(packages[0])}" if packages else None for extra, packages in names.items()}


def nvidia_gpus() -> list[str]:
    """Returns the NVIDIA GPUs with driver and memory, as `nvidia-smi` reports them; else the names of their devices."""
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=name,driver_version,memory.free,memory.total", "--format=csv,noheader"]
        try:
            run = subprocess.run(query, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            run = None  # the driver does not answer
        rows = [line.split(", ") for line in run.stdout.splitlines()] if run and run.returncode == 0 else []
        if gpus := [f"{row[0]} (driver {row[1]}, {row[2]} of {row[3]} free)" for row in rows if len(row) == 4]:
            return gpus
    return [str(path) for path in sorted(_DEVICES.glob("nvidia[0-9]*"))]


def tpu_chips() -> list[str]:
    """Returns the device files of TPU chips."""
    return [str(path) for path in sorted(_DEVICES.glob("accel[0-9]*"))]


def host_memory() -> tuple[int, int] | None:
    """Returns the free and the total memory of the machine in bytes; None if the system does not report it."""
    try:
        fields = dict(re.findall(r"^(\w+): +(\d+) kB", _MEMORY.read_text(), re.MULTILINE))
        return int(fields["MemAvailable"]) * 1024, int(fields["MemTotal"]) * 1024
    except (OSError, KeyError):
        pass
    try:  # macOS reports the total only
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), total
    except (AttributeError, OSError, ValueError):
        return None
