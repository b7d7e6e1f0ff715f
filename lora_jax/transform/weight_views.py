"""How views act on a weight: its labels are renamed, split or sliced with the axes of its value."""

from collections.abc import Sequence
from typing import Any

from jax import lax

from lora_jax.adapters.factored import Factor, Label
from lora_jax.meshes import shard_count
from lora_jax.transform.weight import CannotFactor, Value, Weight, twin, value_size


def fresh(weight: Weight, count: int) -> list[Label]:
    """Labels that the weight does not use, for axes that a view adds."""
    used = {label for label, _ in weight.labels}.union(*(factor.labels for factor in weight.labeled))
    names = (f"+{number}" for number in range(len(used) + count))
    return [name for name in names if name not in used][:count]


def permuted(weight: Weight, value: Value, order: Sequence[int]) -> Weight:
    """A transposed view."""
    return weight.replace(value=value, dims=tuple(weight.dims[axis] for axis in order))


def reshaped(weight: Weight, value: Value) -> Weight:
    """A reshaped view: axes are merged and split along the borders of labels, which are split where needed."""
    weight, plan = split_labels(weight, value.shape)
    for label, size in weight.labels:
        if size == 1 and not any(label == other for axis in plan for other, _ in axis):
            weight = weight.without(label)
    added = iter(fresh(weight, sum(not axis for axis in plan)))
    dims = tuple(axis or ((next(added), 1),) for axis in plan)
    return weight.replace(value=value, dims=dims)


def split_labels(weight: Weight, shape: Sequence[int]) -> tuple[Weight, list[tuple[tuple[Label, int], ...]]]:
    """Splits labels so that each axis of `shape` is a run of labels; axes of size one get no label."""
    queue = [pair for pair in weight.labels if pair[1] != 1]
    plan: list[tuple[tuple[Label, int], ...]] = []
    for size in shape:
        axis: list[tuple[Label, int]] = []
        while size != 1:
            label, have = queue.pop(0)
            if size % have == 0:
                axis.append((label, have))
                size //= have
            elif have % size == 0:
                weight, parts = split_label(weight, label, size, have // size)
                axis.append(parts[0])
                queue.insert(0, parts[1])
                size = 1
            else:
                raise CannotFactor(f"the reshape to {tuple(shape)} cuts across an axis of size {have}")
        plan.append(tuple(axis))
    return weight, plan


def split_label(weight: Weight, label: Label, major: int, minor: int):
    """Splits a label in two, in the labeled arrays and in the dims."""
    parts = ((f"{label}.0", major), (f"{label}.1", minor))
    names = {label: [name for name, _ in parts], twin(label): [twin(name) for name, _ in parts]}

    def split(factor: Factor) -> Factor:
        labels = tuple(new for old in factor.labels for new in names.get(old, [old]))
        if len(labels) == len(factor.labels):
            return factor
        shape = [n for old, size in factor.sizes.items() for n in ((major, minor) if old in names else (size,))]
        return Factor(lax.reshape(factor.array, shape), labels)

    dims = tuple(tuple(new for old in axis for new in (parts if old[0] == label else (old,))) for axis in weight.dims)
    return weight.map_factors(split).replace(dims=dims), parts


def slice_axis(weight: Weight, value: Value, axis: int, start: int, limit: int, stride: int = 1) -> Weight:
    """A view of a static slice along one axis."""
    labels = weight.dims[axis]
    size = limit - start
    if len(labels) > 1:
        # A fused axis: whole blocks, or a part of one block.
        (block, _), *rest = labels
        inner = value_size(rest)
        if stride != 1 or len(rest) != 1:
            raise CannotFactor(f"a strided slice of axis {axis}, which is made of several axes")
        if start % inner == 0 and size % inner == 0:
            return _slice_label(weight, value, axis, block, start // inner, limit // inner, 1, rest)
        if start // inner == (limit - 1) // inner:
            first = start // inner
            weight = _slice_label(weight, value, axis, block, first, first + 1, 1, rest)
            offset = first * inner
            return _slice_label(weight, value, axis, rest[0][0], start - offset, limit - offset, 1, [])
        raise CannotFactor(f"the slice {start}:{limit} of axis {axis} cuts across its blocks")
    return _slice_label(weight, value, axis, labels[0][0], start, limit, stride, [])


def _slice_label(weight: Weight, value: Value, axis, label, start, limit, stride, rest) -> Weight:
    part = weight.along(label, lambda array, at: lax.slice_in_dim(array, start, limit, stride, at))
    size = -(-(limit - start) // stride)
    pairs = ((label, size), *rest)
    if len(weight.dims[axis]) > 1 and not rest:  # the block before it has been cut to one
        pairs = tuple((x, size if x == label else n) for x, n in weight.dims[axis])
    return part.replace(value=value).with_axis(axis, pairs).mark_sliced(label)


def spec_by_label(weight: Weight, spec: Sequence[Any], mesh: Any) -> dict[Label, Any]:
    """The mesh axes of each label, from a partition spec of the base weight."""
    mesh_axes = {}
    for axis, names in zip(weight.dims, spec):
        if names is None:
            continue
        count = shard_count(names, mesh)
        label, size = axis[0]
        if len(axis) > 1 and size % count:
            raise CannotFactor(f"an axis made of several is sharded {count} ways, its first part has size {size}")
        mesh_axes[label] = names
    return mesh_axes
