"""Adapters of Hugging Face's PEFT, in and out; weights of PyTorch models by name."""

from lora_jax.peft.loading import load
from lora_jax.peft.names import CONV1D, CONV2D, CONV3D, LINEAR, SAME, Names, Place, Weight
from lora_jax.peft.saving import save
from lora_jax.peft.tensors import SHARD_BYTES, Tensors, model_files, read_json, write_model

__all__ = [
    "CONV1D",
    "CONV2D",
    "CONV3D",
    "LINEAR",
    "SAME",
    "SHARD_BYTES",
    "Names",
    "Place",
    "Tensors",
    "Weight",
    "load",
    "model_files",
    "read_json",
    "save",
    "write_model",
]
