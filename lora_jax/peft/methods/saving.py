"""Saves deltas in the form of PEFT's methods other than LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.ia3 import IA3Adapter
from lora_jax.adapters.protocol import BATCH, OUT, Adapter
from lora_jax.adapters.terms import is_low_rank
from lora_jax.io.read_errors import list_problems
from lora_jax.peft import keys
from lora_jax.peft.arrays import multiply, replace_tensors
from lora_jax.peft.base_index import bindings_of
from lora_jax.peft.config import TOKENS, exact_pattern
from lora_jax.peft.export import export
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.ia3 import IA3Method, is_bias_gain
from lora_jax.peft.methods.method import Method, factor_layout
from lora_jax.peft.methods.table import METHODS, NORM_TUNING
from lora_jax.peft.methods.vera import VeRAMethod, shared_pair
from lora_jax.peft.module import Module
from lora_jax.peft.modules_to_save import complete
from lora_jax.peft.names import Names
from lora_jax.peft.targets import write_files
from lora_jax.peft.torch_adapter import TorchAdapter, are_ambiguous


def method_of(delta: Mapping[str, Adapter], names: Names) -> str | None:
    """Returns the `peft_type` of a delta whose adapters are all of one method of PEFT other than LoRA.

    Leaves that are trained in full may accompany them. Returns None for LoRA itself, and for low-rank adapters that
    their method cannot represent (VeRA whose pairs are not corners of one pair): they are saved as LoRA.
    """
    others = {path: node for path, node in delta.items() if not isinstance(node, FullAdapter)}
    if not others:
        return NORM_TUNING if _are_norms(delta, names) else None
    if all(isinstance(node, RowsAdapter) for node in delta.values()):
        ids = {tuple(np.asarray(node.ids).tolist()) for node in delta.values() if isinstance(node, RowsAdapter)}
        return TOKENS if len(ids) == 1 else None
    for kind, method in METHODS.items():
        if all(isinstance(node, method.adapters) for node in others.values()):
            fits = not method().check(others)
            if issubclass(method, VeRAMethod):
                fits = fits and shared_pair(_layouts(delta, names, method)) is not None
            return kind if fits or not all(map(is_low_rank, others.values())) else None
    return None


def save_method(
    directory: Path,
    kind: str,
    delta: Mapping[str, Adapter],
    names: Names,
    *,
    base: Any,
    base_model: str | None,
    task_type: str | None,
) -> None:
    """Saves a delta in the form of one of PEFT's methods, which :func:`method_of` returned.

    Raises:
      ValueError: PEFT's method cannot represent the delta: the message lists everything, and nothing is written.
    """
    if kind in METHODS:
        tensors, config, problems = _convert(METHODS[kind](), delta, names, base, task_type)
    elif kind == TOKENS:
        tensors, config, problems = _convert_rows(delta, names)
    else:
        adapter = _export_values(delta, names, base, task_type)
        split = {keys.split_name(name): value for name, value in adapter.values.items()}
        tensors = {f"{keys.PREFIX}{path}.ln_tuning_layers.{x}": value for (path, x), value in split.items()}
        config, problems = _target_modules(sorted(adapter.saved), names), adapter.problems
    if problems:
        raise ValueError(f"The delta cannot be written for PEFT's {kind} {list_problems(problems)}")
    shared = {"base_model_name_or_path": base_model, "task_type": task_type, "inference_mode": True}
    write_files(directory, tensors, {**shared, **config, "peft_type": kind})


def _export_values(delta: Mapping[str, Adapter], names: Names, base: Any, task_type: str | None) -> TorchAdapter:
    adapter = export(delta, names)
    complete(adapter, names, base, task_type, ())
    return adapter


def _target_modules(modules: list[str], names: Names) -> dict[str, Any]:
    """PEFT matches a listed name with every module whose path ends in it, a pattern with the full path."""
    if are_ambiguous(names, modules):
        return {"target_modules": "|".join(exact_pattern(module).removeprefix("^") for module in sorted(modules))}
    return {"target_modules": sorted(modules)}


def _are_norms(delta: Mapping[str, Adapter], names: Names) -> bool:
    """Whether all leaves are scales and biases of norms: vectors whose module has no matrix."""
    for path, node in delta.items():
        binding = names.get(path, node.shape())
        if binding is None or binding.roles is not None or len(binding.tensor_axes) != 1:
            return False
        modules = {keys.split_name(name)[0] for name in binding.tensors}
        others = [row for row in names.weights if row.module or (row.layout and "->" in row.layout)]
        if any(row.declares(f"{module}.weight") for row in others for module in modules):
            return False
    return True


def _layouts(delta: Mapping[str, Adapter], names: Names, method: type[Method]) -> list[tuple[Any, FactorLayout]]:
    nodes = [(path, node) for path, node in delta.items() if isinstance(node, method.adapters)]
    return [(node, FactorLayout(names.find(path, node.shape()))) for path, node in nodes]


def _convert_rows(
    delta: Mapping[str, Adapter], names: Names
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """The tensors and the config of trained rows, and problems."""
    adapter = export(delta, names)
    rows = dict(adapter.rows)
    for path, node in delta.items():
        if (binding := names.get(path, node.shape())) is not None:
            for other, name in binding.tied.items():
                if (module := keys.split_name(name)[0]) in adapter.rows:
                    rows[keys.split_name(other)[0]] = adapter.rows[module]
    tensors = {f"{keys.PREFIX}{module}.trainable_tokens_delta": values for module, (_, values) in rows.items()}
    ids = next(iter(adapter.rows.values()))[0] if adapter.rows else []
    return tensors, {"target_modules": sorted(adapter.rows), "token_indices": ids}, adapter.problems


def _convert(
    method: Method, delta: Mapping[str, Adapter], names: Names, base: Any, task_type: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """The tensors and the config of a method's adapters, and problems."""
    modules: dict[str, Module[np.ndarray]] = {}
    nodes: dict[str, Any] = {}
    gains: dict[str, np.ndarray] = {}  # (IA)³'s gains of biases, by module
    problems = []
    for path, node in delta.items():
        if isinstance(node, FullAdapter):
            continue
        try:
            binding = names.find(path, node.shape())
            if isinstance(node, IA3Adapter) and is_bias_gain(node):
                values = binding.split(np.asarray(node.gain).reshape(binding.shape))
                gains |= {keys.split_name(binding.in_model[name])[0]: gain for name, gain in values.items()}
                continue
            for module in _split_leaf(method, path, node, factor_layout(method, binding)):
                modules[module.path], nodes[module.path] = module, node
        except ValueError as error:
            problems.append(str(error))
    problems += method.check(nodes)
    scales = {path: module.scale for path, module in modules.items()}
    for path, (part, factor) in method.rescale(nodes, scales).items():
        modules[path] = replace_tensors(modules[path], **{part: multiply(modules[path].tensors[part], factor)})
    tensors = {
        f"{keys.PREFIX}{path}.{part}": np.ascontiguousarray(array)
        for path, module in modules.items()
        for part, array in module.tensors.items()
    }
    if isinstance(method, IA3Method):
        problems += _check_gains(modules, nodes, gains, names, base)
    if isinstance(method, VeRAMethod):
        pair = shared_pair(_layouts(delta, names, VeRAMethod))
        if pair is None:
            problems.append("PEFT's VeRA has one random pair, and the pairs of these adapters are not corners of one")
        else:
            tensors |= pair
    full = {path: node for path, node in delta.items() if isinstance(node, FullAdapter)}
    adapter = _export_values(full, names, base, task_type)
    problems += adapter.problems
    tensors |= {keys.value_key(*keys.split_name(name), wrapped=False): x for name, x in adapter.values.items()}
    config = {**_target_modules(list(modules), names), "modules_to_save": sorted(adapter.saved) or None}
    if nodes:
        try:
            config |= method.config(nodes, scales)
        except ValueError as error:
            problems.append(str(error))
    return tensors, config, problems


