"""Converts a delta to PyTorch's terms."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax.adapters.dora import DoRAAdapter
from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.adapters.terms import as_low_rank, is_low_rank
from lora_jax.peft import keys, ties
from lora_jax.peft.arrays import multiply, replace_tensors
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.leaf_modules import LabeledArray, split_low_rank
from lora_jax.peft.module import Module
from lora_jax.peft.names import Names
from lora_jax.peft.problems import collect_problems
from lora_jax.peft.torch_adapter import TorchAdapter, are_ambiguous
from lora_jax.peft.weights import Binding


def export(delta: Mapping[str, Adapter], names: Names) -> TorchAdapter:
    """Converts a delta to PyTorch's terms; what they cannot express is in `problems`."""
    adapter = TorchAdapter()
    offsets: dict[str, tuple[np.ndarray, float]] = {}
    rows: dict[str, int] = {}
    numbers = {id(weight): number for number, weight in enumerate(names.weights)}
    for path, node in delta.items():
        with collect_problems(adapter.problems):
            binding = names.find(path, node.shape())
            in_model = binding.in_model
            adapter.tensors += binding.tensors
            rows |= dict.fromkeys(in_model.values(), numbers[id(binding.weight)])
            if isinstance(node, DoRAAdapter) and node.norm_over != IN:
                raise ValueError(
                    f"{path!r}: PEFT's DoRA has a magnitude for each output, this adapter "
                    f"(norm_over={node.norm_over!r}) one for each input"
                )
            if is_low_rank(node):
                node = node if isinstance(node, LoRAAdapter) else as_low_rank(node)
                adapter.modules += [_rename(x, in_model.get(x.name, x.name)) for x in split_low_rank(binding, node)]
            elif isinstance(node, FullAdapter):
                values = binding.split(np.asarray(node.value))
                adapter.values |= {in_model[name]: value for name, value in values.items()}
                adapter.values |= {other: values[name] for other, name in binding.tied.items()}
            elif isinstance(node, RowsAdapter):
                adapter.rows |= _export_rows(binding, node)
            elif isinstance(node, OffsetAdapter):
                offsets |= _export_offsets(binding, node)
            else:
                form = "; lora_jax.save writes it in a form of its own" if node.nonlinear else ""
                raise ValueError(f"{path!r}: PEFT's LoRA has no counterpart of {node.kind}{form}")
    adapter.ambiguous = are_ambiguous(names, [module.path for module in adapter.modules])
    adapter.modules.sort(key=lambda module: rows.get(module.name, 0))
    with collect_problems(adapter.problems):
        _attach_offsets(adapter.modules, offsets)
    adapter.problems += _check_shared(adapter, names)
    return adapter


def _rename(module: Module[np.ndarray], name: str) -> Module[np.ndarray]:
    return dataclasses.replace(module, name=name, is_parameter=keys.is_parameter(name))


def _export_rows(binding: Binding, node: RowsAdapter) -> dict[str, tuple[list[int], np.ndarray]]:
    """The ids of the replaced rows of a module, and the rows."""
    layout = FactorLayout(binding)
    row_role, other_role = layout.row_roles()
    if len(binding.tensors) > 1 or tuple(IN if role == row_role else OUT for role in layout.axes) != node.axes:
        raise ValueError(f"{binding.path!r}: PEFT has trained rows of single lookup tables only")
    (name,) = binding.tensors
    rows = layout.to_tensor(np.asarray(node.rows), other_role)
    return {keys.split_name(binding.in_model[name])[0]: (np.asarray(node.ids).tolist(), rows)}


def _export_offsets(binding: Binding, node: OffsetAdapter) -> dict[str, tuple[np.ndarray, float]]:
    """The offset of each bias, and its scale."""
    scale = np.asarray(node.scale, np.float32)
    axes = binding.leaf_axes[: scale.ndim]
    labels = [x for group in binding.leaf_axes for x in group][: scale.ndim]
    if not set(labels) <= set(binding.index_labels) or any(len(group) > 1 for group in axes):
        raise ValueError(f"{binding.path!r}: the scale varies along axes that PyTorch stores in one tensor")
    scales = LabeledArray(scale, tuple(labels))
    return {
        binding.in_model[name]: (value, float(scales.at(dict(zip(binding.index_labels, binding.tensors[name]))).array))
        for name, value in binding.split(np.asarray(node.value)).items()
    }


def _attach_offsets(modules: list[Module[np.ndarray]], offsets: Mapping[str, tuple[np.ndarray, float]]) -> None:
    """Adds each offset of a bias to the module with its weight's factors, whose scale multiplies both."""
    by_bias = {f"{module.path}.bias": number for number, module in enumerate(modules) if not module.is_parameter}
    for name, (value, scale) in offsets.items():
        if name not in by_bias:
            raise ValueError(f"{name}: PEFT has an offset of a bias only if its module has factors")
        number = by_bias[name]
        module = modules[number]
        ratio = scale / module.scale
        value = value if np.isclose(ratio, 1.0, rtol=1e-6) else multiply(value, ratio)
        if "b_bias" in module.tensors:
            value = value + module.tensors["b_bias"]
        modules[number] = replace_tensors(module, b_bias=value)
    if any("b_bias" in module.tensors for module in modules):  # PEFT has it in all modules or in none
        for number, module in enumerate(modules):
            if "b_bias" not in module.tensors:
                b = module.tensors["b"]
                modules[number] = replace_tensors(module, b_bias=np.zeros(b.shape[0], b.dtype))


def _check_shared(adapter: TorchAdapter, names: Names) -> list[str]:
    """Problems of modules that PyTorch's model does not call: it calls others with the same weight."""
    declared = {name for row in names.weights for name in row.examples()}
    modules = dict.fromkeys([module.path for module in adapter.modules])
    modules |= dict.fromkeys(keys.split_name(name)[0] for name in adapter.values)
    wrapped = [module for module in modules if ties.is_shared(f"{module}.weight", declared)]
    return [f"{ties.describe_shared(module)}; leave it out of the delta" for module in wrapped]
