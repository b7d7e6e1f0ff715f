"""What each JAX primitive does to an adapted weight."""

from lora_jax.transform.rules import contractions, control_flow, convolutions, lookups, views

RULES = {
    **views.RULES,
    **lookups.RULES,
    **contractions.RULES,
    **convolutions.RULES,
    **control_flow.RULES,
}
