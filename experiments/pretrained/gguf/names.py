"""The names of tensors in GGUF files, and how they hold the tensors of Hugging Face's checkpoints."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.pretrained.gguf.reader import Content, StoredTensor

_DECODER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # GPT-2's
_IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OF_EXPERTS = re.compile(r"(ffn_gate|ffn_up|ffn_down)(?:_exps|\.(\d+))")
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of the factors by which RoPE's frequencies are divided, which a checkpoint's config holds."""


class View:
    """A tensor of Hugging Face's checkpoint within a tensor of a GGUF file.

    Args:
      stored: The tensor of the file.
      expert: The index of the expert, if the tensor of the file holds those of all experts.
      heads: The number of heads between whose rows the features of RoPE's pairs alternate, `[head, pair, 2]`;
        Hugging Face has `[head, 2, pair]`.
      transposed: Whether Hugging Face's tensor is the transpose.
    """

    def __init__(
        self, stored: StoredTensor, *, expert: int | None = None, heads: int | None = None, transposed: bool = False
    ):
        self.stored, self._expert, self._transposed = stored, expert, transposed
        shape = stored.shape if expert is None else stored.shape[1:]
        self.shape = shape[::-1] if transposed else shape
        self._order = None
        if heads is not None and shape[0] % (2 * heads) == 0:
            self._order = np.arange(shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def rows(self, part: slice) -> np.ndarray:
        """Returns the stored form of some rows, in the order of Hugging Face's rows (its columns if transposed)."""
        data = self.stored.data if self._expert is None else self.stored.data[self._expert]
        return data[part if self._order is None else self._order[part]]

    def read(self, part: tuple[slice, ...] | None) -> np.ndarray:
        """Returns the numbers of a part of Hugging Face's tensor; all of it by default."""
        full = tuple(part or ()) + (slice(None),) * (len(self.shape) - len(part or ()))
        if self._transposed:
            full = full[::-1]
        values = self.stored.dequantize(self.rows(full[0]))
        if len(full) > 1:
            values = values[:, *full[1:]]
        return values.T if self._transposed else values


def views(content: Content) -> dict[str, View]:
    """Returns the tensors of a checkpoint by Hugging Face's names; tensors with unknown names keep theirs."""
    architecture = content.fields["general.architecture"]
    named: dict[str, View] = {}
    for name, stored in content.tensors.items():
        if name == ROPE_FACTORS:
            continue
        if architecture == "gpt2":
            named[_gpt2_name(name)] = View(stored, transposed=name.endswith(_TRANSPOSED))
        elif (experts := _expert_names(name, stored)) is not None:
            named |= experts
        else:
            named[_decoder_name(name)] = View(stored, heads=_interleaved_heads(content.fields, name))
    return named


def _decoder_name(name: str) -> str:
    if match := _IN_LAYER.fullmatch(name):
        layer, module, kind = match.groups()
        return f"model.layers.{layer}.{_DECODER[module]}.{kind}" if module in _DECODER else name
    module, _, kind = name.partition(".")
    return f"{_DECODER[module]}.{kind}" if module in _DECODER else name


def _gpt2_name(name: str) -> str:
    if match := _IN_LAYER.fullmatch(name):
        layer, module, kind = match.groups()
        return f"transformer.h.{layer}.{_GPT2[module]}.{kind}" if module in _GPT2 else name
    module, _, kind = name.partition(".")
    return f"{_GPT2[module]}.{kind}" if module in _GPT2 else name


def _expert_names(name: str, stored: StoredTensor) -> dict[str, View] | None:
    """Returns the matrices of the experts in a tensor; None if it holds none."""
    match = _IN_LAYER.fullmatch(name)
    experts = match and _OF_EXPERTS.fullmatch(match[2])
    if not match or not experts:
        return None
    matrix = f"model.layers.{match[1]}.block_sparse_moe.experts.{{}}.{_EXPERTS[experts[1]]}.weight"
    if experts[2] is not None:  # files of 2023 have a tensor per expert
        return {matrix.format(experts[2]): View(stored)}
    return {matrix.format(expert): View(stored, expert=expert) for expert in range(stored.shape[0])}


def _interleaved_heads(fields: Mapping[str, Any], name: str) -> int | None:
    """Returns the number of heads whose features alternate in a tensor's rows, if they do."""
    match = _IN_LAYER.fullmatch(name)
    if fields["general.architecture"] != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    heads = fields["llama.attention.head_count"]
    return heads if match[2] == "attn_q" else fields.get("llama.attention.head_count_kv", heads)
