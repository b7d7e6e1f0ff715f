"""A ViT image classifier in Flax NNX, which maps images to class logits.

Shapes are in the names: B images, P patches, L = P + 1 tokens, D width, H heads, K width of a head, F hidden
width. Images are `[batch, height, width, channels]`; transformers has the channels before height and width.

References:
  Dosovitskiy et al., `An Image is Worth 16x16 Words <https://arxiv.org/abs/2010.11929>`_, 2020
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import UserError
from experiments.models import checkpoint, stack
from experiments.models import config as config_json
from experiments.models.blocks import Attention, encoder_layers
from experiments.models.norm import LayerNorm
from experiments.models.options import DEFAULT, Options
from lora_jax.peft import CONV2D, LINEAR, SAME, Names, Weight


@dataclass(frozen=True)
class VitConfig:
    """The shape of a ViT for square images; fields have the names of Hugging Face's `config.json`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-12

    @classmethod
    @config_json.parsing
    def from_json(cls, config: Mapping[str, Any]) -> "VitConfig":
        """Reads the shape from the content of a `config.json`.

        Raises:
          UserError: A field is missing or describes something that this model does not support.
        """
        shape = config_json.read(cls, config, {"model_type": ("vit",), "hidden_act": ("gelu",)})
        config_json.check_heads(shape)
        if not shape.patch_size or shape.image_size % shape.patch_size:
            raise UserError(
                f"config.json: image_size {shape.image_size} is not a multiple of patch_size {shape.patch_size}"
            )
        return shape

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def names(self) -> Names:
        """The names of the weights in a checkpoint of this model."""
        return NAMES


