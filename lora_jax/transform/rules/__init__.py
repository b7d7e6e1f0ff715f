"""What each JAX primitive does to an adapted weight."""

from lora_jax.transform.registry import RULES, rule
from lora_jax.transform.rules import combinations, contractions, control_flow, convolutions, lookups, views
from lora_jax.transform.rules.combinations import COMBINING

__all__ = [
    "COMBINING",
    "RULES",
    "combinations",
    "contractions",
    "control_flow",
    "convolutions",
    "lookups",
    "rule",
    "views",
]
