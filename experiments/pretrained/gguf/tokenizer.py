"""Builds the tokenizer of a GGUF file from its fields."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from experiments.errors import UserError, reading
from experiments.pretrained.gguf.reader import Content
from experiments.pretrained.gguf.splitting import SPLITTINGS, Splitting

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece's spelling of a space
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6  # values of token_type
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
"""Hugging Face's names of special tokens by GGUF's (with its spelling)."""


def build_tokenizer(content: Content) -> Tokenizer:
    """Returns the tokenizer of a file, which gives the tokens that llama.cpp gives.

    Raises:
      UserError: The file has no tokenizer, one of a kind that is not supported, or a damaged one.
    """
    return _Builder(content).build()


class _Builder:
    def __init__(self, content: Content):
        self._content = content
        self._kind = self._field("model")
        self._tokens: Sequence[str] = self._field("tokens") or ()
        self._kinds: Sequence[int] = self._field("token_type") or ()
        if not self._tokens:
            raise UserError(f"{content.path}: holds no tokenizer ({_PREFIX}tokens)")
        if self._kind not in ("gpt2", "llama"):
            raise UserError(
                f"{content.path}: {_PREFIX}model is {self._kind!r}, supported is 'gpt2' (byte-level BPE) or 'llama' "
                "(SentencePiece BPE)"
            )

    def build(self) -> Tokenizer:
        with reading(self._content.path, "a tokenizer"):
            tokenizer = self._byte_level() if self._kind == "gpt2" else self._sentence_piece()
            tokenizer.add_tokens(self._added())
            tokenizer.post_processor = self._post_processor()
        return tokenizer

    def _field(self, name: str) -> Any:
        return self._content.fields.get(_PREFIX + name)

    def _splitting(self) -> Splitting:
        name = self._field("pre") or "default"
        if name not in SPLITTINGS:
            names = ", ".join(SPLITTINGS)
            raise UserError(f"{self._content.path}: the pre-tokenizer is {name!r}, supported is one of {names}")
        return SPLITTINGS[name]

    def _vocabulary(self) -> dict[str, int]:
        return {token or f"[EMPTY_{number}]": number for number, token in enumerate(self._tokens)}

    def _byte_level(self) -> Tokenizer:
        splitting = self._splitting()
        merges = [_pair(merge) for merge in self._field("merges") or ()]
        tokenizer = Tokenizer(models.BPE(self._vocabulary(), merges, ignore_merges=splitting.whole_words))
        tokenizer.pre_tokenizer = splitting.build()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        vocabulary, unknown = self._vocabulary(), self._token("unknown", 0)
        merges = [_pair(merge) for merge in self._field("merges") or ()] or self._merges_by_score(vocabulary)
        bpe = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        tokenizer, prefix = Tokenizer(bpe), self._field("add_space_prefix") in (None, True)
        before = [normalizers.Prepend(_SPACE)] if prefix else []
        after = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
        spaces = decoders.Replace(_SPACE, " ")
        tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), *after])
        return tokenizer

    def _merges_by_score(self, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
        """Returns the pairs of tokens that make a token, those of the highest scores first."""
        scores = self._field("scores") or ()
        if len(scores) != len(self._tokens):
            raise UserError(f"{self._content.path}: {_PREFIX}scores has {len(scores)} of {len(self._tokens)} values")
        ranked = []
        for number, token in enumerate(self._tokens):
            if self._kind_of(number) in (_CONTROL, _UNUSED, _BYTE):
                continue
            for middle in range(1, len(token)):
                first, second = token[:middle], token[middle:]
                if first in vocabulary and second in vocabulary:
                    ranked.append((-scores[number], vocabulary[first], vocabulary[second], first, second))
        return [(first, second) for *_, first, second in sorted(ranked)]

    def _kind_of(self, number: int) -> int | None:
        return self._kinds[number] if number < len(self._kinds) else None

    def _added(self) -> list[AddedToken]:
        """Returns the tokens that texts contain whole: control tokens, and those that the model's author added."""
        special = {self._field(f"{name}_token_id") for name in SPECIAL}
        added = []
        for number, token in enumerate(self._tokens):
            is_control = self._kind_of(number) == _CONTROL or number in special
            if token and (is_control or self._kind_of(number) == _USER_DEFINED):
                added.append(AddedToken(token, special=is_control, normalized=False))
        return added

    def _token(self, name: str, default: int | None = None) -> str | None:
        number = self._field(f"{name}_token_id")
        number = default if number is None else number
        return None if number is None else self._tokens[number]

    def _post_processor(self) -> Any:
        """Returns the post-processor that adds the tokens that begin and end a text."""
        begins = self._kind == "llama" or self._splitting().begins
        template, special = ["$A"], []
        for name, position, default in (("bos", 0, begins), ("eos", 2, False)):
            token, adds = self._token(name), self._field(f"add_{name}_token")
            if token is not None and (default if adds is None else adds):
                template.insert(position, token)
                special.append((token, self._field(f"{name}_token_id")))
        return processors.TemplateProcessing(single=template, special_tokens=special)


def _pair(merge: str) -> tuple[str, str]:
    middle = merge.index(" ", 1)
    return merge[:middle], merge[middle + 1 :]
