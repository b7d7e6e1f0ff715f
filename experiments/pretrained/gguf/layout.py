"""The tensors of each architecture in a GGUF file, their shapes, and the tensors of Hugging Face's checkpoints in them.

llama.cpp's converters differ from Hugging Face's checkpoints in three ways: the experts of a layer are one tensor; for
the architecture `llama` the two features of a pair that RoPE rotates are neighbors instead of half a head apart; and
GPT-2's matrices are transposed.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_LAYER, _HF_LAYER = "blk.{layer}", "model.layers.{layer}"
_EXPERT = f"{_HF_LAYER}.block_sparse_moe.experts.{{expert}}"


@dataclass(frozen=True)
class Row:
    """A tensor, or one in each layer.

    Attributes:
      name: Its name in a GGUF file; may contain `{layer}` and `{expert}`.
      theirs: Its name in Hugging Face's checkpoint. If only this name contains `{expert}`, experts are its first axis.
      shape: The letters of its sizes; see :func:`_sizes`.
      heads: The letter of the number of heads of RoPE in its rows.
      transposed: Whether Hugging Face's tensor is the transpose.
    """

    name: str
    theirs: str
    shape: str
    heads: str | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Piece:
    """A tensor of Hugging Face's checkpoint in a tensor of a file.

    Attributes:
      theirs: Its name.
      shape: Its shape; that of its transpose if it is transposed.
      expert: Its number on the first axis of the file's tensor, if that axis enumerates experts.
      first: The first of its rows in the file's tensor.
      heads: The number of heads in whose rows the features of a pair are neighbors; None if they are not.
      transposed: Whether Hugging Face's tensor is the transpose.
    """

    theirs: str
    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0
    heads: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor that a file should hold: its shape, and Hugging Face's tensors in it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


_OUTER = (
    Row("token_embd.weight", "model.embed_tokens.weight", "VD"),
    Row("output_norm.weight", "model.norm.weight", "D"),
    Row(f"{_LAYER}.attn_norm.weight", f"{_HF_LAYER}.input_layernorm.weight", "D"),
    Row(f"{_LAYER}.ffn_norm.weight", f"{_HF_LAYER}.post_attention_layernorm.weight", "D"),
)
_HEAD = (Row("output.weight", "lm_head.weight", "VD"),)
_ATTENTION = (
    Row(f"{_LAYER}.attn_q.weight", f"{_HF_LAYER}.self_attn.q_proj.weight", "QD", heads="H"),
    Row(f"{_LAYER}.attn_k.weight", f"{_HF_LAYER}.self_attn.k_proj.weight", "KD", heads="G"),
    Row(f"{_LAYER}.attn_v.weight", f"{_HF_LAYER}.self_attn.v_proj.weight", "KD"),
    Row(f"{_LAYER}.attn_output.weight", f"{_HF_LAYER}.self_attn.o_proj.weight", "DQ"),
)
_QKV_BIAS = (
    Row(f"{_LAYER}.attn_q.bias", f"{_HF_LAYER}.self_attn.q_proj.bias", "Q", heads="H"),
    Row(f"{_LAYER}.attn_k.bias", f"{_HF_LAYER}.self_attn.k_proj.bias", "K", heads="G"),
    Row(f"{_LAYER}.attn_v.bias", f"{_HF_LAYER}.self_attn.v_proj.bias", "K"),
)
_OUTPUT_BIAS = (Row(f"{_LAYER}.attn_output.bias", f"{_HF_LAYER}.self_attn.o_proj.bias", "D"),)
_QK_NORM = (
    Row(f"{_LAYER}.attn_q_norm.weight", f"{_HF_LAYER}.self_attn.q_norm.weight", "W"),
    Row(f"{_LAYER}.attn_k_norm.weight", f"{_HF_LAYER}.self_attn.k_norm.weight", "W"),
)
_FEED_FORWARD = (
    Row(f"{_LAYER}.ffn_gate.weight", f"{_HF_LAYER}.mlp.gate_proj.weight", "FD"),
    Row(f"{_LAYER}.ffn_up.weight", f"{_HF_LAYER}.mlp.up_proj.weight", "FD"),
    Row(f"{_LAYER}.ffn_down.weight", f"{_HF_LAYER}.mlp.down_proj.weight", "DF"),
)
_FEED_FORWARD_BIAS = (
    Row(f"{_LAYER}.ffn_gate.bias", f"{_HF_LAYER}.mlp.gate_proj.bias", "F"),
    Row(f"{_LAYER}.ffn_up.bias", f"{_HF_LAYER}.mlp.up_proj.bias", "F"),
    Row(f"{_LAYER}.ffn_down.bias", f"{_HF_LAYER}.mlp.down_proj.bias", "D"),
)
_ROUTER = (Row(f"{_LAYER}.ffn_gate_inp.weight", f"{_HF_LAYER}.block_sparse_moe.gate.weight", "ED"),)
_EXPERTS = (
    Row(f"{_LAYER}.ffn_gate_exps.weight", f"{_EXPERT}.w1.weight", "EFD"),
    Row(f"{_LAYER}.ffn_down_exps.weight", f"{_EXPERT}.w2.weight", "EDF"),
    Row(f"{_LAYER}.ffn_up_exps.weight", f"{_EXPERT}.w3.weight", "EFD"),
)
_SINGLE_EXPERTS = (  # in files of 2023 and early 2024
    Row(f"{_LAYER}.ffn_gate.{{expert}}.weight", f"{_EXPERT}.w1.weight", "FD"),
    Row(f"{_LAYER}.ffn_down.{{expert}}.weight", f"{_EXPERT}.w2.weight", "DF"),
    Row(f"{_LAYER}.ffn_up.{{expert}}.weight", f"{_EXPERT}.w3.weight", "FD"),
)
_FUSED = {  # options of the converter
    "attn_qkv.weight": ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "attn_qkv.bias": ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
}
_HF_BLOCK = "transformer.h.{layer}"
_GPT2 = (
    Row("token_embd.weight", "transformer.wte.weight", "VD"),
    Row("position_embd.weight", "transformer.wpe.weight", "PD"),
    Row("output_norm.weight", "transformer.ln_f.weight", "D"),
    Row("output_norm.bias", "transformer.ln_f.bias", "D"),
    Row(f"{_LAYER}.attn_norm.weight", f"{_HF_BLOCK}.ln_1.weight", "D"),
    Row(f"{_LAYER}.attn_norm.bias", f"{_HF_BLOCK}.ln_1.bias", "D"),
    Row(f"{_LAYER}.attn_qkv.weight", f"{_HF_BLOCK}.attn.c_attn.weight", "TD", transposed=True),
    Row(f"{_LAYER}.attn_qkv.bias", f"{_HF_BLOCK}.attn.c_attn.bias", "T"),
    Row(f"{_LAYER}.attn_output.weight", f"{_HF_BLOCK}.attn.c_proj.weight", "DD", transposed=True),
    Row(f"{_LAYER}.attn_output.bias", f"{_HF_BLOCK}.attn.c_proj.bias", "D"),
    Row(f"{_LAYER}.ffn_norm.weight", f"{_HF_BLOCK}.ln_2.weight", "D"),
    Row(f"{_LAYER}.ffn_norm.bias", f"{_HF_BLOCK}.ln_2.bias", "D"),
    Row(f"{_LAYER}.ffn_up.weight", f"{_HF_BLOCK}.mlp.c_fc.weight", "FD", transposed=True),
    Row(f"{_LAYER}.ffn_up.bias", f"{_HF_BLOCK}.mlp.c_fc.bias", "F"),
    Row(f"{_LAYER}.ffn_down.weight", f"{_HF_BLOCK}.mlp.c_proj.weight", "DF", transposed=True),
    Row(f"{_LAYER}.ffn_down.bias", f"{_HF_BLOCK}.mlp.c_proj.bias", "D"),
)


def layout(architecture: str, config: Mapping[str, Any], names: Collection[str]) -> dict[str, Entry]:
    """Returns the tensors of a model by their names in a GGUF file.

    Args:
      architecture: llama.cpp's name of the architecture.
      config: The content of the model's `config.json`.
      names: The tensors of the file; they decide between forms of experts, and between separate and fused tensors.
    """
    sizes = _sizes(config)
    entries: dict[str, Entry] = {}
    for row in _rows(config, names):
        shape = tuple(sizes[letter] for letter in row.shape)
        heads = sizes[row.heads] if row.heads and architecture == "llama" else None
        for layer in range(sizes["L"]) if "{layer}" in row.name else (0,):
            for expert in range(sizes["E"]) if "{expert}" in row.name else (0,):
                name, theirs = (text.format(layer=layer, expert="{expert}") for text in (row.name, row.theirs))
                pieces = (Piece(theirs.format(expert=expert), shape, None, 0, heads, row.transposed),)
                if "{expert}" in theirs and "{expert}" not in name:
                    pieces = tuple(Piece(theirs.format(expert=n), shape[1:], n) for n in range(shape[0]))
                entries[name.format(expert=expert)] = Entry(shape, pieces)
    return _fuse(entries, names)


def _fuse(entries: Mapping[str, Entry], names: Collection[str]) -> dict[str, Entry]:
    """Replaces tensors by one that holds their rows, if a file has that one."""
    result = dict(entries)
    for name in names:
        match = re.fullmatch(r"(blk\.\d+\.)(.+)", name)
        members = [match[1] + member for member in _FUSED.get(match[2], ())] if match else []
        if not members or not all(member in entries for member in members):
            continue
        pieces, first = [], 0
        for member in members:
            entry = result.pop(member)
            pieces += [dataclasses.replace(piece, first=first) for piece in entry.pieces]
            first += pieces[-1].shape[0]
        rows = -2 if pieces[0].expert is not None else 0
        shape = list(entries[members[0]].shape)
        shape[rows] = first
        result[name] = Entry(tuple(shape), tuple(pieces))
    return result


def _rows(config: Mapping[str, Any], names: Collection[str]) -> tuple[Row, ...]:
    family = config["model_type"]
    head = _HEAD if not config["tie_word_embeddings"] or "output.weight" in names else ()
    if family == "gpt2":
        return (*_GPT2, *head)
    bias = bool(config.get("attention_bias"))
    rows = [*_OUTER, *head, *_ATTENTION]
    rows += _QKV_BIAS if bias or family == "qwen2" else ()
    rows += _OUTPUT_BIAS if bias else ()
    rows += _QK_NORM if family == "qwen3" else ()
    if family != "mixtral":
        return (*rows, *_FEED_FORWARD, *(_FEED_FORWARD_BIAS if config.get("mlp_bias") else ()))
    single = _SINGLE_EXPERTS[0].name.format(layer=0, expert=0) in names
    return (*rows, *_ROUTER, *(_SINGLE_EXPERTS if single else _EXPERTS))


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Returns the sizes of a model's axes.

    They are L layers, E experts, H heads, G key heads, V the vocabulary, D the model's width, F the hidden width, W the
    width of a head, Q and K those of all queries and all keys, P positions, and T three times the model's width.
    """
    if config["model_type"] == "gpt2":
        width = config["n_embd"]
        hidden = config.get("n_inner") or 4 * width
        lengths = {"L": config["n_layer"], "P": config["n_positions"]}
        return lengths | {"V": config["vocab_size"], "D": width, "F": hidden, "T": 3 * width}
    heads, groups, head = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    return {
        "L": config["num_hidden_layers"],
        "E": config.get("num_local_experts", 0),
        "H": heads,
        "G": groups,
        "V": config["vocab_size"],
        "D": config["hidden_size"],
        "F": config["intermediate_size"],
        "W": head,
        "Q": heads * head,
        "K": groups * head,
    }
