"""Derives the `config.json` of a model in Hugging Face layout from the fields and tensors of a GGUF file."""

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
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
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
        "tie_word_embeddings": _is_tied(content),
        **{name: number for name, number in ids.items() if number is not None},
    }
    return config | common, derivation.problems


class _Derivation:
    """Reads the fields of one architecture, and collects what is wrong with them."""

    def __init__(self, content: Content, architecture: str):
        self._content, self._architecture = content, architecture
        self.problems: list[str] = []

    def gpt2(self) -> dict[str, Any]:
        config = self._numbers(_GPT2)
        up = self._content.tensors.get("blk.0.ffn_up.weight")  # converters state four times the width in any case
        hidden = up.shape[0] if up is not None else 4 * config["n_embd"]
        return config | {"model_type": "gpt2", "n_inner": None if hidden == 4 * config["n_embd"] else hidden}

    def decoder(self) -> dict[str, Any]:
        config: dict[str, Any] = {"model_type": self._architecture, "hidden_act": "silu"}
        config |= self._numbers(_DECODER)
        heads = config["num_attention_heads"]
        config |= {
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": self._number("attention.key_length", config["hidden_size"] // heads),
            "rope_theta": self._number("rope.freq_base", 10_000.0),
            "attention_bias": "blk.0.attn_output.bias" in self._content.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._content.tensors,
        }
        if self._field("expert_count"):
            config |= {"model_type": "mixtral"} | self._numbers(_EXPERTS)
        if config["head_dim"] % 2:
            self.problems.append(f"field: heads have {config['head_dim']} features, RoPE rotates pairs of them")
        return config | self._window(config["model_type"]) | self._rope(config)

    def _numbers(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns required fields by Hugging Face's names; see :meth:`_number`."""
        return {theirs: self._number(name) for name, theirs in names.items()}

    def _number(self, name: str, default: Any = None) -> Any:
        """Returns a field that is a positive number; 1 if it is not, or if it is missing and has no default."""
        value, where = self._field(name), f"{self._architecture}.{name}"
        if value is None and default is None:
            self.problems.append(f"missing: the field {where}")
            return 1
        value = default if value is None else value
        kind, limit = (float, 1e38) if name in _FLOATS else (int, _LIMITS.get(name, 2**31))
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < limit:
            self.problems.append(f"field: {where} is {reprlib.repr(value)}, expected a positive number below {limit:,}")
            return 1
        return value

    def _field(self, name: str) -> Any:
        """Returns the value of a field; a float is the shortest number that float32 rounds to the stored one."""
        value = self._content.fields.get(f"{self._architecture}.{name}")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _window(self, family: str) -> dict[str, Any]:
        window = self._field("attention.sliding_window")
        if family == "mixtral":
            return {"sliding_window": window}
        if family == "llama":
            return {"model_type": "mistral", "sliding_window": window} if window else {}
        return {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": 0}

    def _rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        rotated, width = self._field("rope.dimension_count"), config["head_dim"]
        fields: dict[str, Any] = {} if rotated in (None, width) else {"partial_rotary_factor": rotated / width}
        factors = self._content.tensors.get(ROPE_FACTORS)
        try:
            scaling = rope_scaling(self._field, config["max_position_embeddings"])
            if factors is not None:
                scaling = llama3_scaling(factors.dequantize(factors.data), config["rope_theta"], width)
        except ValueError as error:
            self.problems.append(f"RoPE: {error}")
            return fields
        return fields if scaling is None else fields | {"rope_scaling": scaling}


def _vocabulary(content: Content) -> int:
    """Returns the number of rows of the embedding."""
    embedding = content.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None else len(content.fields.get("tokenizer.ggml.tokens", ()))


def _is_tied(content: Content) -> bool:
    """Whether the head is the embedding: there is no other, or a copy (GPT-2)."""
    head, embedding = content.tensors.get("output.weight"), content.tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return head is None and "output.weight" not in content.problems
    return head.kind == embedding.kind and np.array_equal(head.data, embedding.data)
