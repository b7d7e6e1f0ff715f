"""Rewards of answers by a rule: 1 or 0 by comparison with a reference."""

import re
from collections.abc import Iterable
from typing import Literal

RewardName = Literal["choice", "exact", "contains", "number"]
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def reward(answer: str, reference: str, rule: RewardName, choices: Iterable[str] = ()) -> float:
    """Returns the reward of an answer. Case, and white space around it, do not matter.

    Args:
      answer: The text of the answer.
      reference: The right answer.
      rule: What earns 1: the answer contains the reference and none of the other choices (`choice`), equals it
        (`exact`), contains it (`contains`), or its last number is the reference (`number`).
      choices: The right answers of all problems.

    Example:
      >>> [reward(text, "game", "choice", {"game", "mail"}) for text in ("A game.", "game, mail", "It is fun")]
      [1.0, 0.0, 0.0]
      >>> [reward("It is 12.", "12", "exact"), reward("3 + 9 is 12.", "12", "number")]
      [0.0, 1.0]
    """
    answer, reference = answer.strip().casefold(), reference.strip().casefold()
    if rule == "exact":
        return float(answer == reference)
    if rule == "number":
        numbers = _NUMBER.findall(answer)
        return float(bool(numbers) and numbers[-1].replace(",", "") == reference.replace(",", ""))
    others = {choice.strip().casefold() for choice in choices} - {reference} if rule == "choice" else ()
    return float(reference in answer and not any(other in answer for other in others))
