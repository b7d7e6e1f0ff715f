"""Every record read once before anything is trained: a malformed one is an error, or counted and left out."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from experiments.errors import UserError
from experiments.input.records import Preference, Problem, Rated
from experiments.input.sources import Records, first

OnBad = Literal["error", "skip"]
_REASONS = 3  # that are kept of each source
_OTHER_USE: dict[type, str] = {
    Preference: "a preference (chosen and rejected), which sft does not learn from; write what was chosen as the "
    "completion of a prompt, or as a conversation",
    Rated: "a completion with a label (KTO), which sft does not learn from; --data-form prompt-completion learns from "
    "every completion, whatever its label",
    Problem: "a prompt with an answer for a reward by rule, which sft does not learn from; an answer that is to be "
    "learned is a completion",
}


@dataclass
class Findings:
    """What reading the records of one source has told.

    Attributes:
      forms: How many records are in which format.
      skipped: How many are malformed.
      reasons: Of the first of them, with file and line.
    """

    forms: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)


def checked(
    records: Records, *, on_bad: OnBad = "error", limit: int | None = None
) -> tuple[Records, tuple[Findings, ...]]:
    """Records without the malformed ones, and what reading them has told of each source.

    Records are read one by one and not kept. A record that is repeated by a weight is read once.

    Args:
      records: From :func:`experiments.input.sources.splits`.
      on_bad: `error` raises at the first malformed record; `skip` counts them and leaves them out.
      limit: Keep this many well-formed records, from the beginning; None keeps all.

    Raises:
      UserError: A record is malformed; is for another kind of training, whatever `on_bad` says; or too few are left.
    """
    if on_bad == "error":
        records = first(records, limit)
    findings = tuple(Findings() for _ in records.sources)
    good = [np.full(len(source), -1, np.int8) for source in records.sources]  # -1 is not known yet
    for index, (source, number) in enumerate(zip(records.source_of.tolist(), records.number_of.tolist())):
        if good[source][number] < 0:
            good[source][number] = _is_good(records, index, on_bad, findings[source])
    if on_bad == "error":
        return records, findings
    usable = np.array([good[source][number] for source, number in zip(records.source_of, records.number_of)], bool)
    if not usable.any():
        reason = next(reason for one in findings for reason in one.reasons)
        raise UserError(f"none of {len(records):,} records can be used; the first: {reason}")
    return first(records.take(np.flatnonzero(usable)), limit), findings


def _is_good(records: Records, index: int, on_bad: OnBad, findings: Findings) -> bool:
    try:
        form, record = records.read(index)
    except UserError as error:
        if on_bad == "error":
            raise
        findings.skipped += 1
        if len(findings.reasons) < _REASONS:
            findings.reasons.append(str(error))
        return False
    if type(record) in _OTHER_USE:
        raise UserError(f"{records.place(index)}: {_OTHER_USE[type(record)]}")
    findings.forms[form] += 1
    return True
