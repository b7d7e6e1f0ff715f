"""Pairs of a query and its answer: read from records, tokenized and batched."""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from experiments.configs.embed import Config
from experiments.errors import UserError
from experiments.input import sources
from experiments.input.chat import texts_of
from experiments.input.checking import Use, check_records
from experiments.input.records import Completion, Conversation, Message, Record, TextPair
from experiments.tasks import text
from experiments.tasks.batching import Batch, Planned, assemble
from experiments.training.stream import Stream

Candidates = tuple[np.ndarray, ...]
"""The token ids of a pair's answer, which comes first, and of its hard negatives."""

SPLITS = ("train", "validation", "test")


EMBED = Use("embed", (Conversation, Completion, TextPair))


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts and their tokens.

    Attributes:
      texts: The texts of each pair.
      queries: The token ids of each query.
      answers: The token ids of each answer.
      negatives: The token ids of each record's negatives.
      digest: A digest of the records.
    """

    texts: tuple[TextPair, ...]
    queries: list[np.ndarray]
    answers: list[np.ndarray]
    negatives: list[list[np.ndarray]]
    digest: str

    def __len__(self) -> int:
        return len(self.texts)


class PairStream(Stream):
    """The batches of the contrastive loss by step; see :class:`experiments.training.stream.Stream`.

    Args:
      pairs: The pairs.
      candidates: The answer and the hard negatives of each pair, equally many.
      lengths: The lengths that queries are padded to.
      answer_length: The length that answers are padded to.
      batch_size: The number of pairs per batch. In a batch with fewer pairs, the last rows have no tokens.
      seed: The seed of the order.
    """

    def __init__(
        self,
        pairs: Pairs,
        candidates: Sequence[Candidates],
        lengths: Sequence[int],
        answer_length: int,
        batch_size: int,
        seed: int,
    ):
        self._no_labels = np.zeros(len(pairs), np.int32)
        super().__init__(pairs.queries, self._no_labels, lengths, batch_size, seed)
        self._columns, self._answer_length = list(zip(*candidates)), answer_length

    def rows(self, step: int, rows: slice) -> Batch:
        queries = super().rows(step, rows)
        planned = Planned(self._planned(step).indices[rows], self._answer_length)
        documents = [assemble(planned, column, self._no_labels, len(queries["tokens"])) for column in self._columns]
        stacked = {f"document_{name}": np.stack([one[name] for one in documents], axis=1) for name in _TEXT}
        return {name: queries[name] for name in _TEXT} | stacked

    def tokens(self, step: int) -> int:
        indices = self._planned(step).indices
        return super().tokens(step) + sum(len(column[index]) for column in self._columns for index in indices)


_TEXT = ("tokens", "mask")


def read(config: Config, tokenizer: Tokenizer, report: Callable[[str], None]) -> dict[str, Pairs]:
    """Reads the pairs of every split.

    Args:
      config: The study's config.
      tokenizer: The tokenizer of the encoder.
      report: Called with a line for each split.

    Raises:
      UserError: Data is missing or malformed, test or validation data is training data, or two pairs are too few.
    """
    train, validation = sources.splits(config.data, config.validation)
    names = " and ".join(config.data)
    if config.test:
        test = sources.concatenate([sources.read(name, "test") for name in config.test])
    else:
        test = sources.read_separate(config.data, "test")
    records = {"train": train, "validation": validation, "test": test}
    pairs = {}
    for split in SPLITS:
        of_split = records[split]
        if of_split is None:
            raise UserError(f"{names}: no {split} data next to the training data; name some with --{split}")
        if split != "train" and sources.overlap_warnings(train, of_split):
            raise UserError(f"{of_split.sources[0].name}: training data cannot be {split} data; name other --{split}")
        limit = getattr(config, f"{split}_examples")
        of_split, findings = check_records(of_split, on_bad=config.on_bad, limit=limit, use=EMBED)
        skipped = sum(one.skipped for one in findings)
        pairs[split], description = _tokenize(of_split, tokenizer, config)
        report(f"{split}: {description}" + (f", {skipped:,} malformed records skipped" if skipped else ""))
        for reason in (reason for one in findings for reason in one.reasons):
            report(f"{split}: skipped: {reason}")
    if len(pairs["test"]) < 2:
        raise UserError(f"{names}: expected at least two test pairs, got {len(pairs['test'])}")
    return pairs


def _tokenize(records: sources.Records, tokenizer: Tokenizer, config: Config) -> tuple[Pairs, str]:
    """Returns the pairs, and their number with that of truncated texts."""
    texts = tuple(read_pair(record, records.location(number)) for number, record in enumerate(records))
    queries, answers = [pair.anchor for pair in texts], [pair.positive for pair in texts]
    others = [negative for pair in texts for negative in pair.negatives]
    tokens, notes = [], [f"{len(texts):,} pairs"]
    limits = ("queries", queries, config.lengths[-1]), ("answers", [*answers, *others], config.answer_length)
    for name, strings, limit in limits:
        tokens.append(text.encode(tokenizer, strings, limit))
        count = sum(len(whole) > limit for whole in text.encode(tokenizer, strings, sys.maxsize))
        notes += [f"{count:,} {name} truncated to {limit} tokens"] if count else []
    rest = iter(tokens[1][len(answers) :])
    negatives = [list(itertools.islice(rest, len(pair.negatives))) for pair in texts]
    return Pairs(texts, tokens[0], tokens[1][: len(answers)], negatives, records.digest), ", ".join(notes)


def read_pair(record: Record, where: str) -> TextPair:
    """Returns the query and the answer of a record as anchor and positive.

    Args:
      record: A pair of texts, a prompt with its completion, or a conversation, whose last question and answer are the
        pair.
      where: The location of the record, for error messages.

    Raises:
      UserError: A text is empty.
    """
    if isinstance(record, TextPair):
        return record
    if isinstance(record, Completion):
        pair = TextPair(record.prompt, record.completion)
    else:
        assert isinstance(record, Conversation)  # check_records refuses others
        pair = TextPair(_last(record.messages, "user", where), _last(record.messages, "assistant", where))
    for name, part in (("query", pair.anchor), ("answer", pair.positive)):
        if not part.strip():
            raise UserError(f"{where}: the {name} is empty")
    return pair


def _last(messages: Sequence[Message], role: str, where: str) -> str:
    texts = [message["content"] for message in messages if message["role"] == role]
    return "\n".join(texts_of(texts[-1], where)) if texts else ""
