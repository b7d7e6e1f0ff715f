"""The accuracy of commonsense reasoning: the first word in an answer that can be a label is the choice.

References:
  Hu et al., `LLM-Adapters <https://arxiv.org/abs/2304.01933>`_, 2023
"""

import re
from collections.abc import Sequence

import numpy as np

from experiments.input.official.commonsense import Choice

_PATTERNS = {
    "true": "true|false",
    "false": "true|false",
    "solution": "solution[12]",
    "answer": "answer[1-5]",
    "ending": "ending[1-4]",
    "option": "option[12]",
}


def extract(text: str, label: str) -> str:
    """Returns the choice in an answer; empty if there is none.

    Args:
      text: The answer.
      label: The right choice, whose kind decides which words are choices.

    Example:
      >>> extract("the correct answer is answer2, not answer1", "answer1")
      'answer2'
    """
    match = re.search(_PATTERNS.get(label.rstrip("0123456789"), re.escape(label)), text)
    return match[0] if match else ""


def score(texts: Sequence[str], choices: Sequence[Choice]) -> dict[str, float]:
    """Returns the accuracy of each task, and with several tasks the mean of these, from 0 to 100."""
    right: dict[str, list[bool]] = {}
    for text, choice in zip(texts, choices, strict=True):
        right.setdefault(choice.task or "accuracy", []).append(extract(text, choice.label) == choice.label)
    scores = {task: 100 * float(np.mean(values)) for task, values in right.items()}
    return scores | ({"average": float(np.mean(list(scores.values())))} if len(scores) > 1 else {})