def _split_leaf(method: Method, path: str, node: Any, layout: FactorLayout) -> list[Module[np.ndarray]]:
    """Makes the modules of a leaf's adapter; layers without adapter are omitted, unless there are no others."""
    if node.axes != layout.axes:
        raise ValueError(f"{path!r}: the adapter's axes are {node.axes}, those of its PyTorch module {layout.axes}")
    binding, lead, batch = layout.binding, layout.leading_sizes, layout.axes.count(BATCH)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, index in binding.tensors.items():
        layers[f"{keys.split_name(binding.in_model[name])[0]}.weight"] = {
            field: array.reshape((*lead, *array.shape[batch:]))[layout.slices(index)] if array.ndim >= batch else array
            for field, array in method.arrays(node).items()
        }
    adapted = [name for name, fields in layers.items() if not _is_identity(method, fields)] or list(layers)
    return [
        Module(
            name=name,
            kind=binding.kind,
            tensors=method.tensors(layers[name], layout),
            scale=float(layers[name].get("scale", 1.0)),
        )
        for name in adapted
    ]


def _is_identity(method: Method, fields: Mapping[str, np.ndarray]) -> bool:
    """Whether a layer of a stacked leaf has no adapter."""
    return all(
        np.array_equal(value, method.identity_like(name, value.shape))
        for name, value in fields.items()
        if name != "scale"
    )


def _check_gains(
    modules: Mapping[str, Module[np.ndarray]],
    nodes: Mapping[str, IA3Adapter],
    gains: Mapping[str, np.ndarray],
    names: Names,
    base: Any,
) -> list[str]:
    """PEFT multiplies a module's whole output, so its bias must have the same gains."""
    problems, unused = [], dict(gains)
    biases = {}
    for path, binding in () if base is None else bindings_of(base, names):
        split = map(keys.split_name, binding.in_model.values())
        biases |= {module: path for module, parameter in split if parameter == "bias"}
    for path, module in modules.items():
        if nodes[path].on != OUT:
            continue
        if path in unused:
            if not np.array_equal(unused.pop(path), module.tensors["ia3_l"].reshape(-1)):
                problems.append(f"{path}.bias: PEFT multiplies the bias by the gains of the weight; these are others")
        elif path in biases:
            problems.append(
                f"{path}.bias: PEFT multiplies the bias too; adapt {biases[path]!r} with IA3(axes=('out',))"
            )
        elif base is None and any(row.declares(f"{path}.bias") for row in names.weights):
            problems.append(f"{path}.bias: PEFT multiplies it too, if there is one: give base=")
    problems += [f"{path}.bias: its gains belong to no adapted module" for path in unused]
    return problems
