"""A delta as PyTorch modules with factors, tensors that are replaced, and rows: what every target writes."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from lora_jax.adapters.dora import DoRAAdapter
from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.lowrank import RANK, LoRAAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter
from lora_jax.adapters.terms import as_low_rank, is_low_rank
from lora_jax.peft import keys
from lora_jax.peft.factor_layout import FactorLayout, Labeled, pad_rank
from lora_jax.peft.names import Binding, Names

GROUPS = "groups"


@dataclasses.dataclass(frozen=True)
class Module:
    """One PyTorch weight with factors, in PEFT's layout.

    Attributes:
      name: The base's tensor.
      kind: Of the module, as in `Weight.module`.
      a: `(rank, in, …)`; of experts `(rank·experts, in)`.
      b: `(out, rank, 1…)`; of experts `(out, rank·experts)`.
      rank: Of each expert's, or group's, product.
      scale: What the product is multiplied by.
      dropout: Its rate.
      magnitude: DoRA's, or None.
      offset: The bias on b, which the scale multiplies too; or None.
      tied: Whether it is the second use of another module's weight.
    """

    name: str
    kind: str
    a: np.ndarray
    b: np.ndarray
    rank: int
    scale: float
    dropout: float
    magnitude: np.ndarray | None = None
    offset: np.ndarray | None = None
    tied: bool = False

    @property
    def module(self) -> str:
        return keys.split_name(self.name)[0]

    @property
    def parameter(self) -> str | None:
        """The parameter's name, where PEFT targets the parameter and not its module."""
        return keys.split_name(self.name)[1] if keys.is_parameter(self.name) else None

    @property
    def label(self) -> str:
        """What PEFT matches patterns with."""
        return self.name if self.parameter else self.module

    def pad_rank(self, rank: int) -> "Module":
        """The same product with rows of zeros up to a rank."""
        if self.kind in ("experts", "transposed_experts"):
            experts = self.a.shape[0] // self.rank
            a = pad_rank(self.a.reshape(experts, self.rank, -1), rank, 1).reshape(-1, self.a.shape[1])
            b = pad_rank(self.b.reshape(-1, self.rank, experts), rank, 1).reshape(self.b.shape[0], -1)
        else:
            a, b = pad_rank(self.a, rank, 0), pad_rank(self.b, rank, 1)
        return dataclasses.replace(self, a=a, b=b, rank=rank)

    def folded(self, factor: float) -> "Module":
        """The same change of the weight with `factor` taken out of the scale and into b."""
        if factor == 1.0:
            return self
        offset = None if self.offset is None else multiplied(self.offset, factor)
        return dataclasses.replace(self, b=multiplied(self.b, factor), offset=offset, scale=self.scale / factor)


def multiplied(array: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """A product, in float32 where the array's dtype does not hold it."""
    wide = array.astype(np.float32) * np.asarray(factor, np.float32)
    narrow = wide.astype(array.dtype)
    return narrow if (narrow.astype(np.float32) == wide).all() else wide


@dataclasses.dataclass
class Exported:
    """A delta in PyTorch's terms.

    Attributes:
      modules: Weights with factors.
      values: Tensors that are replaced, by name.
      rows: Per module, the ids of rows that are replaced, and the rows.
      bias: Which biases are trained by themselves: 'none', 'lora_only' (of modules with factors), 'all'.
      saved: Modules of which `values` are saved.
      ends_alike: Whether the name of a module with factors may be the end of another module's name.
      tensors: The names of all tensors of the leaves that are adapted, in files.
      problems: What cannot be put in these terms.
    """

    modules: list[Module] = dataclasses.field(default_factory=list)
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: dict[str, tuple[list[int], np.ndarray]] = dataclasses.field(default_factory=dict)
    bias: str = "none"
    saved: set[str] = dataclasses.field(default_factory=set)
    ends_alike: bool = False
    tensors: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))


