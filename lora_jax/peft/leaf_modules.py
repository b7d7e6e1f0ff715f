"""The PyTorch modules of a leaf's low-rank adapter."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lora_jax.adapters.dora import DoRAAdapter
from lora_jax.adapters.lowrank import RANK, LoRAAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT
from lora_jax.peft import keys
from lora_jax.peft.arrays import multiply
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.module import Module
from lora_jax.peft.weights import Binding

GROUPS = "groups"
"""The label of a grouped convolution's groups."""


@dataclasses.dataclass(frozen=True)
class LabeledArray:
    """An array with a label for each of its axes."""

    array: np.ndarray
    labels: tuple[str, ...]

    def at(self, index: Mapping[str, int]) -> "LabeledArray":
        """Indexes some labels; labels that the array lacks are ignored."""
        part = self.array[tuple(index.get(label, slice(None)) for label in self.labels)]
        return LabeledArray(part, tuple(label for label in self.labels if label not in index))

    def transpose(self, labels: Sequence[str]) -> np.ndarray:
        """Returns the array with its axes in the order of `labels`."""
        return self.array.transpose([self.labels.index(label) for label in labels])


def split_low_rank(binding: Binding, node: LoRAAdapter) -> Iterator[Module[np.ndarray]]:
    """Yields the modules of a leaf's adapter, and those of tied tensors; layers with factors of zeros are omitted.

    Names are those of checkpoint files.

    Raises:
      ValueError: PEFT cannot express the adapter.
    """
    tied = {primary: other for other, primary in binding.tied.items()}
    for module in _split_modules(binding, node):
        yield module
        if other := tied.get(module.name):
            if module.kind != "embedding" or "magnitude" in module.tensors:
                raise ValueError(
                    f"{binding.path!r}: {module.name} and {other} are one weight; PEFT ties factors of embeddings only"
                )
            factors = {"a": module.tensors["b"].T, "b": module.tensors["a"].T}
            is_parameter = keys.is_parameter(other)
            yield dataclasses.replace(
                module, name=other, kind="linear", tensors=factors, is_parameter=is_parameter, tied=True
            )


def _split_modules(binding: Binding, node: LoRAAdapter) -> Iterator[Module[np.ndarray]]:
    layout = FactorLayout(binding)
    factors = _label_factors(layout, node)
    in_sizes, out_sizes = (layout.sizes(layout.tensor_labels(role)) for role in (IN, OUT))
    for name, position in binding.tensors.items():
        index = dict(zip(binding.index_labels, position))
        if layout.block in index and not factors.blocks[index[layout.block]]:
            continue
        lead = (*layout.expert_labels, *([GROUPS] if factors.groups > 1 else []))
        in_labels, out_labels = ([x for labels in layout.tensor_labels(role) for x in labels] for role in (IN, OUT))
        a = factors.a.at(index).transpose((*lead, RANK, *in_labels))
        b = factors.b.at(index).transpose((*lead, RANK, *out_labels))
        rank = a.shape[len(lead)]
        if any(label in factors.a.labels for label in index):
            has_bias = factors.bias is not None and bool(factors.bias.at(index).array.any())
            nonzero_rank = _nonzero_rank(a, b, len(lead))
            if not nonzero_rank and not has_bias and factors.magnitude is None:
                continue  # a layer without adapter
            rank = nonzero_rank or rank
            a, b = (x.take(range(rank), axis=len(lead)) for x in (a, b))
        scales = np.unique(factors.scale.at(index).array)
        if len(scales) > 1:
            raise ValueError(f"{binding.path!r}: PEFT has one scale for all experts of {name}")
        tensors = {
            "a": _to_torch_a(a, rank, in_sizes, factors.groups),
            "b": _to_torch_b(b, rank, in_sizes, out_sizes, factors.groups),
        }
        if factors.magnitude is not None:
            tensors["magnitude"] = factors.magnitude.at(index).transpose(out_labels).reshape(-1)
        if factors.bias is not None:
            bias = factors.bias.at(index).transpose((*lead, *out_labels)).reshape(-1)
            if bias.any() and (binding.kind == "embedding" or not name.endswith(".weight")):
                raise ValueError(f"{binding.path!r}: PEFT adds no bias on B of {name}")
            tensors["b_bias"] = bias
        yield Module(
            name=name,
            kind=binding.kind,
            tensors=tensors,
            rank=rank * factors.groups,
            scale=float(scales[0]),
            dropout=float(node.dropout),
            is_parameter=keys.is_parameter(name),
        )


@dataclasses.dataclass(frozen=True)
class _LabeledFactors:
    """A leaf's factors with a label for each axis, and zeros for blocks without adapter.

    Attributes:
      a: A.
      b: B.
      scale: The factor of the product.
      magnitude: DoRA's magnitudes, or None.
      bias: The bias on B, or None.
      blocks: Whether each block is adapted.
      groups: The number of groups of a convolution.
    """

    a: LabeledArray
    b: LabeledArray
    scale: LabeledArray
    magnitude: LabeledArray | None
    bias: LabeledArray | None
    blocks: tuple[bool, ...]
    groups: int


