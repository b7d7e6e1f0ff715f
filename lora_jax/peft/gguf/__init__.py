"""Adapters as GGUF files, which llama.cpp loads; needs the package `gguf`."""

from lora_jax.peft.gguf.files import is_adapter
from lora_jax.peft.gguf.model import SUFFIX, GgufModel, is_gguf, read_model
from lora_jax.peft.gguf.reading import read_delta, read_torch_adapter
from lora_jax.peft.gguf.writing import DTYPES, describe_unsupported, write_file

__all__ = [
    "DTYPES",
    "SUFFIX",
    "GgufModel",
    "describe_unsupported",
    "is_adapter",
    "is_gguf",
    "read_delta",
    "read_model",
    "read_torch_adapter",
    "write_file",
]
