"""Prefix tuning: trained keys and values that every layer's attention sees before those of a text.

Shapes are in the names: N layers, P virtual tokens, G groups of heads that share keys and values, K width of a head,
F hidden width.

References:
  Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.baselines import virtual_tokens
from experiments.models.virtual import Shape, Virtual

NAME = "prefix"
"""The entry of the parameters, and the beginning of the paths of a prefix."""


def init(key: jax.Array, shape: Shape, length: int, *, hidden: int | None = None) -> dict[str, Any]:
    """Returns a random prefix.

    Args:
      key: A PRNG key.
      shape: The sizes of the model, `model.shape` of a decoder or an encoder.
      length: The number of virtual tokens.
      hidden: The hidden width of a network of two layers with tanh that computes the keys and values of all layers
        from one vector per token, and trains instead of these. None trains the keys and values themselves, which Li
        and Liang report as unstable.

    Returns:
      `{"keys": float32[layers, length, groups, head], "values": likewise}`; with `hidden` the leaves `embedding`
      `[length, groups · head]`, `up/kernel`, `up/bias`, `down/kernel` `[hidden, layers, 2, groups, head]` and
      `down/bias`.

    References:
      Li and Liang, 2021, §4.3
    """
    if length < 1 or (hidden is not None and hidden < 1):
        raise ValueError(f"length={length}, hidden={hidden}, expected at least 1.")
    keys = jax.random.split(key, 3)
    if hidden is None:
        shape_NPGK = (shape.layers, length, shape.groups, shape.head)
        return {name: jax.random.normal(key, shape_NPGK) for name, key in zip(("keys", "values"), keys)}
    width = shape.groups * shape.head
    return {
        "embedding": jax.random.normal(keys[0], (length, width)),
        "up": _linear(keys[1], width, hidden),
        "down": _linear(keys[2], hidden, shape.layers, 2, shape.groups, shape.head),
    }


def fold(prefix: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns the keys and values of a prefix: the network's outputs, which replace it after training.

    Args:
      prefix: From :func:`init`, or the entry 'prefix' of `lora.merge(base, delta)`.

    Returns:
      `{"keys": [layers, length, groups, head], "values": likewise}`.
    """
    if "keys" in prefix:
        return dict(prefix)
    up, down = prefix["up"], prefix["down"]
    h_PF = jnp.tanh(prefix["embedding"] @ up["kernel"] + up["bias"][None])
    return split(jnp.tensordot(h_PF, down["kernel"], 1) + down["bias"][None])


def split(prefix_PN2GK: jax.Array) -> dict[str, jax.Array]:
    """Returns keys and values from one array, `[length, layers, 2, groups, head]`."""
    keys_NPGK, values_NPGK = (prefix_PN2GK[:, :, part].swapaxes(0, 1) for part in range(2))
    return {"keys": keys_NPGK, "values": values_NPGK}


def adapt(apply_fn: Callable) -> Callable:
    """Returns a function like `apply_fn` that also reads a prefix from its parameters.

    The prefix trains like other leaves, alone or with adapters of weights. In a decoder it is the beginning of the
    cache, in training as in generation, at the positions before those of the text; it leaves a sliding window as
    tokens do. In an encoder it has no positions: attention is softmax(q·[prefix keys; keys])·[prefix values; values].

    Args:
      apply_fn: From `lora.nnx.functional(model)` of a decoder, an encoder or a classifier of this package.

    Returns:
      `apply(params, *args, **kwargs)`, where `params` is the base with the entry 'prefix', of :func:`init`.

    Example:
      >>> import lora_jax as lora
      >>> from experiments import generation
      >>> from experiments.models import llama, location
      >>> model = llama.load(location.find("tiny-llama"))
      >>> apply_fn, base = lora.nnx.functional(model)
      >>> base |= {"prefix": init(jax.random.key(0), model.shape, length=8, hidden=16)}
      >>> apply, tokens = adapt(apply_fn), jnp.array([[5, 9, 2]])
      >>> spec = {"^prefix/": lora.Full(), "(query|value)/kernel": lora.LoRA(4)}
      >>> delta = lora.init(jax.random.key(1), base, spec, apply, tokens)
      >>> step = generation.make_step(lora.adapt(apply))
      >>> generation.greedy(step, (base, delta), tokens, cache=model.cache(1, 8), new_tokens=4).shape
      (1, 4)
    """
    return virtual_tokens.adapt(apply_fn, NAME, _read)


def _read(prefix: Mapping[str, Any]) -> Virtual:
    folded = fold(prefix)
    return Virtual(keys_NPGK=folded["keys"], values_NPGK=folded["values"])


def _linear(key: jax.Array, inputs: int, *outputs: int) -> dict[str, jax.Array]:
    bound = inputs**-0.5
    kernel = jax.random.uniform(key, (inputs, *outputs), minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}
