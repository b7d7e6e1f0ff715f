"""Filters the tokens that sampling may select."""

import jax
import jax.numpy as jnp


def filter_logits(
    logits_BV: jax.Array,
    *,
    temperature: float | jax.Array | None = None,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Divides logits by the temperature, then sets all but the likeliest to -∞, in transformers' order.

    Args:
      logits_BV: Logits of the next tokens.
      temperature: Values below 1 sharpen the distribution, values above 1 flatten it.
      top_k: Keeps this many tokens, and those as likely as the last of them. Static.
      top_p: Keeps the likeliest tokens until their total probability reaches this, at least one.

    Example:
      >>> filter_logits(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_p=0.6)[0, 2].item()
      -inf
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if temperature is not None:
        logits_BV = logits_BV / temperature
    if top_k is not None:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p is not None:
        order_BV = jnp.argsort(logits_BV, axis=-1)  # the least likely first
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        unlikely_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) <= 1 - top_p
        unlikely_BV = unlikely_BV.at[:, -1].set(False)
        ranks_BV = jnp.argsort(order_BV, axis=-1)
        logits_BV = jnp.where(jnp.take_along_axis(unlikely_BV, ranks_BV, axis=-1), -jnp.inf, logits_BV)
    return logits_BV
