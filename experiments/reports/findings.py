"""What a study concludes about published findings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from rich.console import Console

Verdict = Literal["observed", "not observed", "not decided"]


@dataclass(frozen=True)
class Finding:
    """A published finding and what the measurements say about it.

    Attributes:
      claim: The finding.
      verdict: Whether it was observed.
      figures: The figures that decide.
      reason: The likely reason why it was not observed; see :meth:`because`.
    """

    claim: str
    verdict: Verdict
    figures: str
    reason: str = ""

    def because(self, reason: str) -> Self:
        """Returns the finding with the likely reason, if it was not observed; otherwise the finding itself.

        Example:
          >>> print(Finding("one is better", "not observed", "one minus other: -2.0").because("few examples"))
          not observed: one is better. one minus other: -2.0. Likely reason: few examples
        """
        return replace(self, reason=reason) if self.verdict == "not observed" else self

    @property
    def evidence(self) -> str:
        """The figures and, if there is one, the likely reason."""
        return f"{self.figures}. Likely reason: {self.reason}" if self.reason else self.figures

    def __str__(self) -> str:
        return f"{self.verdict}: {self.claim}. {self.evidence}"


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints a line for each finding."""
    for finding in findings:
        console.print(str(finding), highlight=False, soft_wrap=True)
