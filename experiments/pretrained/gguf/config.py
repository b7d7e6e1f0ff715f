"""Derives the `config.json` of a model in Hugging Face layout from the fields of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.errors import UserError
from experiments.pretrained.gguf.reader import Content

_SHARED = {
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
    "feed_forward_length": "n_inner",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")


class _Fields:
    """The fields of one architecture; floats are the shortest numbers that float32 rounds to the stored ones."""

    def __init__(self, content: Content, architecture: str):
        self._content, self._architecture = content, architecture

    def get(self, name: str) -> Any:
        value = self._content.fields.get(f"{self._architecture}.{name}")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def require(self, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns the values of fields by Hugging Face's names."""
        if missing := [name for name in names if self.get(name) is None]:
            listed = ", ".join(f"{self._architecture}.{name}" for name in missing)
            raise UserError(f"{self._content.path}: the file lacks the fields {listed}")
        return {theirs: self.get(name) for name, theirs in names.items()}


def check_architecture(content: Content) -> str:
    """Returns the architecture of a file.

    Raises:
      UserError: It is not supported.
    """
    architecture = content.fields.get("general.architecture")
    if content.fields.get("general.type", "model") != "model":
        raise UserError(f"{content.path}: holds a {content.fields['general.type']}, expected a model")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{content.path}: general.architecture is {architecture!r}, supported is one of {', '.join(_ARCHITECTURES)}"
        )
    return architecture


def config_json(content: Content) -> dict[str, Any]:
    """Returns what a `config.json` would contain for the model of a file.

    Raises:
      UserError: The architecture is not supported, or fields are missing.
    """
    architecture = check_architecture(content)
    fields = _Fields(content, architecture)
    if architecture == "gpt2":
        family, config = "gpt2", fields.require(_GPT2)
    else:
        family, config = _decoder(content, fields, architecture)
    config |= {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": _vocabulary(content),
        "tie_word_embeddings": _is_tied(content),
    }
    for name in ("bos", "eos", "unknown", "padding"):
        number = content.fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and name in ("bos", "eos", "padding"):
            config[f"{name.removesuffix('ding')}_token_id"] = number
    return config


def _decoder(content: Content, fields: _Fields, architecture: str) -> tuple[str, dict[str, Any]]:
    config = fields.require(_SHARED)
    heads = config["num_attention_heads"]
    config |= {
        "hidden_act": "silu",
        "num_key_value_heads": fields.get("attention.head_count_kv") or heads,
        "head_dim": fields.get("attention.key_length") or config["hidden_size"] // heads,
        "rope_theta": fields.get("rope.freq_base") or 10_000.0,
    }
    return architecture, config


def _vocabulary(content: Content) -> int:
    """Returns the number of rows of the embedding."""
    embedding = content.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    return len(content.fields.get("tokenizer.ggml.tokens", ()))


def _is_tied(content: Content) -> bool:
    """Whether the head is the embedding: there is no other, or a copy (GPT-2)."""
    head, embedding = content.tensors.get("output.weight"), content.tensors.get("token_embd.weight")
    if head is None or embedding is None:
        return head is None
    return head.kind == embedding.kind and np.array_equal(head.data, embedding.data)
