"""The fuzzer: it finds nothing in 200 cases, and would find each kind of problem."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.mutations import mutated

ROOT = Path(__file__).parents[2]


def test_200_cases():
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--cases", "200", "--seed", "14"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 cases of seed 14" in done.stdout and " refused" in done.stdout


class Reader:
    checked = True

    def __init__(self, read):
        self.read = read


def fails(error):
    def read(directory):
        raise error

    return read


@pytest.mark.parametrize(
    "read, outcome",
    [
        (fails(ValueError("a.json: cannot be read.")), "refused"),
        (fails(FileNotFoundError(2, "No such file", "a.json")), "refused"),
        (fails(KeyError("x")), "KeyError"),
        (fails(RecursionError()), "RecursionError"),
        (fails(MemoryError()), "MemoryError"),
        (fails(ValueError("")), "an error without a sentence"),
        (fails(ValueError("\n".join(["unexpected"] * 501))), "an error of many lines"),
        (fails(ValueError("\ud800")), "an error that cannot be printed"),
        (fails(UnicodeDecodeError("utf-8", b"", 0, 1, "x")), "a bare UnicodeDecodeError"),
        (lambda directory: 2, "reads other numbers"),
        (lambda directory: 1, None),
    ],
)
def test_what_is_a_finding(read, outcome, tmp_path):
    assert run._outcome(Reader(read), tmp_path, 1, single=False) == outcome


def test_a_hang_is_found(tmp_path, monkeypatch):
    def forever(directory):
        while True:
            pass

    monkeypatch.setattr(run, "SECONDS", 0.05)
    before = run.signal.signal(run.signal.SIGALRM, run._stop)
    try:
        assert run._outcome(Reader(forever), tmp_path, 1, single=False) == "hangs"
    finally:
        run.signal.signal(run.signal.SIGALRM, before)


def test_mutations_depend_on_the_seed_alone():
    content = json.dumps({"a": [1, 2, {"b": "c"}], "d": None}).encode()
    changed = [[mutated("x.json", content, random.Random(f"0 {n}")) for n in range(300)] for _ in range(2)]
    assert changed[0] == changed[1]
    text = b"".join(changed[0])
    for kind in (b"[" * 1000, b"NaN", b"\xed\xa0\x80", b"99999999999", b"true"):
        assert kind in text
