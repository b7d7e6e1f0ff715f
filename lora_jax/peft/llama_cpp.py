"""Adapters for llama.cpp: one alpha for all modules, and the matrices of all experts of a layer."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from lora_jax.peft.arrays import fold_scale, pad_module
from lora_jax.peft.module import Module

_EXPERT = re.compile(r"(?P<experts>.*\.block_sparse_moe\.experts)\.(?P<expert>\d+)\.(?P<matrix>w[123])\.weight")
_MATRICES = ("w1", "w2", "w3")


def split_expert(name: str) -> tuple[str, int, str] | None:
    """Splits the name of a matrix of one of Mixtral's experts into module, expert and matrix; None for other names.

    Example:
      >>> split_expert("model.layers.3.block_sparse_moe.experts.7.w1.weight")
      ('model.layers.3.block_sparse_moe.experts', 7, 'w1')
    """
    match = _EXPERT.fullmatch(name)
    return (match["experts"], int(match["expert"]), match["matrix"]) if match else None


def common_alpha(modules: Sequence[Module[np.ndarray]]) -> tuple[float, list[Module[np.ndarray]]]:
    """Returns an alpha for all modules, each with the scale alpha / rank: other scales are folded into B.

    llama.cpp has one alpha for all modules, divides it by the rank of each B, and takes 0 for a scale of 1.
    """
    alphas = [round_alpha(module.scale * module.rank, module.rank) for module in modules]
    alpha = collections.Counter(filter(None, alphas)).most_common(1)[0][0] if any(alphas) else 1
    return alpha, [m if a == alpha else fold_scale(m, m.scale * m.rank / alpha) for m, a in zip(modules, alphas)]


def round_alpha(alpha: float, divisor: float) -> float:
    """Returns the alpha with the fewest digits that gives the same float32 scale."""
    for digits in range(1, 10):
        short = float(f"{alpha:.{digits}g}")
        if np.float32(short / divisor) == np.float32(alpha / divisor):
            return int(short) if short.is_integer() else short
    return alpha


def complete_experts(modules: Iterable[Module[np.ndarray]], tensors: Iterable[str]) -> list[Module[np.ndarray]]:
    """Adds factors of zeros for the experts' matrices without an adapter, and pads those of others to one rank.

    llama.cpp's converter stacks the three matrices of all experts of a layer, and fails if one is missing.

    Args:
      modules: The modules of an adapter.
      tensors: The names of the tensors of the adapted leaves, from which the number of experts follows.
    """
    others = []
    layers: dict[str, dict[tuple[int, str], Module[np.ndarray]]] = collections.defaultdict(dict)
    for module in modules:
        if key := split_expert(module.name):
            layers[key[0]][key[1:]] = module
        else:
            others.append(module)
    numbers = collections.defaultdict(set)
    for key in filter(None, map(split_expert, tensors)):
        numbers[key[0]].add(key[1])
    for name, by_key in layers.items():
        others += _complete_layer(name, by_key, sorted(numbers[name] | {expert for expert, _ in by_key}))
    return others


def _complete_layer(
    name: str, by_key: dict[tuple[int, str], Module[np.ndarray]], experts: Sequence[int]
) -> list[Module[np.ndarray]]:
    (_, matrix), first = next(iter(by_key.items()))
    sizes = first.tensors["a"].shape[1], first.tensors["b"].shape[0]
    hidden, inner = sizes[::-1] if matrix == "w2" else sizes
    complete = []
    for matrix in _MATRICES:
        rank = max((m.rank for (_, other), m in by_key.items() if other == matrix), default=first.rank)
        in_size, out_size = (inner, hidden) if matrix == "w2" else (hidden, inner)
        zeros = {"a": np.zeros((rank, in_size), np.float32), "b": np.zeros((out_size, rank), np.float32)}
        for expert in experts:
            module = by_key.get((expert, matrix))
            absent = dataclasses.replace(
                first, name=f"{name}.{expert}.{matrix}.weight", tensors=zeros, rank=rank, scale=first.scale
            )
            complete.append(absent if module is None else pad_module(module, rank))
    return complete
