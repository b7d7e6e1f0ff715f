"""Progress where there is no terminal."""

import doctest
import io

import pytest
from rich.console import Console

from experiments.training import processes, progress


@pytest.fixture
def clock(monkeypatch):
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times[0])
    return times


def lines(clock, seconds, examples=2):
    """The lines of steps that take so many seconds."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=False, width=40)
    with progress.bar(console, "training", examples * len(seconds)) as bar:
        for number, duration in enumerate(seconds, start=1):
            clock[0] += duration
            bar.advance(examples, f"step {number}")
    return [line.strip() for line in output.getvalue().splitlines()]


def test_lines_at_intervals(clock):
    assert lines(clock, [30, *[6] * 11]) == [
        "step 1  30 s with compilation",
        "step 2  6 s/step, 60 s left",
        "step 5  6 s/step, 42 s left",
        "step 8  6 s/step, 24 s left",
        "step 11  6 s/step, 6 s left",
    ]


def test_short_tasks_are_silent(clock):
    assert lines(clock, [0.5, *[0.1] * 50]) == []


def test_a_terminal_has_a_bar(clock):
    output = io.StringIO()
    with progress.bar(Console(file=output, force_terminal=True), "training", 2) as bar:
        clock[0] += 60
        bar.advance(1, "step 1")
    assert "with compilation" not in output.getvalue() and "step 1" in output.getvalue()


def test_examples_in_docstrings():
    assert doctest.testmod(progress).failed == 0


def test_brackets_are_text(capsys):
    processes.console().print("pip install 'jax[tpu]', [bold]", highlight=False, soft_wrap=True)
    assert capsys.readouterr().out == "pip install 'jax[tpu]', [bold]\n"
