"""A leaf's low-rank adapter from the factors that PyTorch's modules have."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.dora import DoRAAdapter
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT
from lora_jax.io.read_errors import BREAK
from lora_jax.leaves import is_abstract
from lora_jax.peft import experts, keys
from lora_jax.peft.config import CONFIG
from lora_jax.peft.factor_layout import FactorLayout, pad_rank
from lora_jax.peft.keys import Key
from lora_jax.peft.names import Binding
from lora_jax.peft.stored import Module, Stored


def low_rank(
    stored: Stored,
    binding: Binding,
    modules: Mapping[tuple[int, ...], Module],
    leaf: Any,
    biases: Callable[[Module], Key | None],
) -> LoRAAdapter:
    """The adapter of a leaf from those of its tensors, each with its index in `binding.index_labels`.

    Layers that the adapter leaves out have factors of zeros, and with DoRA the magnitudes of the leaf itself.

    Args:
      stored: The adapter.
      binding: The leaf and its tensors.
      modules: What the adapter has for each of them.
      leaf: The base's.
      biases: The key of the bias on B that is a part of the adapter; None where there is none. Biases of zeros are left
        out: PEFT has them on all modules or on none.

    Raises:
      ValueError: What is missing or does not fit, a line for each tensor.
    """
    layout = FactorLayout(binding)
    factors, problems = {}, []
    for index, module in modules.items():
        try:
            factors[index] = _factors(stored, module, layout, biases(module))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(BREAK.join(problems))
    groups = next(iter(factors.values())).groups
    if any(factor.groups != groups for factor in factors.values()):
        raise ValueError(f"{binding.path!r}: its tensors have different numbers of groups")
    lead = layout.leading_sizes
    rank = max(f.rank for f in factors.values())
    dtype = _dtype(factors.values())
    a = np.zeros((*lead, *[groups] * (groups > 1), rank, *layout.sizes(layout.labels(IN))), dtype)
    b = np.zeros((*lead, *[groups] * (groups > 1), rank, *_divided(layout.sizes(layout.labels(OUT)), groups)), dtype)
    scale = np.ones(lead, np.float32)
    given = np.zeros(lead, bool)
    axis = len(layout.expert_labels) + (groups > 1)
    bias = np.zeros(np.delete(b.shape, len(lead) + (groups > 1)), joint([f.b.dtype for f in factors.values()]))
    for index, factor in factors.items():
        a[layout.slices(index)] = pad_rank(factor.a, rank, axis)
        b[layout.slices(index)] = pad_rank(factor.b, rank, axis)
        scale[layout.slices(index)] = factor.scale
        given[layout.slices(index)] = True
        if factor.bias is not None:
            bias[layout.slices(index)] = factor.bias
    blocks = (True,) * groups
    shape = layout.sizes(layout.labels(BATCH))
    if layout.block:
        blocks = tuple(np.any(given.reshape(-1, lead[-1]), axis=0).tolist())
        adapted = np.flatnonzero(blocks)
        a, b, scale, bias = (np.take(x, adapted, axis=len(lead) - 1) for x in (a, b, scale, bias))
        shape = [*shape, len(adapted)] if len(blocks) > 1 else shape
    same = scale[given[..., np.flatnonzero(blocks)] if layout.block else given]
    fields: dict[str, Any] = {
        "a": jnp.asarray(a.reshape(*shape, *a.shape[len(lead) :])),
        "b": jnp.asarray(b.reshape(*shape, *b.shape[len(lead) :])),
        "scale": jnp.asarray(same.flat[0] if (same == same.flat[0]).all() else scale.reshape(shape)),
        "dropout": jnp.asarray(stored.config.lora_dropout, jnp.float32),
        "axes": layout.axes,
        "blocks": blocks,
        "bias": jnp.asarray(bias.reshape(*shape, *bias.shape[len(lead) :])) if bias.any() else None,
    }
    if not stored.config.use_dora:
        return LoRAAdapter(**fields)
    magnitude = np.zeros((*lead, *layout.sizes(layout.labels(OUT))), _dtype(factors.values()))
    for index, factor in factors.items():
        magnitude[layout.slices(index)] = factor.magnitude
    full = [math.prod(binding.sizes[x] for x in group) for group, r in zip(binding.leaf_axes, layout.axes) if r == OUT]
    wanted = (*layout.sizes(layout.labels(BATCH)), *full)
    if not given.all():
        if is_abstract(leaf):
            raise ValueError(f"{binding.path!r}: the magnitudes of layers without adapter need the base's values")
        left_out = np.broadcast_to(~given.reshape(given.shape + (1,) * (magnitude.ndim - given.ndim)), magnitude.shape)
        magnitude = np.where(left_out.reshape(wanted), _norms(leaf, layout.axes), magnitude.reshape(wanted))
    magnitude = magnitude.reshape(wanted)
    return DoRAAdapter(**fields, magnitude=jnp.asarray(magnitude), norm_over="in", norm_gradient=False)


def _norms(leaf: Any, axes: Sequence[str]) -> np.ndarray:
    """The norm of each output's weights, `[*batch, *out]`."""
    squares = np.square(np.asarray(leaf).astype(np.float64))
    norms = np.sqrt(squares.sum(axis=tuple(i for i, role in enumerate(axes) if role == IN)))
    kept = [role for role in axes if role != IN]
    order = [i for wanted in (BATCH, OUT) for i, role in enumerate(kept) if role == wanted]
    return norms.transpose(order).astype(np.float32)


