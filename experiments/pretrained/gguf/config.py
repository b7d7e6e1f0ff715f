"""Derives the `config.json` of a model in Hugging Face layout from the fields and tensors of a GGUF file."""

import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.pretrained.gguf.reader import Content
from experiments.pretrained.gguf.rope import llama3_scaling, rope_scaling

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of the factors by which RoPE's frequencies are divided."""

_DECODER = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_GPT2 = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_FLOATS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base")
_LIMITS = {"block_count": 10_000, "expert_count": 1_000}
_WINDOW = "attention.sliding_window"
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
_ROWS = 4096  # the number of rows of an embedding and a head that are compared at a time
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def derive_config(content: Content) -> tuple[dict[str, Any], list[str]]:
    """Returns what the `config.json` of a file's model contains, and what is wrong with its fields.

    A file states no sliding window for Mistral and Qwen 2, so that their attention has none, as in llama.cpp.
    """
    fields, architecture = content.fields, content.fields.get("general.architecture")
    if (kind := fields.get("general.type", "model")) != "model":
        return {}, [f"field: general.type is {kind!r}, expected 'model'"]
    if architecture not in _ARCHITECTURES:
        names = ", ".join(_ARCHITECTURES)
        return {}, [f"field: general.architecture is {architecture!r}, supported is one of {names}"]
    derivation = _Derivation(content, architecture)
    config = derivation.gpt2() if architecture == "gpt2" else derivation.decoder()
    ids = {theirs: fields.get(f"tokenizer.ggml.{name}_token_id") for name, theirs in _TOKENS.items()}
    family = config["model_type"]
    common = {
        "architectures": [_CLASSES[family]],
        "vocab_size": _vocabulary(content),
        "tie_word_embeddings": "output.weight" not in content.tensors.keys() | content.problems.keys(),
        **{name: number for name, number in ids.items() if number is not None},
    }
    return config | common, derivation.problems


