"""The convolution beside the first layer of DeBERTa-v2's large models (XLarge and XXLarge).

Shapes are in the names: B examples, L tokens, D width.

References:
  He et al., `DeBERTa <https://arxiv.org/abs/2006.03654>`_, 2020, and the authors' notes on its version 2
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.norm import LayerNorm
from experiments.models.options import Options


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, "gelu": _gelu}
"""The activations by their names in `config.json`."""


class Convolution(nnx.Module):
    """The normalized sum of the first layer's output and a convolution of its input over the tokens.

    Args:
      width: Of tokens.
      size: The number of tokens under the kernel.
      activation: A name in :data:`ACTIVATIONS`.
      epsilon: Of the normalization.
      options: How to compute.
      dropout: Rate on the convolution while training.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(
        self,
        width: int,
        size: int,
        activation: str,
        epsilon: float,
        options: Options,
        *,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        self.activation = ACTIVATIONS[activation]
        self.conv = nnx.Conv(width, width, (size,), padding=(size - 1) // 2, dtype=options.dtype, rngs=rngs)
        self.norm = LayerNorm(width, epsilon, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, inputs_BLD: jax.Array, outputs_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        mask_BL1 = mask_BL[..., None]
        x_BLD = self.conv(jnp.where(mask_BL1, inputs_BLD, 0))
        x_BLD = self.activation(self.dropout(jnp.where(mask_BL1, x_BLD, 0)))
        return jnp.where(mask_BL1, self.norm(outputs_BLD + x_BLD), 0)