def export(delta: Mapping[str, Adapter], names: Names) -> Exported:
    """Puts a delta in PyTorch's terms; what cannot be is in `problems`."""
    exported = Exported()
    offsets: dict[str, tuple[np.ndarray, float]] = {}
    row: dict[str, int] = {}
    numbers = {id(weight): number for number, weight in enumerate(names.weights)}
    for path, node in delta.items():
        with exported.collecting():
            binding = names.find(path, node.shape())
            new = binding.in_model
            exported.tensors += binding.tensors
            row |= dict.fromkeys(new.values(), numbers[id(binding.weight)])
            if isinstance(node, DoRAAdapter) and node.norm_over != IN:
                raise ValueError(
                    f"{path!r}: PEFT's DoRA has a magnitude for each output, this adapter "
                    f"(norm_over={node.norm_over!r}) one for each input"
                )
            if is_low_rank(node):
                node = node if isinstance(node, LoRAAdapter) else as_low_rank(node)
                modules = _with_tied(binding, _modules(binding, node))
                exported.modules += [dataclasses.replace(m, name=new.get(m.name, m.name)) for m in modules]
            elif isinstance(node, FullAdapter):
                values = binding.split(np.asarray(node.value))
                exported.values |= {new[name]: value for name, value in values.items()}
                exported.values |= {other: values[name] for other, name in binding.tied.items()}
            elif isinstance(node, RowsAdapter):
                exported.rows |= _rows(binding, node)
            elif isinstance(node, OffsetAdapter):
                offsets |= _offsets(binding, node)
            else:
                raise ValueError(f"{path!r}: PEFT's LoRA has no counterpart of {node.kind}")
    exported.ends_alike = ends_alike(names, [module.module for module in exported.modules])
    exported.modules.sort(key=lambda module: row.get(module.name, 0))
    with exported.collecting():
        _attach(exported.modules, offsets)
    return exported


def ends_alike(names: Names, modules: Iterable[str]) -> bool:
    """Whether the name of one of these modules may be the end of another module's name."""
    known = {keys.split_name(re.sub(r"\d+", "0", name))[0] for weight in names.weights for name in weight.examples()}
    numbered = {re.sub(r"\d+", "0", module) for module in modules}
    return any(name.endswith(f".{module}") for name in known for module in numbered)


def _modules(binding: Binding, node: LoRAAdapter) -> Iterator[Module]:
    """The modules of one leaf."""
    layout = FactorLayout(binding)
    kind = binding.weight.module or ("linear" if len(binding.tensor_axes) == 2 else "conv")
    low = _labeled(layout, node, kind)
    for name, index in binding.tensors.items():
        at = dict(zip(binding.index_labels, index))
        if layout.block in at and not low.blocks[at[layout.block]]:
            continue
        lead = (*layout.expert_labels, *([GROUPS] if low.groups > 1 else []))
        into, out = ([x for labels in layout.tensor_labels(role) for x in labels] for role in (IN, OUT))
        a = low.a.at(at).transpose((*lead, RANK, *into))
        b = low.b.at(at).transpose((*lead, RANK, *out))
        used = a.shape[len(lead)]
        if any(label in low.a.labels for label in at):
            whole = low.magnitude is not None or (low.bias is not None and low.bias.at(at).array.any())
            used = _used_rank(a, b, len(lead)) or (a.shape[len(lead)] if whole else 0)
            if not used:
                continue  # a layer that has no adapter
            a, b = (x.take(range(used), axis=len(lead)) for x in (a, b))
        scales = np.unique(low.scale.at(at).array)
        if len(scales) > 1:
            raise ValueError(f"{binding.path!r}: PEFT has one scale for all experts of {name}")
        sizes = {IN: layout.sizes(layout.tensor_labels(IN)), OUT: layout.sizes(layout.tensor_labels(OUT))}
        magnitude = None
        if low.magnitude is not None:
            magnitude = low.magnitude.at(at).transpose(out).reshape(-1)
        offset = None if low.bias is None else low.bias.at(at).transpose((*lead, *out)).reshape(-1)
        if offset is not None and offset.any() and (kind == "embedding" or not name.endswith(".weight")):
            raise ValueError(f"{binding.path!r}: PEFT adds no bias on B of {name}")
        yield Module(
            name=name,
            kind=kind,
            a=_torch_a(a, used, sizes[IN], low.groups),
            b=_torch_b(b, used, sizes, low.groups),
            rank=used * low.groups,
            scale=float(scales[0]),
            dropout=float(node.dropout),
            magnitude=magnitude,
            offset=offset,
        )


@dataclasses.dataclass(frozen=True)
class _Labeled:
    """A leaf's factors with a label for each axis; zeros where a block has no adapter.

    Attributes:
      blocks: Which blocks have one.
      groups: Of a grouped convolution.
    """

    a: Labeled
    b: Labeled
    scale: Labeled
    magnitude: Labeled | None
    bias: Labeled | None
    blocks: tuple[bool, ...]
    groups: int


