"""How byte-level tokenizers split a text into words, by llama.cpp's names.

References:
  llama.cpp, `src/llama-vocab.cpp`
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"


@dataclass(frozen=True)
class Splitting:
    """A way to split a text.

    Attributes:
      patterns: Regular expressions; each one splits the parts that the previous ones made into matches and the rest.
      whole_words: Whether a word of the vocabulary is one token, whatever the merges.
      begins: Whether a text begins with the token for it, if the file does not say so.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Returns the pre-tokenizer, which also spells bytes as characters."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3 = Splitting((rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), whole_words=True, begins=True)
_QWEN2 = Splitting((rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}",))
_DIGITS = Splitting((r"\p{N}", _GPT2))
_DEFAULT = Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_TEKKEN = Splitting(
    (rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), whole_words=True, begins=True
)
SPLITTINGS = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), Splitting((_GPT2,))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
    "tekken": _TEKKEN,
}
"""The ways to split a text by the value of `tokenizer.ggml.pre`, for the tokenizers of the supported families."""
