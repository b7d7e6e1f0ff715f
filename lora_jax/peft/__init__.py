"""Loads and saves adapters of Hugging Face's PEFT; tables of the names of weights in PyTorch."""

from lora_jax.peft.loading import load
from lora_jax.peft.names import CONV1D, CONV2D, CONV3D, LINEAR, SAME, Fused, Names
from lora_jax.peft.saving import save
from lora_jax.peft.tensor_files import SHARD_BYTES, write_model
from lora_jax.peft.tensors import INDEX, WEIGHTS, Tensors, model_files, read_json
from lora_jax.peft.ties import tied_head
from lora_jax.peft.weights import Binding, Weight
from lora_jax.renamed import module_getattr

__all__ = [
    "CONV1D",
    "CONV2D",
    "CONV3D",
    "INDEX",
    "LINEAR",
    "SAME",
    "SHARD_BYTES",
    "WEIGHTS",
    "Binding",
    "Fused",
    "Names",
    "Tensors",
    "Weight",
    "load",
    "model_files",
    "read_json",
    "save",
    "tied_head",
    "write_model",
]

__getattr__ = module_getattr(__name__, Place="Binding")
