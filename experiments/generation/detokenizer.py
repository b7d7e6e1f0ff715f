"""Decodes tokens one by one, for printing a text while it is generated."""

from tokenizers import Tokenizer

_BROKEN = "\ufffd"  # what tokenizers decodes the bytes of an incomplete character to


class Detokenizer:
    """Returns the text that each further token adds, and holds back characters until all of their bytes are present.

    Unlike `tokenizers.decoders.DecodeStream`, it accepts any tokens: those of a byte fallback may change the text of
    earlier ones, which is an error there.

    Args:
      tokenizer: The tokenizer. Special tokens add no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the last ones, which determine the spaces between them and further ones
        self._printed = 0  # the number of these whose text has been returned

    def push(self, token: int) -> str:
        """Returns the text that is complete with this token and was not before."""
        self._tokens.append(token)
        before, text = self._decode(self._tokens[: self._printed]), self._decode(self._tokens)
        if text.endswith(_BROKEN) or len(text) <= len(before):
            return ""
        # Decoders drop the space before the first word, so that the text depends on the previous token.
        self._tokens = self._tokens[self._printed :]
        self._printed = len(self._tokens)
        return text[len(before) :]

    def flush(self) -> str:
        """Returns the rest of the text after the last token, without a character that has remained incomplete."""
        before, text = self._decode(self._tokens[: self._printed]), self._decode(self._tokens)
        self._tokens, self._printed = [], 0
        return text[len(before) :].rstrip(_BROKEN)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
