"""Checks that transformers and peft reproduce the predictions of an adapter that the quickstart exported.

    python -m experiments.run quickstart --export peft
    python -m experiments.checks.exported_quickstart runs/quickstart/lora-lr-0.003-seed0-… --base DIRECTORY

The second command needs torch, transformers, peft and numpy, and no dependency of this project. It runs the code in the
export's README on all test examples of the run and compares its logits with those of the run. --base is a local copy of
the base, if the README names a model on the Hugging Face Hub.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from experiments.input import labeled
from experiments.tasks import examples

_BATCH = 200
_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a run, which contains peft/ and test_logits.npy")
    parser.add_argument("--base", type=Path, help="the base in Hugging Face layout (default: as in the README)")
    args = parser.parse_args()
    config = json.loads((args.run.parent / "run.json").read_text(encoding="utf-8"))["config"]
    test = labeled.load_splits(config["data"], examples.limits(SimpleNamespace(**config)))["test"]
    expected = np.load(args.run / "test_logits.npy")
    names = run_readme(args.run / "peft", args.base and args.base.absolute())
    logits = [names["logits"](list(test.texts[i : i + _BATCH])).numpy() for i in range(0, len(test), _BATCH)]
    compare(np.concatenate(logits), expected, test)


def run_readme(directory: Path, base: Path | None) -> dict:
    """Runs the code of an export's README in the export's directory and returns the names that it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if base is not None:
        code, count = re.subn(r"^base, adapter = .*$", f'base, adapter = {str(base)!r}, "."', code, flags=re.MULTILINE)
        assert count == 1
    names: dict = {}
    before = Path.cwd()
    os.chdir(directory)
    try:
        exec(compile(code, str(directory / "README.md"), "exec"), names)
    finally:
        os.chdir(before)
    return names


def compare(logits: np.ndarray, expected: np.ndarray, test: examples.Examples) -> None:
    """Compares logits with those of the run.

    Raises:
      SystemExit: They differ by more than float32 explains.
    """
    if logits.shape != expected.shape:
        sys.exit(f"expected logits of shape {expected.shape}, got {logits.shape}")
    difference, same = np.abs(logits - expected).max(), np.mean(logits.argmax(-1) == expected.argmax(-1))
    print(f"{len(test):,} test examples, largest logit {np.abs(expected).max():.3g}")
    print(f"largest difference of a logit: {difference:.2g}")
    print(f"the same class: {same:.2%}; accuracy {np.mean(logits.argmax(-1) == test.labels):.1%}")
    if difference > _TOLERANCE:
        sys.exit(f"logits differ by more than {_TOLERANCE}")


if __name__ == "__main__":
    main()
