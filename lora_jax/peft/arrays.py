"""Operations on the arrays of modules that are saved."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lora_jax.peft.factor_layout import pad_rank
from lora_jax.peft.module import Module


def multiply(array: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Multiplies an array, in float32 if its dtype does not represent the product."""
    wide = array.astype(np.float32) * np.asarray(factor, np.float32)
    narrow = wide.astype(array.dtype)
    return narrow if (narrow.astype(np.float32) == wide).all() else wide


def common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Returns the dtype if there is only one, otherwise float32."""
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)


def replace_tensors(module: Module[np.ndarray], **tensors: np.ndarray | None) -> Module[np.ndarray]:
    """Returns a module with some tensors replaced; None removes a tensor."""
    merged = {**module.tensors, **tensors}
    return dataclasses.replace(module, tensors={part: array for part, array in merged.items() if array is not None})


def pad_module(module: Module[np.ndarray], rank: int) -> Module[np.ndarray]:
    """Pads a module's factors with zeros to a rank; their product does not change."""
    a, b = module.tensors["a"], module.tensors["b"]
    if module.kind in ("experts", "transposed_experts"):
        experts = a.shape[0] // module.rank
        a = pad_rank(a.reshape(experts, module.rank, -1), rank, 1).reshape(-1, a.shape[1])
        b = pad_rank(b.reshape(-1, module.rank, experts), rank, 1).reshape(b.shape[0], -1)
    else:
        a, b = pad_rank(a, rank, 0), pad_rank(b, rank, 1)
    return dataclasses.replace(replace_tensors(module, a=a, b=b), rank=rank)


def fold_scale(module: Module[np.ndarray], factor: float) -> Module[np.ndarray]:
    """Moves a factor from a module's scale into B and its bias; the change of the weight stays the same."""
    if factor == 1.0:
        return module
    scaled = {part: multiply(module.tensors[part], factor) for part in ("b", "b_bias") if part in module.tensors}
    return dataclasses.replace(replace_tensors(module, **scaled), scale=module.scale / factor if factor else 1.0)
