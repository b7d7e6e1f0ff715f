"""The metrics of SQuAD: exact match and F1 of words, after normalization.

References:
  Rajpurkar et al., `SQuAD <https://arxiv.org/abs/1606.05250>`_, 2016, §6.1
  Rajpurkar et al., `Know What You Don't Know <https://arxiv.org/abs/1806.03822>`_, 2018
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from experiments.input.official.squad import UNANSWERABLE

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """Returns a text in lower case without punctuation, articles and superfluous space.

    Example:
      >>> normalize("The  Saint-Denis, a town")
      'saintdenis town'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the means of exact match and F1 with the best of each question's answers, from 0 to 100.

    Args:
      texts: The generated answers; empty or `unanswerable` if there is none.
      answers: The right answers of each question, none if it cannot be answered.
    """
    exact, f1 = [], []
    for text, several in zip(texts, answers, strict=True):
        words = normalize("" if normalize(text) == UNANSWERABLE else text).split()
        # An answer of articles and punctuation only is none, as in SQuAD's script.
        right = [answer for answer in (normalize(answer).split() for answer in several) if answer] or [[]]
        exact.append(max(words == answer for answer in right))
        f1.append(max(_f1(words, answer) for answer in right))
    return {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}


def _f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    common = sum((Counter(words) & Counter(answer)).values())
    return 2 * common / (len(words) + len(answer))
