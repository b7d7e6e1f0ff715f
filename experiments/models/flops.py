"""The floating-point operations of a training step, independent of how it is compiled."""

from typing import Any

import jax

import lora_jax as lora
from experiments.models.weights import flatten_weights


def step_flops(base: Any, delta: Any, shape: Any, tokens: int, length: int) -> float:
    """Returns the operations of a step that trains an adapter on a frozen base without rematerialization.

    A token takes 2 operations per base weight in the forward pass and 2 in the backward pass, which computes only the
    gradient of the input, and 6 per adapter parameter. Attention takes 2 causal products in the forward and 4 in the
    backward pass, counted as if each sequence were one example. Lookups and elementwise functions are not counted.

    Args:
      base: The parameters, or their shapes.
      delta: The adapter, or its shapes.
      shape: The model's shape, such as a `LlamaConfig`.
      tokens: The number of tokens of a step.
      length: The length of a sequence.

    References:
      Kaplan et al., `Scaling Laws for Neural Language Models <https://arxiv.org/abs/2001.08361>`_, 2020, §2.1
    """
    trained = sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0]))
    layers = getattr(shape, "num_hidden_layers", None) or shape.n_layer
    # The heads' total width, which for GPT-2 is the model's width.
    heads_width = shape.num_attention_heads * shape.head_dim if hasattr(shape, "head_dim") else shape.n_embd
    attention = 6 * layers * heads_width * length
    return tokens * (4.0 * multiplied_weights(base, shape) + 6.0 * trained + attention)


def multiplied_weights(base: Any, shape: Any) -> float:
    """Returns the number of weights that a token is multiplied with: kernels, of its experts only, and the head."""
    chosen = getattr(shape, "num_experts_per_tok", 1) / getattr(shape, "num_local_experts", 1)
    total, head = 0.0, False
    leaves = flatten_weights(base)
    for path, leaf in leaves.items():
        if path.endswith("kernel"):
            head = head or path == "output/kernel"
            total += leaf.size * (chosen if "feed_forward/" in path and "router" not in path else 1)
    return total if head else total + leaves["token/embedding"].size
