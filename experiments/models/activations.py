"""Estimates of the memory that the backward pass of a decoder needs for activations."""

from typing import Any

from experiments.models.options import Remat


def activation_bytes(shape: Any, rows: int, length: int, itemsize: int, remat: Remat, *, flash: bool = False) -> float:
    """Returns about how many bytes a forward pass stores for the backward pass, with an adapter on all linear layers.

    A token's floats per layer, of width `d`, hidden width `f` and `h` heads: without rematerialization `15 d + 6 f`,
    and the attention to all tokens of its row, `3 h` times the length, unless the kernel is a flash kernel; with
    'dots' the products with weights, `6 d + 4 f`; with 'full' the input of the layer, `d`.

    Args:
      shape: The model's shape, such as a `LlamaConfig`.
      rows: The number of sequences.
      length: Tokens per sequence.
      itemsize: Bytes of an activation.
      remat: What is rematerialized.
      flash: Whether the attention kernel stores no scores.

    Example:
      >>> from types import SimpleNamespace
      >>> shape = SimpleNamespace(num_hidden_layers=2, hidden_size=8, intermediate_size=16, num_attention_heads=2)
      >>> [activation_bytes(shape, 1, 4, 4, remat) for remat in ("none", "dots", "full")]
      [7680.0, 3584.0, 256.0]
    """
    layers = getattr(shape, "num_hidden_layers", None) or shape.n_layer
    width = getattr(shape, "hidden_size", None) or shape.n_embd
    heads = getattr(shape, "num_attention_heads", None) or shape.n_head
    hidden = (getattr(shape, "intermediate_size", None) or 4 * width) * getattr(shape, "num_experts_per_tok", 1)
    if remat == "none":
        floats = 15 * width + 6 * hidden + (0 if flash else 3 * heads * length)
    else:
        floats = 6 * width + 4 * hidden if remat == "dots" else width
    return float(layers * rows * length * floats * itemsize)
