"""PEFT's methods by their `peft_type`."""

from lora_jax.peft.methods.adalora import AdaLora
from lora_jax.peft.methods.ia3 import Ia3
from lora_jax.peft.methods.loha import LoHa
from lora_jax.peft.methods.lokr import LoKr
from lora_jax.peft.methods.method import Method
from lora_jax.peft.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {kind.peft_type: kind for kind in (AdaLora, LoHa, LoKr, VeRA, Ia3)}
