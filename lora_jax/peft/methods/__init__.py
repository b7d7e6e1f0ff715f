"""PEFT's methods beside LoRA: AdaLoRA, LoHa, LoKr, VeRA, (IA)³, trainable tokens and the tuning of norms."""

from lora_jax.peft.methods.loading import load_method
from lora_jax.peft.methods.saving import method_of, save_method
from lora_jax.peft.methods.table import METHODS

__all__ = ["METHODS", "load_method", "method_of", "save_method"]
