"""mlx-lm's experts: it stores the matrices of all experts of a layer in one module, `switch_mlp`."""

import collections
import re
from collections.abc import Collection, Iterable

import numpy as np

from lora_jax.peft.experts import FUSED_PARTS
from lora_jax.peft.module import Module
from lora_jax.peft.names import Fused

_MATRIX = re.compile(r"(.+)\.experts\.([0-9]+)\.(w[123]|(?:gate|up|down)_proj)")
_SWITCH_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"} | {
    x: x for x in ("gate_proj", "up_proj", "down_proj")
}


def stack_experts(
    modules: Iterable[Module[np.ndarray]],
) -> list[tuple[str, Module[np.ndarray], np.ndarray, np.ndarray]]:
    """Converts modules to mlx-lm's names and layout, which stacks the modules of experts.

    Returns:
      The name, the module (of one expert) and its factors in mlx-lm's layout: `[in, rank]` and `[rank, out]`; for
      experts `[experts, rank, in]` and `[experts, out, rank]`.
    """
    plain, stacked = [], collections.defaultdict(dict)
    for module in modules:
        if match := _MATRIX.fullmatch(module.path):
            stacked[f"{match[1]}.switch_mlp.{_SWITCH_NAMES.get(match[3], match[3])}"][int(match[2])] = module
        else:
            plain.append((module.path, module, module.tensors["a"].T, module.tensors["b"].T))
    for name, by_expert in stacked.items():
        first = next(iter(by_expert.values()))
        factors = []
        for part in ("a", "b"):
            zeros = np.zeros_like(first.tensors[part])
            arrays = [by_expert[i].tensors[part] if i in by_expert else zeros for i in range(max(by_expert) + 1)]
            factors.append(np.stack(arrays))
        plain.append((name, first, *factors))
    return plain


def split_experts(module: str, count: int, base_modules: Collection[str]) -> list[str]:
    """Returns a checkpoint's modules of the experts that mlx-lm stores in one.

    Args:
      module: `….switch_mlp.down_proj`.
      count: The number of experts.
      base_modules: The checkpoint's modules, if available.
    """
    outer, _, part = module.rpartition(".switch_mlp.")
    templates = [f"{outer}.experts.{{}}.{name}" for name, switch_name in _SWITCH_NAMES.items() if switch_name == part]
    if not outer or not templates:
        return [f"{module}.{expert}" for expert in range(count)]
    default = 0 if outer.endswith("block_sparse_moe") else -1  # Mixtral's w1, or gate_proj
    template = next((name for name in templates if name.format(0) in base_modules), templates[default])
    return [template.format(expert) for expert in range(count)]


def find_fused(modules: Iterable[str]) -> list[Fused]:
    """Returns the parameters of transformers 5 that combine the matrices of experts, from the modules of these."""
    adapted: dict[str, set[str]] = collections.defaultdict(set)
    for match in filter(None, map(_MATRIX.fullmatch, modules)):
        adapted[match[1]].add(match[3])
    return [
        Fused(
            f"{outer.replace('.block_sparse_moe', '.mlp')}.experts.{parameter}",
            tuple(f"{outer}.experts.{{expert}}.{part}.weight" for part in parts),
        )
        for outer, matrices in adapted.items()
        for parameter, alternatives in FUSED_PARTS.items()
        for parts in alternatives
        if matrices.intersection(parts)
    ]
