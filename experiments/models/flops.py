"""The floating-point operations of training, independent of how a step is compiled."""

from dataclasses import dataclass
from typing import Any

import jax

import lora_jax as lora
from experiments.models.weights import flatten_weights

_HEAD, _EMBEDDING = "output/kernel", "token/embedding"


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training, forward and backward.

    Attributes:
      token: Those of each token before the head.
      label: Those of the head for each token with a label, the only ones of which logits are needed.
    """

    token: float
    label: float


def count_flops(base: Any, delta: Any, shape: Any, length: int) -> Flops:
    """Returns the operations of training an adapter on a frozen base without rematerialization.

    A token takes 2 operations per base weight in the forward pass and 2 in the backward pass, which computes only the
    gradient of the input, and 6 per adapter parameter; the gradient of a weight that is trained in full takes 2 more.
    Attention takes 2 causal products in the forward and 4 in the backward pass, counted as if each sequence were one
    example. Lookups and elementwise functions are not counted.

    Args:
      base: The parameters, or their shapes.
      delta: The adapter, or its shapes.
      shape: The model's shape, such as a `LlamaConfig`.
      length: The length of a sequence.

    References:
      Kaplan et al., `Scaling Laws for Neural Language Models <https://arxiv.org/abs/2001.08361>`_, 2020, §2.1
    """
    weights, trained = multiplied_weights(base, shape), lora.partition(delta)[0]
    head = _HEAD if _HEAD in weights else _EMBEDDING
    adapters = {
        path: 2.0 * weights.get(path, 0)
        if delta[path].kind == "Full"
        else 6.0 * sum(leaf.size for leaf in jax.tree.leaves(trained[path]))
        for path in trained
    }
    layers = getattr(shape, "num_hidden_layers", None) or shape.n_layer
    # The heads' total width, which for GPT-2 is the model's width.
    heads_width = shape.num_attention_heads * shape.head_dim if hasattr(shape, "head_dim") else shape.n_embd
    attention = 6 * layers * heads_width * length
    label = 4.0 * weights.pop(head) + adapters.pop(head, 0.0)
    return Flops(4.0 * sum(weights.values()) + sum(adapters.values()) + attention, label)


def multiplied_weights(base: Any, shape: Any) -> dict[str, float]:
    """Returns the number of weights that a token is multiplied with by path: kernels, of its experts only, and the
    head, which may be the embedding."""
    chosen = getattr(shape, "num_experts_per_tok", 1) / getattr(shape, "num_local_experts", 1)
    leaves = flatten_weights(base)
    kernels = {
        path: leaf.size * (chosen if "feed_forward/" in path and "router" not in path else 1)
        for path, leaf in leaves.items()
        if path.endswith("kernel")
    }
    return kernels if _HEAD in kernels else kernels | {_EMBEDDING: leaves[_EMBEDDING].size}
