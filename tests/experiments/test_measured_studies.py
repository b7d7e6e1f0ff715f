"""The studies that measure models, memory and time, at their smallest size."""

import importlib
import json

import pytest

from experiments import command_line, run

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.mark.parametrize("name", ["datatypes", "latency", "optimizer-memory"])
def test_the_smallest_study(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", without_libtpu)
    config = type(command_line.find_config(name).DEFAULTS)(fast=True, out=tmp_path)
    importlib.import_module(config.STUDY).run(config)
    record = json.loads((tmp_path / "run.json").read_text())
    printed = capsys.readouterr().out
    assert record["findings"] and all(finding["claim"] in printed for finding in record["findings"])
    assert {finding["verdict"] for finding in record["findings"]} <= {"observed", "not observed", "not decided"}
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "README.md").read_text()
    assert page.startswith(f"# {name}\n") and f"python -m experiments.run {name} --fast" in page


find_spec = importlib.util.find_spec


def without_libtpu(name, package=None):
    """Compiling for a TPU takes longer than the rest."""
    return None if name == "libtpu" else find_spec(name, package)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["latency", "--shapes", "4by512"], "expected BATCHxLENGTH, as in 4x512, got '4by512'"),
        (["latency", "--width", "100"], "width must be a multiple of 64"),
        (["optimizer-memory", "--steps", "0"], "steps must be positive"),
        (["datatypes", "--lr", "0"], "lr must be positive"),
        (["analysis"], "analysis has been divided into subspaces"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(flags, message, capsys):
    assert run.main(flags) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