class _Derivation:
    """Reads the fields of one architecture, and collects what is wrong with them."""

    def __init__(self, content: Content, architecture: str):
        self._content, self._architecture = content, architecture
        self.problems: list[str] = []
        self._bad: set[str] = set()

    def gpt2(self) -> dict[str, Any]:
        config = self._numbers(_GPT2)
        self._check_multiple("embedding_length", config["n_embd"], "attention.head_count", config["n_head"])
        up = self._content.tensors.get("blk.0.ffn_up.weight")  # converters state four times the width in any case
        hidden = up.shape[0] if up is not None else 4 * config["n_embd"]
        return config | {"model_type": "gpt2", "n_inner": None if hidden == 4 * config["n_embd"] else hidden}

    def decoder(self) -> dict[str, Any]:
        family, tensors = self._family(), self._content.tensors
        config: dict[str, Any] = {"model_type": family, "hidden_act": "silu"}
        config |= self._numbers(_DECODER)
        heads, width = config["num_attention_heads"], config["hidden_size"]
        config |= {
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": self._number("attention.key_length", width // heads or 1),
            "rope_theta": self._number("rope.freq_base", 10_000.0),
            "attention_bias": family in ("llama", "qwen3") and "blk.0.attn_output.bias" in tensors,
            "mlp_bias": family == "llama" and "blk.0.ffn_gate.bias" in tensors,
        }
        self._check_multiple("attention.head_count", heads, "attention.head_count_kv", config["num_key_value_heads"])
        states_width = self._field("attention.key_length") is not None
        if not states_width:
            self._check_multiple("embedding_length", width, "attention.head_count", heads)
        if family == "mixtral":
            config |= self._numbers(_EXPERTS)
            used, experts = config["num_experts_per_tok"], config["num_local_experts"]
            if used > experts and self._are_good("expert_count", "expert_used_count"):
                names = self._name("expert_used_count"), self._name("expert_count")
                self.problems.append(f"field: {names[0]} is {used}, expected at most {names[1]} {experts}")
        config |= self._window(family)
        names = ("attention.key_length",) if states_width else ("embedding_length", "attention.head_count")
        knows_width = self._are_good(*names) and (states_width or width % heads == 0)
        return config | self._rope(config, config["head_dim"] if knows_width else None)

    def _numbers(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns required fields by Hugging Face's names; see :meth:`_number`."""
        return {theirs: self._number(name) for name, theirs in names.items()}

    def _number(self, name: str, default: Any = None) -> Any:
        """Returns a field that is a positive number; 1 if it is not, or if it is missing and has no default."""
        value, where = self._field(name), self._name(name)
        if value is None and default is None:
            self.problems.append(f"missing: the field {where}")
            return self._substitute(name)
        value = default if value is None else value
        kind, limit = (float, 1e38) if name in _FLOATS else (int, _LIMITS.get(name, 2**31))
        least = 1 if name == "rope.freq_base" else 0
        if isinstance(value, bool) or not isinstance(value, int | kind) or not least < value < limit:
            expected = f"a {'number' if kind is float else 'whole number'} above {least} and below {limit:,}"
            self.problems.append(f"field: {where} is {reprlib.repr(value)}, expected {expected}")
            return self._substitute(name)
        return value

    def _substitute(self, name: str) -> int:
        """Notes a bad field, and returns what to check tensors with: as many layers as have tensors, otherwise 1."""
        self._bad.add(name)
        layers = [re.match(r"blk\.(\d{1,4})\.", tensor) for tensor in self._content.tensors]
        numbers = [int(match[1]) for match in layers if match]
        return max(numbers, default=0) + 1 if name == "block_count" else 1

    def _check_multiple(self, name: str, value: int, other: str, divisor: int) -> None:
        if value % divisor and self._are_good(name, other):
            message = f"{self._name(name)} {value} is not a multiple of {self._name(other)} {divisor}"
            self.problems.append(f"field: {message}")

    def _are_good(self, *names: str) -> bool:
        return not self._bad & set(names)

    def _name(self, name: str) -> str:
        return f"{self._architecture}.{name}"

    def _field(self, name: str) -> Any:
        """Returns the value of a field; a float is the shortest number that float32 rounds to the stored one."""
        value = self._content.fields.get(self._name(name))
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _family(self) -> str:
        if self._field("expert_count"):
            return "mixtral"
        return "mistral" if self._architecture == "llama" and self._field(_WINDOW) else self._architecture

    def _window(self, family: str) -> dict[str, Any]:
        if family == "llama":
            return {}
        window = self._number(_WINDOW) if self._field(_WINDOW) else None
        if family in ("mistral", "mixtral"):
            return {"sliding_window": window}
        return {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": 0}

    def _rope(self, config: Mapping[str, Any], width: int | None) -> dict[str, Any]:
        """Returns RoPE's fields for heads of a width, which is None if the fields do not tell it."""
        rotated, factors = self._field("rope.dimension_count"), self._content.tensors.get(ROPE_FACTORS)
        if width is not None and width % 2:
            where = self._name("attention.key_length")
            self.problems.append(f"field: {where}: heads have {width} features, RoPE rotates pairs of them")
        elif width is not None and rotated not in (None, width):
            where = self._name("rope.dimension_count")
            self.problems.append(f"field: {where} is {reprlib.repr(rotated)}, supported is all {width} of a head")
        try:
            scaling = rope_scaling(self._field, config["max_position_embeddings"])
            if factors is not None and width is not None and self._are_good("rope.freq_base"):
                scaling = llama3_scaling(factors.dequantize(factors.data), config["rope_theta"], width)
        except ValueError as error:
            self.problems.append(f"RoPE: {error}")
            return {}
        return {} if scaling is None else {"rope_scaling": scaling}


def _vocabulary(content: Content) -> int:
    """Returns the number of rows of the embedding."""
    embedding = content.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None else len(content.fields.get("tokenizer.ggml.tokens", ()))


def is_copied(content: Content) -> bool:
    """Whether a file holds a copy of the embedding as its head (GPT-2). Reads rows until one differs."""
    head, embedding = content.tensors.get("output.weight"), content.tensors.get("token_embd.weight")
    if head is None or embedding is None or (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    starts = range(0, head.shape[0], _ROWS)
    return all(
        np.array_equal(head.data[first : first + _ROWS], embedding.data[first : first + _ROWS]) for first in starts
    )
