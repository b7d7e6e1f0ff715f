"""Experts in transformers 5: one parameter of the running model for the matrices of all experts in checkpoint files.

PEFT adapts that parameter, `[experts, out, in]`, with factors A `[rank·experts, in]` and B `[out, rank·experts]`: the
expert is the first part of A's rows and the last of B's columns (`lora.ParamWrapper`). Where the parameter is several
matrices of each expert, one behind the other along `out`, these share A, and each has its part of B's rows.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from lora_jax.peft.exported import Exported, Module
from lora_jax.peft.factor_layout import pad_rank
from lora_jax.peft.names import Fused, Names
from lora_jax.peft.stored import Module as StoredModule
from lora_jax.peft.stored import Share, Stored

_PARTS = {"gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")), "down_proj": (("w2",), ("down_proj",))}
"""The matrices of an expert in checkpoint files, by the parameter of transformers 5 that they are part of."""


def shares(names: Names, tensors: Iterable[str]) -> dict[str, list[tuple[str, Share]]]:
    """By fused parameter, the tensors that it is made of, and where each is in it; in the order of the table."""
    listed = list(tensors)
    result: dict[str, list[tuple[str, Share]]] = {}
    for row in names.fused:
        matrices: dict[str, dict[tuple[int, int], str]] = collections.defaultdict(dict)
        for number, part in enumerate(row.parts):
            for match in filter(None, map(_pattern(part).fullmatch, listed)):
                matrices[row.parameter.format(**match.groupdict())][int(match["expert"]), number] = match[0]
        for parameter, by_index in matrices.items():
            experts = max(expert for expert, _ in by_index) + 1
            bindings = sorted(by_index.items())
            result[parameter] = [(name, Share(*index, experts, len(row.parts))) for index, name in bindings]
    return result


def of_checkpoint(module: str, parameters: Iterable[str], tensors: Mapping[str, str]) -> list[Fused]:
    """The fused parameters of a module whose experts' matrices a checkpoint holds one by one.

    Args:
      module: Of the running model.
      parameters: Those of its parameters that have factors.
      tensors: By names of the running model, those in the checkpoint's files.
    """
    fused = []
    for parameter in in_order(list(parameters)):
        for parts in _PARTS.get(parameter, ()):
            files = [tensors.get(f"{module}.0.{part}.weight") for part in parts]
            if None not in files:
                fused.append(Fused(f"{module}.{parameter}", tuple(_any_expert(name) for name in files if name)))
    return fused


def _any_expert(name: str) -> str:
    outer, _, part = name.rpartition(".0.")
    return f"{outer}.{{expert}}.{part}"


def in_order(parameters: Sequence[str]) -> list[str]:
    """The parameters of one module in its own order, which transformers has for those of experts; others as given."""
    order = list(_PARTS)
    return sorted(parameters, key=order.index) if set(parameters) <= set(order) else list(parameters)


def read(
    stored: Stored, module: StoredModule, rank: int, into: Sequence[int], out: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """One expert's factors of one of its matrices, `[rank, in]` and `[rank, out]`, from those of the parameter."""
    share = module.share
    assert share is not None
    experts, parts = share.experts, share.parts
    a = stored.read(module.parts["a"], (rank * experts, *into), again=True).reshape(experts, rank, *into)
    b = stored.read(module.parts["b"], (out[0] * parts, rank * experts), again=True).reshape(parts, *out, rank, experts)
    columns = slice(None)
    if parts > 1 and rank % parts == 0 and _is_diagonal(b, rank // parts):
        columns = slice(share.part * (rank // parts), (share.part + 1) * (rank // parts))
    return a[share.expert][columns], b[share.part, ..., columns, share.expert].T


def _is_diagonal(b: np.ndarray, rank: int) -> bool:
    """Whether each part has ranks of its own, as PEFT writes factors of separate matrices; not where all is zero."""
    outside = b.copy()
    for part in range(b.shape[0]):
        outside[part, ..., part * rank : (part + 1) * rank, :] = 0
    return not outside.any() and bool(b.any())


def fuse(exported: Exported, names: Names) -> None:
    """Puts the factors of experts' matrices together as those of the parameters that PEFT adapts."""
    stored = [row.name for row in names.weights if "{" not in row.name]  # of a checkpoint, experts without factors too
    by_name = {module.name: module for module in exported.modules}
    for parameter, parts in shares(names, dict.fromkeys((*exported.tensors, *stored))).items():
        modules = {(share.expert, share.part): by_name.pop(name) for name, share in parts if name in by_name}
        if modules:
            with exported.collecting():
                by_name[parameter] = _fused(parameter, modules, parts[0][1])
    exported.modules = list(by_name.values())


def _fused(parameter: str, modules: Mapping[tuple[int, int], Module], share: Share) -> Module:
    """The factors of a parameter from those of some of the matrices that it holds."""
    if any(module.magnitude is not None for module in modules.values()):
        raise ValueError(f"{parameter}: PEFT has no DoRA on experts, whose matrices transformers 5 makes one parameter")
    if any(module.offset is not None and module.offset.any() for module in modules.values()):
        raise ValueError(f"{parameter}: PEFT has no bias on B of experts, which transformers 5 makes one parameter")
    first = next(iter(modules.values()))
    alike = all(np.float32(module.scale) == np.float32(first.scale) for module in modules.values())
    modules = {at: module if alike else module.folded(module.scale) for at, module in modules.items()}
    (out, _), (_, into) = first.b.shape, first.a.shape
    dtype = np.result_type(*(factor.dtype for module in modules.values() for factor in (module.a, module.b)))
    by_expert: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    for (expert, _), module in modules.items():
        by_expert[expert].append(module.a)
    shared = all(np.array_equal(a, others[0]) for others in by_expert.values() for a in others[1:])
    ranks = [max((m.rank for (_, part), m in modules.items() if part == i), default=0) for i in range(share.parts)]
    starts = [0 if shared else sum(ranks[:part]) for part in range(share.parts)]
    rank = max(ranks) if shared else sum(ranks)
    a = np.zeros((share.experts, rank, into), dtype)
    b = np.zeros((share.parts, out, rank, share.experts), dtype)
    for (expert, part), module in modules.items():
        span = slice(starts[part], starts[part] + ranks[part])
        a[expert, span] = pad_rank(module.a, ranks[part], 0)
        b[part, :, span, expert] = pad_rank(module.b, ranks[part], 1)
    return dataclasses.replace(
        first,
        name=parameter,
        kind="experts",
        a=a.reshape(-1, into),
        b=b.reshape(share.parts * out, -1),
        rank=rank,
        scale=first.scale if alike else 1.0,
        dropout=0.0,  # PEFT has none on parameters
        offset=None,
    )


def switched(modules: Iterable[Module]) -> list[tuple[str, Module, np.ndarray, np.ndarray]]:
    """Modules as mlx-lm names them, which holds an expert's matrices in one module for all experts.

    Returns:
      The name, the module (of one of the experts) and its factors in mlx-lm's layout: `[in, rank]` and `[rank, out]`;
      of experts `[experts, rank, in]` and `[experts, out, rank]`.
    """
    plain, stacked = [], collections.defaultdict(dict)
    for module in modules:
        if match := _MATRIX.fullmatch(module.module):
            stacked[f"{match[1]}.switch_mlp.{_SWITCHED.get(match[3], match[3])}"][int(match[2])] = module
        else:
            plain.append((module.module, module, module.a.T, module.b.T))
    for name, by_expert in stacked.items():
        first = next(iter(by_expert.values()))
        factors = []
        for part in ("a", "b"):
            zeros = np.zeros_like(getattr(first, part))
            every = [getattr(by_expert[i], part) if i in by_expert else zeros for i in range(max(by_expert) + 1)]
            factors.append(np.stack(every))
        plain.append((name, first, *factors))
    return plain


def separate(module: str, count: int, base_modules: Collection[str]) -> list[str]:
    """The modules of the experts that mlx-lm has as one, as a checkpoint names them.

    Args:
      module: `….switch_mlp.down_proj`.
      count: How many experts there are.
      base_modules: Of the checkpoint, as far as they are known.
    """
    outer, _, part = module.rpartition(".switch_mlp.")
    named = [f"{outer}.experts.{{}}.{name}" for name, switched in _SWITCHED.items() if switched == part]
    if not outer or not named:
        return [f"{module}.{expert}" for expert in range(count)]
    usual = 0 if outer.endswith("block_sparse_moe") else -1  # Mixtral's w1, or gate_proj
    template = next((name for name in named if name.format(0) in base_modules), named[usual])
    return [template.format(expert) for expert in range(count)]


def of_matrices(modules: Iterable[str]) -> list[Fused]:
    """The parameters of transformers 5 that the matrices of experts are parts of, from the names of these."""
    adapted: dict[str, set[str]] = collections.defaultdict(set)
    for match in filter(None, map(_MATRIX.fullmatch, modules)):
        adapted[match[1]].add(match[3])
    return [
        Fused(
            f"{outer.replace('.block_sparse_moe', '.mlp')}.experts.{parameter}",
            tuple(f"{outer}.experts.{{expert}}.{part}.weight" for part in parts),
        )
        for outer, matrices in adapted.items()
        for parameter, alternatives in _PARTS.items()
        for parts in alternatives
        if matrices.intersection(parts)
    ]


_MATRIX = re.compile(r"(.+)\.experts\.([0-9]+)\.(w[123]|(?:gate|up|down)_proj)")
_SWITCHED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"} | {
    x: x for x in ("gate_proj", "up_proj", "down_proj")
}


def _pattern(template: str) -> re.Pattern:
    """A tensor's name with `{layer}` and `{expert}` as a regular expression."""
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{x}>[0-9]+)" if i % 2 else re.escape(x) for i, x in enumerate(pieces)))
