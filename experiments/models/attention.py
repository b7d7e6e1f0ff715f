"""Scaled dot-product attention by the kernel that a platform has."""

import jax

from experiments.models.options import AttentionKernel


def attend(
    q_BLHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask_B1LT: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    kernel: AttentionKernel = "xla",
) -> jax.Array:
    """Mixes values by the softmax of scaled products of queries and keys.

    Args:
      q_BLHK: `[batch, queries, heads, width]`.
      k_BTGK: `[batch, keys, groups, width]`; each group serves heads / groups heads (grouped-query attention).
      v_BTGK: Like the keys.
      mask_B1LT: True where a query may see a key, broadcast over heads; None sees all.
      causal: Query i sees keys 0 … i only.
      window: With `causal`, query i sees the last `window` keys up to its own only.
      scale: Of the products; None is 1/√width.
      kernel: See :class:`Options`.

    Returns:
      `[batch, queries, heads, width]`.
    """
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BLHK,
        k_BTGK,
        v_BTGK,
        mask=mask_B1LT,
        is_causal=causal,
        local_window_size=local,
        scale=scale,
        implementation="cudnn" if kernel == "cudnn" else "xla",
    )
