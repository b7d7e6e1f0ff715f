"""Specs of baselines that train some leaves of a model in full: BitFit, the top layers, the head, everything.

They fit every model of this package (BERT's family, DeBERTa, GPT-2, Llama's family and classifiers on them), and
combine with each other and with adapters as dicts do: `bitfit(base) | head(base)`.

References:
  Ben Zaken et al., `BitFit <https://arxiv.org/abs/2106.10199>`_, 2021
  Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §5.1
"""

import re
from typing import Any

import lora_jax as lora
from experiments.errors import UserError

Spec = dict[str, lora.Recipe]
QUERY_VALUE, LINEAR = "attention/(query|value)/kernel", "(attention|feed_forward)/.*kernel"
"""Patterns of the weights that the LoRA paper adapts, and of all linear weights of the layers."""

_HEADS = ("pooler", "classifier", "score", "output")
_LAYER = re.compile(r"(?:^|/)layers/(\d+)/")


def full() -> Spec:
    """Returns the spec of full fine-tuning.

    Example:
      >>> full()
      {'': Full(dtype=None)}
    """
    return {"": lora.Full()}


def bitfit(base: Any) -> Spec:
    """Returns the spec that trains all biases, including those of normalizations.

    Args:
      base: The parameters of a model.

    Raises:
      UserError: The model has no biases.

    Example:
      >>> list(bitfit({"up": {"kernel": 0.0, "bias": 0.0}}))
      ['(^|/)bias$']
    """
    if not any(path.rpartition("/")[2] == "bias" for path in lora.paths.flatten(base).paths):
        raise UserError("BitFit trains biases, and this model has none, like most of Llama's family")
    return {"(^|/)bias$": lora.Full()}


def head(base: Any) -> Spec:
    """Returns the spec that trains the layers after the last hidden state: a classifier, or a language model's head.

    Args:
      base: The parameters of a model.

    Raises:
      UserError: The model has no head, or that of a language model is tied to the embedding of tokens.

    Example:
      >>> list(head({"encoder": 0.0, "pooler": 0.0, "classifier": 0.0}))
      ['^(pooler|classifier)(/|$)']
    """
    names = [name for name in _HEADS if name in base]
    if not names:
        tied = "it is tied to the embedding of tokens; load the model with untied=True"
        expected = f"expected one of {', '.join(_HEADS)}"
        raise UserError(f"the model has no head to train: {tied if 'token' in base else expected}")
    return {f"^({'|'.join(names)})(/|$)": lora.Full()}


def top_layers(base: Any, count: int = 2) -> Spec:
    """Returns the spec that trains the last layers.

    Args:
      base: The parameters of a model whose layers are unrolled: `Options(scan=False)`.
      count: The number of layers.

    Raises:
      UserError: The layers are stacked, or there are fewer than `count`.

    Example:
      >>> list(top_layers({"layers": {0: {"kernel": 0.0}, 1: {"kernel": 0.0}, 2: {"kernel": 0.0}}}))
      ['(^|/)layers/(1|2)/']
    """
    paths = lora.paths.flatten(base).paths
    numbers = sorted({int(match[1]) for path in paths if (match := _LAYER.search(path))})
    if not numbers and any("layers/" in path for path in paths):
        raise UserError("the layers are stacked, one leaf for all of them; build the model with Options(scan=False)")
    if not 1 <= count <= len(numbers):
        raise UserError(f"top_layers(count={count}): the model has {len(numbers)} layers")
    return {f"(^|/)layers/({'|'.join(map(str, numbers[-count:]))})/": lora.Full()}
