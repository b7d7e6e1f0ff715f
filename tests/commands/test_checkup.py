"""`lora-jax doctor`: what it reports on a machine that works, and on devices that are broken or not used."""

import io
import json
import re
import stat
import sys

import jax
import pytest
from rich.console import Console

from lora_jax.__main__ import main
from lora_jax.commands import checkup, device_check, machine

DEVICES = {
    "platform": "cpu",
    "kind": "cpu",
    "devices": 8,
    "processes": 1,
    "limit": None,
    "used": None,
    "settings": {},
}
STEP = {"seconds": [0.5, 0.001], "losses": [3.0, 2.0], "difference": 1e-7}


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """A function that runs the command with another program for the training step, and returns its lines."""
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in checkup.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def call(*program, status):
        monkeypatch.setattr(checkup, "_CHECK", (sys.executable, "-c", "; ".join(["import os, sys, time", *program])))
        assert main(["doctor"]) == status
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert err == "" and 7 <= len(lines) <= 15 and all(len(line) <= 240 for line in lines), (out, err)
        return lines

    return call


def printed(*parts):
    return [f"print({json.dumps(part)!r}, flush=True)" for part in parts]


def test_the_command_on_this_machine(capfd):
    """The process of the training step is the real one."""
    assert main(["doctor"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) <= 15
    assert lines[0].startswith("lora-jax ") and f"jax {jax.__version__} " in lines[1]
    assert re.match(r"platform \| cpu, selected by JAX_PLATFORMS \| 1 × ", lines[4])
    assert re.search(r"host [\d.]+ of [\d.]+ GiB", lines[5])
    assert re.match(r"training step \| [\d.]+ s with compilation, then [\d.]+ ms \| loss ", lines[6])


def test_the_step_trains_with_right_numbers():
    step = device_check.train()
    assert step["losses"][1] < step["losses"][0] and step["difference"] < 1e-5
    assert checkup._wrong_numbers(step) == []


def test_settings_that_are_not_the_default_are_reported():
    defaults = {name: getattr(jax.config, name) for name in device_check.DEFAULTS}
    with jax.enable_x64(True):
        settings = device_check.describe_devices()["settings"]
    assert settings["jax_enable_x64"] is True
    assert settings["jax_numpy_dtype_promotion"] == defaults["jax_numpy_dtype_promotion"] == "strict"
    assert "jax_disable_jit" not in settings


def test_a_report_without_problems(report, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump=" + 300 * "x")
    lines = report(*printed(DEVICES | {"settings": {"jax_enable_x64": True}}, STEP), status=0)
    assert "XLA_FLAGS=--xla_dump" not in lines[3] or lines[3].endswith("…")
    assert lines[4] == "platform | cpu, selected by JAX | 8 × cpu"
    assert lines[6].startswith("training step | 0.50 s with compilation, then 1.0 ms | loss 3 to 2 | ")


def test_a_platform_that_does_not_start(report):
    error = "RuntimeError: Unable to initialize backend 'cuda':\n  no device"
    lines = report(*printed({"error": error}), status=1)
    assert lines[4] == "platform | none, selected by JAX" and lines[6] == "training step | failed"
    assert lines[-1] == f"problem: {' '.join(error.split())}"


def test_the_real_step_on_a_platform_that_does_not_exist(report, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "unknown")
    lines = report("from lora_jax.commands.device_check import main", "main()", status=1)
    assert lines[4] == "platform | none, selected by JAX_PLATFORMS" and "unknown" in lines[-1]


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        ("os.abort()", "the device ended the process by SIGABRT"),
        ("sys.exit('no driver')", "no driver"),
        ("sys.exit(3)", "ended with status 3"),
        ("time.sleep(60)", "does not answer within 1 s"),
    ],
)
def test_a_device_that_ends_or_holds_the_step(report, monkeypatch, last, problem):
    monkeypatch.setattr(checkup, "_SECONDS", 1 if "sleep" in last else 60)
    lines = report(*printed(DEVICES), last, status=1)
    assert lines[6] == "training step | failed" and problem in lines[-1]
    if "sleep" not in last:  # what it printed before is reported
        assert lines[4] == "platform | cpu, selected by JAX | 8 × cpu"


def test_a_device_that_computes_wrong_numbers(report):
    lines = report(*printed(DEVICES, STEP | {"losses": [float("nan")] * 2, "difference": 0.5}), status=1)
    assert "problem: training does not decrease the loss: nan" in lines[-2] and "differ by 0.5" in lines[-1]


def test_a_gpu_that_jax_does_not_use(report, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    (line,) = [line for line in report(*printed(DEVICES, STEP), status=0) if line.startswith("note: ")]
    assert line == "note: an NVIDIA GPU is present, and JAX does not use it: jaxlib runs on CPUs only: pip install " + (
        "'lora-jax[cuda]'"
    )
    monkeypatch.setattr(machine, "extra_packages", lambda: {"cuda": "jax-cuda13-plugin 1", "tpu": None, "gguf": None})
    assert report(*printed(DEVICES, STEP), status=0)[-1].endswith("its plugin is installed and did not start")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert report(*printed(DEVICES, STEP), status=0)[-1].endswith("JAX_PLATFORMS=cpu")
    used = DEVICES | {"platform": "gpu", "kind": "NVIDIA H100", "limit": 60 * 2**30, "used": 2**30}
    lines = report(*printed(used, STEP), status=0)
    assert not [line for line in lines if line.startswith("note: ")]
    assert "59.0 of 60.0 GiB that JAX allocates from" in lines[5]


def test_a_tpu_that_jax_does_not_use(report, monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(machine, "extra_packages", lambda: {"cuda": None, "tpu": None, "gguf": None})
    assert report(*printed(DEVICES, STEP), status=0)[-1].startswith("note: a TPU is present, and JAX does not use it")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100, 580.1, 70000 MiB, 81559 MiB'", "NVIDIA H100 (driver 580.1, 70000 MiB of 81559 MiB free)"),
        ("echo 'No devices were found'", None),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
    ],
)
def test_gpus_as_the_driver_reports_them(report, tmp_path, script, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    lines = report(*printed(DEVICES, STEP), status=0)
    assert (expected in lines[5]) if expected else (lines[5].startswith("free memory | host"))
    assert any(line.startswith("note: an NVIDIA GPU") for line in lines) == bool(expected)


def test_old_and_missing_packages(report, monkeypatch):
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda _: ["jax>=99.1", "none>=1.0", "gguf>=0; extra"])
    versions = machine.PACKAGES
    monkeypatch.setattr(machine, "PACKAGES", (*versions, "none"))
    lines = report(*printed(DEVICES, STEP), status=1)
    assert lines[1].endswith("none missing")
    assert lines[-1] == f"problem: jax {jax.__version__} is older than 99.1, the oldest version that is supported"


def test_a_terminal_shows_that_the_step_is_running(monkeypatch):
    monkeypatch.setattr(checkup, "_CHECK", (sys.executable, "-c", "; ".join(printed(DEVICES, STEP))))
    progress = Console(file=io.StringIO(), force_terminal=True)
    assert checkup.doctor(Console(file=io.StringIO()), progress)
    assert "one training step" in progress.file.getvalue()
