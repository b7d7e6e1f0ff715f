"""Floating-point operations that training a model needs, whatever it is compiled to."""

from typing import Any

import jax

import lora_jax as lora
from lora_jax import paths


def step_flops(base: Any, delta: Any, shape: Any, tokens: int, length: int) -> float:
    """Those of a step that trains an adapter on a frozen base, nothing computed twice.

    A token takes 2 operations for each weight that it is multiplied with in the forward pass, and 2 in the backward
    pass, which needs the gradient of the input alone; 6 for each parameter of the adapter. Attention takes 2 products
    of half a square (a causal mask's) in the forward and 4 in the backward pass, counted as if each sequence were one
    example. Lookups, norms and other functions of single elements count for nothing.

    Args:
      base: The parameters, or their shapes.
      delta: The adapter's.
      shape: The model's, such as a `LlamaConfig`.
      tokens: Of a step.
      length: Of a sequence.

    References:
      Kaplan et al., `Scaling Laws for Neural Language Models <https://arxiv.org/abs/2001.08361>`_, 2020, §2.1
    """
    trained = sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0]))
    layers = getattr(shape, "num_hidden_layers", None) or shape.n_layer
    # Heads times their width: a model of the GPT-2 form has as much of it as its own width.
    mixed = shape.num_attention_heads * shape.head_dim if hasattr(shape, "head_dim") else shape.n_embd
    attention = 6 * layers * mixed * length
    return tokens * (4.0 * multiplied(base, shape) + 6.0 * trained + attention)


def multiplied(base: Any, shape: Any) -> float:
    """The weights that a token is multiplied with: all kernels, of experts those it is sent to, and the head."""
    chosen = getattr(shape, "num_experts_per_tok", 1) / getattr(shape, "num_local_experts", 1)
    found, head = 0.0, False
    leaves = paths.flatten(base).as_dict()
    for path, leaf in leaves.items():
        if path.endswith("kernel"):
            head = head or path == "output/kernel"
            found += leaf.size * (chosen if "feed_forward/" in path and "router" not in path else 1)
    return found if head else found + leaves["token/embedding"].size
