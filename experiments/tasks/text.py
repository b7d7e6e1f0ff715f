"""Texts to token ids with a checkpoint's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from experiments.errors import UserError


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory in Hugging Face layout, without its padding and truncation.

    Raises:
      UserError: There is no `tokenizer.json`, or it cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower type
        raise UserError(f"{path}: cannot be read as a tokenizer ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
    """The token ids of each text with the tokenizer's special tokens, cut to `max_length`."""
    tokenizer.enable_truncation(max_length)
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(list(texts))]


def encode_pairs(
    tokenizer: Tokenizer, first: Sequence[str], second: Sequence[str], max_length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The token ids and the segment of each token of pairs of texts, the longer text cut first."""
    tokenizer.enable_truncation(max_length)
    encoded = tokenizer.encode_batch(list(zip(first, second, strict=True)))
    return [(np.array(pair.ids, np.int32), np.array(pair.type_ids, np.int32)) for pair in encoded]
