"""`lora-jax doctor`: a report on the installation and the device, to paste into an issue."""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import textwrap
from typing import Any

from rich.console import Console

from lora_jax import __version__
from lora_jax.commands import machine

VARIABLES = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
"""The environment variables that the report shows if they are set."""

LINES = 15
TOLERANCE = 0.02  # products in bfloat16, which TPUs use by default, differ by 0.4 %
_WIDTH = 240
_SECONDS = 300
_CHECK = (sys.executable, "-m", "lora_jax.commands.device_check")


def doctor(console: Console, progress: Console) -> bool:
    """Prints versions, extras, settings, devices, free memory and one training step, in at most 15 lines.

    The step runs in another process, so that a driver that crashes or does not answer is one of the problems in the
    report.

    Args:
      console: The console of the report.
      progress: The console on which a terminal shows that the step is running.

    Returns:
      Whether there is no problem.
    """
    with progress.status("one training step on the device …") if progress.is_terminal else contextlib.nullcontext():
        check = _run_check()
    extras = [f"{extra}: {package or 'not installed'}" for extra, package in machine.extra_packages().items()]
    problems = [*machine.old_packages(), *([check["error"]] if "error" in check else _wrong_numbers(check))]
    lines = [
        f"lora-jax {__version__} | Python {platform.python_version()} | {platform.platform()}",
        " | ".join(f"{package} {machine.version(package) or 'missing'}" for package in machine.PACKAGES),
        f"extras | {' | '.join(extras)}",
        f"settings | {' | '.join(_settings(check)) or 'defaults'}",
        f"platform | {_platform(check)}",
        f"free memory | {' | '.join(_free_memory(check))}",
        f"training step | {_step(check)}",
        *[f"note: {note}" for note in _unused_accelerators(check)],
        *[f"problem: {problem}" for problem in problems],
    ]
    for line in lines[:LINES]:
        console.print(textwrap.shorten(line, _WIDTH, placeholder=" …"))
    return not problems


def _run_check() -> dict[str, Any]:
    """Runs the training step; returns what its process reports, with the key 'error' if it did not finish."""
    try:
        run = subprocess.run(_CHECK, capture_output=True, timeout=_SECONDS)
        output, status = run.stdout, run.returncode
        messages = run.stderr.decode(errors="replace").strip().splitlines()
    except subprocess.TimeoutExpired as expired:
        output, status, messages = expired.stdout or b"", None, []
    check: dict[str, Any] = {}
    for line in output.decode(errors="replace").splitlines():
        if line.startswith("{"):
            check |= json.loads(line)
    if status is None:
        check["error"] = f"the device does not answer within {_SECONDS} s; another process may hold it"
    elif status < 0:
        check["error"] = f"the device ended the process by {signal.Signals(-status).name}: {' '.join(messages[-1:])}"
    elif status:
        check["error"] = " ".join(messages[-1:]) or f"the process of the training step ended with status {status}"
    return check


def _wrong_numbers(check: dict[str, Any]) -> list[str]:
    before, after = check["losses"]
    problems = []
    if not after < before or not math.isfinite(before):
        problems.append(f"training does not decrease the loss: {before:.6g} before a step, {after:.6g} after it")
    if not check["difference"] <= TOLERANCE:
        problems.append(f"outputs of the adapted and the merged model differ by {check['difference']:.2g}")
    return problems


def _settings(check: dict[str, Any]) -> list[str]:
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]
    return variables + [f"{name}={value}" for name, value in check.get("settings", {}).items()]


def _platform(check: dict[str, Any]) -> str:
    reason = "selected by JAX_PLATFORMS" if os.environ.get("JAX_PLATFORMS") else "selected by JAX"
    if "platform" not in check:
        return f"none, {reason}"
    processes = f" | {check['processes']} processes" if check["processes"] > 1 else ""
    return f"{check['platform']}, {reason} | {check['devices']} × {check['kind']}{processes}"


def _free_memory(check: dict[str, Any]) -> list[str]:
    parts = []
    if check.get("limit"):
        parts.append(f"{_gib(check['limit'] - check['used'])} of {_gib(check['limit'])} GiB that JAX allocates from")
    parts += machine.nvidia_gpus()
    if host := machine.host_memory():
        parts.append(f"host {_gib(host[0])} of {_gib(host[1])} GiB")
    return parts or ["unknown"]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _step(check: dict[str, Any]) -> str:
    if "losses" not in check:
        return "failed"
    (first, second), (before, after) = check["seconds"], check["losses"]
    return (
        f"{first:.2f} s with compilation, then {second * 1000:.1f} ms | loss {before:.4g} to {after:.4g} | adapted and "
        f"merged outputs differ by {check['difference']:.1e}"
    )


def _unused_accelerators(check: dict[str, Any]) -> list[str]:
    """Returns a sentence for each kind of accelerator that the machine has and JAX does not use."""
    accelerators = {
        "gpu": ("cuda", "an NVIDIA GPU", machine.nvidia_gpus()),
        "tpu": ("tpu", "a TPU", machine.tpu_chips()),
    }
    notes = []
    for backend, (extra, name, devices) in accelerators.items():
        if not devices or check.get("platform") == backend:
            continue
        if machine.extra_packages()[extra] is None:
            reason = f"jaxlib runs on CPUs only: pip install 'lora-jax[{extra}]'"
        elif platforms := os.environ.get("JAX_PLATFORMS"):
            reason = f"JAX_PLATFORMS={platforms}"
        else:
            reason = "its plugin is installed and did not start"
        notes.append(f"{name} is present, and JAX does not use it: {reason}")
    return notes
