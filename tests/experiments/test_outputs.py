"""A run's directory: its lock, and whose files --fresh removes."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.command_line import main
from experiments.errors import UserError
from experiments.training import lock, outputs

HOLD = """
import sys, time
from pathlib import Path
from experiments.training import lock
if sys.argv[2] == "lease":
    lock.RENEWED, lock.EXPIRED = 0.1, 0.6
    def refuse(descriptor):
        raise OSError(37, "No locks available")
    lock._flock = refuse
with lock.hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["flock", "lease"])
def kind(request, monkeypatch):
    if request.param == "lease":

        def refuse(descriptor):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(lock, "_flock", refuse)
        monkeypatch.setattr(lock, "RENEWED", 0.1)
        monkeypatch.setattr(lock, "EXPIRED", 0.6)
    return request.param


@pytest.fixture
def holder(tmp_path, kind):
    """Another process that holds the lock of `tmp_path`."""
    environment = os.environ | {"PYTHONPATH": str(Path(outputs.__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    args = [sys.executable, "-c", HOLD, str(tmp_path), kind]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_run_at_a_time(tmp_path, holder):
    message = f"another run writes to it \\(process {holder.pid} on host {socket.gethostname()}\\)"
    with pytest.raises(UserError, match=message), lock.hold_lock(tmp_path):
        raise AssertionError("held twice")
    holder.kill()
    holder.wait()
    with lock.hold_lock(tmp_path):  # a killed process keeps nothing
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_released(tmp_path, kind):
    for _ in range(2):
        with pytest.raises(KeyError), lock.hold_lock(tmp_path):
            raise KeyError
    with lock.hold_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), lock.hold_lock(tmp_path):
        raise AssertionError("held twice")
    assert not list(tmp_path.iterdir())


def test_a_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
    monkeypatch.setattr(lock, "RENEWED", 0.02)
    with lock.hold_lock(tmp_path):
        first = (tmp_path / lock.LEASE).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / lock.LEASE).stat().st_mtime_ns > first


@pytest.fixture
def study():
    @outputs.exclusive
    def run(config):
        outputs.begin(config.out, "result.json", "checkpoints", "step-[0-9]*", fresh=config.fresh)
        if config.fails:
            raise UserError("no such model")
        (config.out / "checkpoints/10").mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "checkpoints/10/array", "step-3"):
            (config.out / name).write_text("ours")
        assert (config.out / lock.LOCK).exists()

    def start(out, *, fresh=False, fails=False):
        run(SimpleNamespace(out=out, fresh=fresh, fails=fails))

    return start


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


OURS = [outputs.LISTING, "checkpoints/10/array", "result.json", "step-3"]


def test_a_run_replaces_what_it_wrote(tmp_path, study):
    for fresh in (False, False, True, True):
        study(tmp_path / "runs" / "one", fresh=fresh)
        assert names(tmp_path / "runs" / "one") == OURS


def test_fresh_removes_what_the_program_wrote(tmp_path, study):
    study(tmp_path)
    mine = ["checkpoints/notes.txt", "notes.txt", "step-notes.txt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="no such model"):
        study(tmp_path, fresh=True, fails=True)
    assert names(tmp_path) == sorted([outputs.LISTING, *mine])
    study(tmp_path, fresh=True)
    assert names(tmp_path) == sorted([*OURS, *mine])


@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_another_program(tmp_path, study, fresh):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.pt").write_text("mine")
    (tmp_path / "result.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds checkpoints, result\.json, which this program did not write"):
        study(tmp_path, fresh=fresh)
    assert names(tmp_path) == ["checkpoints/model.pt", "result.json"]


@pytest.mark.parametrize("fresh", [False, True])
def test_links_are_not_followed(tmp_path, study, fresh):
    out, outside = tmp_path / "out", tmp_path / "outside"
    study(out)
    (out / "checkpoints").rename(outside)
    (out / "checkpoints").symlink_to(outside)
    with pytest.raises(UserError, match="holds checkpoints, which this program did not write"):
        study(out, fresh=fresh)
    assert names(outside) == ["10/array"]


def test_what_is_no_directory(tmp_path, study):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name, message in {
        "file": "expected a directory, got a file",
        "nowhere": "expected a directory, got a link",
    }.items():
        with pytest.raises(UserError, match=message):
            study(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        study(tmp_path / "file" / "inside")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def test_the_working_directory(tmp_path, study, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(Path("."))
    assert names(tmp_path) == OURS


def test_a_failed_start_leaves_nothing(tmp_path):
    @outputs.exclusive
    def run(config):
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        run(SimpleNamespace(out=tmp_path / "new" / "out"))
    assert not list(tmp_path.iterdir())


def test_a_damaged_listing(tmp_path, study):
    study(tmp_path)
    for text in ("", "[]", json.dumps({"format": "other", "entries": []}), "[" * 100_000):
        (tmp_path / outputs.LISTING).write_text(text)
        with pytest.raises(UserError, match=r"\.lora_jax\.json: cannot be read"):
            study(tmp_path)


@pytest.mark.parametrize("config", ["quickstart", "sweep", "subspaces", "gpt2-tiny", "llama-tiny", "sft"])
def test_every_study_takes_the_lock(tmp_path, config, capsys):
    with lock.hold_lock(tmp_path):
        assert main([config, "--out", str(tmp_path)]) == 2
        message = f"error: {tmp_path}: another run writes to it (process {os.getpid()} on host {socket.gethostname()})"
        assert capsys.readouterr().err.startswith(message)
    assert not list(tmp_path.iterdir())
