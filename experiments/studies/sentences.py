"""Loads a trained sentence classifier: `load(directory)("a chess engine")` returns a label."""

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

DESCRIPTION = "classifier.json"


def describe(directory: Path, model: str, problem: Problem) -> None:
    """Writes the file that :func:`load` needs next to a run's adapter: the base, the labels and the maximum length."""
    base = str(Path(model).absolute()) if Path(model).is_dir() else model
    write_json(directory / DESCRIPTION, {"model": base, "labels": problem.names, "length": problem.lengths[-1]})


def load(directory: str | Path) -> Callable[[str | tuple[str, str]], str]:
    """Loads the classifier that a run of the quickstart trained, merged into its base.

    Args:
      directory: The directory of the run, such as `runs/quickstart/lora-lr-0.003-seed0-…`.

    Returns:
      A function from a sentence, or a pair of sentences, to its label.

    Raises:
      UserError: A file is missing or damaged.
    """
    description = read_json(Path(directory) / DESCRIPTION, dict[str, Any])
    checkpoint = location.find(description["model"])
    tokenizer = text.load_tokenizer(checkpoint)
    model = classifier.load(checkpoint, len(description["labels"]), text.separator(tokenizer))
    apply, base = lora.nnx.functional(model)
    params, apply = lora.merge(base, lora.load(Path(directory) / "adapter", base)), jax.jit(apply)

    def classify(sentence: str | tuple[str, str]) -> str:
        (tokens,) = text.encode(tokenizer, [sentence], description["length"])
        padded = np.zeros((1, description["length"]), np.int32)
        padded[0, : len(tokens)] = tokens
        logits, _ = apply(params, padded, np.arange(description["length"])[None] < len(tokens))
        return description["labels"][int(np.argmax(logits))]

    return classify
