"""Prompt tuning: trained vectors stand in place of the embeddings of tokens before every text.

The LoRA paper calls it prefix-embedding tuning (PreEmbed). Its infixes, trained vectors after a prompt, are not
supported: virtual tokens are the same for all texts of a batch and precede them.

References:
  Lester et al., `The Power of Scale for Parameter-Efficient Prompt Tuning <https://arxiv.org/abs/2104.08691>`_, 2021
  Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §5.1
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments.baselines import virtual_tokens
from experiments.models.virtual import Virtual

NAME = "prompt"
"""The entry of the parameters, and the path of the prompt."""


def init(key: jax.Array, table: jax.Array, length: int) -> jax.Array:
    """Returns a prompt of the embeddings of random tokens.

    Args:
      key: A PRNG key.
      table: The embeddings of the vocabulary, `[vocabulary, width]`, also quantized.
      length: The number of virtual tokens.

    Returns:
      `float32[length, width]`.

    References:
      Lester et al., 2021, §3.2, "sampled vocabulary"
    """
    _check(length)
    rows = jax.random.choice(key, table.shape[0], (length,), replace=length > table.shape[0])
    return from_tokens(table, rows, length)


def from_tokens(
    table: jax.Array, tokens: Sequence[int] | np.ndarray | jax.Array, length: int | None = None
) -> jax.Array:
    """Returns a prompt of the embeddings of a text, such as a description of the task or the names of its classes.

    Args:
      table: The embeddings of the vocabulary, `[vocabulary, width]`, also quantized.
      tokens: The token ids of the text.
      length: The number of virtual tokens: the text is repeated or cut. None is that of the text.

    Returns:
      `float32[length, width]`.

    Raises:
      ValueError: There are no tokens, or a token is not in the vocabulary.
    """
    ids = np.asarray(tokens).reshape(-1)
    count = table.shape[0]
    if not ids.size or ids.min() < 0 or ids.max() >= count:
        raise ValueError(f"tokens={ids.tolist()}, expected at least one, each from 0 to {count - 1}.")
    length = len(ids) if length is None else length
    _check(length)
    return jnp.take(lora.dequantize(table), np.resize(ids, length), axis=0).astype(jnp.float32)


def adapt(apply_fn: Callable) -> Callable:
    """Returns a function like `apply_fn` that also reads a prompt from its parameters.

    The prompt trains like any other leaf, alone or with adapters of weights, and serves generation unchanged: a cache
    receives the keys and values of the prompt in the first call.

    Args:
      apply_fn: From `lora.nnx.functional(model)` of a decoder, an encoder or a classifier of this package.

    Returns:
      `apply(params, *args, **kwargs)`, where `params` is the base with the entry 'prompt', `[length, width]`.

    Example:
      >>> from experiments.models import llama, location
      >>> apply_fn, base = lora.nnx.functional(llama.load(location.find("tiny-llama")))
      >>> base |= {"prompt": init(jax.random.key(0), base["token"]["embedding"], length=8)}
      >>> apply, tokens = adapt(apply_fn), jnp.array([[5, 9, 2]])
      >>> spec = {"^prompt$": lora.Full(), "(query|value)/kernel": lora.LoRA(4)}
      >>> delta = lora.init(jax.random.key(1), base, spec, apply, tokens)
      >>> lora.adapt(apply)(base, delta, tokens).shape[:2]
      (1, 3)
    """
    return virtual_tokens.adapt(apply_fn, NAME, lambda prompt_PD: Virtual(embeddings_PD=prompt_PD))


def _check(length: int) -> None:
    if length < 1:
        raise ValueError(f"length={length}, expected at least 1.")
