"""Contrastive embeddings: texts near their positives, far from the positives of the other texts of the batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from experiments.models.classifier import mean_pool
from experiments.objectives.log_probabilities import Loss, summed
from experiments.objectives.reference import split


def embeddings(apply: Callable, *, dropout: bool = False) -> Callable[..., jax.Array]:
    """Returns the function that embeds texts as MiniLM does: the mean over the tokens, scaled to unit length.

    Args:
      apply: `apply_fn` of `lora.nnx.functional(encoder)`: a vector per token, of tokens and mask.
      dropout: Whether the adapters drop out, with a key.

    Returns:
      `embed(base, delta, tokens, mask, key=None)`, `float32[..., width]` of `[..., length]`.

    References:
      Reimers and Gurevych, `Sentence-BERT <https://arxiv.org/abs/1908.10084>`_, 2019, Section 3
    """
    adapted = lora.adapt(apply)

    def embed(base: Any, delta: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array | None = None) -> jax.Array:
        tokens_BL, mask_BL = tokens.reshape(-1, tokens.shape[-1]), mask.reshape(-1, tokens.shape[-1])
        x_BLD = adapted(base, delta, tokens_BL, mask_BL, dropout_key=key if dropout else None)
        x_BD = mean_pool(x_BLD.astype(jnp.float32), mask_BL)
        return _unit(x_BD).reshape(*tokens.shape[:-1], -1)

    return embed


def contrastive(embed: Callable[..., jax.Array], *, temperature: float = 0.05, symmetric: bool = False) -> Loss:
    r"""Returns the loss of in-batch negatives, which is sentence-transformers' MultipleNegativesRankingLoss.

    .. math:: -\log \frac{\exp(\cos(a_i, d_i)/\tau)}{\sum_j \exp(\cos(a_i, d_j)/\tau)}

    over the positives :math:`d_j` of all anchors of the batch, and their negatives. A batch may hold a
    text twice (sentence-transformers avoids such batches): left out are copies of :math:`a_i`, of :math:`d_i`, and of
    the positives of anchors that equal :math:`a_i`. The loss depends on the whole batch:
    microbatches (`accumulate`) and the devices of `pmap` have their own negatives only, and therefore another loss. On
    a mesh the negatives are those of the whole batch.

    Args:
      embed: From :func:`embeddings`.
      temperature: :math:`\tau`; sentence-transformers' scale is its inverse.
      symmetric: Whether to average the loss with that of finding the anchor of each positive.

    Returns:
      A loss of batches with anchors `tokens` and `mask`, `[examples, length]`, and documents `document_tokens` and
      `document_mask`, `[examples, 1 + negatives, length]`, the positive first. Weight: the number of examples. Metrics:
      `accuracy`, the number of anchors whose positive is the nearest.

    Raises:
      ValueError: `temperature` is not positive.

    Example:
      >>> embed = lambda base, delta, tokens, mask, key: jax.nn.one_hot(tokens[..., 0], 2)
      >>> tokens, mask = jnp.array([[0], [1]]), jnp.ones((2, 1))
      >>> batch = {"tokens": tokens, "mask": mask, "document_tokens": tokens[:, None], "document_mask": mask[:, None]}
      >>> (loss, examples), metrics = contrastive(embed, temperature=1)({}, {}, batch, None)
      >>> round(float(loss), 4), int(examples), int(metrics["accuracy"])  # 2 log(1 + 1/e)
      (0.6265, 2, 2)

    References:
      van den Oord et al., `InfoNCE <https://arxiv.org/abs/1807.03748>`_, 2018, Equation 4
      Henderson et al., `Smart Reply <https://arxiv.org/abs/1705.00652>`_, 2017, Section 4.4 (in-batch negatives)
    """
    if temperature <= 0:
        raise ValueError(f"contrastive(temperature={temperature}): expected a positive number.")

    def loss(base: Any, delta: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Any:
        base, keys = split(base)[0], (None, None) if key is None else jax.random.split(key)
        anchors_ND = _unit(embed(base, delta, batch["tokens"], batch["mask"], keys[0]))
        documents_NKD = _unit(embed(base, delta, batch["document_tokens"], batch["document_mask"], keys[1]))
        there_NK = jnp.any(batch["document_mask"] > 0, axis=-1)
        valid_N = jnp.any(batch["mask"] > 0, axis=-1) & there_NK[:, 0]
        # All positives, then all first negatives, and so on: the positive of anchor i is document i.
        documents_MD = jnp.swapaxes(documents_NKD, 0, 1).reshape(-1, documents_NKD.shape[-1])
        scores_NM = anchors_ND @ documents_MD.T / temperature
        used_NM = (there_NK & valid_N[:, None]).T.reshape(1, -1) & ~_right(batch)
        scores_NM = jnp.where(used_NM, scores_NM, -jnp.inf)
        own_N = jnp.where(valid_N, jnp.diagonal(scores_NM), 0)
        losses_N = _log_sum(scores_NM, valid_N) - own_N
        if symmetric:
            square_NN = jnp.where(valid_N[None], scores_NM[:, : len(valid_N)].T, -jnp.inf)
            losses_N = (losses_N + _log_sum(square_NN, valid_N) - own_N) / 2
        metrics = {
            "accuracy": jnp.sum(
                valid_N & (jnp.argmax(scores_NM, axis=1) == jnp.arange(len(valid_N))), dtype=jnp.float32
            )
        }
        return (summed(losses_N, valid_N), jnp.sum(valid_N, dtype=jnp.float32)), metrics

    return loss


def _right(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Returns which documents, besides its own positive, are no negatives of an anchor, `bool[anchors, documents]`."""
    anchors_NL = jnp.where(batch["mask"] > 0, batch["tokens"], -1)
    documents_NKL = jnp.where(batch["document_mask"] > 0, batch["document_tokens"], -1)
    documents_ML = jnp.swapaxes(documents_NKL, 0, 1).reshape(-1, documents_NKL.shape[-1])
    count, total = len(anchors_NL), len(documents_ML)
    same_anchor_NN = _equal(anchors_NL, anchors_NL).astype(jnp.float32)
    same_document_NM = _equal(documents_ML[:count], documents_ML).astype(jnp.float32)
    right_NM = (same_anchor_NN @ same_document_NM > 0) | _equal(anchors_NL, documents_ML)
    return right_NM & ~jnp.eye(count, total, dtype=bool)


def _equal(texts_NL: jax.Array, others_ML: jax.Array) -> jax.Array:
    """Returns which texts are equal, `bool[texts, others]`; -1 is no token."""
    length = max(texts_NL.shape[1], others_ML.shape[1])
    one, other = (jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=-1) for x in (texts_NL, others_ML))
    return jnp.all(one[:, None] == other[None], axis=-1)


def _log_sum(scores_NM: jax.Array, valid_N: jax.Array) -> jax.Array:
    """Returns the log of the summed exponentials of valid rows; the others are finite, as their gradients."""
    return jax.nn.logsumexp(jnp.where(valid_N[:, None], scores_NM, 0), axis=1)


def _unit(x: jax.Array) -> jax.Array:
    """Returns vectors of unit length; zero vectors stay zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
