"""A training process that is killed at random moments, saves included, and resumed each time."""

import multiprocessing
import os
import random
import signal
import time

import lora_jax as lora
from experiments import run
from experiments.training import record
from tests.experiments.sft_runs import ARGUMENTS, adapters_equal, losses

KILLS, STEPS = 20, 240


def started(out):
    """A process of the command line; what it imports is imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run", "experiments.studies.sft.study"])
    arguments = ["sft", *ARGUMENTS, "--steps", str(STEPS), "--checkpoint-every", "3", "--out", str(out)]
    process = context.Process(target=_main, args=(arguments,))
    process.start()
    return process


def _main(arguments):
    raise SystemExit(run.main(arguments))


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"The process ended by itself, with status {process.exitcode}."
        assert time.monotonic() < end, "Nothing happened."
        time.sleep(0.002)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "The run is too short for so many kills."


def test_nothing_is_lost_by_kills(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    metrics, chance = killed / record.METRICS, random.Random(0)
    in_saves = 0

    def lines():
        return len(record.read(metrics)) if metrics.exists() else 0

    def saving():
        return any(killed.glob("checkpoints/*tmp*"))

    for number in range(KILLS):
        process = started(killed)
        restarted = metrics.stat().st_mtime_ns if metrics.exists() else 0
        if number % 7 == 0:  # while it reads, tokenizes and compiles, or restores
            time.sleep(chance.uniform(0, 2))
            kill(process)
            continue
        wait_for(lambda: metrics.exists() and metrics.stat().st_mtime_ns != restarted and lines(), process)  # noqa: B023
        if number % 2:  # in the middle of a save
            wait_for(saving, process)
        else:
            time.sleep(chance.uniform(0, 0.3))
        in_saves += saving()
        kill(process)
    assert in_saves >= KILLS // 4
    for out in (killed, whole):
        process = started(out)
        process.join(300)
        assert process.exitcode == 0
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    assert [line["loss"] for line in record.read(metrics) if "loss" in line] == losses(whole)
    adapters_equal(*(lora.load(out / "adapter") for out in (killed, whole)))
