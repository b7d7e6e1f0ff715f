"""What the GGUF file of an adapter depends on in its base model: names, layers and attention heads."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.paths import nearest
from lora_jax.peft import ties
from lora_jax.peft.gguf.files import field, import_gguf, open_gguf
from lora_jax.peft.tensors import read_json

SUFFIX = ".gguf"
CONFIG = "config.json"
_LAYER = "model.layers.{layer}"
_LLAMA = (
    "model.embed_tokens",
    "lm_head",
    *(f"{_LAYER}.self_attn.{part}_proj" for part in "qkvo"),
    *(f"{_LAYER}.mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_MIXTRAL = (*_LLAMA, f"{_LAYER}.block_sparse_moe.gate", f"{_LAYER}.mlp.gate")  # in files, and in the running model
_BLOCK = "transformer.h.{layer}"
_GPT2 = (
    "transformer.wte",
    "lm_head",
    *(f"{_BLOCK}.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
)
FAMILIES = {
    "llama": ("llama", _LLAMA),
    "mistral": ("llama", _LLAMA),
    "mixtral": ("llama", _MIXTRAL),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
}
"""By `model_type`, the architecture of llama.cpp, and the modules to which it applies adapters, in PyTorch."""
EXPERT_MATRICES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
"""The matrices of Mixtral's experts, and the weights of llama.cpp that stack those of all experts."""


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """A base model, as far as GGUF files of its adapters depend on it.

    Attributes:
      model_type: Hugging Face's name of the family.
      layers: The number of layers.
      heads: The number of query heads.
      kv_heads: The number of key and value heads.
      experts: The number of experts; 0 without.
      tied: Whether the head is the embedding.
      name: The name of its directory or file.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    tied: bool
    name: str

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return FAMILIES[self.model_type][0]

    def weight_name(self, module: str) -> str | None:
        """Returns llama.cpp's name of a module's weight, without `.weight`; None if it applies no adapters to it."""
        names = [module, f"model.{module}", f"transformer.{module}"]  # a bare model's modules lack the first segment
        return next((self._weight_names[name] for name in names if name in self._weight_names), None)

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """The names of modules in PyTorch's running model, by llama.cpp's name of their weight."""
        return {name: module for module, name in self._weight_names.items()}

    @functools.cached_property
    def _weight_names(self) -> dict[str, str]:
        gguf = import_gguf()
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(numbers[self.architecture], self.layers)
        return {module: table.get_name(module) for module in self._torch_modules()}

    def _torch_modules(self) -> Iterator[str]:
        for template in FAMILIES[self.model_type][1]:
            for layer in range(self.layers if "{layer}" in template else 1):
                yield template.format(layer=layer)

    def to_stored_rows(self, name: str, factor: np.ndarray) -> np.ndarray:
        """Permutes the rows of a weight's B, `[out, rank]`, as llama.cpp permutes those of queries and keys.

        For rotary embeddings its architecture `llama` interleaves the halves of each head.
        """
        heads = self._permuted_heads(name, factor)
        return factor if heads is None else _swap_halves(factor, heads, 2)

    def to_torch_rows(self, name: str, factor: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_stored_rows`."""
        heads = self._permuted_heads(name, factor)
        return factor if heads is None else _swap_halves(factor, heads, len(factor) // heads // 2)

    def _permuted_heads(self, name: str, factor: np.ndarray) -> int | None:
        if self.architecture != "llama" or (match := re.fullmatch(r"blk\.\d+\.attn_([qk])", name)) is None:
            return None
        heads = self.heads if match[1] == "q" else self.kv_heads
        if len(factor) % (2 * heads):
            raise ValueError(
                f"{name}: B has {len(factor)} rows, which are not the pairs of {heads} heads of {self.name}"
            )
        return heads


def _swap_halves(factor: np.ndarray, heads: int, parts: int) -> np.ndarray:
    """Swaps the axes `[parts, width / parts]` of each head's rows."""
    return factor.reshape(heads, parts, -1, *factor.shape[1:]).swapaxes(1, 2).reshape(factor.shape)


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that is named like a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


def read_model(path: Path) -> GgufModel:
    """Reads the facts of a base model from a directory with its `config.json`, or from a GGUF file.

    Raises:
      ValueError: The path is neither, or the family is not supported.
    """
    import_gguf()  # before other errors
    if is_gguf(path):
        return _from_gguf(path)
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{path}: a GGUF adapter depends on the base's family and heads; expected a directory with {CONFIG}, or a "
            "GGUF file."
        )
    return _from_config(read_json(path / CONFIG), path)


def _from_config(config: Mapping[str, Any], path: Path) -> GgufModel:
    where = path / CONFIG
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type is {model_type!r}; adapters are converted to and from GGUF for {', '.join(FAMILIES)}."
        )
    table = f"{FAMILIES[model_type][1][0]}.weight"
    heads = _size(config, where, "num_attention_heads", "n_head")
    return GgufModel(
        model_type=model_type,
        layers=_size(config, where, "num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=_size(config, where, "num_key_value_heads") if config.get("num_key_value_heads") else heads,
        experts=_size(config, where, "num_local_experts") if model_type == "mixtral" else 0,
        tied=ties.tied_head(table, config, "CAUSAL_LM") is not None,
        name=path.absolute().name,
    )


def _size(config: Mapping[str, Any], where: Path, *names: str) -> int:
    """Returns the first of some fields that a config has, a positive integer."""
    value = next((config[name] for name in names if name in config), None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {names[0]} is {value!r}; expected a positive integer.")
    return value


def _from_gguf(file: Path) -> GgufModel:
    reader = open_gguf(file)
    architecture, kind = field(reader, "general.architecture"), field(reader, "general.type", "model")
    types = [model_type for model_type, (name, _) in FAMILIES.items() if name == architecture]
    if kind != "model":
        raise ValueError(f"{file}: a GGUF file of general.type {kind!r}; expected a model.")
    if not types:
        names = dict.fromkeys(name for name, _ in FAMILIES.values())
        raise ValueError(
            f"{file}: general.architecture is {architecture!r}; adapters are converted to and from GGUF for "
            f"{', '.join(names)}; {nearest(str(architecture), list(names))}."
        )
    sizes = {
        name: field(reader, f"{architecture}.{name}")
        for name in ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
    }
    heads = _size(sizes, file, "attention.head_count")
    experts = sizes["expert_count"] or 0
    return GgufModel(
        model_type="mixtral" if experts and architecture == "llama" else types[0],
        layers=_size(sizes, file, "block_count"),
        heads=heads,
        kv_heads=_size(sizes, file, "attention.head_count_kv") if sizes["attention.head_count_kv"] else heads,
        experts=experts,
        tied=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        name=file.stem,
    )