def _labeled(layout: FactorLayout, node: LoRAAdapter, kind: str) -> _Labeled:
    binding, sizes = layout.binding, dict(layout.binding.sizes)
    running = {label for label in binding.index_labels if label != layout.block}
    # An axis that runs over tensors may also be taken for an out axis: factors a that all tensors share.
    for labels, own, role in zip(binding.leaf_axes, layout.axes, node.axes):
        if own != role and not (role == OUT and set(labels) <= running):
            raise ValueError(
                f"{binding.path!r}: the adapter's axes are {node.axes}, those of its PyTorch module {layout.axes}"
            )
    of_role = {
        role: [x for labels, r in zip(binding.leaf_axes, node.axes) if r == role for x in labels]
        for role in (BATCH, IN, OUT)
    }
    a, b, scale = (np.asarray(x) for x in (node.a, node.b, node.scale))
    bias = None if node.bias is None else np.asarray(node.bias)
    batch, number = node.axes.count(BATCH), len(node.blocks)
    lead, out, groups = of_role[BATCH], of_role[OUT], 1
    if number > 1 and layout.block and sizes[layout.block] == number:
        a, b = (_with_gaps(x, node.blocks, batch) for x in (a, b))
        scale = _with_gaps(scale, node.blocks, batch) if scale.ndim > batch else scale
        bias = None if bias is None else _with_gaps(bias, node.blocks, batch)
        lead, out = [*lead, layout.block], [x for x in out if x != layout.block]
    elif number > 1 and kind == "conv" and all(node.blocks):
        lead, groups = [*lead, GROUPS], number
        sizes |= {GROUPS: groups, out[0]: sizes[out[0]] // groups}
    elif number > 1:
        if bias is not None:
            scales = scale.reshape(scale.shape + (1,) * (bias.ndim - scale.ndim))
            bias = _with_gaps(bias if scale.ndim <= batch else multiplied(bias, scales), node.blocks, batch)
        a, b, scale = _block_diagonal(a, b, scale, node.blocks, batch)
    lead_sizes = [sizes[x] for x in lead]
    magnitude = None
    if isinstance(node, DoRAAdapter):
        labels = [*of_role[BATCH], *of_role[OUT]]
        magnitude = Labeled(np.asarray(node.magnitude).reshape([binding.sizes[x] for x in labels]), tuple(labels))
    return _Labeled(
        a=Labeled(a.reshape(*lead_sizes, -1, *(sizes[x] for x in of_role[IN])), (*lead, RANK, *of_role[IN])),
        b=Labeled(b.reshape(*lead_sizes, -1, *(sizes[x] for x in out)), (*lead, RANK, *out)),
        scale=Labeled(scale.reshape([sizes[x] for x in lead[: scale.ndim]]), tuple(lead[: scale.ndim])),
        magnitude=magnitude,
        bias=None if bias is None else Labeled(bias.reshape([sizes[x] for x in (*lead, *out)]), (*lead, *out)),
        blocks=node.blocks,
        groups=groups,
    )


def _with_gaps(array: np.ndarray, blocks: Sequence[bool], axis: int) -> np.ndarray:
    """Zeros for the blocks that are not adapted."""
    shape = list(array.shape)
    shape[axis] = len(blocks)
    full = np.zeros(shape, array.dtype)
    full[(*[slice(None)] * axis, np.flatnonzero(blocks))] = array
    return full


def _block_diagonal(a, b, scale, blocks: Sequence[bool], axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks with factors of their own as one pair: all of a, and b with zeros outside of each block's rows."""
    if scale.ndim > axis:  # a scale a block
        b = multiplied(b, scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim)))
        scale = np.ones((), np.float32)
    rank, size = b.shape[axis + 1 :]
    adapted = np.flatnonzero(blocks)
    wide = np.zeros((*b.shape[:axis], len(adapted), rank, len(blocks), size), b.dtype)
    for number, block in enumerate(adapted):
        wide[..., number, :, block, :] = b[(*[slice(None)] * axis, number)]
    joined = (*b.shape[:axis], len(adapted) * rank)
    return a.reshape(*joined, *a.shape[axis + 2 :]), wide.reshape(*joined, len(blocks) * size), scale


