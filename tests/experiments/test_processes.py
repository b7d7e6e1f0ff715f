"""Several real processes on the loopback address: they train as one does, end when one is lost, and resume."""

import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest

import lora_jax as lora
from experiments import execution, run
from experiments.training import record
from experiments.training.processes import SILENCE
from tests.experiments.sft_runs import ARGUMENTS, losses

STEPS = 40


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return tmp_path


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def started(count, out, *mesh):
    """`count` processes of one run; what they import is imported once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run", "experiments.studies.sft.study"])
    arguments = ["sft", *ARGUMENTS, *mesh, "--steps", str(STEPS), "--checkpoint-every", "10", "--out", str(out)]
    port = free_port()
    processes = [context.Process(target=_main, args=(arguments, port, count, i)) for i in range(count)]
    for process in processes:
        process.start()
    return processes


def _main(arguments, port, count, number):
    if count > 1:
        arguments = [*arguments, "--distributed"]
        names = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": count, "PROCESS_ID": number}
        os.environ |= {f"JAX_{name}": str(value) for name, value in names.items()}
    raise SystemExit(run.main(arguments))


def statuses(processes, seconds=240):
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
    return [process.exitcode for process in processes]


def wait_for_steps(out, count, processes):
    path, end = out / record.METRICS, time.monotonic() + 120
    while not (path.exists() and len(record.read(path)) >= count):
        assert all(process.is_alive() for process in processes) and time.monotonic() < end
        time.sleep(0.01)


def test_processes_train_as_one(environment):
    out, alone = environment / "several", environment / "alone"
    # One of two processes is killed: the other ends by itself, with an error, and soon.
    pair = started(2, out, "--mesh.data", "2")
    wait_for_steps(out, 15, pair)
    os.kill(pair[1].pid, signal.SIGKILL)
    began = time.monotonic()
    first, second = statuses(pair)
    assert (first, second) == (76, -signal.SIGKILL) and time.monotonic() - began < SILENCE
    first_losses = [line["loss"] for line in record.read(out / record.METRICS) if "loss" in line]
    # Four others resume what two have begun; one of them is told to end, and all do, at the same step.
    four = started(4, out, "--mesh.data", "2", "--mesh.fsdp", "2")
    wait_for_steps(out, 22, four)
    os.kill(four[2].pid, signal.SIGTERM)
    assert statuses(four) == [75] * 4
    stopped = max(line["step"] for line in record.read(out / record.METRICS))
    assert (out / "checkpoints" / str(stopped)).is_dir()
    # The first of two, through which they found each other, is killed.
    pair = started(2, out, "--mesh.fsdp", "2")
    wait_for_steps(out, 30, pair)
    os.kill(pair[0].pid, signal.SIGKILL)
    began = time.monotonic()
    first, second = statuses(pair)
    # JAX's own service may end the other one before a broken connection does, by SIGABRT.
    assert first == -signal.SIGKILL and second in (76, -signal.SIGABRT) and time.monotonic() - began < SILENCE
    # One finishes it. All of it is what one process does.
    assert statuses(started(1, out)) == [0]
    assert statuses(started(1, alone)) == [0]
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)
    np.testing.assert_allclose(first_losses, losses(alone)[: len(first_losses)], rtol=1e-5)
    several, one = lora.load(out / "adapter"), lora.load(alone / "adapter")
    for path in one:
        for name in ("a", "b"):
            expected = np.asarray(getattr(one[path], name))
            np.testing.assert_allclose(getattr(several[path], name), expected, atol=1e-4 * np.abs(expected).max())


def test_what_is_wrong_in_one_is_the_end_of_all(environment):
    # The data are read by the first process alone.
    assert statuses(started(2, environment / "out", "--mesh.data", "2", "--data", "nowhere.jsonl")) == [2, 2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number, not 'two'"),
        (
            {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "process_id and num_processes must be nonnegative, with process_id < num_processes",
        ),
    ],
)
def test_an_environment_that_does_not_say_who_is_who(variables, message, monkeypatch, capsys):
    import jax

    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(execution.processes, "end", lambda status: None)
    assert run.main(["sft", "--distributed"]) == 2
    assert message in capsys.readouterr().err
