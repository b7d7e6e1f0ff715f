"""What a study concludes about published findings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

Verdict = Literal["observed", "not observed", "not decided"]


@dataclass(frozen=True)
class Finding:
    """A published finding and what the measurements say about it.

    Attributes:
      claim: The finding.
      verdict: Whether it was observed.
      figures: The figures that decide.
    """

    claim: str
    verdict: Verdict
    figures: str


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints a line for each finding."""
    for finding in findings:
        console.print(f"{finding.verdict}: {finding.claim}. {finding.figures}", highlight=False, soft_wrap=True)