def _label_factors(layout: FactorLayout, node: LoRAAdapter) -> _LabeledFactors:
    binding, sizes = layout.binding, dict(layout.binding.sizes)
    enumerating = {label for label in binding.index_labels if label != layout.block}
    # An axis that enumerates tensors may also be an out axis of the adapter: all tensors then share A.
    for labels, role, node_role in zip(binding.leaf_axes, layout.axes, node.axes):
        if role != node_role and not (node_role == OUT and set(labels) <= enumerating):
            raise ValueError(
                f"{binding.path!r}: the adapter's axes are {node.axes}, those of its PyTorch module {layout.axes}"
            )
    by_role = {
        role: [x for labels, r in zip(binding.leaf_axes, node.axes) if r == role for x in labels]
        for role in (BATCH, IN, OUT)
    }
    a, b, scale = (np.asarray(x) for x in (node.a, node.b, node.scale))
    bias = None if node.bias is None else np.asarray(node.bias)
    batch, count = node.axes.count(BATCH), len(node.blocks)
    lead, out, groups = by_role[BATCH], by_role[OUT], 1
    if count > 1 and layout.block and sizes[layout.block] == count:
        a, b = (_fill_blocks(x, node.blocks, batch) for x in (a, b))
        scale = _fill_blocks(scale, node.blocks, batch) if scale.ndim > batch else scale
        bias = None if bias is None else _fill_blocks(bias, node.blocks, batch)
        lead, out = [*lead, layout.block], [x for x in out if x != layout.block]
    elif count > 1 and binding.kind == "conv" and all(node.blocks):
        lead, groups = [*lead, GROUPS], count
        sizes |= {GROUPS: groups, out[0]: sizes[out[0]] // groups}
    elif count > 1:
        if bias is not None:
            scales = scale.reshape(scale.shape + (1,) * (bias.ndim - scale.ndim))
            bias = _fill_blocks(bias if scale.ndim <= batch else multiply(bias, scales), node.blocks, batch)
        a, b, scale = _block_diagonal(a, b, scale, node.blocks, batch)
    lead_sizes = [sizes[x] for x in lead]
    magnitude = None
    if isinstance(node, DoRAAdapter):
        labels = [*by_role[BATCH], *by_role[OUT]]
        magnitude = LabeledArray(np.asarray(node.magnitude).reshape([binding.sizes[x] for x in labels]), tuple(labels))
    return _LabeledFactors(
        a=LabeledArray(a.reshape(*lead_sizes, -1, *(sizes[x] for x in by_role[IN])), (*lead, RANK, *by_role[IN])),
        b=LabeledArray(b.reshape(*lead_sizes, -1, *(sizes[x] for x in out)), (*lead, RANK, *out)),
        scale=LabeledArray(scale.reshape([sizes[x] for x in lead[: scale.ndim]]), tuple(lead[: scale.ndim])),
        magnitude=magnitude,
        bias=None if bias is None else LabeledArray(bias.reshape([sizes[x] for x in (*lead, *out)]), (*lead, *out)),
        blocks=node.blocks,
        groups=groups,
    )


def _fill_blocks(array: np.ndarray, blocks: Sequence[bool], axis: int) -> np.ndarray:
    """Inserts zeros for the blocks that are not adapted."""
    shape = list(array.shape)
    shape[axis] = len(blocks)
    full = np.zeros(shape, array.dtype)
    full[(*[slice(None)] * axis, np.flatnonzero(blocks))] = array
    return full


def _block_diagonal(
    a: np.ndarray, b: np.ndarray, scale: np.ndarray, blocks: Sequence[bool], axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combines the factors of each block to one pair: B is zero outside the rows of each block."""
    if scale.ndim > axis:  # one scale per block
        b = multiply(b, scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim)))
        scale = np.ones((), np.float32)
    rank, size = b.shape[axis + 1 :]
    adapted = np.flatnonzero(blocks)
    wide = np.zeros((*b.shape[:axis], len(adapted), rank, len(blocks), size), b.dtype)
    for number, block in enumerate(adapted):
        wide[..., number, :, block, :] = b[(*[slice(None)] * axis, number)]
    shape = (*b.shape[:axis], len(adapted) * rank)
    return a.reshape(*shape, *a.shape[axis + 2 :]), wide.reshape(*shape, len(blocks) * size), scale


def _nonzero_rank(a: np.ndarray, b: np.ndarray, axis: int) -> int:
    """The rank without trailing rows that are zero in both factors."""
    a_axes, b_axes = (tuple(i for i in range(x.ndim) if i != axis) for x in (a, b))
    nonzero = np.flatnonzero(a.astype(bool).any(axis=a_axes) | b.astype(bool).any(axis=b_axes))
    return int(nonzero[-1]) + 1 if len(nonzero) else 0


def _to_torch_a(a: np.ndarray, rank: int, in_sizes: list[int], groups: int) -> np.ndarray:
    if groups == 1:
        return a.reshape(-1, *in_sizes)
    # PEFT's A contracts all channels: a group's rows are zero outside the group's channels.
    channels, *window = in_sizes
    wide = np.zeros((groups, rank, groups, channels, *window), a.dtype)
    wide[np.arange(groups), :, np.arange(groups)] = a.reshape(groups, rank, channels, *window)
    return wide.reshape(groups * rank, groups * channels, *window)


def _to_torch_b(b: np.ndarray, rank: int, in_sizes: list[int], out_sizes: list[int], groups: int) -> np.ndarray:
    ones = (1,) * (len(in_sizes) - 1)
    if groups > 1:
        return b.transpose(0, 2, 1).reshape(*out_sizes, rank, *ones)
    b = b.reshape(-1, rank, *out_sizes)
    return np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(*out_sizes, -1, *ones)