def _factors(stored: Stored, module: Module, layout: FactorLayout, of_bias: Key | None) -> "_Factors":
    """A module's factors in the order of the leaf's labels, with the bias on B that a key names."""
    wanted = ["a", "b", *(["magnitude"] if stored.config.use_dora else [])]
    missing = [part for part in wanted if part not in module.parts]
    if missing:
        known = keys.factor_keys(module.label, embedding=layout.binding.weight.module == "embedding")
        raise ValueError("missing: " + ", ".join(known[part] for part in missing))
    if "magnitude" in module.parts and not stored.config.use_dora:
        raise ValueError(f"unused: {module.parts['magnitude'].key}, since {CONFIG} has use_dora false")
    rank = stored.config.rank(module.label)
    into, out = (layout.sizes(layout.tensor_labels(role)) for role in (IN, OUT))
    ones = (1,) * (len(layout.binding.tensor_axes) - 2)
    groups = 1
    if module.share is not None:
        a, b = experts.read(stored, module, rank, into, out)
        rank = len(a)
    elif layout.expert_labels:
        count = math.prod(layout.binding.sizes[x] for x in layout.expert_labels)
        a = stored.read(module.parts["a"], (rank * count, *into)).reshape(count, rank, *into)
        b = stored.read(module.parts["b"], (*out, rank * count)).reshape(*out, rank, count).transpose(2, 1, 0)
    elif ones and (per := (stored.tensors[module.parts["b"].key][1:2] or (0,))[0]) not in (0, rank) and rank % per == 0:
        groups = rank // per
        a, b = _grouped(stored, module, rank, groups, into, out)
    else:
        a = stored.read(module.parts["a"], (rank, *into))
        b = stored.read(module.parts["b"], (*out, rank, *ones)).reshape(*out, rank).T
    magnitude = None
    if stored.config.use_dora:
        key = module.parts["magnitude"]
        magnitude = stored.read(key, (1, *out, *ones) if ones else out).reshape(out)
        magnitude = layout.to_leaf(magnitude, OUT, rank=False)
    bias = None if of_bias is None else _bias(stored, of_bias, layout, module, out)
    if groups == 1:
        a, b = layout.to_leaf(a, IN), layout.to_leaf(b, OUT)
    else:
        a = np.stack([layout.to_leaf(part, IN) for part in a])
        bias = None if bias is None else bias.reshape(groups, -1)
    return _Factors(a, b, magnitude, bias, stored.config.scale(module.label), rank // groups, groups)


def _bias(stored: Stored, key: Key, layout: FactorLayout, module: Module, out: list[int]) -> np.ndarray:
    """The bias on B, where PEFT has one."""
    where = "DoRA" if stored.config.use_dora else None
    if layout.binding.weight.module == "embedding":
        where = "an embedding"
    elif layout.expert_labels or module.share is not None:
        where = "experts"
    elif keys.split_name(module.name)[1] == "in_proj_weight":
        where = "the in_proj_weight of an attention"
    if where is not None and stored.tensors.read(key.key).any():
        raise ValueError(f"cannot be held: {key.key}, since PEFT applies no lora_bias to {where}")
    return layout.to_leaf(stored.read(key, out), OUT, rank=False)


def _grouped(stored: Stored, module: Module, rank: int, groups: int, into, out) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a grouped convolution, a group at a time.

    PEFT's A is not grouped. What it adds fits the grouped kernel only where each group's rows see nothing but
    the group's own channels.
    """
    channels, per = into[0], rank // groups
    a = stored.read(module.parts["a"], (rank, channels * groups, *into[1:]))
    b = stored.read(module.parts["b"], (*out, per, *(1,) * len(into[1:])))
    parts = a.reshape(groups, per, groups, channels, *into[1:])
    across = parts.copy()
    across[np.arange(groups), :, np.arange(groups)] = 0
    if across.any():
        raise ValueError(
            f"cannot be held: {module.parts['a'].key} reaches across the {groups} groups of its convolution, "
            "which no change of the grouped kernel does"
        )
    own = parts[np.arange(groups), :, np.arange(groups)]
    return own, b.reshape(groups, out[0] // groups, per).transpose(0, 2, 1)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """One module's factors: a `[*experts, (groups,) rank, *in]`, b `[…, rank, *out]`, axes as in the leaf.

    The bias is `[(groups,) *out]`.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    bias: np.ndarray | None
    scale: float
    rank: int
    groups: int


def _dtype(factors: Iterable[_Factors]) -> np.dtype:
    return joint([x.dtype for f in factors for x in (f.a, f.b)])


def joint(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The one dtype, or float32."""
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)


def _divided(sizes: list[int], groups: int) -> list[int]:
    return [sizes[0] // groups, *sizes[1:]] if groups > 1 else sizes
