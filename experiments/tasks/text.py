"""Converts texts to token ids with a checkpoint's tokenizer."""

import contextlib
import json
import os
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from experiments.errors import UserError, reading
from experiments.pretrained.files import open_files


def load_tokenizer(model: Path) -> Tokenizer:
    """Loads the tokenizer of a directory in Hugging Face layout or of a GGUF file, without padding and truncation.

    Raises:
      UserError: `tokenizer.json` is missing or cannot be read.
    """
    files = open_files(model)
    text, where = files.read("tokenizer.json"), files.where("tokenizer.json")
    if text is None:
        raise UserError(f"{where}: no such file")
    with reading(where, "a tokenizer"), _suppress_panic_output():
        _check_post_processor(json.loads(text).get("post_processor"))
        tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def _suppress_panic_output() -> Generator[None]:
    """Discards the `with` block's output on file descriptor 2 if Rust panics; the exception has the same message."""
    stderr, panicked = os.dup(2), False
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = type(error).__module__ == "pyo3_runtime"
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if not panicked:
                output.seek(0)
                os.write(2, output.read())


def _check_post_processor(content: Any) -> None:
    """Raises a ValueError if a post-processor uses an undefined token, which would make tokenizers panic."""
    if not isinstance(content, dict):
        return
    for processor in content.get("processors") or ():
        _check_post_processor(processor)
    pieces = [*(content.get("single") or ()), *(content.get("pair") or ())]
    names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    if missing := sorted(set(names) - set(content.get("special_tokens") or ())):
        raise ValueError(f"the post-processor uses the undefined token {missing[0]}")


def encode(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int) -> list[np.ndarray]:
    """Returns the token ids of each text, or pair of texts, including special tokens, truncated to `max_length`.

    The longer text of a pair is truncated first.
    """
    tokenizer.enable_truncation(max_length)
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(list(texts))]


def encode_pairs(
    tokenizer: Tokenizer, first: Sequence[str], second: Sequence[str], max_length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the token ids and segment ids of pairs of texts; the longer text is truncated first."""
    tokenizer.enable_truncation(max_length)
    encoded = tokenizer.encode_batch(list(zip(first, second, strict=True)))
    return [(np.array(pair.ids, np.int32), np.array(pair.type_ids, np.int32)) for pair in encoded]


def separator(tokenizer: Tokenizer) -> int | None:
    """Returns the token that ends the first text of a pair; None for tokenizers without segments, such as RoBERTa's."""
    pair = tokenizer.encode("a", "b")
    return pair.ids[pair.type_ids.index(1) - 1] if 1 in pair.type_ids else None
