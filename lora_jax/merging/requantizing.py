"""Deltas folded into quantized weights that stay quantized."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapters.factored import compute_dtype
from lora_jax.leaves import is_quantized
from lora_jax.merging.folding import Delta, merge
from lora_jax.transform.call import Arguments, check_delta


class RoundingError(NamedTuple):
    """What quantizing a merged weight took from it.

    Attributes:
      weight: The norm of the difference over the norm of the merged weight.
      change: The norm of the difference over the norm of what the adapter changed. At 1 rounding took as much as
        training gave; infinite where the adapter changed nothing.
    """

    weight: float
    change: float


def merge_quantized(base: Any, delta: Delta) -> tuple[Any, dict[str, RoundingError]]:
    r"""Folds a delta into a quantized base, and quantizes the sums again.

    Each sum is rounded to the levels of its blocks, which may take more than the adapter added: look at the errors
    before using the result. :func:`lora_jax.merge` gives floats, rounded once.

    Args:
      base: Parameters, from :func:`lora_jax.quantize`. Not changed, not donated. One weight at a time is dequantized.
      delta: From :func:`lora_jax.init`.

    Returns:
      The merged parameters, quantized leaves in the formats they had and other weights as `merge` gives them; and the
      error of each quantized weight that the delta names.

    Raises:
      ValueError: The delta does not fit the base; a merged weight is not finite; weights cannot be quantized into a
        format of the base.

    Example:
      >>> import jax, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> small = lora.quantize(base, {"w": lora.Int8(axes=("in", "out"))})
      >>> delta = lora.init(jax.random.key(0), small, {"w": lora.LoRA(2, axes=("in", "out"), init="orthogonal")})
      >>> delta["w"] = jax.tree.map(lambda leaf: leaf + 0.1, delta["w"])
      >>> merged, errors = merge_quantized(small, delta)
      >>> merged["w"], errors["w"].weight < 0.01 < errors["w"].change
      (Int8[128, 64](dtype=float32, block=64, double, 8.133 bits), True)

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §3
    """
    check_delta(delta, Arguments.create(base))
    errors: dict[str, RoundingError] = {}

    def of(path: str, leaf: Any) -> Any:
        if path not in delta:
            return leaf
        if not is_quantized(leaf):
            return merge({path: leaf}, {path: delta[path]})[path]
        before = leaf.dequantize().astype(compute_dtype(leaf.dtype))
        after = merge({path: before}, {path: delta[path]})[path]
        try:
            requantized = leaf.requantized(after)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error} lora_jax.merge gives floats.") from error
        rounding = jnp.linalg.norm(requantized.dequantize().astype(after.dtype) - after)
        whole, changed = jnp.linalg.norm(after), jnp.linalg.norm(after - before)
        errors[path] = RoundingError(*(float(rounding) / float(of) if of else float("inf") for of in (whole, changed)))
        return requantized

    return paths.flatten(base).map(of), errors
