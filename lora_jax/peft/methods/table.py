"""PEFT's methods other than LoRA."""

from lora_jax.peft.methods.adalora import AdaLoRAMethod
from lora_jax.peft.methods.hira import HiRAMethod
from lora_jax.peft.methods.ia3 import IA3Method
from lora_jax.peft.methods.loha import LoHaMethod
from lora_jax.peft.methods.lokr import LoKrMethod
from lora_jax.peft.methods.method import Method
from lora_jax.peft.methods.miss import MiSSMethod
from lora_jax.peft.methods.oft import OFTMethod
from lora_jax.peft.methods.vera import VeRAMethod

_ALL = (AdaLoRAMethod, LoHaMethod, LoKrMethod, VeRAMethod, IA3Method, HiRAMethod, MiSSMethod, OFTMethod)

METHODS: dict[str, type[Method]] = {method.peft_type: method for method in _ALL}

NORM_TUNING = "LN_TUNING"
"""PEFT's method that trains the scales and biases of norms in full; it has no adapter class of its own."""
