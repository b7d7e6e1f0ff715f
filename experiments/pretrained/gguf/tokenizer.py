"""Builds the tokenizer of a GGUF file from its fields.

References:
  llama.cpp, `src/llama-vocab.cpp`: the pre-tokenizers by name.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from experiments.errors import UserError
from experiments.pretrained.gguf.reader import Content

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


_PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "smollm": lambda: _gpt2(pre_tokenizers.Digits(individual_digits=True)),
}
_WHOLE_WORDS = ("llama-bpe",)  # a word of the vocabulary is one token, whatever the merges

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type


def build_tokenizer(content: Content) -> Tokenizer:
    """Returns the tokenizer of a file.

    Raises:
      UserError: The file has no tokenizer, or one of a kind that is not supported.
    """
    fields = content.fields
    tokens, kind = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.model")
    if not tokens:
        raise UserError(f"{content.path}: holds no tokenizer (tokenizer.ggml.tokens)")
    if kind != "gpt2":
        raise UserError(f"{content.path}: tokenizer.ggml.model is {kind!r}, supported is gpt2")
    tokenizer = _byte_level(content, tokens)
    _add_tokens(tokenizer, tokens, fields.get("tokenizer.ggml.token_type") or ())
    tokenizer.post_processor = _post_processor(content, tokens)
    return tokenizer


def _byte_level(content: Content, tokens: Sequence[str]) -> Tokenizer:
    name = content.fields.get("tokenizer.ggml.pre") or "default"
    if name not in _PRE_TOKENIZERS:
        names = ", ".join(_PRE_TOKENIZERS)
        raise UserError(f"{content.path}: the pre-tokenizer is {name!r}, supported is one of {names}")
    merges = [tuple(merge.split(" ", 1)) for merge in content.fields.get("tokenizer.ggml.merges") or ()]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Declares the tokens that texts contain whole: control tokens, and others that the model's author added."""
    named = [(token, kind) for token, kind in zip(tokens, kinds) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in named])


def _post_processor(content: Content, tokens: Sequence[str]) -> Any:
    """Returns the post-processor that adds the tokens that begin and end a text, if the file says so."""
    template, special = ["$A:0"], []
    for name, position in (("bos", 0), ("eos", 2)):
        number = content.fields.get(f"tokenizer.ggml.{name}_token_id")
        if content.fields.get(f"tokenizer.ggml.add_{name}_token") and number is not None:
            template.insert(position, f"{tokens[number]}:0")
            special.append((tokens[number], number))
    return processors.TemplateProcessing(single=template, special_tokens=special)
