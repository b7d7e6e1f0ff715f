"""Classification and regression of texts from a decoder's last token.

Equivalent to `LlamaForSequenceClassification` in transformers and its counterparts for the other decoders: a linear
layer without a bias replaces the head of the language model.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import checkpoint, families
from experiments.models import config as config_json
from experiments.models.decoder import Decoder
from experiments.models.options import DEFAULT, Options
from experiments.models.virtual import NO_VIRTUAL, Virtual
from lora_jax.peft import LINEAR, Names, Weight
from lora_jax.quantization import Format


class DecoderClassifier(nnx.Module):
    """Logits of a text from the hidden state of its last token.

    Args:
      decoder: The decoder; its head is not used.
      width: The width of its hidden states.
      classes: The number of logits; one for a regression.
      options: How the model computes.
      rngs: Keys of the random initial weights.
    """

    def __init__(self, decoder: Decoder, width: int, classes: int, options: Options = DEFAULT, *, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.decoder, self.options = decoder, options
        self.score = nnx.Linear(width, classes, use_bias=False, dtype=options.dtype, kernel_init=small, rngs=rngs)

    @property
    def trained_length(self) -> int | None:
        """The longest sequence that the decoder's checkpoint supports; None if unknown."""
        return self.decoder.trained_length

    def __call__(
        self,
        tokens_BL: jax.Array,
        mask_BL: jax.Array | None = None,
        types_BL: jax.Array | None = None,
        *,
        virtual: Virtual = NO_VIRTUAL,
    ) -> jax.Array:
        """Returns the logits of texts.

        Args:
          tokens_BL: Token ids, `int[batch, length]`.
          mask_BL: True (or 1) at tokens, False at padding, on either side. None: no padding.
          types_BL: Ignored, since decoders have no segments.
          virtual: Virtual tokens before the text.

        Returns:
          `float32[batch, classes]`.
        """
        del types_BL
        mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL.astype(bool)
        x_BLD = self.decoder.hidden(tokens_BL, mask_BL, virtual=virtual)
        last_B = jnp.max(jnp.where(mask_BL, jnp.arange(mask_BL.shape[1])[None], 0), axis=1)
        last_BD = jnp.take_along_axis(x_BLD, last_B[:, None, None], axis=1)[:, 0]
        return self.score(last_BD).astype(jnp.float32)


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    classes: int | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
    rules: Mapping[str, Format | None] | None = None,
    stored: bool = False,
) -> DecoderClassifier:
    """Returns a classifier on the decoder of a checkpoint in Hugging Face layout.

    Args:
      directory: The directory of the checkpoint of a classifier or of a language model.
      options: How the model computes.
      classes: The number of classes of a new last layer; None loads the checkpoint's.
      seed: The seed of the new layer.
      dtype: See :func:`checkpoint.load`.
      sharding: See :func:`checkpoint.load`.
      rules: See :func:`checkpoint.load`.
      stored: See :func:`checkpoint.load`.

    Raises:
      UserError: The config or the weights are missing, damaged or of another architecture.
    """
    content = headless(checkpoint.read_config(directory))
    family = families.get_family(content)
    shape = family.shape(content)
    count = config_json.count_classes(content) if classes is None else classes

    return checkpoint.load(
        lambda rngs: build(family, shape, count, options, rngs=rngs),
        names(content),
        directory,
        dtype=dtype,
        sharding=sharding,
        unused=rf"{families.UNUSED}|^lm_head\.|^score\.",
        fresh=checkpoint.NOTHING if classes is None else "^score/",
        seed=seed,
        rules=rules,
        example=(jax.ShapeDtypeStruct((1, 8), jnp.int32),),
        stored=stored,
    )


def build(family: families.Family, shape: Any, classes: int, options: Options, *, rngs: nnx.Rngs) -> DecoderClassifier:
    """Returns a classifier on a decoder of a family, with random weights."""
    decoder = family.build(shape, options, rngs=rngs)
    width = shape.n_embd if hasattr(shape, "n_embd") else shape.hidden_size
    return DecoderClassifier(decoder, width, classes, options, rngs=rngs)


def names(config: Mapping[str, Any]) -> Names:
    """Returns the names of a :class:`DecoderClassifier`'s weights in a checkpoint with this `config.json`."""
    content = headless(config)
    family = families.get_family(content)
    table = family.names(family.shape(content))
    rows = (dataclasses.replace(row, path=f"decoder/{row.path}", tied=()) for row in table.weights)
    return dataclasses.replace(table, weights=(*rows, Weight("score/kernel", "score.weight", LINEAR)))


def headless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a decoder without a head, which is that of a tied head."""
    return {**config, "tie_word_embeddings": True}
