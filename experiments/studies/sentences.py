"""A trained sentence classifier from a run's directory: `load(directory)("a chess engine")` is a label."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from experiments.models import classifier, location
from experiments.reports.results import read_json, write_json
from experiments.studies.problem import Problem
from experiments.tasks import text

ABOUT = "classifier.json"


def describe(directory: Path, model: str, problem: Problem) -> None:
    """Writes, beside a run's adapter, what :func:`load` needs: the base, the labels and the longest text."""
    base = str(Path(model).absolute()) if Path(model).is_dir() else model
    write_json(directory / ABOUT, {"model": base, "labels": problem.names, "length": problem.lengths[-1]})


def load(directory: str | Path) -> Callable[[str], str]:
    """The classifier that a run of the quickstart has trained, merged into its base.

    Args:
      directory: Of the run, such as `runs/quickstart/lora-seed0-…`; it holds `adapter/` and `classifier.json`.

    Returns:
      A function from a sentence to its label.

    Raises:
      UserError: Something is missing or damaged.
    """
    about = read_json(Path(directory) / ABOUT, dict[str, Any])
    checkpoint = location.find(about["model"])
    apply, base = lora.nnx.functional(classifier.load(checkpoint, len(about["labels"])))
    params = lora.merge(base, lora.load(Path(directory) / "adapter", base))
    tokenizer, logits_of = text.load_tokenizer(checkpoint), jax.jit(apply)

    def classify(sentence: str) -> str:
        (tokens,) = text.encode(tokenizer, [sentence], about["length"])
        padded = np.zeros((1, about["length"]), np.int32)
        padded[0, : len(tokens)] = tokens
        logits, _ = logits_of(params, padded, np.arange(about["length"])[None] < len(tokens))
        return about["labels"][int(np.argmax(logits))]

    return classify