def _used_rank(a: np.ndarray, b: np.ndarray, axis: int) -> int:
    """The rank without the rows at the end that are zero in both factors."""
    others = tuple(i for i in range(a.ndim) if i != axis), tuple(i for i in range(b.ndim) if i != axis)
    used = np.flatnonzero(a.astype(bool).any(axis=others[0]) | b.astype(bool).any(axis=others[1]))
    return int(used[-1]) + 1 if len(used) else 0


def _torch_a(a: np.ndarray, rank: int, into: list[int], groups: int) -> np.ndarray:
    if groups == 1:
        return a.reshape(-1, *into)
    # PEFT's A sees all channels: a group's rows are zero outside of its own.
    channels, *window = into
    wide = np.zeros((groups, rank, groups, channels, *window), a.dtype)
    wide[np.arange(groups), :, np.arange(groups)] = a.reshape(groups, rank, channels, *window)
    return wide.reshape(groups * rank, groups * channels, *window)


def _torch_b(b: np.ndarray, rank: int, sizes: Mapping[str, list[int]], groups: int) -> np.ndarray:
    ones = (1,) * (len(sizes[IN]) - 1)
    if groups > 1:
        return b.transpose(0, 2, 1).reshape(*sizes[OUT], rank, *ones)
    b = b.reshape(-1, rank, *sizes[OUT])
    return np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(*sizes[OUT], -1, *ones)


def _with_tied(binding: Binding, modules: Iterable[Module]) -> Iterator[Module]:
    """A lookup's modules, and those of the products that use the same weight the other way round."""
    others = {primary: other for other, primary in binding.tied.items()}
    for module in modules:
        yield module
        if other := others.get(module.name):
            if module.kind != "embedding" or module.magnitude is not None:
                raise ValueError(
                    f"{binding.path!r}: {module.name} and {other} are one weight; PEFT ties factors of lookups"
                )
            yield dataclasses.replace(module, name=other, kind="linear", a=module.b.T, b=module.a.T, tied=True)


def _rows(binding: Binding, node: RowsAdapter) -> dict[str, tuple[list[int], np.ndarray]]:
    layout = FactorLayout(binding)
    by_row, others = layout.row_roles()
    if len(binding.tensors) > 1 or tuple(IN if role == by_row else OUT for role in layout.axes) != node.axes:
        raise ValueError(f"{binding.path!r}: Rows is held for a single lookup table only")
    (name,) = binding.tensors
    return {
        keys.split_name(binding.in_model[name])[0]: (
            np.asarray(node.ids).tolist(),
            layout.to_tensor(np.asarray(node.rows), others),
        )
    }


def _offsets(binding: Binding, node: OffsetAdapter) -> dict[str, tuple[np.ndarray, float]]:
    """Per bias, the term and its scale."""
    scale = np.asarray(node.scale, np.float32)
    labels = [x for group in binding.leaf_axes for x in group][: scale.ndim]
    if not set(labels) <= set(binding.index_labels) or any(len(group) > 1 for group in binding.leaf_axes[: scale.ndim]):
        raise ValueError(f"{binding.path!r}: a scale along axes that PyTorch keeps in one tensor")
    scales = Labeled(scale, tuple(labels))
    return {
        binding.in_model[name]: (value, float(scales.at(dict(zip(binding.index_labels, binding.tensors[name]))).array))
        for name, value in binding.split(np.asarray(node.value)).items()
    }


def _attach(modules: list[Module], offsets: dict[str, tuple[np.ndarray, float]]) -> None:
    """Puts each offset of a bias beside the factors of its module, with one scale for both."""
    by_bias = {f"{module.module}.bias": number for number, module in enumerate(modules) if not module.parameter}
    for name, (value, scale) in offsets.items():
        if name not in by_bias:
            raise ValueError(f"{name}: PEFT has an offset of a bias beside factors of the same module only")
        number = by_bias[name]
        ratio = scale / modules[number].scale
        value = value if np.isclose(ratio, 1.0, rtol=1e-6) else multiplied(value, ratio)
        if (own := modules[number].offset) is not None:
            value = value + own
        modules[number] = dataclasses.replace(modules[number], offset=value)
    if any(module.offset is not None for module in modules):  # PEFT has it in all modules or in none
        for number, module in enumerate(modules):
            if module.offset is None:
                modules[number] = dataclasses.replace(module, offset=np.zeros(module.b.shape[0], module.b.dtype))
