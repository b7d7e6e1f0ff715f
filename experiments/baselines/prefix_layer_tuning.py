"""Prefix-layer tuning (PreLayer in the LoRA paper): the input of every layer is trained at virtual tokens.

What a layer computes at these tokens is replaced before the next layer. The keys and values of the virtual tokens are
therefore those of the layer's weights, unlike in :mod:`experiments.baselines.prefix_tuning`, which trains them.

References:
  Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §5.1
"""

from collections.abc import Callable

import jax

from experiments.baselines import virtual_tokens
from experiments.models.virtual import Shape, Virtual

NAME = "layer_inputs"
"""The entry of the parameters, and the path of the trained inputs."""


def init(key: jax.Array, shape: Shape, length: int) -> jax.Array:
    """Returns random inputs of all layers, whose features have unit variance, as after a normalization.

    Args:
      key: A PRNG key.
      shape: The sizes of the model, `model.shape` of a decoder or an encoder.
      length: The number of virtual tokens.

    Returns:
      `float32[layers, length, width]`.
    """
    if length < 1:
        raise ValueError(f"length={length}, expected at least 1.")
    return jax.random.normal(key, (shape.layers, length, shape.width))


def adapt(apply_fn: Callable) -> Callable:
    """Returns a function like `apply_fn` that also reads inputs of layers from its parameters.

    Args:
      apply_fn: From `lora.nnx.functional(model)` of a decoder, an encoder or a classifier of this package.

    Returns:
      `apply(params, *args, **kwargs)`, where `params` is the base with the entry 'layer_inputs', of :func:`init`.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lora
      >>> from experiments.models import llama, location
      >>> model = llama.load(location.find("tiny-llama"))
      >>> apply_fn, base = lora.nnx.functional(model)
      >>> base |= {"layer_inputs": init(jax.random.key(0), model.shape, length=8)}
      >>> adapt(apply_fn)(base, jnp.array([[5, 9, 2]])).shape[:2]
      (1, 3)
    """
    return virtual_tokens.adapt(apply_fn, NAME, lambda inputs_NPD: Virtual(inputs_NPD=inputs_NPD))
