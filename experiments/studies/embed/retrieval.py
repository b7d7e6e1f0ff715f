"""Retrieval of the answer of each query among the answers of all queries: ranks, recall and its uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS = 1024  # queries that are compared with all answers at a time


@dataclass(frozen=True)
class Figure:
    """A measured fraction.

    Attributes:
      value: The mean.
      error: Its standard error.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f}"


def rank_answers(queries: np.ndarray, answers: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many other answers are at least as near to each query as its own, and the index of the nearest.

    Args:
      queries: Unit vectors, `float[queries, width]`.
      answers: Unit vectors of the answers, in the order of their queries.
      texts: The answers. Equal texts are one answer.

    Example:
      >>> vectors = np.eye(3)
      >>> ranks, nearest = rank_answers(vectors[[0, 1, 1]], vectors, ["a", "b", "c"])
      >>> ranks.tolist(), nearest.tolist()  # the third query is at its own and one other answer at the same distance
      ([0, 0, 2], [0, 1, 1])
    """
    unique, text_of = np.unique(np.array(texts), return_inverse=True)
    first = np.array([np.flatnonzero(text_of == index)[0] for index in range(len(unique))])
    ranks, nearest = [], []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ answers[first].T
        right = scores[np.arange(len(scores)), text_of[start : start + _ROWS]]
        ranks.append(np.sum(scores >= right[:, None], axis=1) - 1)
        nearest.append(first[scores.argmax(axis=1)])
    return np.concatenate(ranks), np.concatenate(nearest)


def nearest_others(answers: np.ndarray, texts: Sequence[str], count: int) -> np.ndarray:
    """Returns the indices of the answers that are nearest to each answer and differ from it, `int[answers, count]`.

    Args:
      answers: Unit vectors.
      texts: The answers, more different ones than `count`.
      count: The number of other answers.

    Example:
      >>> vectors = np.array([[1, 0], [1, 0], [0.8, 0.6], [0, 1]])
      >>> nearest_others(vectors, ["a", "a", "b", "c"], 1).ravel().tolist()
      [2, 2, 0, 2]
    """
    _, text_of = np.unique(np.array(texts), return_inverse=True)
    chosen = []
    for start in range(0, len(answers), _ROWS):
        scores = answers[start : start + _ROWS] @ answers.T
        scores[text_of[start : start + _ROWS, None] == text_of] = -np.inf
        chosen.append(np.argsort(-scores, axis=1, kind="stable")[:, :count])
    return np.concatenate(chosen)


def recall(ranks: Sequence[int] | np.ndarray, count: int) -> Figure:
    """Returns the fraction of queries whose answer is among the `count` nearest, with its binomial standard error.

    Example:
      >>> str(recall([0, 3, 12, 0], 10))
      '75.0 ± 21.7'
    """
    value = float(np.mean(np.asarray(ranks) < count))
    return Figure(value, math.sqrt(value * (1 - value) / len(ranks)))


def gain(before: Sequence[int], after: Sequence[int], count: int) -> Figure:
    """Returns the difference of two recalls, with the standard error of the paired differences of the same queries.

    Example:
      >>> str(gain([0, 3, 12, 0], [0, 0, 0, 0], 1))
      '50.0 ± 28.9'
    """
    difference = (np.asarray(after) < count).astype(float) - (np.asarray(before) < count)
    return Figure(float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference))))
