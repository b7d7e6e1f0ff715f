"""A sentence classifier or regression: an encoder, the mean over its tokens, and a linear layer.

The heads of transformers are in :mod:`experiments.models.heads`.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import bert, checkpoint, deberta
from experiments.models.virtual import NO_VIRTUAL, Virtual
from lora_jax.peft import Names


class SentenceClassifier(nnx.Module):
    """Class logits of sentences; the new layer is initialized to zero.

    Args:
      encoder: Maps tokens and mask to a vector per token.
      width: The width of these vectors.
      classes: The number of classes.
      separator: The token after which the second text of a pair begins; None for models without segments.
      rngs: Required by the linear layer, not used.
    """

    def __init__(
        self,
        encoder: bert.Bert | deberta.Deberta,
        width: int,
        classes: int,
        separator: int | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder, self.separator = encoder, separator
        self.classifier = nnx.Linear(width, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(
        self, tokens_BL: jax.Array, mask_BL: jax.Array, *, virtual: Virtual = NO_VIRTUAL
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the logits `float[batch, classes]` and the sentence vectors `float[batch, width]`.

        The mean is over the tokens of the text, without virtual ones.
        """
        types_BL = None if self.separator is None else segments(tokens_BL, self.separator)
        x_BLD = self.encoder(tokens_BL, mask_BL, types_BL, virtual=virtual)
        sentence_BD = mean_pool(x_BLD[:, virtual.in_sequence :], mask_BL)
        return self.classifier(sentence_BD), sentence_BD


def load(directory: Path, classes: int, separator: int | None = None) -> SentenceClassifier:
    """Returns a classifier on the encoder of a checkpoint in Hugging Face layout: of BERT's family, or DeBERTa.

    Args:
      directory: The directory of the checkpoint.
      classes: The number of classes; one output for a regression.
      separator: See :class:`SentenceClassifier`.

    Raises:
      UserError: The directory's config or weights are missing, damaged or of another architecture.
    """
    is_deberta = isinstance(read_config(directory), deberta.DebertaConfig)
    encoder = deberta.load(directory) if is_deberta else bert.load(directory)
    return SentenceClassifier(encoder, encoder.config.hidden_size, classes, separator, rngs=nnx.Rngs(0))


def read_config(directory: Path) -> bert.BertConfig | deberta.DebertaConfig:
    """Returns the shape of the encoder of a checkpoint.

    Raises:
      UserError: The config is missing or damaged, or of another architecture.
    """
    content = checkpoint.read_config(directory)
    kind = deberta.DebertaConfig if content.get("model_type") == "deberta-v2" else bert.BertConfig
    return kind.from_json(content)


def encoder_names(config: bert.BertConfig, root: str = "encoder/") -> Names:
    """Returns the names of an encoder's weights, whose paths begin with `root`, in the bare encoder (`AutoModel` in
    transformers)."""
    prefix = config.names.prefix
    rows = [
        dataclasses.replace(weight, path=f"{root}{weight.path}", name=weight.name.removeprefix(prefix))
        for weight in config.names.weights
    ]
    return Names(tuple(rows))


def mean_pool(x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Returns the mean over the tokens of `mask_BL`; 0 without tokens."""
    mask_BL1 = mask_BL[..., None].astype(x_BLD.dtype)
    return jnp.sum(x_BLD * mask_BL1, axis=1) / jnp.maximum(jnp.sum(mask_BL1, axis=1), 1)


def segments(tokens_BL: jax.Array, separator: int) -> jax.Array:
    """Returns the segment of each token, `int[batch, length]`: 1 after the first separator, otherwise 0."""
    is_separator_BL = (tokens_BL == separator).astype(jnp.int32)
    return jnp.minimum(jnp.cumsum(is_separator_BL, axis=1) - is_separator_BL, 1)
