"""Texts that continue a prompt: the labels are the next tokens, except those of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from experiments.tasks.batching import NO_LABEL


@dataclass(frozen=True)
class Continuations:
    """Tokenized examples.

    Attributes:
      sequences: The token ids of each example: the prompt and the text without its last token.
      labels: The next token at each position, `NO_LABEL` if it belongs to the prompt.
    """

    sequences: list[np.ndarray]
    labels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.sequences)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], texts: Sequence[str], max_length: int, end: int | None
) -> Continuations:
    """Tokenizes each `PROMPT TEXT` as one string, with a space between prompt and text.

    Args:
      tokenizer: A tokenizer. Special tokens that it adds at the beginning belong to the prompt.
      prompts: The prompts.
      texts: The texts to predict.
      max_length: Maximum length of a sequence. Longer ones are truncated and have no end token.
      end: The token that ends a text; None adds no token.
    """
    tokenizer.no_truncation()
    sequences, labels = [], []
    strings = [f"{prompt} {text}" for prompt, text in zip(prompts, texts)]
    for prompt, encoding in zip(prompts, tokenizer.encode_batch(strings)):
        ids, starts = list(encoding.ids), [start for start, _ in encoding.offsets]
        if end is not None and ids[-1] != end:
            ids, starts = [*ids, end], [*starts, len(prompt)]
        # Special tokens of the tokenizer have the offset 0 and belong to the prompt, except an end token.
        in_prompt = [start < len(prompt) and token != end for token, start in zip(ids, starts)]
        next_tokens = [NO_LABEL if excluded else token for excluded, token in zip(in_prompt, ids)][1:]
        sequences.append(np.array(ids[:-1][:max_length], np.int32))
        labels.append(np.array(next_tokens[:max_length], np.int32))
    return Continuations(sequences, labels)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of prompts and their mask, padded on the right, without end tokens."""
    tokenizer.no_truncation()
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    encoded = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in encoded]
    mask = np.arange(max(map(len, encoded)))[None] < np.array([[len(ids)] for ids in encoded])
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(encoded)
    return tokens, mask
