"""Biases that a checkpoint lacks and that its model can have if a flag of the config is set."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import Adapter
from lora_jax.commands.leaves import leaf_path
from lora_jax.peft import keys

_FLAGS = (
    (
        "attention_bias",
        r"self_attn\.[qkvo]_proj",
        "afmoe apertus apertus1p5_text arcee aria_text beam bitnet cohere cohere2 cohere2_moe diffllama dory exaone "
        "falcon_h1 flex_olmo flint gemma gemma2 gemma3_text gemma4_text gemma4_unified_text granite granite_swa "
        "granitemoe granitemoe_swa granitemoeshared hy_v3 hyperclovax iquestcoder laguna lara_mini llama llama4_text "
        "mellum nanochat olmo olmo2 olmo3 olmo_hybrid olmoe phimoe qwen3 qwen3_moe smollm3 vaultgemma",
    ),
    ("attention_bias", r"self_attn\.[qkv]_proj", "glm4_moe helium mimo_v2_flash sarvam_moe solar_open"),
    ("attention_out_bias", r"self_attn\.o_proj", "seed_oss"),
    ("use_qkv_bias", r"self_attn\.[qkv]_proj", "stablelm"),
    (
        "mlp_bias",
        r"mlp\.(gate|up|down)_proj",
        "arcee cwm doge dory exaone granite granite_swa helium hyperclovax iquestcoder llama minicpm3 seed_oss smollm3",
    ),
)
"""The flag, the modules of each layer that have a bias if it is set, and the model types, in transformers 5.24."""


@dataclasses.dataclass(frozen=True)
class NewBiases:
    """Biases to add to a checkpoint.

    Attributes:
      weights: The weights' names in the checkpoint's files, by the biases' names.
      flags: The flags of the config to set.
    """

    weights: dict[str, str]
    flags: tuple[str, ...]


def split_biases(
    delta: dict[str, Adapter], tensors: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> NewBiases:
    """Converts the biases of a delta's low-rank adapters to offsets of new biases of the checkpoint, in place.

    Args:
      delta: The adapters, by the path of each tensor.
      tensors: The shapes of the checkpoint's tensors.
      config: The content of the checkpoint's `config.json`.

    Returns:
      The biases to add to the checkpoint. A flag applies to all layers, so they include layers without adapter.

    Raises:
      ValueError: A module whose adapter has a bias cannot have one; the message names the modules.
    """
    biased = {
        path.replace("/", "."): (node, node.bias)
        for path, node in delta.items()
        if isinstance(node, LoRAAdapter) and node.bias is not None
    }
    model_type = str(config.get("model_type") or "")
    flags = {
        name: flag
        for flag, modules, types in _FLAGS
        for name in tensors
        if model_type in types.split() and re.fullmatch(rf"(model\.)?layers\.\d+\.{modules}\.weight", name)
    }
    if unsupported := [keys.split_name(name)[0] for name in biased if name not in flags]:
        model = f"a model of type {model_type!r}" if model_type else "a model without a config.json that names its type"
        more = f" ({len(unsupported)} such modules)" if len(unsupported) > 1 else ""
        raise ValueError(
            f"{unsupported[0]}{more}: the adapter has a bias on B (lora_bias), and {model} cannot have a bias in this "
            "module: use the adapter unmerged."
        )
    for name, (node, bias) in biased.items():
        delta[leaf_path(name)] = dataclasses.replace(node, bias=None)
        delta[leaf_path(_bias_name(name))] = OffsetAdapter(value=bias, scale=node.scale, axes=())
    required = {flags[name] for name in biased}
    selected = tuple(flag for flag in dict.fromkeys(flags.values()) if flag in required)
    weights = {_bias_name(name): name for name, flag in flags.items() if flag in selected}
    return NewBiases({bias: name for bias, name in weights.items() if bias not in tensors}, selected)


def _bias_name(name: str) -> str:
    return f"{keys.split_name(name)[0]}.bias"
