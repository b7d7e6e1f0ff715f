"""Classification and regression of sentences and pairs of sentences from an encoder's first token.

Equivalent to `BertForSequenceClassification` in transformers and its counterparts for the other encoders. Heads of
decoders are in :mod:`experiments.models.decoder_heads`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import UserError
from experiments.models import bert, bert_names, checkpoint, deberta
from experiments.models import config as config_json
from experiments.models.options import DEFAULT, Options
from experiments.models.virtual import NO_VIRTUAL, Virtual
from lora_jax.peft import LINEAR, Names, Weight

Config = bert.BertConfig | deberta.DebertaConfig


class SequenceClassifier(nnx.Module):
    """Logits of a text from the vector of its first token: a dense layer, an activation, and a linear layer.

    Args:
      encoder: Maps tokens, mask and segment ids to a vector per token.
      config: The encoder's shape.
      classes: The number of logits; one for a regression.
      options: How the model computes.
      dropout: Rate before both layers while training.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(
        self,
        encoder: bert.Bert | deberta.Deberta,
        config: Config,
        classes: int,
        options: Options = DEFAULT,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        width = config.hidden_size
        small = nnx.initializers.normal(0.02)
        self.activation = _HEADS[config.model_type].activation
        self.encoder = encoder
        self.pooler = nnx.Linear(width, width, dtype=options.dtype, kernel_init=small, rngs=rngs)
        self.classifier = nnx.Linear(width, classes, dtype=options.dtype, kernel_init=small, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(
        self,
        tokens_BL: jax.Array,
        mask_BL: jax.Array,
        types_BL: jax.Array | None = None,
        *,
        virtual: Virtual = NO_VIRTUAL,
    ) -> jax.Array:
        """Returns logits `float32[batch, classes]`; the arguments are those of the encoder.

        With virtual tokens in the sequence, the first token is a virtual one, as in PEFT.
        """
        first_BD = self.encoder(tokens_BL, mask_BL, types_BL, virtual=virtual)[:, 0]
        pooled_BD = self.activation(self.pooler(self.dropout(first_BD)))
        return self.classifier(self.dropout(pooled_BD)).astype(jnp.float32)


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    classes: int | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
) -> SequenceClassifier:
    """Returns a classifier on the encoder of a checkpoint in Hugging Face layout.

    Args:
      directory: The directory of the checkpoint.
      options: How the model computes.
      classes: The number of classes of a new last layer, which follows the checkpoint's dense layer or, without one, a
        new dense layer; None loads the whole head from the checkpoint.
      seed: The seed of the new layers.
      dropout: Rate in the encoder and in the head.
      dtype: See :func:`checkpoint.load`.
      sharding: See :func:`checkpoint.load`.

    Raises:
      UserError: The config or the weights are missing, damaged or of another architecture.
    """
    content = checkpoint.read_config(directory)
    head = _HEADS.get(content.get("model_type", "bert"))
    if head is None:
        kinds = ", ".join(map(repr, _HEADS))
        raise UserError(f"config.json: model_type is {content['model_type']!r}, supported is one of {kinds}")
    config = head.config(content)
    count = config_json.count_classes(content) if classes is None else classes

    def build(rngs: nnx.Rngs) -> SequenceClassifier:
        encoder = head.encoder(config, options, dropout=dropout, rngs=rngs)
        return SequenceClassifier(encoder, config, count, options, dropout=dropout, rngs=rngs)

    return checkpoint.load(
        build,
        names(config),
        directory,
        dtype=dtype,
        sharding=sharding,
        spellings=head.spellings,
        unused=head.unused,
        fresh=checkpoint.NOTHING if classes is None else "^classifier/",
        optional=checkpoint.NOTHING if classes is None else "^pooler/",
        seed=seed,
    )


def names(config: Config) -> Names:
    """Returns the names of a :class:`SequenceClassifier`'s weights in a checkpoint."""
    head, encoder = _HEADS[config.model_type], config.names
    return Names(
        (
            *(dataclasses.replace(weight, path=f"encoder/{weight.path}") for weight in encoder.weights),
            Weight("pooler/kernel", f"{head.pooler}.weight", LINEAR),
            Weight("pooler/bias", f"{head.pooler}.bias"),
            Weight("classifier/kernel", f"{head.classifier}.weight", LINEAR),
            Weight("classifier/bias", f"{head.classifier}.bias"),
        ),
        prefix=encoder.prefix,
    )


@dataclasses.dataclass(frozen=True)
class _Head:
    """An architecture's encoder and the properties of its head."""

    encoder: Callable[..., Any]
    config: Callable[..., Any]
    spellings: tuple[tuple[str, str], ...]
    unused: str
    pooler: str
    classifier: str
    activation: Callable[[jax.Array], jax.Array]


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


_BERT = (bert.Bert, bert.BertConfig.from_json, bert_names.SPELLINGS, bert_names.UNUSED)
_DEBERTA = (deberta.Deberta, deberta.DebertaConfig.from_json, (), deberta.UNUSED)
_HEADS = {
    "bert": _Head(*_BERT, "bert.pooler.dense", "classifier", jnp.tanh),
    "roberta": _Head(*_BERT, "classifier.dense", "classifier.out_proj", jnp.tanh),
    "xlm-roberta": _Head(*_BERT, "classifier.dense", "classifier.out_proj", jnp.tanh),
    "camembert": _Head(*_BERT, "classifier.dense", "classifier.out_proj", jnp.tanh),
    "electra": _Head(*_BERT, "classifier.dense", "classifier.out_proj", _exact_gelu),
    "distilbert": _Head(*_BERT, "pre_classifier", "classifier", jax.nn.relu),
    "deberta-v2": _Head(*_DEBERTA, "pooler.dense", "classifier", _exact_gelu),
}
