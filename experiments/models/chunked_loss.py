"""The cross-entropy of a language model, and other functions of its logits, computed for chunks of tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    x_BLD: jax.Array,
    labels_BL: jax.Array,
    *,
    chunk: int,
    smoothing: float = 0.0,
    max_labels: int | None = None,
) -> jax.Array:
    r"""Returns each token's :math:`-\log p(\text{label})` from the last hidden states.

    Only the logits of `chunk` tokens per sequence exist at a time, in the forward pass and, recomputed, in the
    backward pass. The head is a function, so its weight may have an adapter, be tied to an embedding, or be quantized.

    Args:
      head: A function `[batch, tokens, width] -> [batch, tokens, vocabulary]` that closes over its weights.
      x_BLD: The input of the head.
      labels_BL: The label of each token; negative labels are ignored.
      chunk: The number of tokens per sequence and chunk.
      smoothing: The fraction of each label that is spread evenly over the vocabulary.
      max_labels: The largest number of labels that are not ignored in one sequence, as a static bound: the head then
        computes the logits of so many tokens per sequence, those with labels, instead of all. None has no bound.

    Returns:
      `float32[batch, tokens]`, 0 for ignored labels. Its sum divided by the number of labels is the usual loss. All
      are NaN in sequences with more labels than `max_labels`.

    Raises:
      ValueError: `chunk` or `max_labels` is less than 1.

    Example:
      >>> x, w = jnp.ones((1, 4, 2)), jnp.zeros((2, 8))
      >>> loss = cross_entropy(lambda x: x @ w, x, jnp.array([[1, 2, 3, -100]]), chunk=2)
      >>> [round(float(value), 3) for value in loss[0]]  # log 8, for 8 equal logits
      [2.079, 2.079, 2.079, 0.0]
    """
    if max_labels is not None and max_labels < 1:
        raise ValueError(f"max_labels={max_labels}, expected at least 1.")
    if max_labels is None or max_labels >= x_BLD.shape[1]:
        return _losses(head, x_BLD, labels_BL, chunk, smoothing)
    # Gathering within sequences preserves the batch axis and its sharding.
    labeled_BL = labels_BL >= 0
    loss_BK = _losses(head, *gather_labeled(x_BLD, labels_BL, max_labels), chunk, smoothing)
    rank_BL = jnp.cumsum(labeled_BL, axis=1, dtype=jnp.int32) - 1
    loss_BL = jnp.where(labeled_BL, jnp.take_along_axis(loss_BK, jnp.clip(rank_BL, 0, max_labels - 1), axis=1), 0)
    return jnp.where(rank_BL[:, -1:] < max_labels, loss_BL, jnp.nan)


def gather_labeled(x_BLD: jax.Array, labels_BL: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first `count` labeled tokens of each sequence and their labels; others where there are fewer.

    Example:
      >>> x, labels = gather_labeled(jnp.arange(4.0)[None, :, None], jnp.array([[-1, 7, -1, 8]]), 2)
      >>> x[..., 0].tolist(), labels.tolist()
      ([[1.0, 3.0]], [[7, 8]])
    """
    positions_BK = jnp.argsort(labels_BL < 0, axis=1, stable=True)[:, :count]
    x_BKD = jnp.take_along_axis(x_BLD, positions_BK[..., None], axis=1)
    return x_BKD, jnp.take_along_axis(labels_BL, positions_BK, axis=1)


def _losses(
    head: Callable[[jax.Array], jax.Array], x_BLD: jax.Array, labels_BL: jax.Array, chunk: int, smoothing: float
) -> jax.Array:
    def chunk_loss(x_BlD: jax.Array, labels_Bl: jax.Array) -> jax.Array:
        return _cross_entropy(head(x_BlD), labels_Bl, smoothing)

    return map_chunks(chunk_loss, x_BLD, labels_BL, chunk=chunk)


def map_chunks(fn: Callable[..., Any], *arrays: jax.Array, chunk: int) -> Any:
    """Computes a function of tokens for one chunk of each sequence at a time, and again in the backward pass.

    Args:
      fn: A function of chunks `[batch, tokens, …]` to values of tokens: a tree of arrays `[batch, tokens, …]`.
      *arrays: `[batch, length, …]`.
      chunk: The number of tokens per sequence and chunk.

    Returns:
      The values of all tokens, `[batch, length, …]`.

    Raises:
      ValueError: `chunk` is less than 1.

    Example:
      >>> map_chunks(lambda x, y: x + y, jnp.ones((1, 3)), jnp.ones((1, 3)), chunk=2).tolist()
      [[2.0, 2.0, 2.0]]
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}, expected at least 1.")
    batch, length = arrays[0].shape[:2]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
        # Chunks along the length preserve the batch axis and its sharding.
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def merge(values: jax.Array) -> jax.Array:
        return jnp.moveaxis(values, 0, 1).reshape(batch, count * chunk, *values.shape[3:])[:, :length]

    body = jax.checkpoint(fn)
    _, values = jax.lax.scan(lambda _, chunks: (None, body(*chunks)), None, tuple(map(split, arrays)))
    return jax.tree.map(merge, values)


def _cross_entropy(logits_BlV: jax.Array, labels_Bl: jax.Array, smoothing: float) -> jax.Array:
    logits_BlV = logits_BlV.astype(jnp.float32)
    # A comparison with every entry instead of an index: it fuses, and supports a sharded vocabulary.
    ids_11V = jnp.arange(logits_BlV.shape[-1])[None, None]
    label_logit_Bl = jnp.sum(jnp.where(ids_11V == labels_Bl[..., None], logits_BlV, 0), axis=-1)
    if smoothing:
        label_logit_Bl = (1 - smoothing) * label_logit_Bl + smoothing * jnp.mean(logits_BlV, axis=-1)
    return jnp.where(labels_Bl >= 0, jax.nn.logsumexp(logits_BlV, axis=-1) - label_logit_Bl, 0)
