"""Reads every record once before training. A malformed record is an error, or is counted and skipped."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from experiments.errors import UserError
from experiments.input.records import Completion, Conversation, Preference, Problem, Rated, Record, Text, TextPair
from experiments.input.sources import Records, first

OnBad = Literal["error", "skip"]
_REASONS = 3  # reasons to keep per source
_OTHER_USE: dict[type, str] = {
    Preference: "a preference record (chosen and rejected), which sft does not support; convert the chosen answer to a "
    "completion or a conversation",
    Rated: "a completion with a label (KTO), which sft does not support; --data-form prompt-completion trains on every "
    "completion and ignores the label",
    Problem: "a prompt with an answer for a rule-based reward, which sft does not support; to train on the answers, "
    "rename the column answer to completion",
    TextPair: "a pair of texts for embeddings, which sft does not support; rename the columns to prompt and completion",
}
_KINDS: dict[type, str] = {
    Conversation: "a conversation",
    Completion: "a prompt with a completion",
    Text: "a text",
    Preference: "a preference record (chosen and rejected, and prompt or a shared beginning)",
    Rated: "an answer with a label (prompt, completion and label)",
    Problem: "a prompt with a checkable answer (prompt and answer)",
    TextPair: "a pair of texts (anchor and positive, or query and document, and optionally negatives)",
}


class Use(NamedTuple):
    """A kind of training.

    Attributes:
      name: Its name, for error messages.
      kinds: The types of the records that it trains on.
    """

    name: str
    kinds: tuple[type, ...]


SFT = Use("sft", (Conversation, Completion, Text))


@dataclass
class Findings:
    """The result of reading one source's records.

    Attributes:
      forms: Number of records per format.
      skipped: Number of malformed records.
      reasons: Error messages of the first malformed records, with file and line.
    """

    forms: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)


def check_records(
    records: Records, *, on_bad: OnBad = "error", limit: int | None = None, use: Use = SFT
) -> tuple[Records, tuple[Findings, ...]]:
    """Reads all records and removes malformed ones.

    Records are not kept in memory. A record that is repeated by a weight is read once.

    Args:
      records: From :func:`experiments.input.sources.splits`.
      on_bad: `error` raises at the first malformed record; `skip` counts and removes malformed records.
      limit: Number of well-formed records to keep, from the beginning; None keeps all.
      use: The training that uses the records.

    Returns:
      The records, and the findings for each source.

    Raises:
      UserError: A record is malformed and `on_bad` is `error`, a record is for another kind of training, or too few
        records remain.
    """
    if on_bad == "error":
        records = first(records, limit)
    findings = tuple(Findings() for _ in records.sources)
    good = [np.full(len(source), -1, np.int8) for source in records.sources]  # -1: not read yet
    for index, (source, number) in enumerate(zip(records.source_of.tolist(), records.number_of.tolist())):
        if good[source][number] < 0:
            good[source][number] = _is_good(records, index, on_bad, findings[source], use)
    if on_bad == "error":
        return records, findings
    usable = np.array([good[source][number] for source, number in zip(records.source_of, records.number_of)], bool)
    if not usable.any():
        reason = next(reason for source in findings for reason in source.reasons)
        raise UserError(f"all {len(records):,} records are malformed; the first: {reason}")
    return first(records.take(np.flatnonzero(usable)), limit), findings


def _is_good(records: Records, index: int, on_bad: OnBad, findings: Findings, use: Use) -> bool:
    try:
        form, record = records.read(index)
    except UserError as error:
        if on_bad == "error":
            raise
        findings.skipped += 1
        if len(findings.reasons) < _REASONS:
            findings.reasons.append(str(error))
        return False
    if type(record) not in use.kinds:
        raise UserError(f"{records.location(index)}: {_describe(record, use)}")
    findings.forms[form] += 1
    return True


def _describe(record: Record, use: Use) -> str:
    """Describes a record that is for another kind of training."""
    if use is SFT:
        return _OTHER_USE[type(record)]
    expected = " or ".join(_KINDS[kind] for kind in use.kinds)
    return f"{_KINDS[type(record)]}, which {use.name} does not support; expected {expected}"
