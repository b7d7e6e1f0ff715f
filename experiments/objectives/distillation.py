"""Distillation: the policy learns the distributions of a teacher over the next tokens."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from experiments.models.chunked_loss import gather_labeled, map_chunks
from experiments.objectives.log_probabilities import Batch, Loss
from experiments.objectives.reference import check_reference, split


def distillation(
    apply: Callable,
    teacher: Callable | None = None,
    *,
    mix: float = 0.0,
    temperature: float = 1.0,
    chunk: int = 128,
    max_labels: int | None = None,
    dropout: bool = False,
) -> Loss:
    r"""Returns the divergence of the policy :math:`p` and a teacher :math:`q`, summed over the tokens with labels.

    `mix` :math:`=\beta` selects it: 0 is the forward divergence :math:`KL(q\|p)`, 1 the reverse :math:`KL(p\|q)`, and
    between them Jensen and Shannon's, :math:`\beta\,KL(q\|m) + (1-\beta)\,KL(p\|m)` with
    :math:`m = \beta q + (1-\beta) p`. Logits of `chunk` tokens per row and model exist at a time, in the backward pass
    too.

    The labels only select tokens. On-policy distillation is this loss on answers that the policy samples, see
    :mod:`experiments.objectives.rollouts`.

    Args:
      apply: `apply_fn` of `lora.nnx.functional(model)`, with `model` a :class:`experiments.models.decoder.Decoder`.
      teacher: The function of another model with the same tokens, like `apply`; None is the same model. The base of the
        state is `Frozen(base, reference)` (:class:`experiments.objectives.reference.Frozen`): the reference is the
        teacher's delta, or with `teacher` its base, or a `Frozen` of its base and delta. Without a reference, the
        teacher is the base.
      mix: :math:`\beta`.
      temperature: Divides the logits of both.
      chunk: The number of tokens per row and chunk.
      max_labels: The largest number of labels of a row, as a static bound; the heads then compute logits only where
        there are labels. The loss is NaN if a row has more.
      dropout: Whether the adapters of the policy drop out, with a key.

    Returns:
      A loss of batches of rows (:data:`experiments.objectives.log_probabilities.Batch`). If the teacher reads another
      prompt, such as one with an instruction that the policy is to learn, the batch also has `teacher_tokens`,
      `teacher_labels` and optionally `teacher_segments`, whose labels are as many in each row. Weight: the number of
      labels. Metrics: `agreement`, the number of tokens that both find likeliest.

    Raises:
      ValueError: A value is out of range; (from the loss) the delta needs a base that `lora_jax.prepare` changed, and
        the teacher, which is of the same model, does not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def apply(base, tokens, segments, positions, readout):
      ...     return readout(lambda x: x @ base["w"], jnp.ones((*tokens.shape, 2)))
      >>> batch = {"tokens": jnp.array([[1, 2, 0]]), "labels": jnp.array([[2, 0, -1]])}
      >>> (loss, tokens), metrics = distillation(apply)({"w": jnp.eye(2)}, {}, batch, None)  # the teacher is the base
      >>> float(loss), int(tokens), int(metrics["agreement"])
      (0.0, 2, 2)

    References:
      Hinton et al., `Distilling the Knowledge <https://arxiv.org/abs/1503.02531>`_, 2015, Section 2
      Agarwal et al., `On-Policy Distillation <https://arxiv.org/abs/2306.13649>`_, 2023, Equation 1
    """
    if not 0 <= mix <= 1:
        raise ValueError(f"distillation(mix={mix}): expected a number from 0 (forward) to 1 (reverse).")
    if temperature <= 0:
        raise ValueError(f"distillation(temperature={temperature}): expected a positive number.")

    def divergences(models: Any, rows: Batch, others: Batch) -> tuple[jax.Array, jax.Array]:
        """Of the labeled tokens, and whether both find the same token likeliest, `[rows, labels]`."""

        def compare(head: Callable, x_BLD: jax.Array, other_head: Callable, z_BLD: jax.Array) -> Any:
            width = min(x_BLD.shape[1], z_BLD.shape[1], max_labels or x_BLD.shape[1])
            x_BKD, labels_BK = gather_labeled(x_BLD, rows["labels"], width)
            z_BKD, _ = gather_labeled(jax.lax.stop_gradient(z_BLD), others["labels"], width)

            def chunk_divergence(x_BkD: jax.Array, z_BkD: jax.Array) -> tuple[jax.Array, jax.Array]:
                logits = head(x_BkD), jax.lax.stop_gradient(other_head(z_BkD))
                p_BkV, q_BkV = (jax.nn.log_softmax(each.astype(jnp.float32) / temperature) for each in logits)
                return _divergence(p_BkV, q_BkV, mix), jnp.argmax(p_BkV, axis=-1) == jnp.argmax(q_BkV, axis=-1)

            values_BK, same_BK = map_chunks(chunk_divergence, x_BKD, z_BKD, chunk=chunk)
            counts, other_counts = (
                jnp.sum(each["labels"] >= 0, axis=1, keepdims=True, dtype=jnp.float32) for each in (rows, others)
            )
            fits_B1 = (counts == other_counts) & (counts <= width)
            return jnp.where(labels_BK >= 0, jnp.where(fits_B1, values_BK, jnp.nan), 0), same_BK & (labels_BK >= 0)

        def read(head: Callable, x_BLD: jax.Array) -> Any:
            return (teacher or apply)(
                models["teacher"], *_arguments(others), readout=lambda other, z_BLD: compare(head, x_BLD, other, z_BLD)
            )

        return apply(models["policy"], *_arguments(rows), readout=read)

    adapted = lora.adapt(divergences)

    def loss(base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> Any:
        base, reference = split(base)
        other_base, other_delta = (base, reference) if teacher is None else split(reference)
        if teacher is None:
            check_reference(delta, reference)
        models = {"policy": base, "teacher": jax.lax.stop_gradient(other_base)}
        nodes = {f"policy/{path}": node for path, node in delta.items()}
        nodes |= {f"teacher/{path}": node for path, node in other_delta.items()}
        rows = {name: batch[name] for name in ("tokens", "labels", "segments", "positions") if name in batch}
        others = {name: batch[f"teacher_{name}"] for name in rows if f"teacher_{name}" in batch} or rows
        values, same = adapted(models, nodes, rows, others, dropout_key=key if dropout else None)
        return (jnp.sum(values), jnp.sum(batch["labels"] >= 0, dtype=jnp.float32)), {
            "agreement": jnp.sum(same, dtype=jnp.float32)
        }

    return loss


def _arguments(batch: Batch) -> tuple[jax.Array | None, ...]:
    return batch["tokens"], batch.get("segments"), batch.get("positions")


def _divergence(p: jax.Array, q: jax.Array, mix: float) -> jax.Array:
    """Returns the divergence of two distributions over the last axis, given as log-probabilities."""
    if mix in (0, 1):
        first, second = (q, p) if mix == 0 else (p, q)
        return jnp.sum(jnp.exp(first) * (first - second), axis=-1)
    m = jnp.logaddexp(q + math.log(mix), p + math.log1p(-mix))
    return jnp.sum(mix * jnp.exp(q) * (q - m) + (1 - mix) * jnp.exp(p) * (p - m), axis=-1)