class Embeddings(nnx.Module):
    """The class token and a vector per patch, with position embeddings."""

    def __init__(self, config: VitConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        small = nnx.initializers.normal(0.02)
        self.dtype = options.dtype
        self.patch = nnx.Conv(
            config.num_channels, width, patch, strides=patch, padding="VALID", dtype=options.dtype, rngs=rngs
        )
        self.image = nnx.Param(small(rngs.params(), (1, 1, width)))
        self.position = nnx.Param(small(rngs.params(), (1, 1 + config.patches, width)))
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        patches_BHWD = self.patch(images_BHWC)
        batch, *_, width = patches_BHWD.shape
        image_B1D = jnp.broadcast_to(self.image[...].astype(self.dtype), (batch, 1, width))
        x_BLD = jnp.concatenate([image_B1D, patches_BHWD.reshape(batch, -1, width)], axis=1)
        return self.dropout(x_BLD + self.position[...].astype(self.dtype))


class Encoder(nnx.Module):
    """The sequence of layers, and a final normalization."""

    def __init__(self, config: VitConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.options = options

        def attention(rngs: nnx.Rngs) -> Attention:
            return Attention(
                config.hidden_size, config.num_attention_heads, options, qkv_bias=config.qkv_bias, rngs=rngs
            )

        self.layers = encoder_layers(config, attention, options, norm_first=True, dropout=dropout, rngs=rngs)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        return self.norm(stack.run(self.layers, x_BLD, options=self.options)[0])


class VitClassifier(nnx.Module):
    """Class logits of images, from the vector of the class token.

    Args:
      config: The shape.
      classes: The number of logits.
      options: How the model computes.
      dropout: Rate on embeddings and on both blocks of a layer while training; attention weights are not dropped.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(
        self,
        config: VitConfig,
        classes: int,
        options: Options = DEFAULT,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embeddings = Embeddings(config, options, dropout=dropout, rngs=rngs)
        self.encoder = Encoder(config, options, dropout=dropout, rngs=rngs)
        small = nnx.initializers.normal(0.02)
        self.classifier = nnx.Linear(config.hidden_size, classes, dtype=options.dtype, kernel_init=small, rngs=rngs)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the logits `float32[batch, classes]` of images `float[batch, height, width, channels]`."""
        return self.classifier(self.hidden(images_BHWC)[:, 0]).astype(jnp.float32)

    def hidden(self, images_BHWC: jax.Array) -> jax.Array:
        """Returns the last hidden states of the class token and of the patches, row by row.

        Raises:
          ValueError: The images differ in size from those that the positions were trained for.
        """
        size, channels = self.config.image_size, self.config.num_channels
        if images_BHWC.shape[1:] != (size, size, channels):
            raise ValueError(
                f"images are {images_BHWC.shape[1:]}, expected (height, width, channels) = {(size, size, channels)}: "
                "positions are not interpolated, so resize the images"
            )
        return self.encoder(self.embeddings(images_BHWC))


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    classes: int | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
) -> VitClassifier:
    """Returns the classifier of a checkpoint in Hugging Face layout; see :func:`checkpoint.load`.

    Args:
      directory: The directory of the checkpoint.
      options: How the model computes.
      classes: The number of classes of a new last layer; None loads the checkpoint's.
      seed: The seed of the new layer.
      dropout: See :class:`VitClassifier`.
      dtype: See :func:`checkpoint.load`.
      sharding: See :func:`checkpoint.load`.

    Raises:
      UserError: The config or the weights are missing, damaged or of another architecture.
    """
    content = checkpoint.read_config(directory)
    config = VitConfig.from_json(content)
    count = config_json.count_classes(content) if classes is None else classes
    return checkpoint.load(
        lambda rngs: VitClassifier(config, count, options, dropout=dropout, rngs=rngs),
        NAMES,
        directory,
        dtype=dtype,
        sharding=sharding,
        unused=UNUSED,
        fresh=checkpoint.NOTHING if classes is None else "^classifier/",
        seed=seed,
    )


# The parts of a layer here, in checkpoint files, and in transformers 5, which renames them while loading.
_LINEAR_PARTS = (
    ("attention/query", "attention.attention.query", "attention.q_proj"),
    ("attention/key", "attention.attention.key", "attention.k_proj"),
    ("attention/value", "attention.attention.value", "attention.v_proj"),
    ("attention/output", "attention.output.dense", "attention.o_proj"),
    ("feed_forward/up", "intermediate.dense", "mlp.fc1"),
    ("feed_forward/down", "output.dense", "mlp.fc2"),
)
_NORMS = (
    ("attention_norm", "layernorm_before", "layernorm_before"),
    ("feed_forward_norm", "layernorm_after", "layernorm_after"),
)


def _rows(parts: tuple[tuple[str, str, str], ...], variable: str, parameter: str, layout: str = SAME) -> list[Weight]:
    """Returns the rows of a kind of variable in all layers."""
    return [
        Weight(
            f"encoder/layers/{{layer}}/{part}/{variable}",
            f"vit.encoder.layer.{{layer}}.{in_files}.{parameter}",
            layout,
            in_model=f"vit.layers.{{layer}}.{in_model}.{parameter}",
        )
        for part, in_files, in_model in parts
    ]


NAMES = Names(
    (
        Weight("embeddings/image", "vit.embeddings.cls_token"),
        Weight("embeddings/position", "vit.embeddings.position_embeddings"),
        Weight("embeddings/patch/kernel", "vit.embeddings.patch_embeddings.projection.weight", CONV2D),
        Weight("embeddings/patch/bias", "vit.embeddings.patch_embeddings.projection.bias"),
        *_rows(_LINEAR_PARTS, "kernel", "weight", LINEAR),
        *_rows(_LINEAR_PARTS, "bias", "bias"),
        *_rows(_NORMS, "scale", "weight"),
        *_rows(_NORMS, "bias", "bias"),
        Weight("encoder/norm/scale", "vit.layernorm.weight"),
        Weight("encoder/norm/bias", "vit.layernorm.bias"),
        Weight("classifier/kernel", "classifier.weight", LINEAR),
        Weight("classifier/bias", "classifier.bias"),
    ),
    prefix="vit.",
)
UNUSED = r"^pooler\.|^decoder\.|^embeddings\.mask_token$|^classifier\."
