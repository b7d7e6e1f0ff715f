"""Batches of pairs of texts for embeddings: anchors, and their documents with the positive first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from experiments.errors import UserError
from experiments.input.records import TextPair
from experiments.input.sources import Records
from experiments.tasks import text
from experiments.tasks.batching import Batch


@dataclass(frozen=True)
class TextPairs:
    """Batches by step of pairs of texts. All epochs have the same pairs in different orders.

    A batch is a dict of arrays: `tokens` and `mask`, `[batch_size, longest anchor]`; `document_tokens` and
    `document_mask`, `[batch_size, 1 + negatives, longest document]`; and `index: int32[batch_size]`, the number of the
    record. The last batch of an epoch is padded with empty rows, whose index is -1.

    Attributes:
      anchors: The tokens of each anchor.
      documents: The tokens of each record's documents.
      batch_size: Pairs per batch.
      seed: Random seed of the orders. None keeps the order of the records.
      truncated: Number of truncated texts.
    """

    anchors: Sequence[np.ndarray]
    documents: Sequence[Sequence[np.ndarray]]
    batch_size: int
    seed: int | None
    truncated: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        return -(-len(self.anchors) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns rows of the batch of a step."""
        numbers = self._numbers(step)[rows]
        longest = max(map(len, self.anchors)), max(len(tokens) for each in self.documents for tokens in each)
        count = len(self.documents[0])
        tokens, documents = (
            np.zeros((len(numbers), longest[0]), np.int32),
            np.zeros((len(numbers), count, longest[1]), np.int32),
        )
        mask, document_mask = np.zeros(tokens.shape, np.int32), np.zeros(documents.shape, np.int32)
        for slot, number in enumerate(numbers.tolist()):
            if number >= 0:
                _fill(tokens[slot], mask[slot], self.anchors[number])
                for row, document in enumerate(self.documents[number]):
                    _fill(documents[slot, row], document_mask[slot, row], document)
        return {
            "tokens": tokens,
            "mask": mask,
            "document_tokens": documents,
            "document_mask": document_mask,
            "index": numbers.astype(np.int32),
        }

    def examples(self, step: int) -> int:
        """Returns the number of pairs in the batch of a step."""
        return int((self._numbers(step) >= 0).sum())

    def _numbers(self, step: int) -> np.ndarray:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.arange(len(self.anchors))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        numbers = order[index * self.batch_size : (index + 1) * self.batch_size]
        return np.pad(numbers, (0, self.batch_size - len(numbers)), constant_values=-1)


def read_text_pairs(
    records: Records,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    seed: int | None,
    report: Callable[[str], None] = lambda line: None,
) -> TextPairs:
    """Tokenizes pairs of texts with an encoder's tokenizer, with the tokens that begin and end a text.

    Args:
      records: Pairs, which :func:`experiments.input.checking.check_records` ensures.
      tokenizer: From :func:`experiments.tasks.text.load_tokenizer`.
      length: The maximum number of tokens of a text; longer texts are truncated, as sentence-transformers does.
      batch_size: Pairs per batch, over all processes.
      seed: Random seed of the order. None keeps the order of the records.
      report: Called with lines that describe the batches.

    Raises:
      UserError: A record is malformed, is no pair, or has another number of negatives than the first.
    """
    pairs: list[TextPair] = []
    for number, record in enumerate(records):
        if not isinstance(record, TextPair):
            raise UserError(f"{records.location(number)}: got a {type(record).__name__.lower()}, expected a text pair")
        if pairs and len(record.negatives) != len(pairs[0].negatives):
            raise UserError(
                f"{records.location(number)}: {len(record.negatives)} negatives, expected "
                f"{len(pairs[0].negatives)} as in {records.location(0)}"
            )
        pairs.append(record)
    documents = [(pair.positive, *pair.negatives) for pair in pairs]
    flat = text.encode(tokenizer, [document for each in documents for document in each], length + 1)
    anchors = text.encode(tokenizer, [pair.anchor for pair in pairs], length + 1)
    truncated = sum(len(tokens) > length for tokens in (*anchors, *flat))
    width = len(documents[0])
    if truncated:
        anchors = text.encode(tokenizer, [pair.anchor for pair in pairs], length)
        flat = text.encode(tokenizer, [document for each in documents for document in each], length)
        report(f"truncated: {truncated:,} of {len(anchors) + len(flat):,} texts longer than {length:,} tokens")
    grouped = [flat[first : first + width] for first in range(0, len(flat), width)]
    batches = TextPairs(anchors, grouped, batch_size, seed, truncated)
    report(f"{len(pairs):,} pairs; {batches.steps_per_epoch:,} batches of {batch_size:,} per epoch")
    return batches


def _fill(tokens: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
    tokens[: len(values)], mask[: len(values)] = values, 1
