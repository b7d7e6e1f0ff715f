"""Whether transformers and peft reproduce the predictions of an adapter that the quickstart exported.

    python -m experiments.run quickstart --export peft
    python -m experiments.checks.exported_quickstart runs/quickstart/lora-seed0-… --base DIRECTORY

The second command needs torch, transformers, peft and numpy, and none of this project's own dependencies. It runs the
code in the export's README as it stands there, on all test examples of the run, and prints how far its logits are from
those of the run. --base is a copy of the base on disk, where the README names one of the hub's.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

from experiments.tasks import examples

_BATCH = 200
_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the directory of a run, which holds peft/ and test_logits.npy")
    parser.add_argument("--base", type=Path, help="the base in Hugging Face layout (default: as the README says)")
    chosen = parser.parse_args()
    config = json.loads((chosen.run.parent / "run.json").read_text(encoding="utf-8"))["config"]
    test = examples.load(config["data"], "test", config["test_examples"])
    expected = np.load(chosen.run / "test_logits.npy")
    names = readme(chosen.run / "peft", chosen.base and chosen.base.absolute())
    found = [names["logits"](list(test.texts[i : i + _BATCH])).numpy() for i in range(0, len(test), _BATCH)]
    compare(np.concatenate(found), expected, test)


def readme(directory: Path, base: Path | None) -> dict:
    """Runs the code of an export's README in the export's directory; the names that it defines."""
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


def compare(found: np.ndarray, expected: np.ndarray, test: examples.Examples) -> None:
    """Prints how far the logits are apart.

    Raises:
      SystemExit: Further than float32 explains.
    """
    if found.shape != expected.shape:
        sys.exit(f"logits of shape {found.shape}, the run's are {expected.shape}")
    apart, same = np.abs(found - expected).max(), np.mean(found.argmax(-1) == expected.argmax(-1))
    print(f"{len(test):,} test examples, logits up to {np.abs(expected).max():.3g}")
    print(f"largest difference of a logit: {apart:.2g}")
    print(f"the same class: {same:.2%}; accuracy {np.mean(found.argmax(-1) == test.labels):.1%}")
    if apart > _TOLERANCE:
        sys.exit(f"more than {_TOLERANCE} apart")


if __name__ == "__main__":
    main()
