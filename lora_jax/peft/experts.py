"""Experts in transformers 5: one parameter of the running model combines the matrices of all experts in files.

PEFT adapts that parameter, `[experts, out, in]`, with factors A `[rank·experts, in]` and B `[out, rank·experts]`: the
expert index is slowest in A's rows and fastest in B's columns (`lora.ParamWrapper`). If the parameter concatenates
several matrices of each expert along `out`, these share A, and each has its part of B's rows.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora_jax.peft.adapter_tensors import StoredTensor
from lora_jax.peft.arrays import fold_scale
from lora_jax.peft.factor_layout import pad_rank
from lora_jax.peft.module import ExpertSlice, Module
from lora_jax.peft.names import Fused, Names
from lora_jax.peft.problems import collect_problems
from lora_jax.peft.torch_adapter import TorchAdapter

FUSED_PARTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}
"""The matrices of an expert in checkpoint files, by the parameter of transformers 5 that combines them."""


def find_parts(names: Names, tensors: Iterable[str]) -> dict[str, list[tuple[str, ExpertSlice]]]:
    """Returns, by fused parameter, the tensors that it combines and their positions, in the order of the table."""
    listed = list(tensors)
    parts: dict[str, list[tuple[str, ExpertSlice]]] = {}
    for row in names.fused:
        matrices: dict[str, dict[tuple[int, int], str]] = collections.defaultdict(dict)
        for number, part in enumerate(row.parts):
            for match in filter(None, map(_pattern(part).fullmatch, listed)):
                matrices[row.parameter.format(**match.groupdict())][int(match["expert"]), number] = match[0]
        for parameter, by_index in matrices.items():
            experts = max(expert for expert, _ in by_index) + 1
            indexed = sorted(by_index.items())
            parts[parameter] = [(name, ExpertSlice(*index, experts, len(row.parts))) for index, name in indexed]
    return parts


def find_fused(module: str, parameters: Iterable[str], tensors: Mapping[str, str]) -> list[Fused]:
    """Returns the fused parameters of a module whose experts' matrices a checkpoint stores separately.

    Args:
      module: The module, in the running model.
      parameters: Its parameters that have factors.
      tensors: Names in the checkpoint's files, by name in the running model.
    """
    fused = []
    for parameter in sort_parameters(list(parameters)):
        for parts in FUSED_PARTS.get(parameter, ()):
            files = [tensors.get(f"{module}.0.{part}.weight") for part in parts]
            if None not in files:
                fused.append(Fused(f"{module}.{parameter}", tuple(_expert_template(name) for name in files if name)))
    return fused


def _expert_template(name: str) -> str:
    outer, _, part = name.rpartition(".0.")
    return f"{outer}.{{expert}}.{part}"


def sort_parameters(parameters: Sequence[str]) -> list[str]:
    """Sorts the parameters of a module of experts in transformers' order; other parameters retain theirs."""
    order = list(FUSED_PARTS)
    return sorted(parameters, key=order.index) if set(parameters) <= set(order) else list(parameters)


def read_expert(
    module: Module[StoredTensor], in_sizes: Sequence[int], out_sizes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the factors of one expert's matrix, `[rank, in]` and `[rank, out]`, from those of the parameter."""
    position, rank = module.expert, module.rank
    assert position is not None
    experts, parts = position.experts, position.parts
    a = module.tensors["a"].read((rank * experts, *in_sizes), cache=True)
    b = module.tensors["b"].read((out_sizes[0] * parts, rank * experts), cache=True)
    a, b = a.reshape(experts, rank, *in_sizes), b.reshape(parts, *out_sizes, rank, experts)
    columns = slice(None)
    if parts > 1 and rank % parts == 0 and _is_diagonal(b, rank // parts):
        columns = slice(position.part * (rank // parts), (position.part + 1) * (rank // parts))
    return a[position.expert][columns], b[position.part, ..., columns, position.expert].T


def _is_diagonal(b: np.ndarray, rank: int) -> bool:
    """Whether each part has its own ranks, as PEFT writes factors of separate matrices, and B is not zero."""
    outside = b.copy()
    for part in range(b.shape[0]):
        outside[part, ..., part * rank : (part + 1) * rank, :] = 0
    return not outside.any() and bool(b.any())


def fuse(adapter: TorchAdapter, names: Names) -> None:
    """Combines the factors of experts' matrices to factors of the parameters that PEFT adapts, in place."""
    stored = [row.name for row in names.weights if "{" not in row.name]  # of a checkpoint: includes unadapted experts
    by_name = {module.name: module for module in adapter.modules}
    for parameter, parts in find_parts(names, dict.fromkeys((*adapter.tensors, *stored))).items():
        modules = {(position.expert, position.part): by_name.pop(x) for x, position in parts if x in by_name}
        if modules:
            with collect_problems(adapter.problems):
                by_name[parameter] = _fuse_modules(parameter, modules, parts[0][1])
    adapter.modules = list(by_name.values())


def _fuse_modules(
    parameter: str, modules: Mapping[tuple[int, int], Module[np.ndarray]], shape: ExpertSlice
) -> Module[np.ndarray]:
    """Makes the module of a parameter from those of some of the matrices that it combines."""
    if any("magnitude" in module.tensors for module in modules.values()):
        raise ValueError(f"{parameter}: PEFT has no DoRA on experts, whose matrices transformers 5 combines")
    if any("b_bias" in module.tensors and module.tensors["b_bias"].any() for module in modules.values()):
        raise ValueError(f"{parameter}: PEFT has no bias on B of experts, whose matrices transformers 5 combines")
    first = next(iter(modules.values()))
    same_scale = all(np.float32(module.scale) == np.float32(first.scale) for module in modules.values())
    if not same_scale:
        modules = {index: fold_scale(module, module.scale) for index, module in modules.items()}
    factors = {index: (module.tensors["a"], module.tensors["b"]) for index, module in modules.items()}
    in_size, out_size = first.tensors["a"].shape[1], first.tensors["b"].shape[0]
    dtype = np.result_type(*(factor.dtype for pair in factors.values() for factor in pair))
    by_expert: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    for (expert, _), (a, _) in factors.items():
        by_expert[expert].append(a)
    share_a = all(np.array_equal(a, others[0]) for others in by_expert.values() for a in others[1:])
    ranks = [max((m.rank for (_, part), m in modules.items() if part == i), default=0) for i in range(shape.parts)]
    starts = [0 if share_a else sum(ranks[:part]) for part in range(shape.parts)]
    rank = max(ranks) if share_a else sum(ranks)
    fused_a = np.zeros((shape.experts, rank, in_size), dtype)
    fused_b = np.zeros((shape.parts, out_size, rank, shape.experts), dtype)
    for (expert, part), (a, b) in factors.items():
        span = slice(starts[part], starts[part] + ranks[part])
        fused_a[expert, span] = pad_rank(a, ranks[part], 0)
        fused_b[part, :, span, expert] = pad_rank(b, ranks[part], 1)
    return Module(
        name=parameter,
        kind="experts",
        tensors={"a": fused_a.reshape(-1, in_size), "b": fused_b.reshape(shape.parts * out_size, -1)},
        rank=rank,
        scale=first.scale if same_scale else 1.0,
        dropout=0.0,  # PEFT has none on parameters
        is_parameter=True,
    )


def _pattern(template: str) -> re.Pattern:
    """Compiles a tensor's name with `{layer}` and `{expert}` to a regular expression."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{x}>[0-9]+)" if i % 2 else re.escape(x) for i, x in enumerate(pieces)))
