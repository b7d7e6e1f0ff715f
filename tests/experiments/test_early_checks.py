"""What is checked before JAX is imported."""

import json
import subprocess
import sys

import pytest

from experiments.studies.decoder import records
from experiments.studies.sft import splits

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'lora_jax')))\n"
"""Any import of these is an error."""


def command(*args):
    """Runs a command for which JAX is not installed."""
    code = f"{BLOCKED}from experiments import run; sys.exit(run.main({list(args)!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "BAD"], "bad.jsonl, line 2: got prompt, expected"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--eval-share", "2"], "eval_share must be a fraction"),
        (["--ranks", "(=8"], "ranks: '(' is not a valid regular expression"),
        (["--length", "-1"], "length must be positive"),
    ],
)
def test_errors_before_jax_is_imported(flags, message, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = command("sft", *[flag.replace("BAD", str(bad)) for flag in flags])
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr


def test_the_first_line_comes_before_jax_is_imported(tmp_path):
    rows = [{"prompt": str(i), "completion": "b"} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("sft", "--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "out"))
    assert done.stdout == f"smollm2-135m on {tmp_path / 'train.jsonl'}: 3 training records; loading JAX …\n"
    assert "import of jax halted" in done.stderr  # which comes next


def test_few_records_are_checked_early(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_FIRST", 1)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    splits.check(splits.Config(data=str(tmp_path / "train.jsonl")))
