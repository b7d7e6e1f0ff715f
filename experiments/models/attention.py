"""Scaled dot-product attention with a choice of kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from experiments.models.options import AttentionKernel, Platform, Shards

_PLATFORMS = {"cudnn": "gpu", "flash": "tpu"}
# Blocks of the TPU kernel are multiples of the 128 lanes of a register. Larger blocks amortize the loop overhead; the
# largest fits in vector memory together with the accumulators of the backward pass.
_BLOCKS = (512, 256, 128)


def attend(
    q_BLHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    mask_B1LT: jax.Array | None = None,
    *,
    segments_BL: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    kernel: AttentionKernel = "xla",
    platform: Platform | None = None,
    shards: Shards | None = None,
) -> jax.Array:
    """Computes scaled dot-product attention.

    Args:
      q_BLHK: `[batch, queries, heads, width]`.
      k_BTGK: `[batch, keys, groups, width]`; heads / groups heads share a group (grouped-query attention).
      v_BTGK: `[batch, keys, groups, width]`.
      mask_B1LT: True where a query attends to a key, broadcast over heads; None does not mask. Not for 'flash'.
      segments_BL: For self-attention: tokens attend to tokens of the same segment only. A padding mask is a special
        case, in which padding attends to padding.
      causal: Whether query i attends to keys 0 … i only.
      window: With `causal`, query i attends to the last `window` keys up to its own only.
      scale: The scale of the products; None is 1/√width.
      kernel: See :class:`Options`.
      platform: See :class:`Options`.
      shards: See :class:`Options`.

    Returns:
      `[batch, queries, heads, width]`.

    Raises:
      ValueError: The kernel does not support the platform, the shapes, the dtype or the mask.
    """
    if window is not None and not causal:
        raise ValueError(f"window={window} requires causal=True.")
    _check(kernel, q_BLHK, k_BTGK, mask_B1LT, platform)
    if kernel == "flash":
        local = functools.partial(_flash, causal=causal, window=window, scale=scale)
        if shards is not None:  # XLA cannot partition a kernel, so each device runs it on its examples and heads
            spec = jax.P(shards.batch, None, shards.heads, None)
            in_specs = (spec, spec, spec, None if segments_BL is None else jax.P(shards.batch, None))
            # The kernel has no information about the mesh axes along which its results vary.
            local = jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)
        return local(q_BLHK, k_BTGK, v_BTGK, segments_BL)
    if segments_BL is not None:
        same_B1LL = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
        mask_B1LT = same_B1LL if mask_B1LT is None else mask_B1LT & same_B1LL
    if kernel == "cudnn" and mask_B1LT is not None:  # cuDNN broadcasts over batch and heads only
        mask_B1LT = jnp.broadcast_to(mask_B1LT, (*mask_B1LT.shape[:2], q_BLHK.shape[1], k_BTGK.shape[1]))
    with jax.numpy_dtype_promotion("standard"):  # it computes float32 scores from bfloat16 inputs
        return jax.nn.dot_product_attention(
            q_BLHK,
            k_BTGK,
            v_BTGK,
            mask=mask_B1LT,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            scale=scale,
            implementation="cudnn" if kernel == "cudnn" else "xla",
        )


def _flash(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segments_BL: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> jax.Array:
    """Computes attention by JAX's splash attention, which skips fully masked blocks."""
    _, length, heads, width = q_BLHK.shape
    square = (length, length)
    if window is not None:
        mask = splash.LocalMask(square, window_size=(window - 1, 0), offset=0)
    else:
        mask = splash.CausalMask(square) if causal else splash.FullMask(square)
    block = next(size for size in _BLOCKS if length % size == 0)
    backward = {"block_q_dkv": block, "block_kv_dkv": block, "block_q_dq": block, "block_kv_dq": block}
    kernel: Any = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, **backward),  # pyrefly: ignore[bad-argument-type]
        head_shards=1,
        q_seq_shards=1,
    )
    q_BLHK = q_BLHK * jnp.asarray(width**-0.5 if scale is None else scale, q_BLHK.dtype)  # the kernel does not scale
    q_BHLK, k_BGLK, v_BGLK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    if segments_BL is None:
        mixed_BHLK = jax.vmap(kernel)(q_BHLK, k_BGLK, v_BGLK)
    else:
        segments_BL = segments_BL.astype(jnp.int32)
        mixed_BHLK = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))(
            q_BHLK, k_BGLK, v_BGLK, segments_BL
        )
    return mixed_BHLK.swapaxes(1, 2)


def _check(
    kernel: AttentionKernel, q_BLHK: jax.Array, k_BTGK: jax.Array, mask: jax.Array | None, platform: Platform | None
) -> None:
    if kernel == "xla":
        return
    if kernel not in _PLATFORMS:
        raise ValueError(f"attention={kernel!r}; the kernels are 'xla', {', '.join(map(repr, _PLATFORMS))}.")
    platform = platform or jax.default_backend()  # pyrefly: ignore[bad-assignment]
    if platform != _PLATFORMS[kernel]:
        raise ValueError(
            f"attention={kernel!r} runs on {_PLATFORMS[kernel]}, this is {platform}; attention='xla' runs everywhere. "
            f"To compile ahead of time, set platform={_PLATFORMS[kernel]!r}."
        )
    _, queries, heads, width = q_BLHK.shape
    keys, dtype = k_BTGK.shape[1], q_BLHK.dtype
    problems = []
    if kernel == "cudnn":
        if dtype not in (jnp.bfloat16, jnp.float16):
            problems.append(f"bfloat16 or float16, got {dtype}")
        if width % 8:
            problems.append(f"heads whose width is a multiple of 8, got {width}")
    else:
        if mask is not None:
            problems.append("segments, no mask")
        if queries != keys or queries % _BLOCKS[-1]:
            problems.append(
                f"as many queries as keys, a multiple of {_BLOCKS[-1]}, got {queries} queries and {keys} keys"
            )
        if dtype not in (jnp.bfloat16, jnp.float32):
            problems.append(f"bfloat16 or float32, got {dtype}")
    if heads % k_BTGK.shape[2]:
        problems.append(f"heads in equal groups, got {heads} heads and {k_BTGK.shape[2]} groups")
    if problems:
        raise ValueError(f"attention={kernel!r} takes {'; and '.join(problems)}.")
