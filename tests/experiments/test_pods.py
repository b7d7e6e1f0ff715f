"""The scripts that start runs again, with programs of the same names in place of Python and Slurm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import pods

SCRIPTS = Path(pods.__file__).parent


def program(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/usr/bin/env bash", *lines, "")))
    path.chmod(0o755)


def calls(root):
    return (root / "calls").read_text().splitlines()


@pytest.fixture
def root(tmp_path):
    """A checkout whose Python says what it is asked for, and ends as the files in `statuses` say, one after another."""
    (tmp_path / "experiments" / "pods").mkdir(parents=True)
    for name in ("again.sh", "slurm.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "experiments" / "pods" / name)
    said = f'echo "$@" >> {tmp_path}/calls'
    program(
        tmp_path / ".venv" / "bin" / "python",
        (said, f"n=$(wc -l < {tmp_path}/calls)", f'exit "$(sed -n "${{n}}p;\\$p" {tmp_path}/statuses | head -1)"'),
    )
    program(tmp_path / "bin" / "sleep", ())
    program(tmp_path / "bin" / "srun", ('shift; exec "$@"',))
    program(tmp_path / "bin" / "scontrol", (f'echo "scontrol $@" >> {tmp_path}/calls',))
    return tmp_path


def run(root, name, statuses, *flags, **environment):
    (root / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    path = f"{root / 'bin'}:{os.environ['PATH']}"
    command = ["bash", f"experiments/pods/{name}", "llama3-8b-lora", *flags]
    return subprocess.run(
        command, cwd=root, env={**os.environ, "PATH": path, **environment}, capture_output=True
    ).returncode


def test_again_until_it_ends_for_a_reason_of_its_own(root):
    assert run(root, "again.sh", (75, 76, 134, 0), "--fresh", "--out", "a b") == 0
    first, *others = calls(root)
    assert first == "-m experiments.run llama3-8b-lora --fresh --out a b"
    assert others == ["-m experiments.run llama3-8b-lora --out a b"] * 3


@pytest.mark.parametrize("status", [0, 2, 130])
def test_an_end_that_is_not_others_doing_is_the_end(root, status):
    assert run(root, "again.sh", (status,)) == status
    assert len(calls(root)) == 1


def test_a_hundred_tries(root):
    assert run(root, "again.sh", (76,)) == 76
    assert len(calls(root)) == 100


def test_told_to_end_it_starts_nothing_again(root):
    program(root / ".venv" / "bin" / "python", (f"echo >> {root}/calls; kill -TERM $PPID; exit 76",))
    assert run(root, "again.sh", ()) == 75
    assert len(calls(root)) == 1


@pytest.mark.parametrize("status", [75, 76, 134])
def test_slurm_puts_the_job_back_into_the_queue(root, status):
    assert run(root, "slurm.sh", (status,), "--fresh", SLURM_JOB_ID="7") == status
    assert calls(root) == ["-m experiments.run llama3-8b-lora --fresh --distributed", "scontrol requeue 7"]


def test_slurm_starts_afresh_once_and_gives_up(root):
    assert run(root, "slurm.sh", (75,), "--fresh", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="100") == 75
    assert calls(root) == ["-m experiments.run llama3-8b-lora --distributed"]
    assert run(root, "slurm.sh", (2,), SLURM_JOB_ID="7") == 2
    assert len(calls(root)) == 2
