"""Texts that a language model is to continue a prompt with: next tokens as labels, the prompt's own left out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from experiments.tasks.batching import NO_LABEL


@dataclass(frozen=True)
class Continuations:
    """Tokenized examples.

    Attributes:
      sequences: Token ids, an array an example: the prompt and the text but for its last token.
      labels: For each of them the token that follows, `NO_LABEL` where that is still the prompt's.
    """

    sequences: list[np.ndarray]
    labels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.sequences)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], texts: Sequence[str], max_length: int, end: int | None
) -> Continuations:
    """Tokenizes `PROMPT TEXT`, with a space between them, as one string each.

    Args:
      tokenizer: With its special tokens, which are the prompt's where they come first.
      prompts: What is given.
      texts: What is to be predicted.
      max_length: Of a sequence; longer ones are cut, and then have no end.
      end: The token that ends a text; None teaches no end.
    """
    tokenizer.no_truncation()
    sequences, labels = [], []
    joined = [f"{prompt} {text}" for prompt, text in zip(prompts, texts)]
    for prompt, encoding in zip(prompts, tokenizer.encode_batch(joined)):
        ids, starts = list(encoding.ids), [start for start, _ in encoding.offsets]
        if end is not None and ids[-1] != end:
            ids, starts = [*ids, end], [*starts, len(prompt)]
        # a special token of the tokenizer's has no place in the string; an end counts all the same
        given = [start < len(prompt) and token != end for token, start in zip(ids, starts)]
        following = [NO_LABEL if known else token for known, token in zip(given, ids)][1:]
        sequences.append(np.array(ids[:-1][:max_length], np.int32))
        labels.append(np.array(following[:max_length], np.int32))
    return Continuations(sequences, labels)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of prompts and their mask, padded on the right; no end token behind them."""
    tokenizer.no_truncation()
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    encoded = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in encoded]
    mask = np.arange(max(map(len, encoded)))[None] < np.array([[len(ids)] for ids in encoded])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(encoded)
    return tokens, mask
