"""A leaf's low-rank adapter from the factors of its PyTorch modules."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.dora import DoRAAdapter
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT
from lora_jax.io.read_errors import BREAK
from lora_jax.leaves import is_abstract
from lora_jax.peft import experts, keys
from lora_jax.peft.adapter_tensors import StoredTensor
from lora_jax.peft.arrays import common_dtype
from lora_jax.peft.config import CONFIG
from lora_jax.peft.factor_layout import FactorLayout, pad_rank
from lora_jax.peft.module import Module
from lora_jax.peft.weights import Binding


def make_low_rank(
    binding: Binding, modules: Mapping[tuple[int, ...], Module[StoredTensor]], leaf: Any, *, use_dora: bool
) -> LoRAAdapter:
    """Makes the adapter of a leaf from the modules of its tensors.

    Layers without a module get factors of zeros, and with DoRA the magnitudes of the leaf itself.

    Args:
      binding: The leaf and its tensors.
      modules: The modules, by index in `binding.tensors`. A bias on B is part of the adapter; if all of them are zero
        they are omitted, since PEFT has them on all modules or on none.
      leaf: The base's leaf.
      use_dora: Whether the modules have DoRA's magnitudes.

    Raises:
      ValueError: Tensors are missing or do not fit; the message has a line for each module.
    """
    layout = FactorLayout(binding)
    factors, problems = {}, []
    for index, module in modules.items():
        try:
            factors[index] = _read_factors(module, layout, use_dora)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(BREAK.join(problems))
    groups = next(iter(factors.values())).groups
    if any(factor.groups != groups for factor in factors.values()):
        raise ValueError(f"{binding.path!r}: its tensors have different numbers of groups")
    lead = layout.leading_sizes
    rank = max(f.rank for f in factors.values())
    dtype = _factor_dtype(factors.values())
    group_axis = [groups] if groups > 1 else []
    in_sizes, out_sizes = (layout.sizes(layout.labels(role)) for role in (IN, OUT))
    if groups > 1:
        out_sizes[0] //= groups
    a = np.zeros((*lead, *group_axis, rank, *in_sizes), dtype)
    b = np.zeros((*lead, *group_axis, rank, *out_sizes), dtype)
    bias = np.zeros((*lead, *group_axis, *out_sizes), common_dtype([f.b.dtype for f in factors.values()]))
    scale = np.ones(lead, np.float32)
    is_adapted = np.zeros(lead, bool)
    rank_axis = len(layout.expert_labels) + len(group_axis)
    for index, factor in factors.items():
        a[layout.slices(index)] = pad_rank(factor.a, rank, rank_axis)
        b[layout.slices(index)] = pad_rank(factor.b, rank, rank_axis)
        scale[layout.slices(index)] = factor.scale
        is_adapted[layout.slices(index)] = True
        if factor.bias is not None:
            bias[layout.slices(index)] = factor.bias
    blocks = (True,) * groups
    shape = layout.sizes(layout.labels(BATCH))
    if layout.block:
        blocks = tuple(np.any(is_adapted.reshape(-1, lead[-1]), axis=0).tolist())
        adapted = np.flatnonzero(blocks)
        a, b, scale, bias = (np.take(x, adapted, axis=len(lead) - 1) for x in (a, b, scale, bias))
        shape = [*shape, len(adapted)] if len(blocks) > 1 else shape
    scales = scale[is_adapted[..., np.flatnonzero(blocks)] if layout.block else is_adapted]
    fields: dict[str, Any] = {
        "a": jnp.asarray(a.reshape(*shape, *a.shape[len(lead) :])),
        "b": jnp.asarray(b.reshape(*shape, *b.shape[len(lead) :])),
        "scale": jnp.asarray(scales.flat[0] if (scales == scales.flat[0]).all() else scale.reshape(shape)),
        "dropout": jnp.asarray(next(iter(modules.values())).dropout, jnp.float32),
        "axes": layout.axes,
        "blocks": blocks,
        "bias": jnp.asarray(bias.reshape(*shape, *bias.shape[len(lead) :])) if bias.any() else None,
    }
    if not use_dora:
        return LoRAAdapter(**fields)
    magnitude = np.zeros((*lead, *layout.sizes(layout.labels(OUT))), dtype)
    for index, factor in factors.items():
        magnitude[layout.slices(index)] = factor.magnitude
    out_axes = [labels for labels, role in zip(binding.leaf_axes, layout.axes) if role == OUT]
    shape = (*layout.sizes(layout.labels(BATCH)), *layout.sizes(out_axes))
    if not is_adapted.all():
        if is_abstract(leaf):
            raise ValueError(f"{binding.path!r}: the magnitudes of layers without adapter need the base's values")
        mask = is_adapted.reshape(is_adapted.shape + (1,) * (magnitude.ndim - is_adapted.ndim))
        mask = np.broadcast_to(mask, magnitude.shape).reshape(shape)
        magnitude = np.where(mask, magnitude.reshape(shape), _output_norms(leaf, layout.axes))
    magnitude = jnp.asarray(magnitude.reshape(shape))
    return DoRAAdapter(**fields, magnitude=magnitude, norm_over="in", norm_gradient=False)


def _output_norms(leaf: Any, axes: Sequence[str]) -> np.ndarray:
    """The norm of each output's weights, `[*batch, *out]`."""
    squares = np.square(np.asarray(leaf).astype(np.float64))
    norms = np.sqrt(squares.sum(axis=tuple(i for i, role in enumerate(axes) if role == IN)))
    rest = [role for role in axes if role != IN]
    order = [i for target in (BATCH, OUT) for i, role in enumerate(rest) if role == target]
    return norms.transpose(order).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _LeafFactors:
    """One module's factors with the leaf's axes.

    Attributes:
      a: `[*experts, (groups,) rank, *in]`.
      b: `[*experts, (groups,) rank, *out]`.
      magnitude: `[*out]`, or None.
      bias: `[(groups,) *out]`, or None.
      scale: The factor of the product.
      rank: The rank of each group.
      groups: The number of groups of a convolution.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    bias: np.ndarray | None
    scale: float
    rank: int
    groups: int


def _read_factors(module: Module[StoredTensor], layout: FactorLayout, use_dora: bool) -> _LeafFactors:
    """Reads a module's factors and regroups them into the leaf's axes."""
    tensors, rank = module.tensors, module.rank
    expected = ["a", "b", *(["magnitude"] if use_dora else [])]
    if missing := [part for part in expected if part not in tensors]:
        names = keys.factor_keys(module.label, embedding=module.kind == "embedding")
        raise ValueError("missing: " + ", ".join(names[part] for part in missing))
    if "magnitude" in tensors and not use_dora:
        raise ValueError(f"unused: {tensors['magnitude'].key}, since {CONFIG} has use_dora false")
    in_sizes, out_sizes = (layout.sizes(layout.tensor_labels(role)) for role in (IN, OUT))
    ones = (1,) * (len(layout.binding.tensor_axes) - 2)
    group_rank = (tensors["b"].shape[1:2] or (0,))[0]
    groups = 1
    if module.expert is not None:
        a, b = experts.read_expert(module, in_sizes, out_sizes)
        rank = len(a)
    elif layout.expert_labels:
        count = math.prod(layout.binding.sizes[x] for x in layout.expert_labels)
        a = tensors["a"].read((rank * count, *in_sizes)).reshape(count, rank, *in_sizes)
        b = tensors["b"].read((*out_sizes, rank * count)).reshape(*out_sizes, rank, count).transpose(2, 1, 0)
    elif ones and group_rank not in (0, rank) and rank % group_rank == 0:
        groups = rank // group_rank
        a, b = _read_grouped(module, groups, in_sizes, out_sizes)
    else:
        a = tensors["a"].read((rank, *in_sizes))
        b = tensors["b"].read((*out_sizes, rank, *ones)).reshape(*out_sizes, rank).T
    magnitude = None
    if use_dora:
        magnitude = tensors["magnitude"].read((1, *out_sizes, *ones) if ones else out_sizes).reshape(out_sizes)
        magnitude = layout.to_leaf(magnitude, OUT, rank=False)
    bias = _read_bias(module, layout, out_sizes, use_dora) if "b_bias" in tensors else None
    if groups == 1:
        a, b = layout.to_leaf(a, IN), layout.to_leaf(b, OUT)
    else:
        a = np.stack([layout.to_leaf(part, IN) for part in a])
        bias = None if bias is None else bias.reshape(groups, -1)
    return _LeafFactors(a, b, magnitude, bias, module.scale, rank // groups, groups)


def _read_bias(module: Module[StoredTensor], layout: FactorLayout, out_sizes: list[int], use_dora: bool) -> np.ndarray:
    """Reads the bias on B, if PEFT applies one to modules of this kind."""
    tensor, unsupported = module.tensors["b_bias"], "DoRA" if use_dora else None
    if module.kind == "embedding":
        unsupported = "an embedding"
    elif layout.expert_labels or module.expert is not None:
        unsupported = "experts"
    elif module.parameter == "in_proj_weight":
        unsupported = "the in_proj_weight of an attention"
    if unsupported is not None and tensor.tensors.read(tensor.key).any():
        raise ValueError(f"unsupported: {tensor.key}, since PEFT applies no lora_bias to {unsupported}")
    return layout.to_leaf(tensor.read(out_sizes), OUT, rank=False)


def _read_grouped(
    module: Module[StoredTensor], groups: int, in_sizes: list[int], out_sizes: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the factors of a grouped convolution, with an axis of groups first.

    PEFT's A is not grouped. Its product is a change of the grouped kernel only if each group's rows are zero outside
    the group's own channels.
    """
    channels, rank = in_sizes[0], module.rank // groups
    window = in_sizes[1:]
    a = module.tensors["a"].read((module.rank, channels * groups, *window))
    b = module.tensors["b"].read((*out_sizes, rank, *(1,) * len(window)))
    by_group = a.reshape(groups, rank, groups, channels, *window)
    off_diagonal = by_group.copy()
    off_diagonal[np.arange(groups), :, np.arange(groups)] = 0
    if off_diagonal.any():
        raise ValueError(
            f"unsupported: {module.tensors['a'].key} connects the {groups} groups of its convolution, "
            "which a change of the grouped kernel cannot"
        )
    diagonal = by_group[np.arange(groups), :, np.arange(groups)]
    return diagonal, b.reshape(groups, out_sizes[0] // groups, rank).transpose(0, 2, 1)


def _factor_dtype(factors: Iterable[_LeafFactors]) -> np.dtype:
    return common_dtype([x.dtype for f in factors for x in (f.a, f.b)])
