"""PEFT's methods other than LoRA, one file each; also trainable tokens and the tuning of norms."""

from lora_jax.peft.methods.loading import load_method, method_in
from lora_jax.peft.methods.saving import method_of, save_method
from lora_jax.peft.methods.table import METHODS, NORM_TUNING

__all__ = ["METHODS", "NORM_TUNING", "load_method", "method_in", "method_of", "save_method"]
